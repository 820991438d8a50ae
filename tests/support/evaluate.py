"""Configurations and problems for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hildanext.config import Config, parse_config

ROOT = Path(__file__).parents[2]
PROBLEMS = ROOT / "src" / "hildanext" / "data" / "sources" / "humaneval_dummy.jsonl"


def changed(config: Config, **sections: Any) -> Config:
    """The configuration with some keys of some sections changed."""
    raw = config.model_dump(mode="json")
    return parse_config(raw | {name: raw[name] | keys for name, keys in sections.items()})
