"""`preflight`: does a training fit, and what to change where it does not. Nothing is loaded but the tokenizer's libraries."""

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
from hildanext.training.footprint import Command, Peak, measure, predict, shape_of

GB = 1e9


class Change(NamedTuple):
    """Something that makes a step smaller, as `--set` takes it, and its price."""

    settings: dict[str, Any]
    price: str


class Tried(NamedTuple):
    changes: list[Change]
    peak: Peak


def policy_of(config: ModelConfig, card: str | None) -> Policy:
    """The policy of this machine, or of a GPU that is not here, by its compute capability ('sm_61')."""
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
        compute, reason = DTYPES[config.dtype], "asked for in the configuration"
    return policy_for(torch.device("cuda"), capability, compute, reason, has_triton=True)


def memory_there(policy: Policy, card: str | None) -> int | None:
    """Bytes that a training can have here; None for a card that is not here."""
    if card is not None:
        return None
    if policy.device.type == "cuda":
        return torch.cuda.mem_get_info(policy.device)[1]
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def possible_changes(config: Config) -> list[Change]:
    """What could be changed, the cheapest first: none of them changes what is learned but the last three."""
    train, rows = config.train, config.train.rows_per_step
    found = []
    if not train.gradient_checkpointing:
        found.append(Change({"train.gradient_checkpointing": True}, "a third more compute"))
    if train.micro_batch > 1:
        half = next(size for size in range(train.micro_batch // 2, 0, -1) if rows % size == 0)
        found.append(Change({"train.micro_batch": half}, "smaller matrices"))
        if half > 1:
            found.append(Change({"train.micro_batch": 1}, "smaller matrices"))
    if config.lora.rank is None:
        if train.optimizer == "adamw":
            found.append(Change({"train.optimizer": "adamw8bit"}, "the extra 'quant'; 8-bit moments"))
        if train.optimizer != "adafactor":
            found.append(Change({"train.optimizer": "adafactor"}, "another optimizer"))
        found.append(Change({"lora.rank": 16}, "an adapter in place of all weights"))
    if config.lora.base == "native":
        settings = {"lora.base": "nf4"} | ({"lora.rank": 16} if config.lora.rank is None else {})
        found.append(Change(settings, "the extra 'quant'; frozen weights in 4 bits"))
    if config.data.seq_len >= 256:
        found.append(Change({"data.seq_len": config.data.seq_len // 2}, "shorter rows; tokenize again"))
    return found


def changed(config: Config, changes: list[Change]) -> Config:
    settings = [f"{key}={json.dumps(value)}" for change in changes for key, value in change.settings.items()]
    return parse_config(apply_overrides(config.model_dump(mode="json"), settings))


def advice(
    config: Config, command: Command, policy: Policy, shape: PreTrainedConfig, limit: int
) -> tuple[list[Tried], Tried | None]:
    """Each change alone, and the first of them, added up in order, that fit together; None if all are not enough."""
    changes = possible_changes(config)
    alone = [Tried([one], predict(changed(config, [one]), command, policy, shape)) for one in changes]
    taken: list[Change] = []
    for one in changes:
        taken = [earlier for earlier in taken if not set(earlier.settings) & set(one.settings)] + [one]
        if "lora.rank" in one.settings:
            taken = [earlier for earlier in taken if "train.optimizer" not in earlier.settings]
        peak = predict(changed(config, taken), command, policy, shape)
        if peak.total <= limit:
            return alone, Tried(taken, peak)
    return alone, None


def preflight(
    config: Config, command: Command, card: str | None, memory_gb: float | None, measured: bool
) -> dict[str, Any]:
    """The policy, the peak and its parts, the memory there is, and changes that make it fit.

    Raises UsageError or ConfigError for a model, a device or a card that is not there.
    """
    if measured and card is not None:
        raise ConfigError("--measure runs here: it does not go with --card")
    if command == "dpo" and config.lora.rank is None:
        raise ConfigError("'lora.rank': dpo trains an adapter; set a rank")
    policy, shape = policy_of(config.model, card), shape_of(config.model)
    peak = predict(config, command, policy, shape)
    there = memory_there(policy, card) if memory_gb is None else round(memory_gb * GB)
    report: dict[str, Any] = {
        "command": command,
        "model": config.model.base,
        "policy": policy.as_dict() | {"optimizer": config.train.optimizer},
        "peak": {**peak._asdict(), "total": peak.total},
        "memory": there,
        "fits": None if there is None else peak.total <= there,
    }
    if there is not None and peak.total > there:
        say("it does not fit; looking for what would help")
        alone, together = advice(config, command, policy, shape, there)
        report["changes"] = [_told(one) for one in alone]
        report["fitting"] = None if together is None else _told(together)
    if measured:
        report["measured"] = measure(config, command, policy, shape)
    return report | {"stdout": table(report)}


def _told(one: Tried) -> dict[str, Any]:
    settings = {key: value for change in one.changes for key, value in change.settings.items()}
    return {"set": settings, "price": "; ".join(change.price for change in one.changes), "total": one.peak.total}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
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
        return "\n".join([*lines, "", "give --memory GB to hear whether it fits"])
    lines += [
        "",
        f"memory        {report['memory'] / GB:8.2f} GB: {'it fits' if report['fits'] else 'it does NOT fit'}",
    ]
    if report["fits"]:
        return "\n".join(lines)
    lines += ["", "a change alone:"]
    lines += [f"  {one['total'] / GB:6.2f} GB  {_flags(one['set'])}  ({one['price']})" for one in report["changes"]]
    if report["fitting"] is None:
        return "\n".join([*lines, "all of them together are not enough: a smaller model, or more memory"])
    fitting = report["fitting"]
    return "\n".join([*lines, "fits:", f"  {fitting['total'] / GB:6.2f} GB  {_flags(fitting['set'])}"])


def _flags(settings: dict[str, Any]) -> str:
    return " ".join(
        f"--set {key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )
