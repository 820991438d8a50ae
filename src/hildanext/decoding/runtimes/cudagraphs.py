"""CUDA graphs: a forward recorded once for each shape and replayed, without a kernel launch from Python.

For GPUs, the old ones included: it needs neither Triton nor a compiler. Prompts in chunks run eagerly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.decoding.cache import SlotView
from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.runtimes.protocol import ForwardBatch, widen

SHORTEST = 256  # keys of the smallest graph; the others have twice as many each


class Recorded(NamedTuple):
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    visible: Tensor
    columns: Tensor
    hidden: Tensor


class CudaGraphRuntime(EagerRuntime):
    """Fixed shapes: one sequence or all slots, a block or two, keys in powers of two; recorded when first needed."""

    name = "cudagraphs"

    def __init__(self, model: PreTrainedModel, block_size: int) -> None:
        super().__init__(model)
        self.widths = (block_size, 2 * block_size)
        self.slots = 1
        self.recorded: dict[tuple[int, int, int], Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()  # one graph runs at a time: they share their memory

    def allocate(self, slots: int, context: int) -> None:
        self.recorded.clear()
        super().allocate(slots, context)
        self.slots = slots

    def body(self, batch: ForwardBatch) -> Tensor:
        n, old = batch.ids.shape
        width = next((width for width in self.widths if old <= width), None)
        if width is None:
            return super().body(batch)
        alone = n == 1 and batch.slot == 0
        wide = widen(batch, 1 if alone else self.slots, width)
        length = graph_length(batch.length, self.cache.context)
        shape = (len(wide.ids), width, length)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(wide, length)
        found = self.recorded[shape]
        # Pageable memory on the host: these copies wait for nothing, the replay comes after them in the stream.
        for target, source in zip(found[1:5], (*wide[:3], wide.columns(self.cache.context)), strict=True):
            target.copy_(source)
        found.graph.replay()
        return found.hidden[batch.slot : batch.slot + n, :old]

    def _record(self, batch: ForwardBatch, length: int) -> Recorded:
        device = self.model.device
        ids, positions, visible = (part.to(device) for part in batch[:3])
        columns = batch.columns(self.cache.context).to(device)
        rows = torch.arange(len(batch.ids), device=device)[:, None]
        place = SlotView(0, torch.arange(length, device=device), rows, columns, None)
        # As PyTorch asks: warm up on another stream, so that nothing is set up while recording.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.forward(ids, positions, visible, place)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self.forward(ids, positions, visible, place)
        return Recorded(graph, ids, positions, visible, columns, hidden)

    def close(self) -> None:
        self.recorded.clear()  # graphs hold the cache's memory
        super().close()


def graph_length(length: int, context: int) -> int:
    """Keys that a graph for `length` keys reads: the next of 256, 512, 1024, ..., at most the slot's."""
    return min(SHORTEST << max(0, (length - 1) // SHORTEST).bit_length(), context)
