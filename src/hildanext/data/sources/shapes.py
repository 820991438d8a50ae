"""Converts records of instruction data to messages.

Supported shapes: `messages` (string or typed parts), ShareGPT `conversations` (from/value, with tool calls), questions
with answers (Alpaca, GSM8K, prompt and completion, ...), and preference pairs of these, which give the chosen answer.

No record is silently made smaller. A key of some shape that a record's own shape does not use is a reject, unless its
text is in the conversation as well. Keys that no shape knows describe the record; they are collected, to be counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hildanext.data.conversations import Message, check_messages
from hildanext.data.sources.message import FOREIGN, REASONING, ROLE_OF, TRAIN, from_json, to_message
from hildanext.errors import DataError

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "question", "prompt", "query", "problem")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "answer", "completion", "response", "solution")
SYSTEMS = ("system", "system_prompt")
# Every key that holds content. Record-level REASONING and FOREIGN belong to no shape.
PARTS = (*CONVERSATIONS, *QUESTIONS, *CONTEXTS, *ANSWERS, *SYSTEMS, *REASONING, *FOREIGN)
CONTENT = (*PARTS, "history", "chosen", "rejected", "tools", "functions")
# Every key that is looked at.
KEYS = {*CONTENT, *TRAIN, "label", "id", "source"}
LABELS = ("role", "from", "type")  # keys of turns whose values are no text


def to_messages(record: dict[str, Any], unknown: set[str] | None = None) -> list[Message]:
    """The conversation of a record, up to its last assistant turn.

    A turn that is not to be trained gets `"train": false`. Raises DataError for an unknown shape, role or content, for
    a record without a turn to train, and for content that its shape does not use. Keys that no shape knows are added to
    `unknown`.
    """
    names: set[str] = set() if unknown is None else unknown
    messages = _conversation(record, record.get("chosen"), names)
    _check_trained(record)
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise DataError("no supervised turn")
    check_used(record, messages)
    known = {*CONTENT, "id", "source"}
    names.update(key for key, value in record.items() if key not in known and value not in (None, "", [], {}))
    return messages


def to_pair(record: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """The conversations with the chosen and with the rejected answer. Raises DataError."""
    for side in ("chosen", "rejected"):
        if record.get(side) is None:
            raise DataError(f"no '{side}' answer")
    chosen, rejected = (_conversation(record, record[side], set()) for side in ("chosen", "rejected"))
    _check_trained(record)
    check_used(record, [*chosen, *rejected])
    return chosen, rejected


def to_prompt(record: dict[str, Any]) -> list[Message]:
    """The conversation of a record without its last answer. Raises DataError."""
    messages = _with_system(record, [to_message(turn, set()) for turn in _turns(record, answered=False)])
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise DataError("no prompt")
    if to_tools(record):
        raise DataError("a prompt cannot have tools")
    check_used(record, messages, [*ANSWERS, "chosen", "rejected"])
    return messages


def _check_trained(record: dict[str, Any]) -> None:
    """Raises DataError for a record that as a whole is not to be trained.

    Unpaired preference data mark bad answers with a false 'label'.
    """
    if any(record.get(key) == 0 for key in TRAIN) or record.get("label") is False:
        raise DataError("no supervised turn")


def _conversation(record: dict[str, Any], chosen: object, unknown: set[str]) -> list[Message]:
    """The messages of a record with its own answer, or with `chosen` if it is not None."""
    if chosen is None:
        turns = _turns(record, answered=True)
    else:
        turns = _as_turns(chosen)
        if not _is_whole(chosen):
            turns = [*_turns(record, answered=False), *turns]
    messages = _with_system(record, [to_message(turn, unknown) for turn in turns])
    n_turns = len(messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise DataError("no assistant turn")
    if len(messages) < n_turns:
        unknown.add("messages[] after the last answer")
    return check_messages(messages)


def _with_system(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Leave out empty system messages, and begin with the record's system prompt if the messages have none."""
    messages = [message for message in messages if message["content"] or message["role"] != "system"]
    system = next((record[key] for key in SYSTEMS if isinstance(record.get(key), str) and record[key].strip()), None)
    if system is not None and messages and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _turns(record: dict[str, Any], answered: bool) -> list[Any]:
    """The turns of a record in its own format; without the answer to a question unless `answered`."""
    for key in CONVERSATIONS:
        if isinstance(record.get(key), list):
            return list(record[key])
    if isinstance(record.get("prompt"), list):  # a conversation, continued by the completion
        completion = record.get("completion") if answered else None
        return [*record["prompt"], *([] if completion is None else _as_turns(completion))]
    question = _first(record, QUESTIONS)
    if question is None:
        raise DataError("no prompt" if isinstance(record.get("chosen"), list) else "unknown record shape")
    history = record.get("history") or []  # Alpaca's earlier turns: [question, answer] pairs
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("'history' is not a list of pairs")
    turns = [turn for pair in history for turn in _exchange(*pair)]
    parts = [record[question], *(record.get(key) for key in CONTEXTS)]
    asked = "\n".join(part for part in parts if isinstance(part, str) and part)
    answer = _first(record, ANSWERS)
    return turns + _exchange(asked, None if answer is None else record[answer])[: 2 if answered else 1]


def _first(record: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` with text, else the first with an empty text; None without either."""
    given = [key for key in keys if isinstance(record.get(key), str)]
    return next((key for key in given if record[key].strip()), given[0] if given else None)


def _exchange(asked: object, answered: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _as_turns(answer: object) -> list[Any]:
    """An answer (a text, a turn or a list of these) as turns."""
    answers = answer if isinstance(answer, list) else [answer]
    return [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in answers]


def _is_whole(chosen: object) -> bool:
    """Whether a chosen answer is a whole conversation: turns that do not begin with an answer."""
    first = chosen[0] if isinstance(chosen, list) and chosen else None
    return isinstance(first, dict) and ROLE_OF.get(str(first.get("role", first.get("from"))).lower()) != "assistant"


def check_used(record: dict[str, Any], messages: Sequence[Message], besides: Sequence[str] = ()) -> None:
    """Raises DataError for content of a record that is neither in its messages nor under a key in `besides`."""
    used = {"tools" if record.get("tools") else "functions", *besides}
    if record.get("chosen") is not None:
        used |= {"chosen", "rejected"}
    if not _is_whole(record.get("chosen")):
        own = next((key for key in CONVERSATIONS if isinstance(record.get(key), list)), None)
        used |= {own} if own is not None else set()
    written = "\n".join(_texts(list(messages)))
    for key in CONTENT:
        if key not in used and not all(text.strip() in written for text in _texts(record.get(key))):
            raise DataError(f"'{key}' is not used beside the other keys of the record")


def _texts(value: object) -> Iterator[str]:
    """The strings in a JSON value, without roles and types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in LABELS:
                yield from _texts(item)


def to_tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The function descriptions of a record, or None. Raises DataError unless they are a list of objects."""
    tools, functions = from_json(record.get("tools") or None), from_json(record.get("functions") or None)
    key, found = ("tools", tools) if tools else ("functions", functions)
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"'{key}' is not a list of objects")
    return found if key == "tools" else [{"type": "function", "function": function} for function in found]
