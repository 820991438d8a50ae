"""Conversations: messages rendered with the tokenizer's chat template, and which of their tokens the assistant wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Conversation = tuple[list[Message], list[dict[str, Any]] | None]

ROLES = ("system", "user", "assistant", "tool")


def check_messages(value: object) -> list[Message]:
    """Messages with a known role and a string as content, one of them the assistant's. Raises DataError otherwise."""
    if not isinstance(value, list) or not value:
        raise DataError("no 'messages'")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError("a message without a known role")
        if not isinstance(message.get("content"), str):
            raise DataError("a message without text content")
    if not any(message["role"] == "assistant" for message in value):
        raise DataError("no assistant turn")
    return value


class Turn(NamedTuple):
    """An assistant's turn in the rendered text: its first character, its content as given, whether it is supervised."""

    start: int
    content: str
    train: bool


def tools_as_text(messages: list[Message], tools: list[dict[str, Any]] | None, template: str) -> bool:
    """Whether a conversation uses tools that this chat template does not know, so that they are written as plain text."""
    calls = any(message.get("tool_calls") for message in messages)
    return bool((calls and "tool_calls" not in template) or (tools and "tools" not in template))


def _with_plain_tools(messages: list[Message], tools: list[dict[str, Any]] | None, template: str) -> list[Message]:
    """The messages with tool calls as JSON content and tools in a system message, where the template would drop them."""
    if "tool_calls" not in template:
        plain = []
        for message in messages:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
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
) -> tuple[str, list[Turn]]:
    """The conversation as the chat template writes it, and the assistant's turns in it.

    A turn begins where the rendering of the messages before it, with the generation prompt, ends: what a model is given
    when it is asked for that turn. Raises DataError when that rendering is no prefix of the whole, or when the template
    refuses the messages.
    """
    import jinja2

    template = tokenizer.get_chat_template(tools=tools)
    messages = _with_plain_tools(messages, tools, template)
    shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    options: dict[str, Any] = {"tools": tools, "chat_template": template, "tokenize": False}
    try:
        text = str(tokenizer.apply_chat_template(shown, **options))
        turns = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = str(tokenizer.apply_chat_template(shown[:i], add_generation_prompt=True, **options))
            if not text.startswith(prompt):
                raise DataError("the chat template writes earlier turns differently once later ones follow")
            turns.append(Turn(len(prompt), message["content"].strip(), message.get("train", True)))
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses the messages ({' '.join(str(error).split())})") from None
    return text, turns


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, eos: int
) -> list[tuple[np.ndarray, np.ndarray] | DataError]:
    """(`input_ids` [n] int32, `loss_mask` [n] bool) of each conversation, or a DataError with the reason, in order.

    Raises DataError for a tokenizer without a chat template.
    """
    if not conversations:
        return []
    if tokenizer.chat_template is None:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' has no chat template, and the documents are messages")
    rendered: list[tuple[str, list[Turn]] | DataError] = []
    for messages, tools in conversations:
        try:
            rendered.append(render(messages, tools, tokenizer))
        except DataError as error:
            rendered.append(error)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    texts = [item[0] for item in rendered if not isinstance(item, DataError)]
    encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != eos]
    results: list[tuple[np.ndarray, np.ndarray] | DataError] = []
    for item in rendered:
        if isinstance(item, DataError):
            results.append(item)
            continue
        encoding = next(encodings)
        ids = np.array(encoding.ids, dtype=np.int32)
        results.append(_supervise(ids, np.array(encoding.offsets).reshape(-1, 2), *item, eos, special))
    return results


def _supervise(
    ids: np.ndarray, offsets: np.ndarray, text: str, turns: list[Turn], eos: int, special: list[int]
) -> tuple[np.ndarray, np.ndarray] | DataError:
    """Mark the assistant's turns and end the document at its last one's end.

    `offsets` [n, 2]: first and last+1 character of each token in `text`.
    """
    mask = np.zeros(len(ids), dtype=bool)
    # A token that reaches into the turn belongs to it, also when it begins in the prompt (a space before a word).
    firsts = [int(np.searchsorted(offsets[:, 1], turn.start, side="right")) for turn in turns]
    end = len(ids)
    for turn, first, bound in zip(turns, firsts, [*firsts[1:], len(ids)], strict=True):
        found = _turn_end(ids, offsets, text, turn, first, bound, eos, special)
        if found is None:
            return DataError("the end of an assistant turn cannot be found in the rendered text")
        end = found
        mask[first:end] = turn.train
    # White space that the template puts after the last turn is never generated: the document ends with the turn. Any
    # other text after it stays, unsupervised.
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
    """Token index one past a turn that begins at `first` and ends before `bound`; None when it cannot be told.

    The turn ends with its first end-of-text token; without one with its first special token (an end-of-turn token that
    is not the tokenizer's end of text, as '<|im_end|>' in base models); without either with its content.
    """
    window = ids[first:bound]
    for closing in (window == eos, np.isin(window, special)):
        if closing.any():
            return first + int(closing.argmax()) + 1
    at = text.find(turn.content, turn.start)
    if at < 0 or not turn.content:
        return None
    return min(bound, int(np.searchsorted(offsets[:, 0], at + len(turn.content), side="left")))
