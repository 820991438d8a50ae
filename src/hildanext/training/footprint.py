"""The peak memory of a training step: predicted before anything is loaded, or measured on random weights.

For the prediction the step itself runs on fake tensors: they have shapes and types and no memory, so that a model of any size and
architecture takes seconds and whatever autograd keeps is counted where it is kept. Formulas would have to know every
architecture; what is left to formulas here is the optimizer's state, and weights that bitsandbytes holds.
"""

from __future__ import annotations

import sys
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hildanext.config import Config, ModelConfig
from hildanext.diffusion import objective
from hildanext.diffusion.masks import Pieces
from hildanext.errors import ConfigError
from hildanext.model.backbone import body
from hildanext.model.lora import inject, one_matrix
from hildanext.model.policy import Policy
from hildanext.model.pretrained import locate
from hildanext.model.training_attention import Kind, Visible, use_training_attention, visible_keys
from hildanext.training.memory import checkpoint_activations, peak_memory_mb, trimmer
from hildanext.training.optimizer import make_optimizer

Command = Literal["convert-wsd", "sft", "dpo"]
# Beside tensors: on a CPU what the first step loads, and what libraries and the C library's allocator hold between
# tensors, as a share of all that a step makes; measured on SmolLM2's shape. Where peft computes an adapter
# (`lora.one_matrix`), its small tensors lie between the large ones, and hold more. With checkpointing memory goes back
# before each layer (`memory.given_back`), and the share is of what one layer makes; an adapter's gradients lie between
# those. On a GPU the context and cuBLAS's workspaces, and a share for the caching allocator (assumed: not measured on a
# card yet).
LOADED, FRAGMENTS, FRAGMENTS_LORA = 50_000_000, 0.29, 0.6
OF_A_LAYER, OF_A_LAYER_LORA = 0.4, 2.0
CONTEXT, CACHED = 450_000_000, 0.05
# Bytes a weight in bitsandbytes' formats, their scales included.
EIGHT_BIT_FROM = 4096  # numbers in a tensor, for bitsandbytes to keep its moments in 8 bits
HELD = {"int8": 1.01, "nf4": 0.52}


class Peak(NamedTuple):
    """Bytes at the highest moment of a training step."""

    process: int  # libraries on a CPU, the context on a GPU
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass, and temporaries
    allocator: int  # held by the allocator between them

    @property
    def total(self) -> int:
        return sum(self)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, from its birth until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


def shape_of(model: ModelConfig) -> PreTrainedConfig:
    """A model's architecture without its weights. Raises UsageError when it is not there."""
    place, gguf = locate(model.base)
    found: PreTrainedConfig = AutoConfig.from_pretrained(
        place,
        gguf_file=gguf,
        revision=model.revision or "main",
        trust_remote_code=model.trust_remote_code,
    )
    return found


class RowShapes(NamedTuple):
    """A micro-batch as it costs most: every row one document, every token of it noised and supervised.

    Of preferences B is the rows of all pairs: two answers each, in every draw of the noise.
    """

    ids: Tensor  # [B, W] int64: x_t, or [x_t ; x_0]
    position_ids: Tensor  # [B, W] int64
    labels: Tensor  # [S] int64
    places: tuple[Tensor, Tensor]  # row and column of the S hidden states that the head sees
    visible: Visible
    mask_bytes: int


def kind_of(config: Config, policy: Policy) -> Kind:
    """How attention is computed, as `attention_choice.choose_attention` takes it where the model allows it."""
    asked = config.train.attention
    if asked == "dense" or config.model.attention != "sdpa":
        return "dense"
    kind = policy.attention if asked == "auto" else asked
    if kind == "flex" and policy.device.type == "cpu":
        raise ConfigError("'train.attention': 'flex' has no backward on a CPU; use 'auto'")
    return kind


def rows_of(
    config: Config, command: Command, policy: Policy, shape: PreTrainedConfig, device: torch.device
) -> RowShapes:
    """Rows of `data.seq_len`; real tensors, small ones."""
    length, n_rows, block_size = config.data.seq_len, config.train.micro_batch, block_of(config, command)
    if command == "dpo":
        n_rows *= 2 * config.dpo.draws * (2 if config.dpo.complementary else 1)
    text = shape.get_text_config()
    heads: int = text.num_attention_heads
    groups = heads // (text.to_dict().get("num_key_value_heads") or heads)
    doc_ids = torch.zeros(n_rows, length, dtype=torch.int64, device=device)
    position_ids = torch.arange(length, device=device).expand(n_rows, length).contiguous()
    visible = visible_keys(kind_of(config, policy), doc_ids, position_ids, block_size, policy.compute, groups)
    masks = [visible] if isinstance(visible, Tensor) else visible.masks if isinstance(visible, Pieces) else []
    streams = 1 if block_size >= length else 2
    wanted = position_ids > 0
    row, column = wanted.nonzero(as_tuple=True)
    ids = (torch.arange(length, device=device) % text.vocab_size).expand(n_rows, length)
    return RowShapes(
        ids.repeat(1, streams),
        position_ids.repeat(1, streams),
        ids[wanted],
        (row, column - 1),
        visible,
        sum(mask.nbytes for mask in masks),
    )


