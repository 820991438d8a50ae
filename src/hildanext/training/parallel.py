"""One process or many: accelerate starts them, DDP or FSDP2 spreads the work, a checkpoint is the same from any number.

Started by `torchrun` or `accelerate launch`, which say through the environment who is who. Rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hildanext.config import TrainConfig
from hildanext.errors import ConfigError, UsageError
from hildanext.model.policy import Policy


def start(policy: Policy, train: TrainConfig) -> Accelerator:
    """Join the other processes. Raises ConfigError when the batch cannot be shared among them, or fp16 is to be sharded."""
    AcceleratorState._reset_state()  # accelerate keeps one precision a process; this training may use another
    # The launcher's word counts: on a CPU accelerate would do without its plugins and say nothing.
    for plugin in ("FSDP", "MEGATRON_LM", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{plugin}"):
            raise UsageError(
                f"launched with accelerate's {plugin} plugin; launch plainly and set train.sharding "
                "to 'fsdp2', which shards parameters, gradients and optimizer"
            )
    accelerator = Accelerator(
        mixed_precision=policy.mixed_precision,
        cpu=policy.device.type == "cpu",
        # A forward uses a weight once: keeping its cast form until the end is memory for nothing.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    world = accelerator.num_processes
    if train.rows_per_step % (train.micro_batch * world):
        raise ConfigError(
            f"'train.rows_per_step': {train.rows_per_step} rows in micro-batches of {train.micro_batch} cannot be shared "
            f"evenly by {world} processes; it must be a multiple of {train.micro_batch * world}"
        )
    if train.sharding == "fsdp2" and train.optimizer != "adamw" and world > 1:
        raise ConfigError(
            f"'train.optimizer': {train.optimizer} does not work on sharded parameters; use 'adamw', whose state fsdp2 shards too"
        )
    if train.sharding == "fsdp2" and policy.compute == torch.float16:
        raise ConfigError(
            "'train.sharding': fsdp2 has no loss scaler for float16; use 'none', or model.dtype 'float32'"
        )
    return accelerator


def spread(accelerator: Accelerator, module: nn.Module, layers: Sequence[str], sharding: str) -> nn.Module:
    """Wrap a module for this training: as it is in one process, DDP in several, or sharded layer by layer (FSDP2).

    layers: class names of the blocks that are sharded one by one (a model's `_no_split_modules`). Sharding replaces
    parameters in place: make the optimizer after it.
    """
    if sharding == "none":
        wrapped: nn.Module = accelerator.prepare(module)
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.broadcast_buffers = False  # they never change, and a forward has nothing to tell other processes
        return wrapped
    if not torch.distributed.is_initialized():
        return module
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in [child for child in module.modules() if type(child).__name__ in layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def sync_gradients(accelerator: Accelerator, module: nn.Module, wanted: bool) -> AbstractContextManager[object]:
    """Within the block gradients meet those of the other processes only if wanted: at a step's last backward."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if wanted else accelerator.no_sync(module)


def average_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """What DDP does in a backward, when all of them are over."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it. Every process must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors as one process would have them. Sharded ones come to the CPU one by one: no device holds two of them whole.

    Every process must call it; those that do not keep them get none.
    """
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A model's state_dict, `gathered`; a weight with two names stays one tensor."""
    state = model.state_dict()  # first: it takes back what the last forward gathered
    weights = gathered(dict(model.named_parameters()), keep)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: weights[names[name]] if name in names else value for name, value in state.items()} if keep else {}


def shard_again(module: nn.Module) -> None:
    """Take back what the last forward gathered: FSDP2 keeps the outermost weights whole until a backward comes."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of a parameter's shape, spread as the parameter is; one that is spread stays as it is."""
    if isinstance(value, DTensor):
        return value
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
