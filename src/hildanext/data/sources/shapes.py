"""The shapes of instruction data: one record of any of them -> messages.

Known: `messages` (string or typed parts), ShareGPT `conversations` (from/value, with tool calls), Alpaca
(instruction/input/output), GSM8K (question/answer), and preference pairs of these, of which the chosen answer is kept.
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
    """The record's conversation, ending with an assistant's turn (what follows the last one is left out).

    A turn with `loss_weight` 0 gets `"train": false`. Raises DataError for a shape, role or content that is not known.
    """
    turns = _turns(record)
    chosen = record.get("chosen")
    if isinstance(chosen, list):  # the pair's whole conversation
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
    """The record's turns, still in its own words."""
    for key in ("messages", "conversations", "conversation"):
        if isinstance(record.get(key), list):
            return record[key]
    if isinstance(record.get("chosen"), list):
        return []
    question, answer = next((pair for pair in QUESTION_ANSWER if isinstance(record.get(pair[0]), str)), ("", ""))
    if not question:
        raise DataError("unknown record shape")
    turns = [turn for pair in _history(record) for turn in _exchange(*pair)]
    asked = "\n".join(part for part in (record[question], record.get("input")) if isinstance(part, str) and part)
    turns += _exchange(asked, record.get(answer))
    return turns[:-1] if record.get(answer) is None and "chosen" in record else turns


def _exchange(asked: object, answered: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _history(record: dict[str, Any]) -> list[Any]:
    """Alpaca's earlier turns: [question, answer] pairs."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("'history' is not a list of pairs")
    return history


def _message(turn: Any) -> Message:
    """One turn as a message. Raises DataError."""
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
    if role == "assistant" and not _supervised(turn.get("loss_weight", 1)):
        message["train"] = False
    return message


def _text(content: object, empty: bool) -> str:
    """A turn's text: a string, or typed parts joined. Raises DataError, also for no text unless it may be `empty`."""
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


def _supervised(weight: object) -> bool:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
        raise DataError("'loss_weight' is not a weight")
    return weight > 0


def _json(value: object) -> Any:
    """JSON inside a string, as ShareGPT keeps it; what is no string stays."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError("broken JSON in a tool call or tool list") from None


def _tool_calls(value: object) -> list[dict[str, Any]]:
    """Calls in the form chat templates take, arguments as an object: from a call or a list, bare or under 'function'."""
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
    """The record's function descriptions, or None. Raises DataError when they are no list of objects."""
    tools = _json(record.get("tools") or None)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("'tools' is not a list of objects")
    return tools
