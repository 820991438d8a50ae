"""Low-rank adapters: train a few per cent of the weights beside a frozen base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hildanext.config.section import Section

Quantization = Literal["native", "int8", "nf4"]


class LoraConfig(Section):
    """An adapter trained beside frozen weights (LoRA, QLoRA)."""

    rank: int | None = Field(
        None, ge=1, le=1024, description="Rank of the adapter that is trained; null is off: every weight is trained."
    )
    alpha: float | None = Field(
        None, gt=0.0, description="The change is scaled by alpha / rank; null is twice the rank."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on what goes into the adapted linear layers.")
    targets: Literal["all-linear"] | list[Annotated[str, Field(min_length=1)]] = Field(
        "all-linear",
        min_length=1,
        description="Linear layers that are adapted, by name (for example ['q_proj', 'v_proj']). The mask token's row and the "
        "head always are.",
    )
    base: Quantization = Field(
        "native",
        description="How the frozen weights are held: 'native' (the compute type), or quantized by bitsandbytes to 'int8' or "
        "'nf4' (QLoRA; CPUs, and NVIDIA GPUs from compute capability 6.0).",
    )

    @model_validator(mode="after")
    def _needs_rank(self) -> LoraConfig:
        if self.rank is None and self.base != "native":
            raise ValueError(f"base '{self.base}' is frozen and needs an adapter to train: set rank")
        return self

    @property
    def scaling(self) -> float:
        """alpha / rank of an adapter that is trained."""
        assert self.rank is not None
        return 2.0 if self.alpha is None else self.alpha / self.rank
