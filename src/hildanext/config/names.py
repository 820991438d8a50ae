"""Settings by name, as Python callers give them: `slots=4`, or with its section `**{"engine.slots": 4}`."""

from __future__ import annotations

import difflib
import json
from typing import Any

from hildanext.config.decoding import DecodeConfig, EngineConfig
from hildanext.config.model import ModelConfig
from hildanext.config.section import Section
from hildanext.errors import ConfigError

# The sections whose keys need no section. No key occurs in two of them.
SECTIONS: dict[str, type[Section]] = {"decode": DecodeConfig, "engine": EngineConfig, "model": ModelConfig}
SECTION_OF = {key: name for name, section in SECTIONS.items() for key in section.model_fields}


def as_overrides(settings: dict[str, Any]) -> list[str]:
    """`section.key=value` items for `load_config`. Raises ConfigError for an unknown name and for a value JSON lacks."""
    items = []
    for name, value in settings.items():
        path = name if "." in name else f"{section_of(name)}.{name}"
        items.append(f"{path}={_as_json(name, value)}")
    return items


def decode_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of one request: keys of `decode`, with or without the section.

    Raises ConfigError for an unknown name, for a setting of the loaded model, and for a value that JSON lacks.
    """
    found = {}
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        section = section or section_of(name)
        if section != "decode":
            raise ConfigError(f"'{name}' is set when the model is loaded: hildanext.load(..., {key}=...)")
        if key not in DecodeConfig.model_fields:
            raise ConfigError(_unknown(name, [f"decode.{known}" for known in DecodeConfig.model_fields]))
        found[key] = json.loads(_as_json(name, value))
    return found


def section_of(name: str) -> str:
    """The section of a key that is given without one. Raises ConfigError for an unknown key."""
    if name not in SECTION_OF:
        raise ConfigError(_unknown(name, list(SECTION_OF)))
    return SECTION_OF[name]


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    hint = " or ".join(f"'{other}'" for other in near)
    remedy = (
        f"did you mean {hint}?"
        if near
        else "give a key of the sections decode, engine or model, or any other as **{'section.key': value}"
    )
    return f"unknown setting '{name}': {remedy}"


def _as_json(name: str, value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"'{name}': {value!r} cannot stand in a configuration file; give text, a number, True, False, None or a list"
        ) from None
