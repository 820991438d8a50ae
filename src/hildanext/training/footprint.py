"""The peak memory of a training step: `predict` computes it before anything is loaded, `measure` runs three real steps.

At its highest moment a step holds, in the order of `Peak`: libraries, weights, gradients, optimizer state, activations
(including the logits of a chunk of positions), and memory that the allocator holds between tensors.

Gradients and activations are counted, not computed by a formula: the worst-case micro-batch runs on fake tensors, which
have shapes and types but no memory. This covers every architecture, and takes seconds for a model of any size.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple, cast

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hildanext.config import Config
from hildanext.model.decoding_attention import use_grouped_attention
from hildanext.model.lora import one_matrix
from hildanext.model.policy import Policy
from hildanext.model.training_attention import Visible, use_training_attention
from hildanext.training.memory import peak_of, trimmer
from hildanext.training.optimizer import make_optimizer
from hildanext.training.worst_case import (
    Command,
    WorstGroups,
    WorstRows,
    build,
    forward_backward,
    n_backwards,
    prepare,
    random_model,
    worst_groups,
    worst_rows,
)

# Memory outside tensors on a CPU, measured on SmolLM2's shape.
LOADED = 50_000_000  # bytes of libraries that the first step loads
# Memory that the C library's allocator holds between tensors, as a share of the activations. Where peft computes an
# adapter (see `lora.one_matrix`), small tensors lie between large ones and the share is larger.
FRAGMENTS, FRAGMENTS_LORA = 0.29, 0.6
# With checkpointing, free memory is returned before each layer (`memory.freed_memory_returned`), so the share refers to
# the activations of one layer. The gradients of an adapter on every row lie between them.
FRAGMENTS_OF_LAYER, FRAGMENTS_OF_LAYER_LORA = 0.4, 2.0
# Memory outside tensors on a GPU: bytes of the CUDA context and cuBLAS workspaces, and the caching allocator's share of
# the activations. Assumed, not measured.
CONTEXT, CACHED = 450_000_000, 0.05
QUANTIZED_BYTES = {"int8": 1.01, "nf4": 0.52}  # per weight in bitsandbytes' formats, scales included
EIGHT_BIT_FROM = 4096  # elements from which bitsandbytes stores a tensor's moments in 8 bits


class Peak(NamedTuple):
    """Bytes at the highest moment of a training step."""

    process: int  # libraries on a CPU, the CUDA context on a GPU
    weights: int
    gradients: int
    optimizer: int
    activations: int  # stored for the backward pass, and temporary tensors such as a chunk's logits
    allocator: int  # held by the allocator between tensors

    @property
    def total(self) -> int:
        return sum(self)


def predict(config: Config, command: Command, policy: Policy, shape: PreTrainedConfig) -> Peak:
    """The peak of a training step of `command` in one process. Loads no weights and computes nothing."""
    peak = tensor_bytes(config, command, policy, shape)
    if policy.device.type != "cpu":
        return peak._replace(process=CONTEXT, allocator=round(CACHED * peak.activations))
    is_full = config.lora.rank is None
    activations, share = peak.activations, FRAGMENTS if is_full or one_matrix(config.lora) else FRAGMENTS_LORA
    if config.train.gradient_checkpointing:
        # Recomputed activations leave fragments too.
        train = config.train.model_copy(update={"gradient_checkpointing": False})
        activations = tensor_bytes(config.model_copy(update={"train": train}), command, policy, shape).activations
        if trimmer() is not None:
            layers: int = shape.get_text_config().num_hidden_layers
            of_layer = FRAGMENTS_OF_LAYER if is_full or config.lora.gate else FRAGMENTS_OF_LAYER_LORA
            share = min(share, of_layer / layers)
    process = psutil.Process().memory_info().rss + LOADED
    return peak._replace(process=process, allocator=round(share * activations))


def tensor_bytes(config: Config, command: Command, policy: Policy, shape: PreTrainedConfig) -> Peak:
    """The part of the peak that is tensors: weights, gradients, optimizer state, activations."""
    make_rows = worst_groups if config.lora.gate else worst_rows
    rows = make_rows(config, command, policy, shape, torch.device("cpu"))
    with torch.device("meta"):
        model = random_model(shape, config, policy)
    for module in model.modules():  # some models read buffer values, for example an embedding's scale
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones_like(buffer, device="cpu"))
    model = prepare(model, config)
    weights = weight_bytes(model, config, command, policy)
    gradients, activations = backward_bytes(model, rows, config, policy, command)
    state, temporary = optimizer_bytes(model, config.train.optimizer, policy.device.type)
    # The optimizer runs after the backward passes, when the activations are gone.
    return Peak(0, weights, gradients, state, max(activations, temporary), 0)


def weight_bytes(model: PreTrainedModel, config: Config, command: Command, policy: Policy) -> int:
    """Bytes of the weights in their storage format, including a second set that dpo or distillation needs."""
    parameters = list(model.parameters())
    total = sum(p.nbytes for p in parameters)
    if config.lora.rank is not None and config.lora.base != "native":
        per_weight = QUANTIZED_BYTES[config.lora.base]
        linear = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
        total -= sum(int(w.nbytes - per_weight * w.numel()) for w in linear if not w.requires_grad)
    if command == "dpo":  # the reference: the adapter before training
        total += sum(p.nbytes for p in parameters if p.requires_grad)
    elif config.loss.distill and config.lora.rank is None:  # the teacher: the frozen base
        total += sum(p.numel() for p in parameters) * policy.compute.itemsize
    return total


def backward_bytes(
    model: PreTrainedModel, rows: WorstRows | WorstGroups, config: Config, policy: Policy, command: Command
) -> tuple[int, int]:
    """(gradients, activations) of the worst-case micro-batch. Replaces the model's parameters by fake ones."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        make_fake(model)
        if isinstance(rows, WorstGroups):
            use_grouped_attention(model)
        else:
            use_fake_attention(model, rows.visible)
        weights = live.live
        for _ in range(n_backwards(config, command)):
            live.peak = live.live
            forward_backward(model, rows, config, policy, command)
        gradients = live.live - weights
        return gradients, live.peak - weights - gradients + rows.mask_bytes


