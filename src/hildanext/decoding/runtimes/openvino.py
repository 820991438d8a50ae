"""OpenVINO for CPUs (extra `cpu`): the model exported as an optimized graph.

The graph reads the cached keys and values of a slot in place and returns those of the new tokens only.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from hildanext.decoding.memory import TokenRows, release_file_pages
from hildanext.decoding.runtimes.openvino_export import Exported, split_attention, traces_freed
from hildanext.decoding.runtimes.openvino_graph import Weights, simplify
from hildanext.decoding.runtimes.protocol import ForwardBatch, GroupRows, pad_batch, widen, within
from hildanext.diffusion.masks import additive, block_causal_mask
from hildanext.errors import ModelError
from hildanext.model.backbone import n_embeddings, weight_matrix
from hildanext.model.gate import as_base
from hildanext.model.gated_linear import BaseHead, find_gate
from hildanext.progress import say

GROW = 128  # a slot's memory grows in steps of this many tokens
GROUP = 64  # with int8 weights, this many activations share an int8 scale; a divisor of most hidden sizes
SMALL_BYTES = 64 << 20  # of weights in fp32, up to which a graph more costs less memory than it is worth
WIDE = 32  # tokens of a pass
FREE, HEAD = -1, 0  # keys of graphs, beside the widths of fixed ones
LEAST_COSINE = 0.8  # mean cosine of hidden states with the model's: bf16 reaches 0.99, int8 0.95, a wrong graph about 0
KINDS = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}


class OpenVinoRuntime:
    """Graphs: one sequence of one block, any other shape, and the head; for a small model one sequence of two blocks, too.

    `prepare` adds graphs of one sequence for the widths in `later`, which exist until the runtime rests. Each graph of the
    body holds the weights in a layout of its own. The loaded model is not needed once they are made.
    """

    name = "openvino"
    torch_threads: int | None = 1  # torch threads wait by spinning and would take cores from OpenVINO
    resting_tokens: int | None = 1024

    def __init__(
        self, model: PreTrainedModel, widths: tuple[int, ...], weights: Weights, later: tuple[int, ...] = ()
    ) -> None:
        self.weights, self.title = weights, type(model).__name__
        config = model.eval().config.get_text_config()
        self.n_states, self.n_kv, self.dim = kv_shape(model)
        self.n_inputs = 3 if find_gate(model) is None else 4  # before keys and values
        self.groups, self.hidden = config.num_attention_heads // self.n_kv, config.hidden_size
        self.kind = torch.bfloat16 if model.dtype == torch.bfloat16 and weights == "native" else torch.float32
        self.core, self.threads = ov.Core(), torch.get_num_threads()
        before = model.dtype
        model.float()  # the exporter needs a single dtype; bf16 to fp32 and back is exact
        body = self._export(model)
        projection, self.probe = model.get_output_embeddings(), _probe_ids(n_embeddings(model))
        if isinstance(projection, BaseHead):
            # The adapter knows masked rows behind text only. Behind random tokens, int8 states of single rows can be far off.
            self.probe = [*_written(model, self.probe[0], 8), *[projection.mask_token_id] * 4]
            # The rule leaves the mask token out as well, without an operation in the graph.
            projection = projection.base
        head = self._convert(projection, (torch.zeros(1, self.hidden),))
        head.reshape([-1, self.hidden])
        for graph in (body, head):
            simplify(graph, weights)
        size = sum(weight.nbytes for weight in model.parameters())
        is_small = size < SMALL_BYTES
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            if shutil.disk_usage(folder).free > size:
                body, head = self._mapped(body, "body.xml"), self._mapped(head, "head.xml")
            else:
                say(
                    f"no room in {folder.rpartition('/')[0]} for {size >> 20} MiB of weights: they stay in memory twice"
                )
            self.graph = body
            self.compiled = {width: self._compile(1, width) for width in widths[: 1 + is_small]}
            self.later = tuple(width for width in later if width not in self.compiled)
            self.compiled[FREE] = self._compile(-1, -1)
            self.compiled[HEAD] = self.core.compile_model(head, "CPU", self._options())
        self.requests = {key: graph.create_infer_request() for key, graph in self.compiled.items()}
        self.logits = torch.zeros(0, model.get_output_embeddings().weight.shape[0])
        expected = self._expected_states(model)
        cast(Any, model).to(before)
        self.embedding = TokenRows(weight_matrix(model.get_input_embeddings()), weights == "int8")
        self.slots, self.room = 0, 0  # slots, and the tokens that each has memory for
        self.memory = torch.empty(0)  # keys and values [2 layers, slots, H, room, D]
        self.used: list[int] = []  # for each slot, the tokens from which on its memory was never written
        self.was_wide = False  # whether the graph of free shapes ran more than WIDE tokens
        self.packed: list[Tensor] = []  # at rest, for each slot [2 layers, H, used, D] in place of `memory`
        self.bound: dict[int, tuple[int, ...]] = {}  # for each request, the memory that its tensors refer to
        self.outputs: dict[int, tuple[Tensor, Tensor]] = {}  # for each request, hidden states and new keys and values
        self._check(expected)
        release_file_pages(self.folder)

    @property
    def fixed(self) -> list[int]:
        """The widths that have a graph of their own, ascending."""
        return sorted(key for key in self.compiled if key > 0)

    def prepare(self, width: int) -> None:
        if width in self.later and width not in self.compiled:
            self.compiled[width] = self._compile(1, width)
            self.requests[width] = self.compiled[width].create_infer_request()

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": KINDS[self.kind],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
        }
        if self.weights != "native":
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
        return options

    def _convert(self, module: nn.Module, example: tuple[Tensor, ...]) -> ov.Model:
        with warnings.catch_warnings(), torch.no_grad(), traces_freed():
            warnings.simplefilter("ignore")  # the tracer warns about Python numbers
            try:
                return ov.convert_model(module, example_input=example)
            except RuntimeError as error:
                lines = str(error).splitlines()
                reason = lines[lines.index("Exception:") + 1] if "Exception:" in lines else lines[0]
                raise ModelError(f"OpenVINO cannot export {self.title}: {reason}") from error

    def _export(self, model: PreTrainedModel) -> ov.Model:
        width, n_cached = 4, 8
        before = model.config._attn_implementation
        AttentionInterface.register("hildanext_split", cast(Any, split_attention))
        model.set_attn_implementation("hildanext_split")
        example = (
            torch.zeros(1, width, self.hidden),
            torch.arange(n_cached, n_cached + width)[None],
            torch.zeros(1, 1, self.groups * width, n_cached + width),
            *[torch.ones(1, width, 1)] * (self.n_inputs - 3),
            *[torch.zeros(1, self.n_kv, n_cached, self.dim)] * self.n_states,
        )
        try:
            return self._convert(Exported(model), example)
        finally:
            model.set_attn_implementation(before)

    def _mapped(self, graph: ov.Model, name: str) -> ov.Model:
        """The same graph with its weights in a mapped file: a compiled graph keeps them, but reads its packed copy."""
        ov.save_model(graph, self.folder / name, compress_to_fp16=False)
        return self.core.read_model(self.folder / name)

    def _compile(self, batch: int, width: int) -> ov.CompiledModel:
        """The body compiled for B sequences of W tokens (-1: any) and any number of cached keys."""
        graph = self.graph.clone()
        rows = self.groups * width if width > 0 else -1
        shapes = [[batch, width, self.hidden], [batch, width], [batch, 1, rows, -1]]
        shapes += [[batch, width, 1]] * (self.n_inputs - 3)
        shapes += [[batch, self.n_kv, -1, self.dim]] * self.n_states
        graph.reshape(dict(zip(graph.inputs, shapes, strict=True)))
        converter = ov.preprocess.PrePostProcessor(graph)
        for index in (2, *range(self.n_inputs, len(shapes))):  # mask, keys and values in the dtype of the attention
            converter.input(index).tensor().set_element_type(KINDS[self.kind])
        for index in range(1, len(graph.outputs)):
            converter.output(index).tensor().set_element_type(KINDS[self.kind])
        return self.core.compile_model(converter.build(), "CPU", self._options())

    def _expected_states(self, model: PreTrainedModel) -> Tensor:
        """The model's own hidden states [12, H] of the probe tokens, in blocks of four, a gate open for the last one."""
        positions = torch.arange(12)[None]
        mask = additive(block_causal_mask(torch.zeros_like(positions), positions // 4), torch.float32)
        ids = torch.tensor([self.probe])
        gate = find_gate(model)
        if gate is not None:
            gate.rows = (positions >= 8)[..., None].float()
        with torch.inference_mode():
            expected = model.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=False)[0][0]
        if gate is not None:
            gate.rows = None
        return expected

    def _check(self, expected: Tensor) -> None:
        """Raise ModelError unless the graphs reproduce the model: an export can drop an operation without an error."""
        self.allocate(1, 12)
        found, ids = [], self.probe
        for start, n in ((0, 8), (8, 4)):
            visible = [(p // 4 + 1) * 4 for p in range(start, start + n)]
            rows = GroupRows(list(range(start, start + n)), [(0, 0)] * n, [start == 8] * n)
            batch = pad_batch([(ids[start : start + n], start, visible)], 0, [rows])
            found.append(self.body(batch)[0].clone())
        cosine = nn.functional.cosine_similarity(torch.cat(found), expected, dim=-1).mean().item()
        if cosine < LEAST_COSINE:
            raise ModelError(
                f"{self.title}: the hidden states of OpenVINO differ from the model's "
                f"(cosine {cosine:.2f}); use engine.runtime 'eager'"
            )
        self.close()

    def allocate(self, slots: int, context: int) -> None:
        self.slots, self.used, self.packed = slots, [0] * slots, []
        self._move(GROW)

    def _grow(self, needed: int) -> None:
        """Make room for `needed` tokens in every slot. They grow in steps with the text: the graph reads them whole."""
        if needed > self.room:
            self._move(-(-needed // GROW) * GROW)

    def _move(self, room: int) -> None:
        """Move the used part of every slot into new memory for `room` tokens."""
        size = self.n_states * self.slots * self.n_kv * room * self.dim
        # numpy's zeros, unlike torch's, take no memory until they are used; with huge pages their neighbours do, too.
        zeros = torch.from_numpy(np.zeros(size, dtype=np.int16 if self.kind == torch.bfloat16 else np.float32))
        memory = zeros.view(self.kind).view(self.n_states, self.slots, self.n_kv, room, self.dim)
        for slot, used in enumerate(self.used):
            if used:
                memory[:, slot, :, :used] = self.packed[slot] if self.packed else self.memory[:, slot, :, :used]
        self.memory, self.room, self.packed = memory, room, []
        self.bound.clear()

    @torch.inference_mode()
    def rest(self, lengths: list[int]) -> None:
        self._wake()
        self.used = [min(used, length) for used, length in zip(self.used, lengths, strict=True)]
        # In the memory, a page between the used parts of two slots may be resident.
        self.packed = [self.memory[:, slot, :, :used].clone() for slot, used in enumerate(self.used)]
        self.memory, self.room = torch.empty(0), 0
        self.requests.clear()  # they refer to the old memory
        self.bound.clear()
        self.outputs.clear()
        self.logits = torch.zeros(0, self.logits.shape[1])
        if self.was_wide:  # a wide pass leaves memory in its graph that `release_memory` does not free
            self.compiled[FREE], self.was_wide = self._compile(-1, -1), False
        for width in self.later:
            self.compiled.pop(width, None)
        for graph in self.compiled.values():
            graph.release_memory()  # of activations
        self.requests = {key: graph.create_infer_request() for key, graph in self.compiled.items()}
        release_file_pages(self.folder)

    def _wake(self) -> None:
        """After `rest`: unpack the keys and values."""
        self._grow(max([1, *self.used]))

    def body(self, batch: ForwardBatch) -> Tensor:
        n, n_tokens = batch.ids.shape
        # Padding to the next graph with fixed shapes takes half the time of the one with free shapes.
        key = next((width for width in self.fixed if n_tokens <= width), FREE) if n == 1 else FREE
        if key > n_tokens:
            batch = widen(batch, 1, key, batch.slot)
        starts, width = batch.starts, batch.ids.shape[1]
        self._grow(max(batch.length, *starts, *self.used))
        self.was_wide |= key == FREE and n * width > WIDE
        request = self.requests[key]
        hidden, new = self._bind(request, batch.slot, n, width)
        with torch.inference_mode():
            embeds = self.embedding.rows(batch.ids)
        mask = self._mask(batch, starts)
        request.set_input_tensor(0, as_openvino(embeds))
        request.set_input_tensor(1, as_openvino(batch.positions))
        request.set_input_tensor(2, as_openvino(mask))
        if self.n_inputs == 4:
            gate = torch.zeros(n, width) if batch.gate is None else batch.gate.float()
            request.set_input_tensor(3, as_openvino(gate[..., None]))
        request.infer()
        for row, (start, real) in enumerate(zip(starts, batch.widths, strict=True)):
            self.memory[:, batch.slot + row, :, start : start + real] = new[:, row, :, :real]
            self.used[batch.slot + row] = max(self.used[batch.slot + row], start + real)
        return hidden[:, :n_tokens]

    def _bind(self, request: ov.InferRequest, slot: int, n: int, width: int) -> tuple[Tensor, Tensor]:
        """Bind the request's inputs to the memory of n slots. Returns its outputs: hidden states, new keys/values."""
        where = (slot, n, width, self.room)
        if self.bound.get(id(request)) != where:
            hidden = torch.zeros(n, width, self.hidden)
            new = torch.zeros(self.n_states, n, self.n_kv, width, self.dim, dtype=self.kind)
            request.set_output_tensor(0, as_openvino(hidden))
            for index in range(self.n_states):
                request.set_input_tensor(self.n_inputs + index, as_openvino(self.memory[index, slot : slot + n]))
                request.set_output_tensor(1 + index, as_openvino(new[index]))
            self.bound[id(request)], self.outputs[id(request)] = where, (hidden, new)
        return self.outputs[id(request)]

    def _mask(self, batch: ForwardBatch, starts: list[int]) -> Tensor:
        """Additive mask [B, 1, G W, W + room]: the new tokens, then the cached positions before the first new one."""
        n, width = batch.ids.shape
        # numpy's calls take less time than torch's, which counts at this size.
        columns, own = np.arange(self.room), np.arange(width)
        first = np.array(starts)[:, None]
        keys = (first + own)[:, None]  # columns of the new tokens
        new = keys < batch.visible.numpy()[..., None]
        if batch.own is not None:
            new |= within(keys, batch.own.numpy())
        real = own < np.array(batch.widths)[:, None]  # [B, W]
        new &= real[:, None]
        new |= ~real[..., None]  # padding attends to all new tokens: an empty row would give nan
        unseen = np.empty((n, self.groups, width, width + self.room), dtype=bool)
        unseen[..., :width] = ~new[:, None]
        unseen[..., width:] = (columns >= first)[:, None, None]
        rows = torch.from_numpy(unseen.reshape(n, 1, -1, width + self.room))
        return rows.to(self.kind).mul_(torch.finfo(self.kind).min)

    def head(self, hidden: Tensor) -> Tensor:
        n = len(hidden)
        if n > len(self.logits):  # reused: allocating some megabytes takes half as long as the head
            self.logits = torch.zeros(n, self.logits.shape[1])
        logits = self.logits[:n]
        request = self.requests[HEAD]
        request.set_input_tensor(as_openvino(hidden.contiguous()))
        request.set_output_tensor(as_openvino(logits))
        request.infer()
        return logits

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        self._wake()
        self.memory[:, target, :, :length] = self.memory[:, source, :, :length]
        self.used[target] = max(self.used[target], length)

    @torch.inference_mode()
    def swap(self, slot: int, other: int, length: int) -> None:
        self._wake()
        for states in self.memory:
            states[[slot, other], :, :length] = states[[other, slot], :, :length]
        self.used[slot] = self.used[other] = max(self.used[slot], self.used[other])

    @torch.inference_mode()
    def erase(self, slot: int) -> None:
        self._wake()
        self.memory[:, slot] = 0

    def close(self) -> None:
        self.memory, self.room = torch.empty(0), 0
        self.bound.clear()
        self.outputs.clear()


def _probe_ids(n_embeddings: int) -> list[int]:
    """Tokens spread over the vocabulary: its first ones are special, and models are hardly trained on them."""
    return [(i + 1) * n_embeddings // 14 for i in range(12)]


@torch.inference_mode()
def _written(model: PreTrainedModel, first: int, n: int) -> list[int]:
    """n tokens, from `first` on, that a gated model's base writes greedily."""
    ids = torch.tensor([[first]])
    with as_base(model):
        while ids.shape[1] < n:
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    written: list[int] = ids[0].tolist()
    return written


def kv_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(number of key and value tensors, key heads, head dimension), found by a forward of two tokens.

    Raises ModelError if layers differ.
    """
    with torch.inference_mode():
        cache = model.base_model(torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    shapes = {states.shape[1::2] if states is not None else None for states in states}
    if len(shapes) != 1 or None in shapes:
        raise ModelError(
            f"{type(model).__name__}: its layers cache keys of different shapes; use engine.runtime 'eager'"
        )
    heads, dim = states[0].shape[1::2]
    return len(states), heads, dim


def as_openvino(tensor: Tensor) -> ov.Tensor:
    """An OpenVINO tensor that shares the memory. numpy has no bf16, so bf16 is passed as 16-bit integers."""
    if tensor.dtype == torch.bfloat16:
        return ov.Tensor(tensor.view(torch.int16).numpy(), ov.Shape(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)
