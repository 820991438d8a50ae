"""Base class of all configuration sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section that refuses unknown keys, implicit type conversions, NaN and infinity.

    Validators that concern several keys raise ValueError with a message of the form `'key': what is wrong; what to do`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
