"""torch.compile: one graph for each fixed shape, compiled before the first request; those of other modes with their first.

Only the number of keys is dynamic, so nothing is compiled again as texts grow. Needs a C++ compiler on CPUs and
Triton on GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from hildanext.decoding.runtimes.fixed_shapes import FixedShapeRuntime
from hildanext.decoding.runtimes.protocol import ForwardBatch, pad_batch
from hildanext.errors import ModelError
from hildanext.progress import say


class CompiledRuntime(FixedShapeRuntime):
    name = "compiled"

    def __init__(self, model: PreTrainedModel, widths: tuple[int, ...], later: tuple[int, ...] = ()) -> None:
        super().__init__(model, widths, later)
        self.compiled = torch.compile(self.forward, fullgraph=True)

    @torch.inference_mode()
    def allocate(self, slots: int, context: int) -> None:
        """Allocate the cache and compile every shape. Raises ModelError if torch.compile cannot work here."""
        super().allocate(slots, context)
        # The cache creates its tensors in the first forward, which must not be a compiled one.
        self.forward(*self.inputs(pad_batch([([0], 0, [1])], 0)))
        say(f"torch.compile: {len({1, slots}) * len(self.widths)} shapes, some seconds each")
        try:
            for n in {1, slots}:
                for width in self.widths:
                    if width <= context:
                        self.body(pad_batch([([0] * width, 0, [width] * width)] * n, 0))
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise ModelError(f"torch.compile does not work here: {reason}; use engine.runtime 'eager'") from error

    def run_fixed(self, batch: ForwardBatch) -> Tensor:
        inputs = self.inputs(batch)
        ids, positions, visible, place, own, gate = inputs
        for tensor in (ids, positions, visible, place.columns, place.rows, own, gate):
            if tensor is not None:
                torch._dynamo.mark_static(tensor)
        torch._dynamo.mark_dynamic(place.keys, 0)
        return self.compiled(*inputs)