def optimizer_bytes(model: PreTrainedModel, name: str, device: str) -> tuple[int, int]:
    """(state, temporary tensors of a step) of an optimizer over the trainable parameters.

    On a GPU a step is one kernel without temporary tensors. On a CPU bitsandbytes makes five fp32 tensors for one
    parameter at a time: both moments, the gradient, the divisor and its square root.
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


# Fake tensors


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from creation until they are freed: the current sum `live` and its maximum `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, n_bytes: int) -> None:
        self.live += n_bytes
        self.peak = max(self.peak, self.live)


def make_fake(model: PreTrainedModel) -> None:
    """Replace parameters by fake ones on the CPU; tied weights stay tied. Call it in a FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module.register_parameter(name, made[id(parameter)])


def use_fake_attention(model: PreTrainedModel, visible: Visible) -> None:
    """Training attention for fake tensors. FlexAttention runs on GPUs only and is replaced by its tensors."""
    if isinstance(visible, BlockMask):
        AttentionInterface.register("hildanext_flex_bytes", cast(Any, _flex_bytes))
        model.set_attn_implementation("hildanext_flex_bytes")
    else:
        use_training_attention(model)


def _flex_bytes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    output: Tensor = _FlexBytes.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


class _FlexBytes(torch.autograd.Function):
    """Allocates the tensors that FlexAttention stores for its backward pass and creates in it; computes nothing."""

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


# Measurement


def measure(config: Config, command: Command, policy: Policy, shape: PreTrainedConfig) -> int:
    """Peak bytes of this process over three real training steps with random weights. Call it in a fresh process."""
    device = policy.device
    rows = (worst_groups if config.lora.gate else worst_rows)(config, command, policy, shape, device)
    outside = start_peak(device)
    model = build(shape, config, policy)
    (use_grouped_attention if config.lora.gate else use_training_attention)(model)
    optimizer = make_optimizer(model, config.train, policy.fused)
    for _ in range(3):  # from the second on there is optimizer state, from the third on the allocator has settled
        for _ in range(n_backwards(config, command)):
            forward_backward(model, rows, config, policy, command)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return outside + peak_of(device)


def start_peak(device: torch.device) -> int:
    """Reset the peak that `peak_of` returns. Returns the bytes that a GPU holds outside tensors; 0 on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    if sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return 0
