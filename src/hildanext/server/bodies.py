"""Request bodies of POST /generate and /generate/base."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from hildanext.config import DecodeConfig, Mode, changed_settings
from hildanext.config.decoding import (
    LogitBias,
    Logprobs,
    Lookup,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    Share,
    TauAccept,
    Temperature,
    TopK,
    TopP,
)
from hildanext.decoding.engines import Prompt


def _whole(text: str) -> str:
    # JSON can contain a lone surrogate; tokenizers cannot encode it.
    try:
        text.encode()  # the event loop waits for this: looking at each character takes a hundred times as long
    except UnicodeEncodeError:
        raise ValueError("the text contains a lone surrogate") from None
    return text


def _whole_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        _whole(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise ValueError("the schema is nested too deeply; flatten it") from None
    return value


Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]
Schema = Annotated[dict[str, Any], AfterValidator(_whole_json)]
NOTHING: list[Any] = [None, False, "", [], {}]  # values that ask for nothing, whatever the field
# Settings whose null is a value, and not "omitted".
NULL_MEANS_OFF = ("tau_edit", "min_indel_confidence", "tau_accept", "lookup")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Tolerant(Body):
    """A body whose unknown fields may be null, empty or false: clients send fields of other servers that way."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"enum": NOTHING}})

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name in cls.model_fields or not is_nothing(value)}


def is_nothing(value: Any) -> bool:
    """Whether a value is null, false or empty. 0 is a value."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


# In JSON Schema: exactly one of the two is there, and not null.
ONE_PROMPT: dict[str, Any] = {
    "oneOf": [
        {"required": [name], "properties": {name: {"type": kind}}}
        for name, kind in (("prompt", "string"), ("messages", "array"))
    ]
}


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Text


class BaseBody(Body):
    """A request to the AR base, which decodes greedily. An omitted setting takes the server's value."""

    model_config = ConfigDict(json_schema_extra=ONE_PROMPT)

    prompt: Text | None = Field(None, description="Text to continue, without the chat template.")
    messages: list[Message] | None = Field(None, description="A conversation, rendered with the model's chat template.")
    max_new_tokens: int | None = Field(None, ge=1)
    stop: list[Stop] | None = Field(None, max_length=16)
    deadline_s: float | None = Field(None, gt=0.0, description="Time limit in seconds; at most server.deadline_s.")
    stream: bool = Field(False, description="Server-sent events: start, token, then done or error.")

    @model_validator(mode="after")
    def _one_prompt(self) -> BaseBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of 'prompt' and 'messages'")
        return self

    @property
    def text(self) -> Prompt:
        """The prompt in the form that `Engine.encode` takes."""
        return self.prompt if self.prompt is not None else [message.model_dump() for message in self.messages or []]

    def decode_config(self, base: DecodeConfig) -> DecodeConfig:
        given = {
            name: value
            for name, value in self
            if name in DecodeConfig.model_fields
            and name in self.model_fields_set
            and (value is not None or name in NULL_MEANS_OFF)
        }
        return base.model_copy(update=changed_settings(given))


class SamplingBody(Body):
    """Settings of `decode` that POST /generate and OpenAI's API take alike. An omitted one takes the server's value."""

    mode: Mode | None = None
    tau_mask: Share | None = None
    tau_edit: Share | None = Field(None, description="null turns editing off; omitted: the preset's value.")
    min_indel_confidence: Share | None = Field(
        None, description="Models with insertions and deletions; null only substitutes; omitted: the server's value."
    )
    tau_accept: TauAccept | None = Field(
        None, description="Gated checkpoints; null edits blocks instead; omitted: the preset's value."
    )
    lookup: Lookup | None = Field(None, description="Also draft from the text so far; null turns it off.")
    temperature: Temperature | None = None
    top_p: TopP | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None


class GenerateBody(BaseBody, SamplingBody):
    """A request. An omitted setting takes the server's value, or with `mode` that mode's value if it has one."""

    top_k: TopK | None = None
    logprobs: Logprobs | None = Field(None, description="Likely tokens to report beside each token; null: no report.")
    seed: Seed | None = Field(None, description="null or omitted: the server's seed, or a new one for each request.")
    json_schema: Schema | None = Field(
        None, description="The answer is JSON that this JSON Schema allows. Editing is off."
    )
    stream: bool = Field(False, description="Server-sent events: start, step, block, then done or error.")
    trace: bool = Field(False, description="Include every denoising step in the answer.")


def n_chars(prompt: Prompt) -> int:
    """Count the characters of a prompt or of all its messages; a token id counts as one."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(1 if isinstance(item, int) else _length(item) for item in prompt)


def _length(message: dict[str, Any]) -> int:
    calls = message.get("tool_calls")
    return len(message["content"]) + (len(json.dumps(calls)) if calls else 0)
