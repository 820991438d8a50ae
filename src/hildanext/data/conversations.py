"""Renders conversations with the tokenizer's chat template and supervises the tokens of the assistant."""

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
    """The conversation rendered by the chat template, and its assistant turns.

    The text before a turn equals the prompt a model is given for that turn: the earlier messages rendered with the
    generation prompt. Raises DataError when that prompt is not a prefix of the whole text, or when the template rejects
    the messages.
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
                raise DataError("the chat template renders earlier turns differently when later turns follow")
            turns.append(Turn(len(prompt), message["content"].strip(), message.get("train", True)))
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template rejects the messages ({' '.join(str(error).split())})") from None
    return text, turns


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, eos: int
) -> list[tuple[np.ndarray, np.ndarray] | DataError]:
    """(`input_ids` [n] int32, `loss_mask` [n] bool) of each conversation, in order.

    A conversation that cannot be encoded gives a DataError with the reason instead. Raises DataError for a tokenizer
    without a chat template.
    """
    if not conversations:
        return []
    if tokenizer.chat_template is None:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' has no chat template, but the documents are messages")
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
    """Supervise the assistant turns and end the document with the last one.

    `offsets` [n, 2]: start and end (exclusive) of each token in `text`, in characters.
    """
    mask = np.zeros(len(ids), dtype=bool)
    # A token that overlaps the turn belongs to it, even if it starts in the prompt (a space before a word).
    firsts = [int(np.searchsorted(offsets[:, 1], turn.start, side="right")) for turn in turns]
    end = len(ids)
    for turn, first, bound in zip(turns, firsts, [*firsts[1:], len(ids)], strict=True):
        turn_end = _turn_end(ids, offsets, text, turn, first, bound, eos, special)
        if turn_end is None:
            return DataError("cannot find the end of an assistant turn in the rendered text")
        end = turn_end
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