def bare(shape: PreTrainedConfig, config: Config, policy: Policy) -> PreTrainedModel:
    """A model of this shape with random weights: in the compute type where they will be frozen, else in fp32."""
    dtype = torch.float32 if config.lora.rank is None else policy.compute
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        shape, dtype=dtype, attn_implementation=config.model.attention
    )
    return model


def prepared(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """As a training has it: with its adapter, if any, and checkpointing."""
    if config.lora.rank is not None:
        inject(model, config.lora, 0, seed=0)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def build(shape: PreTrainedConfig, config: Config, policy: Policy) -> PreTrainedModel:
    """A real model to measure with, on the policy's device."""
    model = bare(shape, config, policy)
    cast(nn.Module, model).to(policy.device)
    return prepared(model, config)


def make_fake(model: PreTrainedModel) -> None:
    """Put fake parameters on the CPU in place of those on the meta device; a tied one stays one. In a FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module.register_parameter(name, made[id(parameter)])


def forward_backward(model: PreTrainedModel, rows: RowShapes, config: Config, policy: Policy, command: Command) -> None:
    """What a micro-batch costs: `DiffusionLM.forward` and the loss, with indices made beforehand."""
    autocast: AbstractContextManager[object] = nullcontext()
    if policy.compute != torch.float32:
        autocast = torch.autocast(model.device.type, dtype=policy.compute, cache_enabled=False)
    dense = isinstance(rows.visible, Tensor)
    with autocast:
        embeds = model.get_input_embeddings()(rows.ids)
        hidden = body(
            model,
            inputs_embeds=embeds,
            attention_mask=rows.visible if dense else None,
            position_ids=rows.position_ids,
            **({} if dense else {"visible": rows.visible}),
        )[rows.places]
        total = _loss(hidden, cast(nn.Module, model.get_output_embeddings()), rows.labels, config, command)
    total.backward()


def _loss(hidden: Tensor, head: nn.Module, labels: Tensor, config: Config, command: Command) -> Tensor:
    n = len(labels)
    ones = torch.ones(n, device=hidden.device)
    if command == "dpo":
        objective.predict(hidden.detach(), head, labels)
        return objective.weighted_cross_entropy(hidden, head, labels, ones)
    masked = torch.ones(n, dtype=torch.bool, device=hidden.device)
    cap = config.sft.cap_weight if command == "sft" else config.loss.cap_weight
    target, weights = objective.Target(labels, ones, masked, ~masked), objective.Weights(cap_weight=cap)
    loss, _, _ = objective.denoising_loss(hidden, head, target, n, weights, mask_token_id=0)
    return loss.total


def backwards(config: Config, command: Command) -> int:
    """2 for a step of several backward passes, of which the later ones run beside the gradients of the first; else 1."""
    passes = {
        "convert-wsd": config.noise.turns + config.noise.complementary,
        "sft": config.sft.turns + config.sft.complementary,
        "dpo": 1,
    }[command]
    return 2 if passes > 1 or config.train.rows_per_step > config.train.micro_batch else 1


class _FlexBytes(torch.autograd.Function):
    """What FlexAttention keeps for its backward pass and makes in it; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        made = [torch.empty_like(tensor) for tensor in (query, key, value, sums)]
        return made[0], made[1], made[2]


def _flex_bytes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    output: Tensor = _FlexBytes.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def use_fake_attention(model: PreTrainedModel, visible: Visible) -> None:
    """Training attention for fake tensors: FlexAttention, which runs on GPUs only, is replaced by what it keeps."""
    if isinstance(visible, BlockMask):
        AttentionInterface.register("hildanext_flex_bytes", cast(Any, _flex_bytes))
        model.set_attn_implementation("hildanext_flex_bytes")
    else:
        use_training_attention(model)


def optimizer_bytes(model: PreTrainedModel, name: str, device: str) -> tuple[int, int]:
    """(state, temporaries of a step) of the optimizer over what is trained.

    One kernel does a step on a GPU. On a CPU bitsandbytes holds, of one tensor at a time and in fp32, both moments, the
    gradient and what it divides by, with its root.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adafactor":
        factors = sum(
            p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim >= 2 else p.numel() for p in trained
        )
        return 4 * factors, 4 * max(p.numel() for p in trained)
    if name == "adamw8bit":
        temporary = 5 * 4 * max(p.numel() for p in trained) if device == "cpu" else 0
        return sum((2 if p.numel() >= EIGHT_BIT_FROM else 8) * p.numel() for p in trained), temporary
    return 8 * sum(p.numel() for p in trained), 0


def predict(config: Config, command: Command, policy: Policy, shape: PreTrainedConfig) -> Peak:
    """The peak of a training step of `command`, one process. Nothing is loaded and nothing is computed."""
    peak = _tensors(config, command, policy, shape)
    if policy.device.type != "cpu":
        return peak._replace(process=CONTEXT, allocator=round(CACHED * peak.activations))
    is_full = config.lora.rank is None
    made, share = peak.activations, FRAGMENTS if is_full or one_matrix(config.lora) else FRAGMENTS_LORA
    if config.train.gradient_checkpointing:
        train = config.train.model_copy(update={"gradient_checkpointing": False})
        made = _tensors(config.model_copy(update={"train": train}), command, policy, shape).activations
        if trimmer() is not None:
            layers: int = shape.get_text_config().num_hidden_layers
            share = min(share, (OF_A_LAYER if is_full else OF_A_LAYER_LORA) / layers)
    process = psutil.Process().memory_info().rss + LOADED
    return peak._replace(process=process, allocator=round(share * made))


def _tensors(config: Config, command: Command, policy: Policy, shape: PreTrainedConfig) -> Peak:
    """What tensors take; the rest of the peak is 0 here."""
    rows = rows_of(config, command, policy, shape, torch.device("cpu"))
    with torch.device("meta"):
        model = bare(shape, config, policy)
    for module in model.modules():  # an embedding's scale is read
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones_like(buffer, device="cpu"))
    model = prepared(model, config)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        make_fake(model)
        use_fake_attention(model, rows.visible)
        before = live.live
        for _ in range(backwards(config, command)):
            live.peak = live.live
            forward_backward(model, rows, config, policy, command)
        gradients = live.live - before
        highest = live.peak - before - gradients + rows.mask_bytes
        state, temporary = optimizer_bytes(model, config.train.optimizer, policy.device.type)
        weights = sum(p.nbytes for p in model.parameters()) - saved_by_quantization(model, config)
        if command == "dpo":  # the reference: the adapter as it was
            weights += sum(p.nbytes for p in model.parameters() if p.requires_grad)
        elif config.loss.distill and config.lora.rank is None:  # the parent, frozen beside
            weights += sum(p.numel() for p in model.parameters()) * policy.compute.itemsize
    return Peak(0, weights, gradients, state, max(highest, temporary), 0)


def saved_by_quantization(model: PreTrainedModel, config: Config) -> int:
    """Bytes of the linear layers that bitsandbytes does not need."""
    if config.lora.rank is None or config.lora.base == "native":
        return 0
    held = HELD[config.lora.base]
    linear = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and not m.weight.requires_grad]
    return sum(int(w.nbytes - held * w.numel()) for w in linear)


def block_of(config: Config, command: Command) -> int:
    """A block size below the row: [x_t ; x_0], twice as long, is what costs most in any schedule that meets it."""
    blocks = [config.wsd.final_block, config.wsd.start_block]
    if command != "convert-wsd":
        tune = config.sft if command == "sft" else config.dpo
        blocks = [tune.block_size or config.wsd.final_block]
    return min(blocks)


def measure(config: Config, command: Command, policy: Policy, shape: PreTrainedConfig) -> int:
    """The peak of three real training steps on random weights of this shape, in bytes of this process. Use a fresh one."""
    device = policy.device
    rows = rows_of(config, command, policy, shape, device)
    outside = start_peak(device)
    model = build(shape, config, policy)
    use_training_attention(model)
    optimizer = make_optimizer(model, config.train, policy.fused)
    for _ in range(3):  # the second one has the optimizer's state, the third what the allocator kept
        for _ in range(backwards(config, command)):
            forward_backward(model, rows, config, policy, command)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return outside + peak_of(device)


def start_peak(device: torch.device) -> int:
    """Forget the peak so far; returns what a GPU holds beside tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    if sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return 0


def peak_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["VmHWM"].split()[0])
    return round(peak_memory_mb(device) * 1e6)
