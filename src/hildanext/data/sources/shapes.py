"""Converts records of instruction data to messages.

Supported shapes: `messages` (string or typed parts), ShareGPT `conversations` (from/value, with tool calls), Alpaca
(instruction/input/output), GSM8K (question/answer), and preference pairs of these, which give the chosen answer.
"""

from __future__ import annotations

import json
from typing import Any

from hildanext.data.conversations import Message, check_messages
from hildanext.errors import DataError

ROLE_OF = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
QUESTION_ANSWER = (("instruction", "output"), ("question", "answer"), ("prompt", "completion"))


def to_messages(record: dict[str, Any]) -> list[Message]:
    """The conversation of a record, up to its last assistant turn.

    A turn with `loss_weight` 0 gets `"train": false`. Raises DataError for an unknown shape, role or content.
    """
    turns = _turns(record)
    chosen = record.get("chosen")
    if isinstance(chosen, list):  # a whole conversation
        turns = chosen
    elif isinstance(chosen, (str, dict)):
        turns = [*turns, {"role": "assistant", "content": chosen} if isinstance(chosen, str) else chosen]
    messages = [_message(turn) for turn in turns]
    messages = [message for message in messages if message["content"] or message["role"] != "system"]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise DataError("no assistant turn")
    check_messages(messages)
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise DataError("no supervised turn")
    return messages


def _turns(record: dict[str, Any]) -> list[Any]:
    """The turns of a record in its own format."""
    for key in ("messages", "conversations", "conversation"):
        if isinstance(record.get(key), list):
            return record[key]
    if isinstance(record.get("chosen"), list):
        return []
    question, answer = next((pair for pair in QUESTION_ANSWER if isinstance(record.get(pair[0]), str)), ("", ""))
    if not question:
        raise DataError("unknown record shape")
    history = record.get("history") or []  # Alpaca's earlier turns: [question, answer] pairs
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("'history' is not a list of pairs")
    turns = [turn for pair in history for turn in _exchange(*pair)]
    asked = "\n".join(part for part in (record[question], record.get("input")) if isinstance(part, str) and part)
    turns += _exchange(asked, record.get(answer))
    return turns[:-1] if record.get(answer) is None and "chosen" in record else turns


def _exchange(asked: object, answered: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _message(turn: Any) -> Message:
    """Convert a turn to a message. Raises DataError with the reason."""
    if not isinstance(turn, dict):
        raise DataError("a message is not an object")
    name = turn.get("role", turn.get("from"))
    role = ROLE_OF.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError("a message without a known role")
    calls = _tool_calls(turn.get("tool_calls"))
    content = turn.get("content", turn.get("value"))
    if name == "function_call":
        content, calls = "", _tool_calls(_json(content))
    message: Message = {"role": role, "content": _text(content, empty=bool(calls) or role in ("system", "tool"))}
    if calls:
        message["tool_calls"] = calls
    if role == "assistant":
        weight = turn.get("loss_weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
            raise DataError("'loss_weight' is not a weight")
        if not weight > 0:
            message["train"] = False
    return message


def _text(content: object, empty: bool) -> str:
    """The text of a turn: a string, or typed parts joined. Raises DataError; for empty text only unless `empty`."""
    if content is None and empty:
        return ""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise DataError("a content part that is not text")
        parts = [part.get("text", part.get("value")) for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("a content part without text")
        content = "".join(parts)
    if not isinstance(content, str):
        raise DataError("a message without text content")
    if not empty and not content.strip():
        raise DataError("empty message")
    return content


def _json(value: object) -> Any:
    """Parse a string as JSON, as in ShareGPT records; return other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError("broken JSON in a tool call or tool list") from None


def _tool_calls(value: object) -> list[dict[str, Any]]:
    """Tool calls in the format of chat templates, with arguments as an object.

    `value` is a call or a list of calls, each bare or under 'function'.
    """
    calls: list[dict[str, Any]] = []
    if value is None:
        return calls
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool call without a name")
        arguments = _json(function.get("arguments", {}))
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def to_tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The function descriptions of a record, or None. Raises DataError unless they are a list of objects."""
    tools = _json(record.get("tools") or None)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("'tools' is not a list of objects")
    return tools
