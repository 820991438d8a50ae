"""Low-rank adapters: train a few per cent of the weights beside a frozen base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hildanext.config.section import Section

Quantization = Literal["native", "int8", "nf4"]


class LoraConfig(Section):
    """Low-rank adapter (LoRA, QLoRA) trained while the base stays frozen."""

    rank: int | None = Field(
        None, ge=1, le=1024, description="Rank of the adapter. null trains all weights without an adapter."
    )
    alpha: float | None = Field(
        None, gt=0.0, description="Adapter scale: the update is multiplied by alpha / rank. null means twice the rank."
    )
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Dropout probability on the inputs of adapted layers. 0 disables dropout."
    )
    targets: Literal["all-linear"] | list[Annotated[str, Field(min_length=1)]] = Field(
        "all-linear",
        min_length=1,
        description="Linear layers to adapt: 'all-linear' or a list of names such as ['q_proj', 'v_proj']. "
        "The mask token's embedding and the output head are always included.",
    )
    base: Quantization = Field(
        "native",
        description="Storage format of the frozen weights: 'native' (the compute format), or 'int8' or 'nf4' to save "
        "memory with bitsandbytes (CPU, or NVIDIA GPU of compute capability 6.0 or higher).",
    )

    gate: bool = Field(
        False,
        description="Gated adapter: it acts on denoised rows only, so clean tokens run through the untouched base, which "
        "verifies what was drafted. Requires rank and the convention 'shifted'.",
    )
    draft_head: int | None = Field(
        None,
        ge=1,
        description="Width of a small map that tells each draft the token before it. Applies to gated adapters. null "
        "trains none.",
    )
    causal_groups: bool = Field(
        False,
        description="Whether a row of a group sees only the rows before it in its group. Applies to gated adapters.",
    )

    @model_validator(mode="after")
    def _gated(self) -> LoraConfig:
        if self.gate and self.rank is None:
            raise ValueError("'gate': a gate belongs to an adapter; set lora.rank")
        for name in ("draft_head", "causal_groups"):
            if getattr(self, name) and not self.gate:
                raise ValueError(f"'{name}': applies to gated adapters only; set lora.gate to true")
        return self

    @model_validator(mode="after")
    def _needs_rank(self) -> LoraConfig:
        if self.rank is None and self.base != "native":
            raise ValueError(f"'base': '{self.base}' freezes the base and leaves nothing to train; set lora.rank")
        return self

    @property
    def scaling(self) -> float:
        """alpha / rank of an adapter that is trained."""
        assert self.rank is not None
        return 2.0 if self.alpha is None else self.alpha / self.rank
