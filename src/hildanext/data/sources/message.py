"""Converts a turn of a conversation, as instruction data spell it, to a message."""

from __future__ import annotations

import json
from typing import Any

from hildanext.data.conversations import Message
from hildanext.data.documents import check_depth, unique_keys
from hildanext.errors import DataError

ROLE_OF = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
# An assistant turn with one of these at 0 or false is not supervised: the spellings of OpenAI and mistral-finetune,
# LLaMA-Factory, axolotl, and ms-swift.
TRAIN = ("weight", "loss_weight", "train", "training", "trainable", "loss")
NAMES = ("name", "tool_call_id")
KNOWN = {"role", "from", "content", "value", "tool_calls", "function_call", "masked", "id", *REASONING, *TRAIN, *NAMES}
# Content that no message can have.
FOREIGN = ("image", "images", "audio", "audios", "video", "videos", "documents", "refusal", "train_detail")


def to_message(turn: Any, unknown: set[str]) -> Message:
    """Convert a turn to a message. Raises DataError with the reason.

    Legacy `function_call` becomes `tool_calls`; all spellings of reasoning become `reasoning_content`. A turn that is
    not to be trained gets `"train": false`. Keys that no format uses are added to `unknown`.
    """
    if not isinstance(turn, dict):
        raise DataError("a message is not an object")
    name = turn.get("role", turn.get("from"))
    role = ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError("a message without a known role")
    for key in FOREIGN:
        if turn.get(key):
            raise DataError(f"'{key}' of a message is not supported")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    calls = to_tool_calls(turn.get("tool_calls")) or to_tool_calls(from_json(turn.get("function_call")))
    if name == "function_call":
        content, calls = "", to_tool_calls(from_json(content))
    reasoning = _reasoning(turn)
    may_be_empty = bool(calls or reasoning) or role in ("system", "tool")
    message: Message = {"role": role, "content": _text(content, may_be_empty)}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    message |= {key: _name(key, turn[key]) for key in NAMES if turn.get(key) not in (None, "")}
    if role == "assistant" and not _trained(turn):
        message["train"] = False
    unknown.update(f"messages[].{key}" for key, value in turn.items() if key not in KNOWN and value is not None)
    return message


def _text(content: object, may_be_empty: bool) -> str:
    """The text of a turn: a string, or typed parts joined. Raises DataError."""
    if content is None and may_be_empty:
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
    if not may_be_empty and not content.strip():
        raise DataError("empty message")
    return content


def _reasoning(turn: dict[str, Any]) -> str:
    """The reasoning of a turn; '' without one. Raises DataError for several different ones."""
    found = {turn[key] if isinstance(turn[key], str) else None for key in REASONING if turn.get(key)}
    if None in found or len(found) > 1:
        raise DataError("the reasoning of a message is not one text")
    return str(found.pop()) if found else ""


def _name(key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"'{key}' of a message is not text")
    return str(value)


def _trained(turn: dict[str, Any]) -> bool:
    """Whether an assistant turn is to be trained. Raises DataError for a weight that is neither 0 nor 1."""
    flags = {key: turn[key] for key in TRAIN if turn.get(key) is not None}
    if not isinstance(flags.get("loss"), bool):
        flags.pop("loss", None)  # a measured loss
    for key, flag in flags.items():
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            raise DataError(f"'{key}' of a message is neither 0 nor 1")
    return all(flags.values()) and not turn.get("masked")


def from_json(value: object) -> Any:
    """Parse a string as JSON, as in ShareGPT records; return other values unchanged. Raises DataError."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        raise DataError("broken JSON in a tool call or tool list") from None
    check_depth(parsed)
    return parsed


def to_tool_calls(value: object) -> list[dict[str, Any]]:
    """Tool calls in the format of chat templates, with arguments as an object. Raises DataError.

    `value` is a call or a list of calls, each bare or under 'function'.
    """
    calls: list[dict[str, Any]] = []
    if value is None:
        return calls
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool call without a name")
        arguments = from_json(function.get("arguments") or {})
        identity = {} if call.get("id") in (None, "") else {"id": _name("tool_calls[].id", call["id"])}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls
