"""Request bodies of OpenAI's API. What a field asks for is decided here; what is not supported is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hildanext.config import DecodeConfig, changed_settings
from hildanext.config.decoding import Logprobs, Seed, TopK
from hildanext.decoding.engines import Rendering
from hildanext.server.bodies import NULL_MEANS_OFF, SamplingBody, Stop, Text, Tolerant, is_nothing
from hildanext.server.structured import MOST_TOOLS, ResponseFormat, Structure, Tool, ToolChoice, structure

MOST_CHOICES = 128  # of `n`, as in OpenAI's API; an engine has fewer slots
MOST_PROMPTS = 64
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]
MaxTokens = Annotated[int, Field(ge=1)] | Literal[-1]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class StreamOptions(Tolerant):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class TextPart(Tolerant):
    type: Literal["text"]
    text: Text


class FunctionCall(Tolerant):
    name: Text
    arguments: Text = Field("", description="A JSON object.")


class ToolCall(Tolerant):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored = None


class ChatMessage(Tolerant):
    """A message of a request. A message of an answer is accepted as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = Field(None, description="Accepted and ignored.")

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} needs 'content'; give its text")
        return self

    @property
    def as_ours(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        given = {name: getattr(self, name) for name in ("name", "tool_call_id", "reasoning_content")}
        return message | {name: value for name, value in given.items() if value}


def rendering_of(messages: list[ChatMessage], begins: bool | None, continues: bool | None) -> Rendering:
    """How a template renders messages. Raises ValueError for flags that contradict each other.

    begins: `add_generation_prompt`, by default true unless the last message is continued.
    """
    if continues and begins:
        raise ValueError("'continue_final_message': set 'add_generation_prompt' to false, or remove one of them")
    if continues and (not messages or messages[-1].role != "assistant" or not messages[-1].as_ours["content"]):
        raise ValueError("'continue_final_message': the last message must be the assistant's, with text; add it")
    return Rendering(
        add_generation_prompt=not continues if begins is None else begins, continue_final_message=bool(continues)
    )


class OpenAIBody(Tolerant, SamplingBody):
    """Fields of both endpoints. OpenAI's clients send the settings that OpenAI does not have in `extra_body`."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        None, description="Answers to each prompt, at most engine.slots. With a seed, answer i is drawn with seed + i."
    )
    seed: Seed | Literal[-1] | None = Field(
        None, description="null, -1 or omitted: the server's seed, or a new one for each answer."
    )
    stop: Annotated[Text, Field(max_length=200)] | Annotated[list[Stop], Field(max_length=16)] | None = None
    response_format: ResponseFormat | None = Field(None, description="The form of the answer; {} is none.")
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    top_k: TopK | Literal[0, -1] | None = Field(None, description="0 and -1: all tokens.")

    @field_validator("response_format", "tool_choice", "tools", mode="before", check_fields=False)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        unused = info.field_name == "tools" and info.data.get("tool_choice") == "none"
        return None if unused or is_nothing(value) else value

    @property
    def most_tokens(self) -> int | None:
        """The longest answer in tokens; None: what is left of the context."""
        raise NotImplementedError

    @property
    def asked_logprobs(self) -> int | None:
        """The number of likely tokens to report beside each token; None: no report."""
        raise NotImplementedError

    @property
    def wanted(self) -> Structure:
        """The grammar and the tools that the request asks for. Raises UsageError, see `structure`."""
        return structure(self.response_format)

    def decode_config(self, base: DecodeConfig) -> DecodeConfig:
        """The server's settings with those of the request."""
        names = (set(type(self).model_fields) & set(DecodeConfig.model_fields)) - {"stop", "logprobs", *NULL_MEANS_OFF}
        given: dict[str, Any] = {name: value for name, value in self if name in names and not is_nothing(value)}
        given |= {name: getattr(self, name) for name in NULL_MEANS_OFF if name in self.model_fields_set}
        if self.seed == -1:
            del given["seed"]
        if self.top_k in (0, -1):
            given["top_k"] = None
        if self.most_tokens is not None:
            given["max_new_tokens"] = self.most_tokens
        if self.stop:
            given["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return base.model_copy(update=changed_settings(given) | {"logprobs": self.asked_logprobs})


class CompletionBody(OpenAIBody):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description="A text, several texts, the token ids of a text, or those of several texts.")
    max_tokens: MaxTokens | None = Field(None, description="null, -1 or omitted: what is left of the context.")
    logprobs: Annotated[int, Field(ge=0, le=5)] | Literal[False] | None = None
    echo: bool | None = Field(None, description="Put the prompt before the answer; not together with logprobs.")
    best_of: Literal[1] | None = None

    @model_validator(mode="after")
    def _no_logprobs_of_the_prompt(self) -> CompletionBody:
        if self.echo and self.asked_logprobs is not None:
            raise ValueError("'echo': a prompt's tokens have no log-probabilities here; remove 'echo' or 'logprobs'")
        return self

    @property
    def most_tokens(self) -> int | None:
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, each a text or token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class ChatBody(OpenAIBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: MaxTokens | None = Field(None, description="Older name of max_completion_tokens.")
    max_completion_tokens: MaxTokens | None = Field(
        None, description="null, -1 or omitted: what is left of the context."
    )
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = Field(None, description="End the prompt with the beginning of an answer.")
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, which is the assistant's, instead of answering it."
    )
    # Before `tools`, whose check reads it.
    tool_choice: ToolChoice | None = Field(None, description="null or omitted: 'auto'.")
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call.")
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    prediction: Ignored = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs': needs 'logprobs': true; add it, or remove 'top_logprobs'")
        self.rendering  # noqa: B018  (raises ValueError)
        return self

    @property
    def most_tokens(self) -> int | None:
        found = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if found == -1 else found

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted(self) -> Structure:
        return structure(self.response_format, self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def rendering(self) -> Rendering:
        """How the chat template renders the messages."""
        return rendering_of(self.messages, self.add_generation_prompt, self.continue_final_message)
