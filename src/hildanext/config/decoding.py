"""Decoding parameters, engines, and the search space of `calibrate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from hildanext.config.section import Section

Mode = Literal["EXACT", "S_MODE", "Q_MODE"]
MODES: tuple[Mode, ...] = get_args(Mode)
Threshold = Literal["preset"]

# The bounds of what a request may ask for, here only: the configuration, HTTP bodies and the chat use these types.
# `temperature` and `top_p` as in OpenAI's API, `top_k` as in vLLM. vLLM's `repetition_penalty` is above 0 and at most 2;
# one near 0 would make every earlier token win at once.
MOST_POST_STEPS = 256
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PostSteps = Annotated[int, Field(ge=0, le=MOST_POST_STEPS)]
MOST_ROWS = 256  # of a pass that verifies drafts
PassRows = Annotated[int, Field(ge=1, le=MOST_ROWS)]
TauAccept = Annotated[float, Field(gt=0.0, le=1.0)]
Lookup = Annotated[int, Field(ge=2, le=4)]
EditBlocks = Annotated[int, Field(ge=0, le=64)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
TopK = Annotated[int, Field(ge=1)]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]
RepetitionPenalty = Annotated[float, Field(ge=0.1, le=2.0)]
# As in OpenAI's API and vLLM's.
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
MinP = Annotated[float, Field(ge=0.0, le=1.0)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # JSON's keys are strings
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
LogitBias = Annotated[dict[TokenId, Bias], Field(max_length=1024, json_schema_extra={"additionalProperties": False})]
MOST_LOGPROBS = 20
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class DecodeConfig(Section):
    """Thresholds, sampling and length of a completion. 'preset' takes the mode's value."""

    mode: Mode | None = Field(
        None,
        description="Preset of decoding parameters: 'EXACT' gives the base's own text, 'Q_MODE' favours quality, 'S_MODE' "
        "speed. Values set by calibrate replace the built-in presets. null takes 'EXACT' where the model is gated or not "
        "converted, else 'Q_MODE'.",
    )
    tau_accept: float | Threshold | None = Field(
        "preset",
        description="A draft is accepted if it is the base's choice, or if its probability under the base is at least this "
        "share (above 0, at most 1) of the likeliest token's and it repeats no pair of tokens of the completion. 1 keeps the "
        "base's text exactly, null edits blocks instead of verifying drafts, 'preset' takes the mode's value. Applies to gated adapters.",
    )
    rows: PassRows | Threshold = Field(
        "preset",
        description="Number of tokens and masks in a pass that verifies drafts. More rows give more tokens per pass, and "
        "slower passes. 'preset' takes the mode's value.",
    )
    lookup: Lookup | None = Field(
        None,
        description="Also draft what followed the same last words earlier in the text; the value is the smallest number of "
        "equal tokens. Applies where drafts are verified. null looks nothing up.",
    )
    tau_mask: float | Threshold = Field(
        "preset",
        description="Confidence (0 to 1) above which a masked token is filled. Lower values need fewer passes; "
        "'preset' takes the mode's value.",
    )
    tau_edit: float | Threshold | None = Field(
        "preset",
        description="Confidence (0 to 1) above which a filled token is replaced. 0 accepts every change, null disables "
        "editing, 'preset' takes the mode's value.",
    )
    max_post_steps: PostSteps | Threshold = Field(
        "preset",
        description="Maximum number of editing passes after a block has no masks left. 0 ends the block at once; "
        "'preset' takes the mode's value.",
    )
    min_indel_confidence: float | Threshold | None = Field(
        "preset",
        description="Confidence (0 to 1) above which a token is deleted or one is inserted, besides tau_mask and tau_edit. "
        "null only substitutes, 'preset' is 0 for models trained with noise.edits 'levenshtein' and null for others.",
    )
    block_size: int | None = Field(
        None,
        ge=1,
        description="Block size in tokens. null takes the calibrated block size of the mode if there is one, else the "
        "checkpoint's.",
    )
    edit_blocks: EditBlocks | Threshold = Field(
        "preset",
        description="Number of finished blocks before the current one that can still be edited; 0 edits the current "
        "block only. 'preset' takes the mode's value.",
    )
    max_new_tokens: int = Field(128, ge=1, description="Maximum length of a completion in tokens.")
    temperature: Temperature = Field(
        0.0, description="Sampling temperature, 0 to 2. 0 always takes the most likely token."
    )
    top_k: TopK | None = Field(
        None, description="Sample from the k most likely tokens only. null samples from all tokens."
    )
    top_p: TopP = Field(
        1.0,
        description="Sample from the smallest set of most likely tokens whose total probability reaches this value. 1 "
        "disables it.",
    )
    repetition_penalty: RepetitionPenalty = Field(
        1.0,
        description="Values above 1, at most 2, make tokens that occur earlier in the text less likely; values below "
        "1, at least 0.1, make them more likely. 1 disables the penalty.",
    )
    presence_penalty: Penalty = Field(
        0.0,
        description="Subtracted from the logit of every token that occurs earlier in the completion, -2 to 2. 0 "
        "disables it.",
    )
    frequency_penalty: Penalty = Field(
        0.0,
        description="Subtracted from a token's logit once for each time that it occurs earlier in the completion, -2 to "
        "2. 0 disables it.",
    )
    min_p: MinP = Field(
        0.0,
        description="Sample only from tokens whose probability is at least this share of the most likely token's. 0 "
        "disables it.",
    )
    logit_bias: LogitBias = Field(
        default_factory=dict,
        description="Token ids and what is added to their logits, -100 to 100. -100 excludes a token in effect, 100 "
        "forces it.",
    )
    logprobs: Logprobs | None = Field(
        None,
        description="Report the log-probability of every token of a completion, and of this many most likely tokens at "
        "its position, at most 20. null reports none.",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        max_length=16,
        description="Strings that end a completion. The completion is cut before the first one found.",
    )
    seed: Seed | None = Field(
        None,
        description="Seed of the sampling noise. null draws a new seed for each request and reports it with the "
        "answer. It has no effect at temperature 0.",
    )

    @model_validator(mode="after")
    def _thresholds(self) -> DecodeConfig:
        for name in ("tau_mask", "tau_edit", "min_indel_confidence"):
            value = self.__dict__[name]
            if isinstance(value, (int, float)) and not 0.0 <= value <= 1.0:
                raise ValueError(f"'{name}': must be between 0 and 1, got {value:g}")
        if isinstance(self.tau_accept, (int, float)) and not 0.0 < self.tau_accept <= 1.0:
            raise ValueError(f"'tau_accept': must be above 0 and at most 1, got {self.tau_accept:g}")
        return self


