"""`preflight`: whether a training fits into memory, and which changes make it fit. No weights are loaded."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedConfig

from hildanext.config import Config, ModelConfig, apply_overrides, parse_config
from hildanext.errors import ConfigError
from hildanext.model.policy import DTYPES, Policy, choose_policy, native_dtype, policy_for
from hildanext.progress import say
from hildanext.training.footprint import Peak, measure, predict
from hildanext.training.trackers import check_trackers
from hildanext.training.worst_case import Command, shape_of

GB = 1e9


class Change(NamedTuple):
    """A change of the configuration that reduces memory."""

    settings: dict[str, Any]  # section.key -> value, as for --set
    price: str  # its disadvantage or requirement, in a few words


class Trial(NamedTuple):
    """Changes and the peak predicted with them."""

    changes: list[Change]
    peak: Peak

    def as_dict(self) -> dict[str, Any]:
        """The changes' settings and prices, and the total of the peak, for the report."""
        settings = {key: value for change in self.changes for key, value in change.settings.items()}
        return {"set": settings, "price": "; ".join(change.price for change in self.changes), "total": self.peak.total}


def policy_of(config: ModelConfig, card: str | None) -> Policy:
    """The policy of this machine, or of another GPU given by its compute capability, for example 'sm_61'.

    Raises ConfigError for a card or a number format that does not exist there.
    """
    if card is None:
        return choose_policy(config.device, config.dtype)
    digits = card.removeprefix("sm_")
    if not digits.isdigit() or len(digits) < 2:
        raise ConfigError(f"--card {card}: expected a compute capability, for example sm_61 or sm_90")
    capability = (int(digits[:-1]), int(digits[-1]))
    compute, reason = native_dtype("cuda", capability, False)
    if config.dtype != "auto":
        if config.dtype == "bfloat16" and capability < (8, 0):
            raise ConfigError(f"'model.dtype': bfloat16 is not native on {card}; use 'float16' or 'auto'")
        compute, reason = DTYPES[config.dtype], "set in the configuration"
    return policy_for(torch.device("cuda"), capability, compute, reason, has_triton=True)


