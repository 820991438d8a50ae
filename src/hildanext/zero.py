"""ZeRO by DeepSpeed (stages 1 and 2) under accelerate's plugin: gradients and optimizer spread, weights whole in every process.

A launch asks for it (`accelerate launch --use_deepspeed`), the configuration says the rest: batch, precision, clipping and
optimizer are ours, and so are the checkpoints, which any number of processes of any kind takes up.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    compare_versions,
    get_int_from_env,
    is_deepspeed_available,
    parse_flag_from_env,
)
from torch import Tensor, nn

from hildanext.config import TrainConfig
from hildanext.errors import ConfigError, UsageError
from hildanext.policy import Policy

OLDEST = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")


def launched() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return bool(parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


def start(policy: Policy, train: TrainConfig) -> Accelerator:
    """Join the other processes. Raises UsageError for what cannot work with DeepSpeed."""
    check(policy, train)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints; stdout is the command's
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for minutes what gloo does as well
        # On a CPU accelerate knows DeepSpeed only if it finds no GPU by itself.
        accelerator = Accelerator(
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if policy.device.type == "cpu" else [],
        )
    configure(accelerator, policy, train)
    return accelerator


def check(policy: Policy, train: TrainConfig) -> None:
    """Raise UsageError for what is known before anything starts."""
    if not is_deepspeed_available():
        raise UsageError("launched with DeepSpeed, which is not installed; pip install 'hildanext[deepspeed]'")
    if compare_versions("deepspeed", "<", OLDEST):  # several between 0.17.6 and it lose gradients with zero_stage 2
        raise UsageError(f"this DeepSpeed is older than {OLDEST}; pip install 'hildanext[deepspeed]'")
    if get_int_from_env(["LOCAL_RANK"], -1) < 0:
        raise UsageError(
            "ACCELERATE_USE_DEEPSPEED is set outside a launch; start with 'accelerate launch --use_deepspeed'"
        )
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise UsageError(
            "launched with DeepSpeed and for the CPU alone, with which accelerate drops DeepSpeed; leave '--cpu' and "
            "'use_cpu' out: without a GPU it takes the CPU"
        )
    if train.sharding != "none":
        raise ConfigError(f"'train.sharding': {train.sharding} and DeepSpeed shard the same; use 'none' with DeepSpeed")
    if train.optimizer != "adamw":
        raise ConfigError(f"'train.optimizer': {train.optimizer} does not work on DeepSpeed's partitions; use 'adamw'")
    if policy.compute == torch.float16:
        raise ConfigError(
            "'model.dtype': float16 needs weights in fp32 and a loss scaler, which DeepSpeed does otherwise; use 'float32', "
            "or launch without DeepSpeed"
        )


def configure(accelerator: Accelerator, policy: Policy, train: TrainConfig) -> None:
    """Put our figures into DeepSpeed's configuration, whatever the launcher said. Raises UsageError for what it cannot be."""
    if accelerator.device.type != policy.device.type:
        raise ConfigError(
            f"'model.device': '{policy.device.type}', but DeepSpeed runs on '{accelerator.device.type}' here; "
            "set CUDA_VISIBLE_DEVICES to '' for the CPU"
        )
    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise UsageError(
            f"DeepSpeed's zero_stage {zero.get('stage')} is not supported; use 1 or 2, or set train.sharding to 'fsdp2' in a "
            "plain launch, which spreads weights too"
        )
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise UsageError(f"DeepSpeed's {key} is not supported; use 'none'")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UsageError(f"DeepSpeed's configuration has a section '{key}'; leave it out: 'train' and 'sft' say it")
    # We accumulate ourselves, and cast ourselves: see `Cast`.
    config |= {"gradient_accumulation_steps": 1, "gradient_clipping": train.clip_norm}
    config |= {"train_micro_batch_size_per_gpu": train.micro_batch}
    config["train_batch_size"] = train.micro_batch * accelerator.num_processes
    config |= {key: {"enabled": False} for key in ("fp16", "bf16", "torch_autocast")}
    accelerator.gradient_accumulation_steps = 1


class Cast(nn.Module):
    """A module whose forward computes in another type, as under `Accelerator.autocast`; DeepSpeed switches that off."""

    def __init__(self, module: nn.Module, policy: Policy) -> None:
        super().__init__()
        self.module, self.policy = module, policy

    def forward(self, *arguments: Any) -> Any:
        with self.policy.autocast():
            return self.module(*arguments)


class Zero:
    """The optimizer of a training: what `train.Trainer` asks of one, done by DeepSpeed on partitions.

    It takes the place of accelerate's wrapper too, which steps within `backward`, before the gradient's norm can be looked at.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, policy: Policy
    ) -> None:
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        with contextlib.redirect_stdout(sys.stderr):
            self.engine, _ = accelerator.prepare(Cast(module, policy), optimizer)
        accelerator.deepspeed_engine_wrapped = self
        self.base = optimizer
        self.param_groups = optimizer.param_groups  # now of partitions; the learning rate is set here

    def backward(self, loss: Tensor, sync_gradients: bool = True) -> None:
        """Called by `Accelerator.backward`."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss)

    def get_global_grad_norm(self) -> Tensor:
        """Called by `Accelerator.clip_grad_norm_`: the norm before the step, not a number where a gradient is none."""
        gradients = [piece for pieces in self.engine.optimizer.averaged_gradients.values() for piece in pieces]
        squares = torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float32) ** 2 for piece in gradients])
        total = squares.sum()
        torch.distributed.all_reduce(total)
        return total.sqrt()

    def step(self) -> None:
        """Clip and update; gradients are gone afterwards."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """`step` did it."""

    def state(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter's AdamW state as one process would have it. Every process must go through all of it."""
        for parameter in self.parameters:
            whole = {key: torch.zeros_like(parameter) for key in MOMENTS}
            for key, value in whole.items():
                for ours, kept in self.held(parameter, key, value):
                    ours.copy_(kept)
                torch.distributed.all_reduce(value)
            step = next(iter(self.base.state.values()))["step"]  # the same of all: they are updated together
            yield parameter, {"step": step.clone(), **whole}

    def put(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Put a parameter's whole state back, of which this process keeps its part."""
        for group in self.base.param_groups:
            for partition in group["params"]:
                if not self.base.state[partition]:
                    device = partition.device if group["fused"] else "cpu"
                    zeros = {key: torch.zeros_like(partition) for key in MOMENTS}
                    self.base.state[partition] = {"step": state["step"].to(device, copy=True), **zeros}
        for key in MOMENTS:
            for ours, kept in self.held(parameter, key, state[key]):
                kept.copy_(ours)

    def held(self, parameter: Tensor, key: str, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The part of a parameter's moment that this process keeps, as views of `whole` and of the partition; or nothing.

        DeepSpeed has functions for this, but links them to the state of the first group of parameters only.
        """
        mapping: Any = vars(parameter)["_hp_mapping"]
        if mapping is None:
            return []
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        (partition,) = self.base.param_groups[mapping.param_group_index]["params"]
        kept = self.base.state[partition][key].narrow(0, there.start, there.numel)
        return [(whole.view(-1).narrow(0, here.start, here.numel), kept)]
