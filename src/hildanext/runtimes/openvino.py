"""OpenVINO for CPUs (extra `cpu`): the same model as one optimized graph, keys and values in memory that it reads in place.

The graph is made from transformers' own forward: attention and cache are handed in through their public interfaces. It
reads the stored keys and values of a slot where they lie and gives back those of the new tokens only.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as ops
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from hildanext.errors import ModelError
from hildanext.runtimes.protocol import Batch

GROW = 128  # a slot's memory grows in steps of so many tokens
QUANT_GROUP = 128  # activations share an int8 scale in groups of so many
KINDS = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}

Parts = tuple[Tensor, Tensor]  # stored [B, H, K, D] and new [B, H, W, D]


def split_attention(
    module: nn.Module, query: Tensor, key: Parts, value: Parts, mask: Tensor, scaling: float, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention over stored and new keys without joining them, which would copy the cache at every forward.

    query [B, Hq, W, D]; key, value: what `SplitCache.update` returned; mask [B, 1, W, K + W] additive. Query heads that
    share a key head are stacked along W, so that keys are not repeated either.
    """
    (stored_keys, new_keys), (stored_values, new_values) = key, value
    batch, n_heads, width, dim = query.shape
    n_kv = new_keys.shape[1]
    groups = n_heads // n_kv
    query = query.reshape(batch, n_kv, groups * width, dim)
    scores = torch.cat([query @ stored_keys.transpose(2, 3), query @ new_keys.transpose(2, 3)], -1) * scaling
    weights = (scores + mask.repeat(1, 1, groups, 1)).softmax(-1)
    n_stored = stored_keys.shape[2]
    output = weights[..., :n_stored] @ stored_values + weights[..., n_stored:] @ new_values
    return output.reshape(batch, n_heads, width, dim).transpose(1, 2), None


