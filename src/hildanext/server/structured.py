"""Structured output of OpenAI's API: which grammar a request asks for, and tool calls in the answer's text.

Tool calls have the format of Hermes and Qwen (https://github.com/NousResearch/Hermes-Function-Calling):

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from hildanext.decoding.grammar import Grammar, check_schema
from hildanext.errors import UsageError
from hildanext.server.bodies import Schema, Text, Tolerant

MOST_TOOLS = 128  # of a request, as in OpenAI's API
OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEADER = re.compile(r'\s*\{"name": "([^"]*)", "arguments": ')
# The separators that Hermes' and Qwen's templates write.
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonSchema(Tolerant):
    name: Text | None = None
    description: Text | None = None
    strict: bool | None = Field(None, description="The answer always matches the schema, whatever this is.")
    schema_: Schema | None = Field(None, alias="schema")


class ResponseFormat(Tolerant):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Tolerant):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: Schema | None = Field(None, description="JSON Schema of an object; omitted: any object.")
    strict: bool | None = Field(None, description="Arguments always match 'parameters', whatever this is.")


class Tool(Tolerant):
    type: Literal["function"]
    function: Function


class FunctionName(Tolerant):
    name: str


class NamedTool(Tolerant):
    type: Literal["function"] = "function"
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class Structure:
    """What the answer to a request must be. `tools` are shown to the model, which may or must call them."""

    grammar: Grammar | None = None
    tools: list[dict[str, Any]] | None = None


def structure(
    response_format: ResponseFormat | None,
    tools: Sequence[Tool] | None = None,
    tool_choice: ToolChoice | None = None,
    parallel_tool_calls: bool | None = None,
) -> Structure:
    """What the fields of a request ask for together. Raises UsageError, which names the field and the remedy."""
    if isinstance(tool_choice, NamedTool):
        name = tool_choice.function.name
        tools = [tool for tool in tools or [] if tool.function.name == name]
        if not tools:
            raise UsageError(f"'tool_choice': no tool is named '{name[:64]}'; name one of 'tools'")
    if tool_choice == "required" and not tools:
        raise UsageError("'tool_choice': 'required' needs 'tools'; add them, or remove it")
    if tool_choice == "none" or not tools:
        return Structure(_of_format(response_format))
    if response_format is not None and response_format.type != "text":
        raise UsageError("'response_format': an answer that may call tools has no other format; remove it or 'tools'")
    several = not isinstance(tool_choice, NamedTool) and parallel_tool_calls is not False
    lark = call_grammar(tools, several=several, optional=tool_choice in (None, "auto"))
    return Structure(Grammar.of_lark(lark), shown_tools(tools))


def shown_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as the model gets to see them."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def _of_format(asked: ResponseFormat | None) -> Grammar | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Grammar.of_schema(ANY_OBJECT)
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise UsageError("'response_format': 'json_schema' needs a schema in 'json_schema.schema'; add it")
    return Grammar.of_schema(asked.json_schema.schema_)


def call_grammar(tools: Sequence[Tool], *, several: bool, optional: bool) -> str:
    """A Lark grammar of tool calls: at least one, or if `optional` text which may end with them.

    Raises UsageError for parameters that are no object, or beyond the bounds of a schema.
    """
    rules = [
        f"start: {'TEXT | ' if optional else ''}first" + (" further*" if several else ""),
        f"further: {json.dumps(chr(10) + OPEN)} call",
        "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
    ]
    if optional:  # lazy: the text ends where the first call begins
        rules += ["TEXT: /(.|\\n)*/", "first: begin call", f"begin[lazy]: TEXT {json.dumps(OPEN)}"]
    else:
        rules += [f"first: {json.dumps(OPEN)} call"]
    for i, tool in enumerate(tools):
        schema = ANY_OBJECT | (tool.function.parameters or {})
        if schema["type"] != "object":
            raise UsageError(f"'tools': the parameters of '{tool.function.name}' must have the type 'object'")
        check_schema(schema)
        header = f'\n{{"name": "{tool.function.name}", "arguments": '
        rules.append(f"call_{i}: {json.dumps(header)} arguments_{i} {json.dumps('}' + chr(10) + CLOSE)}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema | {'x-guidance': SPACED})}")
    return "\n".join(rules)


class AnswerReader:
    """Splits an answer's text, as it comes, into what is said and the tool calls: the deltas of OpenAI's API."""

    def __init__(self, *, calls: bool) -> None:
        """calls: the answer may have tool calls; else all of its text is said."""
        self.reads_calls = calls
        self.content = ""
        self.calls: list[dict[str, Any]] = []
        self._rest = ""  # text that is not read yet
        self._place: Literal["text", "header", "arguments", "behind"] = "text"
        self._depth = 0  # of brackets in the arguments
        self._in_string = self._escaped = False

    def push(self, text: str, *, last: bool = False) -> list[dict[str, Any]]:
        """Read more of the text, the rest of it if `last`. Returns deltas: content, a call's name, or more arguments."""
        self._rest += text
        deltas: list[dict[str, Any]] = []
        progress = True
        while progress:
            progress = False
            if self._place in ("text", "behind"):
                progress = self._read_text(deltas, last)
            elif self._place == "header" and (found := HEADER.match(self._rest)):
                self._rest, self._place, progress = self._rest[found.end() :], "arguments", True
                function = {"name": found[1], "arguments": ""}
                self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
                deltas.append(self._delta(self.calls[-1] | {"function": dict(function)}))
            elif self._place == "arguments" and self._rest:
                progress = self._read_arguments(deltas)
        return deltas

    def _delta(self, change: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": len(self.calls) - 1} | change]}

    def _read_text(self, deltas: list[dict[str, Any]], last: bool) -> bool:
        """Read up to the next call, or as much as cannot begin one. Returns whether a call begins."""
        before, tag, after = self._rest.partition(OPEN) if self.reads_calls else (self._rest, "", "")
        held = 0
        if self.reads_calls and not tag and not last:
            held = next((n for n in range(len(OPEN) - 1, 0, -1) if before.endswith(OPEN[:n])), 0)
        said = before[: len(before) - held]
        if said and self._place == "text":  # between calls stands a line break only
            self.content += said
            deltas.append({"content": said})
        self._rest = after if tag else before[len(said) :]
        if tag:
            self._place = "header"
        return bool(tag)

    def _read_arguments(self, deltas: list[dict[str, Any]]) -> bool:
        """Read up to the end of the arguments' object. Returns whether it was reached."""
        end = 0
        while end < len(self._rest) and self._place == "arguments":
            self._scan(self._rest[end])
            end += 1
        fragment, self._rest = self._rest[:end], self._rest[end:]
        self.calls[-1]["function"]["arguments"] += fragment
        deltas.append(self._delta({"function": {"arguments": fragment}}))
        return self._place == "behind"

    def _scan(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._place = "behind"

    def finish_reason(self, engines: str) -> str:
        """OpenAI's name for why the answer ended, from the engine's."""
        return "tool_calls" if self.calls and engines == "stop" else engines

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message."""
        if not self.calls:
            return {"role": "assistant", "content": self.content, "refusal": None}
        return {"role": "assistant", "content": self.content or None, "refusal": None, "tool_calls": self.calls}
