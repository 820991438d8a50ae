"""Decoding, the engines, and what `calibrate` tries."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hildanext.config.section import Section

Mode = Literal["S_MODE", "Q_MODE"]
Threshold = Literal["preset"]
EditBlocks = Annotated[int, Field(ge=0, le=64)]


class DecodeConfig(Section):
    """Thresholds and sampling."""

    mode: Mode = Field("Q_MODE", description="Preset: S_MODE is speedy (low tau_mask), Q_MODE careful.")
    tau_mask: float | Threshold = Field(
        "preset", description="A masked token is drafted above this confidence; 'preset' is the mode's."
    )
    tau_edit: float | Threshold | None = Field(
        "preset",
        description="An observed token is edited above this confidence; 0 takes every change, null is editing off.",
    )
    max_post_steps: Annotated[int, Field(ge=0)] | Threshold = Field(
        "preset", description="Correction passes after a block's last mask; 0 ends the block at once."
    )
    block_size: int | None = Field(
        None, ge=1, description="Decoding block size; null is the mode's if calibrated, else the checkpoint's."
    )
    edit_blocks: EditBlocks | Threshold = Field(
        "preset",
        description="Finished blocks before the current one that stay editable (multiple block editing).",
    )
    max_new_tokens: int = Field(128, ge=1, description="Token budget of a completion.")
    temperature: float = Field(0.0, ge=0.0, description="0 is greedy.")
    top_k: int | None = Field(None, ge=1, description="Sample among the k best tokens only; null is all.")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="Sample among the fewest best tokens with this probability together."
    )
    repetition_penalty: float = Field(
        1.0, gt=0.0, description="Above 1: tokens that stand before a position become less likely there."
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=16, description="The completion ends before the first of these strings."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampling noise.")

    @model_validator(mode="after")
    def _thresholds(self) -> DecodeConfig:
        for name in ("tau_mask", "tau_edit"):
            value = self.__dict__[name]
            if isinstance(value, (int, float)) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value:g}")
        return self


EngineName = Literal["dinfer", "transformers", "dummy"]
ENGINES: tuple[EngineName, ...] = ("dinfer", "transformers", "dummy")


class EngineConfig(Section):
    """What runs the model, and how many requests at once."""

    order: list[EngineName] = Field(
        default_factory=lambda: list(ENGINES),
        min_length=1,
        description="Engines in order of preference; the first that can serve the model runs. The dummy answers only if listed.",
    )
    runtime: Literal["auto", "eager", "compiled", "cudagraphs", "openvino"] = Field(
        "auto",
        description="What runs the model under the transformers engine. auto: CUDA graphs on GPUs, OpenVINO on CPUs where it is installed, else eager.",
    )
    weights: Literal["native", "int8"] = Field(
        "native", description="OpenVINO only: 8-bit weights and activations. Faster and smaller; the text may differ."
    )
    slots: int = Field(8, ge=1, description="Requests decoded side by side; more wait.")
    context: int | None = Field(
        None, ge=1, description="Tokens a slot holds, prompt and answer. null: the model's own limit, at most 4096."
    )
    prefill_chunk: int = Field(
        512, ge=1, description="Prompt tokens in one forward; bounds the memory of long prompts."
    )
    dinfer_port: int = Field(12345, ge=1024, le=65535, description="Port between dInfer's processes.")
    dinfer_gpus: int = Field(1, ge=1, description="GPUs given to dInfer.")
    dinfer_backend: Literal["sglang", "vllm"] = Field("sglang", description="Runtime under dInfer.")


class CalibrateConfig(Section):
    """What calibrate tries, and what it accepts."""

    prompts: int = Field(16, ge=1, description="Use at most this many prompts.")
    tau_mask: list[float] = Field(
        default_factory=lambda: [0.3, 0.5, 0.7, 0.85, 0.95], min_length=1, description="Values of tau_mask to try."
    )
    tau_edit: list[float | None] = Field(
        default_factory=lambda: [None, 0.0, 0.5, 0.9],
        min_length=1,
        description="Values of tau_edit to try; null is editing off.",
    )
    max_post_steps: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [0, 1, 4, 16], min_length=1, description="Values of max_post_steps to try."
    )
    block_sizes: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, min_length=1, description="Block sizes to try; null is half, once and twice the checkpoint's."
    )
    edit_blocks: list[EditBlocks] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1, description="Values of edit_blocks to try."
    )
    q_loss: float = Field(
        0.05,
        ge=0.0,
        description="Q_MODE is the fastest setting at most this far (nats a token) below the best quality.",
    )
    s_loss: float = Field(0.3, ge=0.0, description="The same for S_MODE.")
    least_variety: float = Field(
        0.8,
        ge=0.0,
        le=1.0,
        description="Settings with less than this share of the most careful one's distinct-2 are out.",
    )

    @model_validator(mode="after")
    def _shares(self) -> CalibrateConfig:
        for name in ("tau_mask", "tau_edit"):
            for value in self.__dict__[name]:
                if value is not None and not 0.0 <= value <= 1.0:
                    raise ValueError(f"{name} must lie in [0, 1], got {value:g}")
        return self
