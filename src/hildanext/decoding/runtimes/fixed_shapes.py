"""The part that the compiled and the CUDA graph runtime share: forwards padded to a few fixed shapes."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.runtimes.protocol import ForwardBatch, widen


class FixedShapeRuntime(EagerRuntime):
    """Pads forwards to one sequence or all slots, and to one of a few widths.

    Wider forwards, such as prompt chunks, run eagerly. A subclass implements `run_fixed`.
    """

    def __init__(self, model: PreTrainedModel, widths: tuple[int, ...], later: tuple[int, ...] = ()) -> None:
        super().__init__(model)
        self.widths, self.later = list(widths), later  # widths: ascending
        self.slots = 1

    def allocate(self, slots: int, context: int) -> None:
        super().allocate(slots, context)
        self.slots = slots

    def prepare(self, width: int) -> None:
        if width in self.later and width not in self.widths:
            self.widths = sorted([*self.widths, width])

    def body(self, batch: ForwardBatch) -> Tensor:
        n, width = batch.ids.shape
        fixed_width = next((fixed for fixed in self.widths if width <= fixed), None)
        if fixed_width is None:
            return super().body(batch)
        if self.gate is not None:
            batch = batch.gated()
        n_fixed = 1 if n == 1 and batch.slot == 0 else self.slots
        return self.run_fixed(widen(batch, n_fixed, fixed_width))[batch.slot : batch.slot + n, :width]

    def run_fixed(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [B, W, H] of a batch of a fixed shape, in the slots from 0 on."""
        raise NotImplementedError