BROUGHT_BY_MODE = ("tau_mask", "tau_edit", "max_post_steps", "edit_blocks", "tau_accept", "rows")


def changed_settings(changes: dict[str, Any]) -> dict[str, Any]:
    """Keys of `decode` to replace for a request or a chat command that asks for `changes`.

    A mode brings its own values of BROUGHT_BY_MODE. Of these, only the ones in `changes` are kept. The block size stays
    as configured: it is a setting of the checkpoint and of the server's fixed shapes.
    """
    return (dict.fromkeys(BROUGHT_BY_MODE, "preset") if "mode" in changes else {}) | changes


EngineName = Literal["dinfer", "transformers", "dummy"]
ENGINES: tuple[EngineName, ...] = ("dinfer", "transformers", "dummy")


class EngineConfig(Section):
    """Inference engine, runtime and number of concurrent requests."""

    order: list[EngineName] = Field(
        default_factory=lambda: list(ENGINES),
        min_length=1,
        description="Engines in order of preference. The first that can serve the model is used. 'dummy' answers "
        "without a model: always if it is listed alone, else only in 'serve' when the weights of the model in this "
        "package are not installed.",
    )
    runtime: Literal["auto", "eager", "compiled", "cudagraphs", "openvino"] = Field(
        "auto",
        description="Runtime of the transformers engine. 'auto' selects CUDA graphs on a GPU, OpenVINO on a CPU where "
        "it is installed, and eager PyTorch otherwise.",
    )
    weights: Literal["native", "int8"] = Field(
        "native",
        description="Weight format of the OpenVINO runtime. 'int8' quantizes weights and activations to 8 bits: "
        "faster and smaller, but the text may differ.",
    )
    slots: int = Field(8, ge=1, description="Number of requests decoded at the same time. Further requests wait.")
    context: int | None = Field(
        None,
        ge=1,
        description="Maximum length of prompt and completion together, in tokens. null takes the "
        "longest text that the model runs exactly (its positions or sliding window), at most 4096.",
    )
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        description="Number of prompt tokens processed in one forward pass. null takes 128 on a CPU, where more are no "
        "faster and take more memory, and 512 elsewhere.",
    )
    dinfer_port: int = Field(
        12345, ge=1024, le=65535, description="TCP port for communication between dInfer's processes."
    )
    dinfer_gpus: int = Field(1, ge=1, description="Number of GPUs used by dInfer.")
    dinfer_backend: Literal["sglang", "vllm"] = Field("sglang", description="Inference backend used by dInfer.")


