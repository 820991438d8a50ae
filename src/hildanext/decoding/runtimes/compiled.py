"""torch.compile: one graph for each of a few fixed shapes, all compiled before the first request.

Forwards of other shapes (chunks of a prompt) run eagerly. Only the number of keys stays symbolic, so nothing is compiled
again as texts grow. Needs a C++ compiler on CPUs, Triton on GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from hildanext.decoding.cache import SlotView
from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.runtimes.protocol import ForwardBatch, pad_batch, widen
from hildanext.errors import ModelError
from hildanext.progress import say


class CompiledRuntime(EagerRuntime):
    """Fixed shapes: one sequence or all slots, a block or a block and the one to store before it."""

    name = "compiled"

    def __init__(self, model: PreTrainedModel, block_size: int) -> None:
        super().__init__(model)
        self.widths = (block_size, 2 * block_size)
        self.slots = 1
        self.compiled = torch.compile(super().forward, fullgraph=True)

    @torch.inference_mode()
    def allocate(self, slots: int, context: int) -> None:
        """Besides, compile every shape. Raises ModelError where torch.compile cannot work."""
        super().allocate(slots, context)
        self.slots = slots
        super().body(pad_batch([([0], 0, [1])], 0))  # the cache's tensors come into being with the first forward
        say(f"torch.compile: {len({1, slots}) * len(self.widths)} shapes, some seconds each")
        try:
            for n in {1, slots}:
                for width in self.widths:
                    if width <= context:
                        self.body(pad_batch([([0] * width, 0, [width] * width)] * n, 0))
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise ModelError(f"torch.compile does not work here: {reason}; use engine.runtime 'eager'") from error

    def body(self, batch: ForwardBatch) -> Tensor:
        n, old = batch.ids.shape
        width = next((width for width in self.widths if old <= width), None)
        if width is None:
            return super().body(batch)
        alone = n == 1 and batch.slot == 0
        return super().body(widen(batch, 1 if alone else self.slots, width))[batch.slot : batch.slot + n, :old]

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor | None, place: SlotView) -> Tensor:
        if ids.shape[1] not in self.widths or len(ids) not in (1, self.slots) or place.start is not None:
            return super().forward(ids, positions, visible, place)
        for tensor in (ids, positions, visible, place.columns, place.rows):
            torch._dynamo.mark_static(tensor)
        torch._dynamo.mark_dynamic(place.keys, 0)
        return self.compiled(ids, positions, visible, place)