def available_memory(policy: Policy, card: str | None) -> int | None:
    """Bytes that a training can use on this machine; None for a card given by name."""
    if card is not None:
        return None
    if policy.device.type == "cuda":
        return torch.cuda.mem_get_info(policy.device)[1]
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def possible_changes(config: Config) -> list[Change]:
    """Changes that reduce memory, the least intrusive first: speed, then optimizer and adapter, then row length."""
    train, rows = config.train, config.train.rows_per_step
    found = []
    if not train.gradient_checkpointing:
        found.append(Change({"train.gradient_checkpointing": True}, "a third more compute"))
    if train.micro_batch > 1:
        half = next(size for size in range(train.micro_batch // 2, 0, -1) if rows % size == 0)
        found.append(Change({"train.micro_batch": half}, "smaller matrices, lower speed"))
        if half > 1:
            found.append(Change({"train.micro_batch": 1}, "smaller matrices, lower speed"))
    if config.lora.rank is None:
        if train.optimizer == "adamw":
            found.append(Change({"train.optimizer": "adamw8bit"}, "needs the extra 'quant'; 8-bit moments"))
        if train.optimizer != "adafactor":
            found.append(Change({"train.optimizer": "adafactor"}, "another optimizer"))
        found.append(Change({"lora.rank": 16}, "trains an adapter instead of all weights"))
    if config.lora.base == "native":
        settings = {"lora.base": "nf4"} | ({"lora.rank": 16} if config.lora.rank is None else {})
        found.append(Change(settings, "needs the extra 'quant'; frozen weights in 4 bits"))
    if config.lora.gate and config.noise.anchors > 1:
        found.append(Change({"noise.anchors": config.noise.anchors // 2}, "half as many groups in a row"))
    if config.data.seq_len >= 256:
        found.append(Change({"data.seq_len": config.data.seq_len // 2}, "shorter rows; needs tokenize again"))
    return found


def with_changes(config: Config, changes: list[Change]) -> Config:
    """The configuration with the changes applied, validated."""
    settings = [f"{key}={json.dumps(value)}" for change in changes for key, value in change.settings.items()]
    return parse_config(apply_overrides(config.model_dump(mode="json"), settings))


def advice(
    config: Config, command: Command, policy: Policy, shape: PreTrainedConfig, limit: int
) -> tuple[list[Trial], Trial | None]:
    """Each change alone, and the first combination that fits into `limit` bytes; None if all changes are not enough.

    Changes are combined in order. A later change replaces earlier ones of the same keys, and an adapter replaces a
    change of the optimizer.
    """
    changes = possible_changes(config)
    alone = [Trial([change], predict(with_changes(config, [change]), command, policy, shape)) for change in changes]
    combined: list[Change] = []
    for change in changes:
        replaced = {*change.settings, *(["train.optimizer"] if "lora.rank" in change.settings else [])}
        combined = [*(earlier for earlier in combined if not replaced & set(earlier.settings)), change]
        peak = predict(with_changes(config, combined), command, policy, shape)
        if peak.total <= limit:
            return alone, Trial(combined, peak)
    return alone, None


def preflight(
    config: Config, command: Command, card: str | None, memory_gb: float | None, measured: bool
) -> dict[str, Any]:
    """The report of `preflight`: policy, predicted peak and its parts, available memory, and changes that make it fit.

    card: predict for this GPU instead of this machine. memory_gb: available memory in GB (10^9 bytes) instead of this
    machine's. measured: also measure the peak here. Raises UsageError or ConfigError for a model, device or card that
    does not exist and for options that exclude each other.
    """
    if measured and card is not None:
        raise ConfigError("--measure: measures on this machine and cannot be combined with --card; leave one out")
    if command == "dpo" and config.lora.rank is None:
        raise ConfigError("'lora.rank': dpo trains an adapter; set a rank")
    check_trackers(config.train)
    policy, shape = policy_of(config.model, card), shape_of(config.model)
    peak = predict(config, command, policy, shape)
    shown = policy.as_dict() | {"optimizer": config.train.optimizer}
    if config.lora.gate:
        shown["training_attention"] = "groups"
    available = available_memory(policy, card) if memory_gb is None else round(memory_gb * GB)
    report: dict[str, Any] = {
        "command": command,
        "model": config.model.base,
        "policy": shown,
        "peak": {**peak._asdict(), "total": peak.total},
        "memory": available,
        "fits": None if available is None else peak.total <= available,
    }
    if available is not None and peak.total > available:
        say("the training does not fit; predicting the effect of changes")
        alone, together = advice(config, command, policy, shape, available)
        report["changes"] = [trial.as_dict() for trial in alone]
        report["fitting"] = None if together is None else together.as_dict()
    if measured:
        report["measured"] = measure(config, command, policy, shape)
    return report | {"stdout": table(report)}


def table(report: dict[str, Any]) -> str:
    """The report as text. Sizes are in GB (10^9 bytes)."""
    policy, peak = report["policy"], report["peak"]
    lines = [
        f"{report['command']} of {report['model']} on {policy['device']}, {policy['dtype']} ({policy['reason']})",
        f"loss scaler: {'yes' if policy['loss_scaler'] else 'no'}   attention: {policy['training_attention']}   "
        f"compile: {'yes' if policy['compile'] else 'no'}   optimizer: {policy['optimizer']}"
        f"{' (fused)' if policy['fused_optimizer'] else ''}",
        "",
        *(f"{name:14}{peak[name] / GB:8.2f} GB" for name in Peak._fields),
        f"{'peak of a step':14}{peak['total'] / GB:8.2f} GB",
    ]
    if "measured" in report:
        lines.append(
            f"{'measured':14}{report['measured'] / GB:8.2f} GB  ({peak['total'] / report['measured'] - 1:+.0%})"
        )
    if report["memory"] is None:
        return "\n".join([*lines, "", "whether it fits is unknown; give the card's memory with --memory GB"])
    lines += [
        "",
        f"memory        {report['memory'] / GB:8.2f} GB: {'it fits' if report['fits'] else 'it does NOT fit'}",
    ]
    if report["fits"]:
        return "\n".join(lines)
    lines += ["", "peak with one change:"]
    lines += [
        f"  {trial['total'] / GB:6.2f} GB  {_flags(trial['set'])}  ({trial['price']})" for trial in report["changes"]
    ]
    if report["fitting"] is None:
        return "\n".join([*lines, "all changes together are not enough; use a smaller model or more memory"])
    fitting = report["fitting"]
    return "\n".join(
        [*lines, "these changes together fit:", f"  {fitting['total'] / GB:6.2f} GB  {_flags(fitting['set'])}"]
    )


def _flags(settings: dict[str, Any]) -> str:
    """Settings as command-line options."""
    return " ".join(
        f"--set {key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )
