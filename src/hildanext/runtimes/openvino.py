"""OpenVINO for CPUs (extra `cpu`): the same model as one optimized graph, keys and values in memory that it reads in place.

The graph is made from transformers' own forward: attention and cache are handed in through their public interfaces. It
reads the stored keys and values of a slot where they lie and gives back those of the new tokens only.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, cast

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
GROUP = 128  # activations share an int8 scale in groups of so many where weights have few bits
GROUP4 = 64  # int4 weights share a scale in groups of so many
KINDS = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}

Weights = Literal["native", "int8", "int4"]
Parts = tuple[Tensor, Tensor]  # stored [B, H, K, D] and new [B, H, W, D]


def split_attention(
    module: nn.Module, query: Tensor, key: Parts, value: Parts, mask: Tensor, scaling: float, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention over stored and new keys without joining them, which would copy the cache at every forward.

    query [B, Hq, W, D]; key, value: what `SplitCache.update` returned. Query heads that share a key head are stacked along
    W, so that keys are not repeated either; the additive mask [B, 1, G W, K + W] comes with its rows repeated as often.
    """
    (stored_keys, new_keys), (stored_values, new_values) = key, value
    batch, n_heads, width, dim = query.shape
    n_kv = new_keys.shape[1]
    query = query.reshape(batch, n_kv, n_heads // n_kv * width, dim) * scaling
    scores = torch.cat([query @ stored_keys.transpose(2, 3), query @ new_keys.transpose(2, 3)], -1)
    weights = (scores + mask).softmax(-1)
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


def simplify(graph: ov.Model, weights: Weights) -> None:
    """Join the linear layers that read the same tensor into one, and store their weights in few bits if asked. In place.

    Each layer costs some 30 microseconds beside its multiplication; a transformer block has seven and needs four.
    """
    groups: dict[tuple[str, int], list[ov.Node]] = defaultdict(list)
    for op in graph.get_ordered_ops():
        if op.get_type_name() == "MatMul" and op.input_value(1).get_node().get_type_name() == "Constant":
            source = op.input_value(0)
            groups[source.get_node().get_friendly_name(), source.get_index()].append(op)
    for group in groups.values():
        parts = [op.input_value(1).get_node().get_data() for op in group]
        parts = [w if op.get_attributes()["transpose_b"] else w.T for w, op in zip(parts, group, strict=True)]
        joined = ops.matmul(group[0].input_value(0), stored_weight(np.concatenate(parts), weights), False, True)
        sizes = ops.constant(np.array([len(part) for part in parts], dtype=np.int64))
        split = ops.variadic_split(joined, ops.constant(np.int64(-1)), sizes) if len(parts) > 1 else joined
        for index, op in enumerate(group):
            op.output(0).replace(split.output(index))
    graph.validate_nodes_and_infer_types()


def stored_weight(weight: np.ndarray, weights: Weights) -> ov.Node:
    """A weight [out, in] as a graph node: as it is, or integers with a scale for each row (int8) or group in a row (int4).

    Symmetric, rounded to nearest. int4 needs rows of whole groups; others stay int8.
    """
    if weights == "native":
        return ops.constant(weight)
    out, n = weight.shape
    fits = weights == "int4" and n % GROUP4 == 0
    grouped = weight.reshape(out, n // GROUP4, GROUP4) if fits else weight
    top = 7 if fits else 127
    scale = np.maximum(np.abs(grouped).max(-1, keepdims=True), 1e-12).astype(np.float32) / top
    small = np.clip(np.rint(grouped / scale), -top, top).astype(np.int8)
    if not fits:
        return ops.multiply(ops.convert(ops.constant(small), ov.Type.f32), ops.constant(scale))
    pairs = small.reshape(-1, 2).astype(np.uint8) & 15
    packed = ov.Tensor((pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8), ov.Shape(small.shape), ov.Type.i4)
    half = ops.convert(ops.constant(packed, shared_memory=False), ov.Type.f16)
    whole = ops.reshape(
        ops.multiply(half, ops.constant(scale.astype(np.float16))), ops.constant(np.array([out, n])), False
    )
    return ops.convert(whole, ov.Type.f32)


class OpenVinoRuntime:
    """A graph of fixed shape for one sequence of one block, one of free shape for everything else, and the head's."""

    name = "openvino"

    def __init__(self, model: PreTrainedModel, block_size: int, weights: Weights) -> None:
        self.model, self.weights, self.block_size = model.eval(), weights, block_size
        config = model.config.get_text_config()
        self.n_states, self.n_kv, self.dim = kv_shape(model)
        self.groups, self.hidden = config.num_attention_heads // self.n_kv, config.hidden_size
        self.kind = torch.bfloat16 if model.dtype == torch.bfloat16 and weights == "native" else torch.float32
        self.core, self.threads = ov.Core(), torch.get_num_threads()
        before = model.dtype
        model.float()  # the exporter wants one number format; bf16 to fp32 and back loses nothing
        body, head = self._export(), self._export_head()
        for graph in (body, head):
            simplify(graph, weights)
        self.free = self._compile(body, -1, -1)
        self.fixed = self._compile(body, 1, block_size)
        self.head_request = self.core.compile_model(head, "CPU", self._options()).create_infer_request()
        cast(Any, model).to(before)
        # The cores are OpenVINO's now: torch's threads, which wait by spinning, would take them from it until `close`.
        torch.set_num_threads(1)
        self.slots, self.context, self.room = 0, 0, 0
        self.memory = torch.empty(0)  # keys and values [2 layers, slots, H, room, D]
        self.bound: dict[int, tuple[int, ...]] = {}
        self.outputs: dict[int, tuple[Tensor, Tensor]] = {}

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": KINDS[self.kind],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
        }
        if self.weights != "native":
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP4 if self.weights == "int4" else GROUP
        return options

    def _convert(self, module: nn.Module, example: tuple[Tensor, ...]) -> ov.Model:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's remarks on Python numbers
            return ov.convert_model(module, example_input=example)

    def _export_head(self) -> ov.Model:
        graph = self._convert(self.model.get_output_embeddings(), (torch.zeros(1, self.hidden),))
        graph.reshape([-1, self.hidden])
        return graph

    def _export(self) -> ov.Model:
        model, width, stored = self.model, 4, 8
        before = model.config._attn_implementation
        AttentionInterface.register("hildanext_split", cast(Any, split_attention))
        model.set_attn_implementation("hildanext_split")
        example = (
            torch.zeros(1, width, self.hidden),
            torch.arange(stored, stored + width)[None],
            torch.zeros(1, 1, self.groups * width, stored + width),
            *[torch.zeros(1, self.n_kv, stored, self.dim)] * self.n_states,
        )
        try:
            return self._convert(Exported(model), example)
        finally:
            model.set_attn_implementation(before)

    def _compile(self, graph: ov.Model, batch: int, width: int) -> ov.InferRequest:
        """An infer request of the graph for B sequences of W tokens (-1: any); stored keys may have any length."""
        graph = graph.clone()
        rows = self.groups * width if width > 0 else -1
        shapes = [[batch, width, self.hidden], [batch, width], [batch, 1, rows, -1]]
        shapes += [[batch, self.n_kv, -1, self.dim]] * self.n_states
        graph.reshape(dict(zip(graph.inputs, shapes, strict=True)))
        door = ov.preprocess.PrePostProcessor(graph)
        for index in range(2, len(shapes)):  # mask, keys and values in the format that attention computes in
            door.input(index).tensor().set_element_type(KINDS[self.kind])
        for index in range(1, len(graph.outputs)):
            door.output(index).tensor().set_element_type(KINDS[self.kind])
        return self.core.compile_model(door.build(), "CPU", self._options()).create_infer_request()

    def allocate(self, slots: int, context: int) -> None:
        self.slots, self.context, self.room, self.memory = slots, context, 0, torch.empty(0)
        self._grow(1)

    def _grow(self, needed: int) -> None:
        """Room for `needed` tokens a slot. The graph reads whole slots, so they grow with the text, in steps."""
        if needed <= self.room:
            return
        room = -(-needed // GROW) * GROW
        memory = torch.zeros(self.n_states, self.slots, self.n_kv, room, self.dim, dtype=self.kind)
        if self.room:
            memory[:, :, :, : self.room] = self.memory
        self.memory, self.room = memory, room
        self.bound.clear()

    def body(self, batch: Batch) -> Tensor:
        starts = [int(row[0]) if width else 0 for row, width in zip(batch.positions, batch.widths, strict=True)]
        self._grow(max(batch.length, max(starts)))
        n, width = batch.ids.shape
        request = self.fixed if (n, width) == (1, self.block_size) else self.free
        hidden, new = self._bind(request, batch.slot, n, width)
        with torch.inference_mode():
            embeds = self.model.get_input_embeddings()(batch.ids).float()
        mask = self._mask(batch, torch.tensor(starts))
        request.set_input_tensor(0, as_openvino(embeds))
        request.set_input_tensor(1, as_openvino(batch.positions))
        request.set_input_tensor(2, as_openvino(mask))
        request.infer()
        for row, (start, real) in enumerate(zip(starts, batch.widths, strict=True)):
            self.memory[:, batch.slot + row, :, start : start + real] = new[:, row, :, :real]
        return hidden

    def _bind(self, request: ov.InferRequest, slot: int, n: int, width: int) -> tuple[Tensor, Tensor]:
        """Let the request read the memory of n slots where it lies. Returns what it writes: hidden states, new keys and values."""
        where = (slot, n, width, self.room)
        if self.bound.get(id(request)) != where:
            hidden = torch.zeros(n, width, self.hidden)
            new = torch.zeros(self.n_states, n, self.n_kv, width, self.dim, dtype=self.kind)
            request.set_output_tensor(0, as_openvino(hidden))
            for index in range(self.n_states):
                request.set_input_tensor(3 + index, as_openvino(self.memory[index, slot : slot + n]))
                request.set_output_tensor(1 + index, as_openvino(new[index]))
            self.bound[id(request)], self.outputs[id(request)] = where, (hidden, new)
        return self.outputs[id(request)]

    def _mask(self, batch: Batch, starts: Tensor) -> Tensor:
        """[B, 1, G W, room + W] additive: stored positions before each sequence's first token, then its new tokens."""
        n, width = batch.ids.shape
        real = torch.arange(width) < torch.tensor(batch.widths)[:, None]  # [B, W]
        stored = (torch.arange(self.room) < starts[:, None])[:, None].expand(n, width, self.room)
        new = (batch.positions[:, None] < batch.visible[..., None]) & real[:, None]
        new = new | ~real[..., None]  # padding sees whatever: an empty row would be nan
        visible = torch.cat([stored, new], -1).repeat(1, self.groups, 1)[:, None]
        return torch.zeros(visible.shape, dtype=self.kind).masked_fill_(~visible, torch.finfo(self.kind).min)

    def head(self, hidden: Tensor) -> Tensor:
        self.head_request.set_input_tensor(as_openvino(hidden.contiguous()))
        self.head_request.infer()
        return torch.from_numpy(self.head_request.get_output_tensor().data)

    def move(self, source: int, target: int, length: int) -> None:
        self.memory[:, target, :, :length] = self.memory[:, source, :, :length]

    def close(self) -> None:
        torch.set_num_threads(self.threads)


def kv_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(number of key and value tensors, heads, width), by running two tokens. Raises ModelError where layers differ."""
    with torch.inference_mode():
        cache = model.base_model(torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    shapes = {states.shape[1::2] if states is not None else None for states in states}
    if len(shapes) != 1 or None in shapes:
        raise ModelError(
            f"{type(model).__name__}: its layers keep keys of different shapes; use engine.runtime 'eager'"
        )
    heads, dim = states[0].shape[1::2]
    return len(states), heads, dim


def as_openvino(tensor: Tensor) -> ov.Tensor:
    """The same memory as an OpenVINO tensor. numpy has no bf16: it goes through as 16-bit integers."""
    if tensor.dtype == torch.bfloat16:
        return ov.Tensor(tensor.view(torch.int16).numpy(), ov.Shape(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)
