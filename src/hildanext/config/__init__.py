"""The configuration: one JSON file, validated once and passed on as frozen objects.

Each module of this package defines a group of sections; read `training.py` first. `schema()` returns the JSON Schema
that editors, the web form and the configuration reference use.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from hildanext.config.data import DataConfig, SourceConfig
from hildanext.config.decoding import (
    ENGINES,
    MODES,
    MOST_POST_STEPS,
    MOST_ROWS,
    CalibrateConfig,
    DecodeConfig,
    EngineConfig,
    EngineName,
    Mode,
    changed_settings,
)
from hildanext.config.evaluation import EvaluateConfig
from hildanext.config.lora import LoraConfig
from hildanext.config.model import SHIPPED_MODEL, Convention, ModelConfig, PathsConfig
from hildanext.config.section import Section
from hildanext.config.serving import JobsConfig, ServerConfig
from hildanext.config.training import DpoConfig, LossConfig, NoiseConfig, SftConfig, TrainConfig, WsdConfig
from hildanext.errors import ConfigError

__all__ = [
    "ENGINES",
    "MODES",
    "MOST_POST_STEPS",
    "MOST_ROWS",
    "SHIPPED_MODEL",
    "CalibrateConfig",
    "Config",
    "Convention",
    "DataConfig",
    "DecodeConfig",
    "DpoConfig",
    "EngineConfig",
    "EngineName",
    "EvaluateConfig",
    "JobsConfig",
    "LoraConfig",
    "LossConfig",
    "Mode",
    "ModelConfig",
    "NoiseConfig",
    "PathsConfig",
    "Section",
    "ServerConfig",
    "SftConfig",
    "SourceConfig",
    "TrainConfig",
    "WsdConfig",
    "apply_overrides",
    "changed_settings",
    "load_config",
    "parse_config",
    "schema",
]


class Config(Section):
    """All sections of the configuration file. Every section and key is optional; unknown keys are refused."""

    paths: PathsConfig = PathsConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    wsd: WsdConfig = WsdConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    sft: SftConfig = SftConfig()
    dpo: DpoConfig = DpoConfig()
    decode: DecodeConfig = DecodeConfig()
    engine: EngineConfig = EngineConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    server: ServerConfig = ServerConfig()
    jobs: JobsConfig = JobsConfig()

    @model_validator(mode="after")
    def _shardable(self) -> Config:
        if self.lora.base == "int8" and self.train.sharding == "fsdp2":
            raise ValueError(
                "'lora.base': 'int8' cannot be sharded by train.sharding 'fsdp2'; use 'nf4', or set train.sharding to "
                "'none'"
            )
        if self.loss.distill and self.train.sharding == "fsdp2" and not self.lora.gate:
            raise ValueError(
                "'loss.distill': needs the complete base in each process; set train.sharding to 'none', or "
                "loss.distill to 0"
            )
        return self

    @model_validator(mode="after")
    def _gated(self) -> Config:
        if not self.lora.gate:
            return self
        if self.model.convention == "in_place":
            raise ValueError(
                "'model.convention': a gated adapter needs 'shifted': the clean row before a token is the base's own word "
                "for it; set it to 'shifted' or lora.gate to false"
            )
        unused = {"noise.turns": self.noise.turns == 2, "noise.complementary": self.noise.complementary}
        unused |= {"noise.embed_std": self.noise.embed_std > 0, "loss.cap_weight": self.loss.cap_weight > 0}
        unused |= {"noise.edits": self.noise.edits == "levenshtein"}
        for key in [key for key, is_set in unused.items() if is_set]:
            raise ValueError(f"'{key}': does not apply to gated adapters; remove it or set lora.gate to false")
        return self


def schema() -> dict[str, Any]:
    """JSON Schema of the configuration file with a description of every key, `$schema` included."""
    result = Config.model_json_schema()
    result["properties"]["$schema"] = {
        "type": "string",
        "description": "Path or URL of this schema. Editors read it; HildaNext ignores it.",
    }
    return result


def _one_line(error: ValidationError, origin: str) -> str:
    """First problem of a pydantic error as `origin: 'key': what is wrong`."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        key = ".".join(path)
        return f"{origin}: unknown key '{key}'; remove it, or run 'hildanext init' for a file with all keys{more}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    # A section's validator names the key itself, relative to the section.
    if named := re.match(r"'([\w.]+)': ", message):
        path, message = [*path, named[1]], message[named.end() :]
    # Whole sections and invalid JSON are not shown: they may contain secrets.
    is_whole = not first["loc"] or isinstance(first["input"], dict)
    value = "" if is_whole else f", got {first['input']!r}"
    key = ".".join(path) or "(top level)"
    return f"{origin}: '{key}': {message[0].lower()}{message[1:]}{value}{more}"


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of a raw configuration with `section.key=value` items applied.

    Values are parsed as JSON; a value that is not JSON is taken as a string. Raises ConfigError for an item without '='
    and for a path through a value that is not a section.
    """
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {item}: expected section.key=value, for example train.lr=1e-4")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node = raw
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"--set {item}: '{key}' is not a section; give the path of a key as section.key=value"
                )
        node[keys[-1]] = value
    return raw


def parse_config(raw: dict[str, Any], origin: str = "config") -> Config:
    """Validate a raw dictionary. Raises ConfigError with one line that names `origin` and the key."""
    raw = {key: value for key, value in raw.items() if key != "$schema"}
    try:
        return Config.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError(_one_line(error, origin)) from None


def load_config(path: str | Path | None = None, overrides: list[str] | None = None, base: str | None = None) -> Config:
    """Read a JSON file (None: the defaults), apply `--set` overrides and validate the result.

    base: `model.base` if neither the file nor the overrides set it. Raises ConfigError for an unreadable file, invalid
    JSON and invalid keys.
    """
    raw: Any = {}
    origin = "config"
    if path is not None:
        origin = str(path)
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: the configuration must be a JSON object")
    raw = apply_overrides(raw, overrides or [])
    if base is not None and isinstance(model := raw.setdefault("model", {}), dict):
        model.setdefault("base", base)
    return parse_config(raw, origin)