class SplitCache(Cache):
    """Hands the attention stored and new keys apart, and collects the new ones."""

    def __init__(self, stored: Sequence[Tensor]) -> None:
        super().__init__(layers=[])
        self.stored, self.new = stored, []  # type: ignore[var-annotated]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> Any:
        self.new += [key_states, value_states]
        return (self.stored[2 * layer_idx], key_states), (self.stored[2 * layer_idx + 1], value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Exported(nn.Module):
    """A model's body as a function of tensors alone, for the exporter."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.body = model.base_model

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
        cache = SplitCache(stored)
        hidden = self.body(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return hidden, *cache.new


def simplify(graph: ov.Model, int8: bool) -> None:
    """Join the linear layers that read the same tensor into one, and store their weights as int8 if asked. In place.

    Each layer costs some 30 microseconds beside its multiplication; a transformer block has seven and needs four. int8 is
    symmetric with a scale for every output row.
    """
    groups: dict[tuple[str, int], list[ov.Node]] = defaultdict(list)
    for op in graph.get_ordered_ops():
        if op.get_type_name() == "MatMul" and op.input_value(1).get_node().get_type_name() == "Constant":
            source = op.input_value(0)
            groups[source.get_node().get_friendly_name(), source.get_index()].append(op)
    for group in groups.values():
        parts = [op.input_value(1).get_node().get_data() for op in group]
        parts = [w if op.get_attributes()["transpose_b"] else w.T for w, op in zip(parts, group, strict=True)]
        if len(group) == 1 and not int8:
            continue
        weight = np.concatenate(parts)
        if int8:
            scale = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-12) / 127
            small = ops.constant(np.clip(np.rint(weight / scale), -127, 127).astype(np.int8))
            node = ops.multiply(ops.convert(small, ov.Type.f32), ops.constant(scale.astype(np.float32)))
        else:
            node = ops.constant(weight)
        joined = ops.matmul(group[0].input_value(0), node, False, True)
        sizes = ops.constant(np.array([len(part) for part in parts], dtype=np.int64))
        split = ops.variadic_split(joined, ops.constant(np.int64(-1)), sizes) if len(parts) > 1 else joined
        for index, op in enumerate(group):
            op.output(0).replace(split.output(index))
    graph.validate_nodes_and_infer_types()


class OpenVinoRuntime:
    """A graph of fixed shape for one sequence of one block, one of free shape for everything else, and the head's."""

    name = "openvino"

    def __init__(self, model: PreTrainedModel, block_size: int, int8: bool) -> None:
        self.model, self.int8 = model.eval(), int8
        config = model.config.get_text_config()
        self.n_layers = config.num_hidden_layers
        self.kind = torch.bfloat16 if model.dtype == torch.bfloat16 and not int8 else torch.float32
        self.core = ov.Core()
        began = model.dtype
        model.float()  # the exporter wants one number format; bf16 to fp32 and back loses nothing
        graph, self.shapes = self._export()
        head = self._convert(
            model.get_output_embeddings(), (torch.zeros(1, config.hidden_size),), [[-1, config.hidden_size]]
        )
        simplify(graph, int8)
        simplify(head, int8)
        hidden = config.hidden_size
        self.free = self._compile(graph, [-1, -1, hidden])
        self.fixed = self._compile(graph, [1, block_size, hidden])
        self.head_request = self.core.compile_model(head, "CPU", self._options()).create_infer_request()
        cast(Any, model).to(began)
        self.block_size, self.slots, self.context, self.room = block_size, 0, 0, 0
        self.memory: list[Tensor] = []  # keys and values [slots, H, room, D], layer by layer
        self.bound: dict[int, tuple[int, int, int]] = {}

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": KINDS[self.kind], "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        if self.int8:
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = QUANT_GROUP
        return options

    def _convert(self, module: nn.Module, example: tuple[Tensor, ...], shapes: list[list[int]]) -> ov.Model:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's remarks on Python numbers; `check` compares the outcome
            graph = ov.convert_model(module, example_input=example)
        graph.reshape(dict(zip(graph.inputs, shapes, strict=True)))
        return graph

    def _export(self) -> tuple[ov.Model, list[tuple[int, int]]]:
        """The body's graph, and (heads, width) of each layer's keys and values."""
        model, width, stored = self.model, 4, 8
        hidden = model.config.get_text_config().hidden_size
        before = model.config._attn_implementation
        probe = _shapes(model)
        AttentionInterface.register("hildanext_split", cast(Any, split_attention))
        model.set_attn_implementation("hildanext_split")
        example = (
            torch.zeros(1, width, hidden),
            torch.arange(stored, stored + width)[None],
            torch.zeros(1, 1, width, stored + width),
            *[torch.zeros(1, heads, stored, dim) for heads, dim in probe],
        )
        shapes = [[-1, -1, hidden], [-1, -1], [-1, 1, -1, -1], *[[-1, heads, -1, dim] for heads, dim in probe]]
        try:
            return self._convert(Exported(model), example, shapes), probe
        finally:
            model.set_attn_implementation(before)

    def _compile(self, graph: ov.Model, embeds: list[int]) -> ov.InferRequest:
        """An infer request of the graph at this shape; stored keys may have any length."""
        batch, width, _ = embeds
        graph = graph.clone()
        shapes = [embeds, [batch, width], [batch, 1, width, -1], *[[batch, h, -1, d] for h, d in self.shapes]]
        graph.reshape(dict(zip(graph.inputs, shapes, strict=True)))
        door = ov.preprocess.PrePostProcessor(graph)
        for index in range(2, len(shapes)):  # the mask, and keys and values, in the format that attention computes in
            door.input(index).tensor().set_element_type(KINDS[self.kind])
        for index in range(1, len(graph.outputs)):
            door.output(index).tensor().set_element_type(KINDS[self.kind])
        return self.core.compile_model(door.build(), "CPU", self._options()).create_infer_request()

    def allocate(self, slots: int, context: int) -> None:
        self.slots, self.context, self.room = slots, context, 0
        self.memory = []
        self._grow(min(GROW, context))

    def _grow(self, needed: int) -> None:
        """Room for `needed` tokens a slot. The graph reads whole slots, so they grow with the text instead of being full size."""
        if needed <= self.room:
            return
        room = min(-(-needed // GROW) * GROW, self.context)
        old, self.memory = self.memory, []
        for index, (heads, dim) in enumerate(self.shapes):
            new = torch.zeros(self.slots, heads, room, dim, dtype=self.kind)
            if old:
                new[:, :, : self.room] = old[index]
                old[index] = torch.empty(0)
            self.memory.append(new)
        self.room = room
        self.bound.clear()

    def body(self, batch: Batch) -> Tensor:
        starts = [int(row[0]) if width else 0 for row, width in zip(batch.positions, batch.widths, strict=True)]
        self._grow(max(starts))
        n, width = batch.ids.shape
        request = self.fixed if (n, width) == (1, self.block_size) else self.free
        self._bind(request, batch.slot, n)
        with torch.inference_mode():
            embeds = self.model.get_input_embeddings()(batch.ids).float()
        mask = self._mask(batch, torch.tensor(starts))
        request.set_input_tensor(0, ov.Tensor(embeds.numpy(), shared_memory=True))
        request.set_input_tensor(1, ov.Tensor(batch.positions.numpy(), shared_memory=True))
        request.set_input_tensor(2, as_openvino(mask))
        request.infer()
        self._grow(max(start + width for start, width in zip(starts, batch.widths, strict=True)))
        for index, stored in enumerate(self.memory):
            new = as_torch(request.get_output_tensor(1 + index))
            for row, (start, real) in enumerate(zip(starts, batch.widths, strict=True)):
                stored[batch.slot + row, :, start : start + real] = new[row, :, :real]
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    def _bind(self, request: ov.InferRequest, slot: int, n: int) -> None:
        """Let the request read the memory of n slots where it lies."""
        where = (slot, n, self.room)
        if self.bound.get(id(request)) != where:
            for index, stored in enumerate(self.memory):
                request.set_input_tensor(3 + index, as_openvino(stored[slot : slot + n]))
            self.bound[id(request)] = where

    def _mask(self, batch: Batch, starts: Tensor) -> Tensor:
        """[B, 1, W, room + W] additive: stored positions before each sequence's first token, then its new tokens."""
        n, width = batch.ids.shape
        widths = torch.tensor(batch.widths)[:, None]
        real = torch.arange(width) < widths  # [B, W]
        stored = (torch.arange(self.room) < starts[:, None])[:, None].expand(n, width, self.room)
        new = (batch.positions[:, None] < batch.visible[..., None]) & real[:, None]
        new = new | ~real[..., None]  # padding sees padding: an empty row would be nan
        visible = torch.cat([stored, new], -1)[:, None]
        return torch.zeros(visible.shape, dtype=self.kind).masked_fill_(~visible, torch.finfo(self.kind).min)

    def head(self, hidden: Tensor) -> Tensor:
        self.head_request.set_input_tensor(ov.Tensor(hidden.contiguous().numpy(), shared_memory=True))
        self.head_request.infer()
        return torch.from_numpy(self.head_request.get_output_tensor().data)

    def move(self, source: int, target: int, length: int) -> None:
        for stored in self.memory:
            stored[target, :, :length] = stored[source, :, :length]


def _shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, width) of the keys and values of each layer, by running two tokens."""
    with torch.inference_mode():
        device = model.device
        cache = model.base_model(torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=True).past_key_values
    shapes = []
    for layer in cache.layers:
        if layer.keys is None:
            raise ModelError(
                f"{type(model).__name__} keeps something else than keys and values; use engine.runtime 'eager'"
            )
        shapes += [(states.shape[1], states.shape[3]) for states in (layer.keys, layer.values)]
    return shapes


def as_openvino(tensor: Tensor) -> ov.Tensor:
    """The same memory as an OpenVINO tensor. numpy has no bf16: it goes through as 16-bit integers."""
    if tensor.dtype == torch.bfloat16:
        return ov.Tensor(tensor.view(torch.int16).numpy(), ov.Shape(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)


def as_torch(tensor: ov.Tensor) -> Tensor:
    """The same memory as a torch tensor."""
    if tensor.get_element_type() == ov.Type.bf16:
        return torch.from_numpy(tensor.data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(tensor.data)
