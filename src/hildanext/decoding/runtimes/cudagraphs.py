"""CUDA graphs: the forward of each fixed shape is recorded once and replayed, without kernel launches from Python.

Works on old GPUs, too: it needs neither Triton nor a compiler.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.decoding.runtimes.fixed_shapes import FixedShapeRuntime
from hildanext.decoding.runtimes.protocol import ForwardBatch

SHORTEST = 256  # keys of the smallest graph; each larger graph has twice as many


class Recorded(NamedTuple):
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # in the order of `run_fixed`
    hidden: Tensor


class CudaGraphRuntime(FixedShapeRuntime):
    """The number of keys is fixed, too, to powers of two. A graph is recorded when first needed."""

    name = "cudagraphs"

    def __init__(self, model: PreTrainedModel, widths: tuple[int, ...], later: tuple[int, ...] = ()) -> None:
        super().__init__(model, widths, later)
        self.recorded: dict[tuple[int, int, int], Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()  # one graph runs at a time, so all share their memory

    def allocate(self, slots: int, context: int) -> None:
        self.recorded.clear()
        super().allocate(slots, context)

    def run_fixed(self, batch: ForwardBatch) -> Tensor:
        length = graph_length(batch.length, self.cache.context)
        shape = (len(batch.ids), batch.ids.shape[1], length)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(batch._replace(length=length))
        found = self.recorded[shape]
        # Safe without synchronization: pageable sources are staged at once, and the replay follows in the same stream.
        sources = (batch.ids, batch.positions, batch.visible, batch.columns(self.cache.context), batch.own, batch.gate)
        for target, source in zip(found.inputs, [tensor for tensor in sources if tensor is not None], strict=True):
            target.copy_(source)
        found.graph.replay()
        return found.hidden

    def _record(self, batch: ForwardBatch) -> Recorded:
        inputs = self.inputs(batch)
        ids, positions, visible, place, own, gate = inputs
        # As PyTorch's documentation asks: warm up on a side stream, so that no lazy initialization is recorded.
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(2):
                self.forward(*inputs)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self.forward(*inputs)
        read = (ids, positions, visible, place.columns, own, gate)
        return Recorded(graph, [tensor for tensor in read if tensor is not None], hidden)

    def close(self) -> None:
        self.recorded.clear()  # graphs hold the cache's memory
        super().close()


def graph_length(length: int, context: int) -> int:
    """Keys that a graph for `length` keys reads: the next of 256, 512, 1024, ..., but at most `context`."""
    return min(SHORTEST << max(0, (length - 1) // SHORTEST).bit_length(), context)
