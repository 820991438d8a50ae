"""GET /settings: the values that a request gets for the settings that it leaves out."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from hildanext.config import Config, DecodeConfig, Mode, changed_settings
from hildanext.config.decoding import BROUGHT_BY_MODE
from hildanext.decoding.engines import Engine
from hildanext.server.answers import problems
from hildanext.server.worker import Worker


class DefaultSettings(BaseModel):
    """The keys of `decode` with all presets resolved: no value is 'preset', and mode and block size are not null."""

    default: DecodeConfig = Field(description="For a request that names no mode.")
    modes: dict[Mode, DecodeConfig] = Field(description="For a request that names this mode, of those the model has.")
    deadline_s: float = Field(description="Time limit of a request in seconds, and the longest that it may ask for.")
    context: int | None = Field(description="Most tokens of prompt and answer together; null: no limit.")


def defaults_routes(config: Config, worker: Worker) -> APIRouter:
    router = APIRouter()

    @router.get("/settings", responses=problems(401, 403, 503))
    async def settings() -> DefaultSettings:
        """What a request that leaves a setting out is decoded with, for each mode of the served model."""
        engine = worker.opened()
        return DefaultSettings(
            default=_resolved(config, engine, config.decode),
            modes={mode: _resolved(config, engine, _in_mode(config.decode, mode)) for mode in engine.modes},
            deadline_s=config.server.deadline_s,
            context=engine.context,
        )

    return router


def _in_mode(decode: DecodeConfig, mode: Mode) -> DecodeConfig:
    return decode.model_copy(update=changed_settings({"mode": mode}))


def _resolved(config: Config, engine: Engine, decode: DecodeConfig) -> DecodeConfig:
    """Replace what depends on the mode and the checkpoint; every other key already has its value."""
    names = ("mode", "block_size", "min_indel_confidence", *BROUGHT_BY_MODE)
    settings = engine.settings(config.model_copy(update={"decode": decode}))._asdict()
    return decode.model_copy(update={name: settings[name] for name in names})