class CalibrateConfig(Section):
    """Settings that calibrate tries, and how much quality it may give up."""

    prompts: int = Field(16, ge=1, description="Maximum number of prompts to measure with.")
    tau_mask: list[float] = Field(
        default_factory=lambda: [0.3, 0.5, 0.7, 0.85, 0.95], min_length=1, description="Values of tau_mask to try."
    )
    tau_edit: list[float | None] = Field(
        default_factory=lambda: [None, 0.0, 0.5, 0.9],
        min_length=1,
        description="Values of tau_edit to try. null disables editing.",
    )
    max_post_steps: list[PostSteps] = Field(
        default_factory=lambda: [0, 1, 4, 16], min_length=1, description="Values of max_post_steps to try."
    )
    block_sizes: list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        min_length=1,
        description="Block sizes to try, in tokens. null tries half, once and twice the checkpoint's block size.",
    )
    edit_blocks: list[EditBlocks] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1, description="Values of edit_blocks to try."
    )
    tau_accept: list[TauAccept] = Field(
        default_factory=lambda: [0.9, 0.7, 0.5, 0.3],
        min_length=1,
        description="Values of tau_accept to try for Q_MODE and S_MODE of gated adapters.",
    )
    rows: list[PassRows] = Field(
        default_factory=lambda: [6, 8, 12, 16],
        min_length=1,
        description="Values of decode.rows to try for gated adapters, each with every tau_accept. Tokens per second decide.",
    )
    q_loss: float = Field(
        0.05,
        ge=0.0,
        description="Quality that Q_MODE may give up, in nats per token below the best setting. The fastest setting "
        "within this limit is chosen.",
    )
    s_loss: float = Field(
        0.3,
        ge=0.0,
        description="Quality that S_MODE may give up, in nats per token below the best setting. The fastest setting "
        "within this limit is chosen.",
    )
    least_variety: float = Field(
        0.8,
        ge=0.0,
        le=1.0,
        description="Minimum variety of the text (distinct-2) as a share of the best setting's. Settings below it are "
        "rejected, which excludes repetitive text.",
    )

    @model_validator(mode="after")
    def _shares(self) -> CalibrateConfig:
        for name in ("tau_mask", "tau_edit"):
            for value in self.__dict__[name]:
                if value is not None and not 0.0 <= value <= 1.0:
                    raise ValueError(f"'{name}': every value must be between 0 and 1, got {value:g}")
        return self
