"""The configuration: one JSON file, validated once here and passed on as frozen objects.

`schema()` turns it into the JSON Schema that editors use. The sections themselves are in `sections/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from hildanext.config.data import DataConfig, SourceConfig
from hildanext.config.decoding import ENGINES, CalibrateConfig, DecodeConfig, EngineConfig, EngineName, Mode
from hildanext.config.evaluation import EvaluateConfig
from hildanext.config.lora import LoraConfig
from hildanext.config.model import SHIPPED_MODEL, Convention, ModelConfig, PathsConfig
from hildanext.config.section import Section
from hildanext.config.serving import JobsConfig, ServerConfig
from hildanext.config.training import DpoConfig, LossConfig, NoiseConfig, SftConfig, TrainConfig, WsdConfig
from hildanext.errors import ConfigError

__all__ = [
    "ENGINES",
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
    "load_config",
    "parse_config",
    "schema",
]


class Config(Section):
    """HildaNext's configuration. Unknown keys are refused."""

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
                "lora.base 'int8' cannot be sharded by train.sharding 'fsdp2'; use 'nf4', or sharding 'none'"
            )
        if self.loss.distill and self.train.sharding == "fsdp2":
            raise ValueError(
                "loss.distill needs the base whole in each process; set train.sharding to 'none', or distill to 0"
            )
        return self


def schema() -> dict[str, Any]:
    """JSON Schema of the configuration file, with every key's description (and the `$schema` key editors read)."""
    result = Config.model_json_schema()
    result["properties"]["$schema"] = {"type": "string", "description": "Path or URL of this schema, for editors."}
    return result


def _one_line(error: ValidationError, origin: str) -> str:
    """First problem of a pydantic error as `origin: key: what is wrong`."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{origin}: unknown key '{key}'; remove it or see 'hildanext init' for the known keys{more}"
    message = first["msg"].removeprefix("Value error, ")
    # Sections, and text that is no JSON, are not shown: secrets may be among them.
    is_whole = not first["loc"] or isinstance(first["input"], dict)
    value = "" if is_whole else f", got {first['input']!r}"
    return f"{origin}: '{key}': {message[0].lower()}{message[1:]}{value}{more}"


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply `section.key=value` items to a raw configuration. Values are JSON; what is not JSON is a string.

    Raises ConfigError for an item without '=' or a path that runs through a plain value.
    """
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {item}: expected section.key=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node = raw
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {item}: '{key}' is not a section")
        node[keys[-1]] = value
    return raw


def parse_config(raw: dict[str, Any], origin: str = "config") -> Config:
    """Validate a raw dictionary. Raises ConfigError with one line that names the key."""
    raw = {key: value for key, value in raw.items() if key != "$schema"}
    try:
        return Config.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError(_one_line(error, origin)) from None


def load_config(path: str | Path | None = None, overrides: list[str] | None = None, base: str | None = None) -> Config:
    """Read a JSON file (None: the defaults), apply `--set` overrides and validate.

    base: `model.base` where neither file nor overrides name one. Raises ConfigError for a missing file, broken JSON or any refused key.
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
