"""Renders conversations with the tokenizer's chat template and supervises the tokens of the assistant."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hildanext.data.chat_template import TRAINING_DATE, ChatTemplate, Rendered, encode_rendered, template_of
from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Conversation = tuple[list[Message], list[dict[str, Any]] | None]

ROLES = ("system", "user", "assistant", "tool")


def check_messages(value: object) -> list[Message]:
    """Check that every message has a known role and string content, and that at least one is the assistant's.

    Returns `value`. Raises DataError with the reason.
    """
    if not isinstance(value, list) or not value:
        raise DataError("no 'messages'")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError("a message without a known role")
        if not isinstance(message.get("content"), str):
            raise DataError("a message without text content")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(
            isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
        ):
            raise DataError("a tool call without a function")
    if not any(message["role"] == "assistant" for message in value):
        raise DataError("no assistant turn")
    return value


class Turn(NamedTuple):
    """An assistant turn of a rendered conversation."""

    start: int  # index of its first character in the rendered text
    content: str  # as given in the message, stripped
    train: bool  # whether it is supervised


def tools_as_text(messages: list[Message], tools: list[dict[str, Any]] | None, template: str) -> bool:
    """Whether a conversation has tools that its chat template does not support, so that they become plain text."""
    calls = any(message.get("tool_calls") for message in messages)
    return bool((calls and "tool_calls" not in template) or (tools and "tools" not in template))


def _with_plain_tools(messages: list[Message], tools: list[dict[str, Any]] | None, template: str) -> list[Message]:
    """Write tool calls as JSON content and tools into a system message, if the template does not support them."""
    if "tool_calls" not in template:
        plain = []
        for message in messages:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or []]
            plain.append({**message, "content": "\n".join([message["content"]] * bool(message["content"]) + calls)})
        messages = plain
    if tools and "tools" not in template:
        described = "You may call these functions:\n" + json.dumps(tools, ensure_ascii=False)
        if messages[0]["role"] == "system":
            first, *messages = messages
            described = f"{first['content']}\n\n{described}"
        messages = [{"role": "system", "content": described}, *messages]
    return messages


def render(
    messages: list[Message], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rendered, list[Turn]]:
    """The conversation rendered by the chat template, and its assistant turns.

    The text before a turn equals the prompt a model is given for that turn: the earlier messages rendered with the
    generation prompt. A turn without earlier messages has no prompt; it is not supervised. Raises DataError when a
    prompt is not a prefix of the whole text, or when the template rejects the messages.
    """
    messages = _with_plain_tools(messages, tools, template_of(tokenizer, tools))
    shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    template = ChatTemplate(tokenizer, shown, tools, TRAINING_DATE)
    whole = template.render()
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(until=i, prompt=True).text if i else ""
        if not whole.text.startswith(prompt):
            raise DataError("the chat template renders earlier turns differently when later turns follow")
        turns.append(Turn(len(prompt), message["content"].strip(), bool(i) and message.get("train", True)))
    return whole, turns


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    eos: int,
    unread: Counter[str] | None = None,
) -> list[tuple[np.ndarray, np.ndarray] | DataError]:
    """(`input_ids` [n] int32, `loss_mask` [n] bool) of each conversation, in order.

    A conversation that cannot be encoded gives a DataError with the reason instead. `unread` counts, by field, the
    conversations with a field that the template does not write. Raises DataError for a tokenizer without a chat
    template.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' has no chat template, but the documents are messages")
    rendered: list[tuple[Rendered, list[Turn]] | DataError] = []
    for messages, tools in conversations:
        try:
            rendered.append(render(messages, tools, tokenizer))
        except DataError as error:
            rendered.append(error)
    encodings = encode_rendered([item[0] for item in rendered if not isinstance(item, DataError)], tokenizer)
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != eos]
    results: list[tuple[np.ndarray, np.ndarray] | DataError] = []
    for item, (messages, _) in zip(rendered, conversations, strict=True):
        if isinstance(item, DataError):
            results.append(item)
            continue
        (text, _), turns = item
        tokens = next(encodings)
        if isinstance(tokens, DataError):
            results.append(tokens)
            continue
        if unread is not None:
            unread.update(unread_fields(messages, text))
        results.append(_supervise(*tokens, text, turns, eos, special))
    return results


def unread_fields(messages: list[Message], text: str) -> set[str]:
    """The fields of messages whose values are not in the rendered text."""
    found = set()
    for message in messages:
        calls = message.get("tool_calls") or []
        values = [(field, message.get(field)) for field in ("content", "reasoning_content", "name", "tool_call_id")]
        for field, value in [*values, *(("tool_calls[].id", call.get("id")) for call in calls)]:
            written = str(value or "").strip()
            # Templates may write a value as JSON.
            if written not in text and json.dumps(written, ensure_ascii=False)[1:-1] not in text:
                found.add(field)
    return found


def _supervise(
    ids: np.ndarray, offsets: np.ndarray, text: str, turns: list[Turn], eos: int, special: list[int]
) -> tuple[np.ndarray, np.ndarray] | DataError:
    """Supervise the assistant turns and end the document with the last one.

    `offsets` [n, 2]: start and end (exclusive) of each token in `text`, in characters.
    """
    if not len(ids) or not turns:
        return DataError("no assistant turn in the rendered text")
    mask = np.zeros(len(ids), dtype=bool)
    # A token that overlaps the turn belongs to it, even if it starts in the prompt (a space before a word).
    firsts = [int(np.searchsorted(offsets[:, 1], turn.start, side="right")) for turn in turns]
    end = len(ids)
    for turn, first, bound in zip(turns, firsts, [*firsts[1:], len(ids)], strict=True):
        turn_end = _turn_end(ids, offsets, text, turn, first, bound, eos, special)
        if turn_end is None and turn.train:
            return DataError("cannot find the end of an assistant turn in the rendered text")
        end = bound if turn_end is None else turn_end
        mask[first:end] = turn.train
    # White space that the template adds after the last turn is dropped, because it is never generated. Other text after
    # the last turn is kept, unsupervised.
    ends_with_turn = not text[int(offsets[end - 1, 1]) :].strip()
    if ends_with_turn:
        ids, mask = ids[:end], mask[:end]
    if ids[-1] != eos:
        ids = np.append(ids, np.int32(eos))
        mask = np.append(mask, ends_with_turn and turns[-1].train)
    return ids, mask


def _turn_end(
    ids: np.ndarray,
    offsets: np.ndarray,
    text: str,
    turn: Turn,
    first: int,
    bound: int,
    eos: int,
    special: list[int],
) -> int | None:
    """Index of the token after a turn that starts at `first` and ends before `bound`; None if not found.

    The turn ends with its first end-of-text token. Without one it ends with its first special token, such as
    '<|im_end|>' in base models whose end-of-text token is another. Without either it ends with its content.
    """
    window = ids[first:bound]
    for closing in (window == eos, np.isin(window, special)):
        if closing.any():
            return first + int(closing.argmax()) + 1
    at = text.find(turn.content, turn.start)
    if at < 0 or not turn.content:
        return None
    return min(bound, int(np.searchsorted(offsets[:, 0], at + len(turn.content), side="left")))
