"""Training in one or several processes: accelerate connects them, DDP or FSDP2 distributes the work.

Start several processes with `torchrun` or `accelerate launch`, which set rank and world size in the environment. Only
rank 0 writes files. Checkpoints do not depend on the number of processes.
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
    """Connect to the other processes.

    Raises ConfigError if the batch cannot be divided evenly among them or if the optimizer or number format cannot be
    sharded, UsageError for a launch with one of accelerate's plugins.
    """
    AcceleratorState._reset_state()  # accelerate stores one precision per process; this training may use another
    # Checked in the environment because accelerate silently ignores its plugins on a CPU.
    for plugin in ("FSDP", "MEGATRON_LM", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{plugin}"):
            raise UsageError(
                f"launched with accelerate's {plugin} plugin; launch without a plugin and set train.sharding to "
                "'fsdp2', which shards parameters, gradients and optimizer state"
            )
    accelerator = Accelerator(
        mixed_precision=policy.mixed_precision,
        cpu=policy.device.type == "cpu",
        # A forward uses each weight once, so caching its cast copy would only cost memory.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    world = accelerator.num_processes
    if train.rows_per_step % (train.micro_batch * world):
        raise ConfigError(
            f"'train.rows_per_step': {train.rows_per_step} rows in micro-batches of {train.micro_batch} cannot be "
            f"divided evenly among {world} processes; use a multiple of {train.micro_batch * world}"
        )
    if train.sharding == "fsdp2" and train.optimizer != "adamw" and world > 1:
        raise ConfigError(
            f"'train.optimizer': {train.optimizer} does not work with sharded parameters; use 'adamw', whose state is "
            "sharded too"
        )
    if train.sharding == "fsdp2" and policy.compute == torch.float16:
        raise ConfigError(
            "'train.sharding': fsdp2 has no loss scaler for float16; use 'none', or set model.dtype to 'float32'"
        )
    return accelerator


def spread(accelerator: Accelerator, module: nn.Module, layers: Sequence[str], sharding: str) -> nn.Module:
    """Wrap a module for training: unchanged in one process, DDP in several, or sharded layer by layer (FSDP2).

    layers: class names of the transformer layers, each of which is sharded as a unit (a model's `_no_split_modules`).
    Sharding replaces parameters in place: create the optimizer afterwards.
    """
    if sharding == "none":
        wrapped: nn.Module = accelerator.prepare(module)
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.broadcast_buffers = False  # buffers never change, so they need no communication
        return wrapped
    if not torch.distributed.is_initialized():
        return module
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in [child for child in module.modules() if type(child).__name__ in layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def sync_gradients(accelerator: Accelerator, module: nn.Module, wanted: bool) -> AbstractContextManager[object]:
    """Context manager: gradients are averaged over processes only if `wanted`, at the last backward of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if wanted else accelerator.no_sync(module)


def average_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Average gradients over processes after the backward passes, as DDP does during the last one."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor if it is sharded, else the tensor itself. All processes must call this in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Complete tensors. Sharded tensors move to the CPU one at a time, so that a device never holds two complete ones.

    All processes must call this; those with keep=False get an empty dictionary.
    """
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The complete state_dict of a model, see `gathered`. A tied weight stays one tensor under both names."""
    state = model.state_dict()  # must come first: it reshards parameters that the last forward gathered
    weights = gathered(dict(model.named_parameters()), keep)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: weights[names[name]] if name in names else value for name, value in state.items()} if keep else {}


def shard_again(module: nn.Module) -> None:
    """Reshard parameters after a forward without backward: FSDP2 would keep the outermost ones gathered until one."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A complete tensor with the device and sharding of a parameter of the same shape. Sharded tensors are returned as is."""
    if isinstance(value, DTensor):
        return value
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
