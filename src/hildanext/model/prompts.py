"""Turn prompts into token ids: plain text, messages (through the tokenizer's chat template), and files of prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hildanext.data.chat_template import TRAINING_DATE, ChatTemplate, Rendered, encode_rendered, template_of
from hildanext.data.conversations import Message
from hildanext.data.documents import Rejects
from hildanext.data.sources import instruct
from hildanext.data.sources.lines import BYTE_ORDER_MARK
from hildanext.data.sources.shapes import to_prompt
from hildanext.data.tokenizer import leading_ids
from hildanext.errors import DataError, UsageError


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    known: list[int] | None = None,
    date: datetime | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a prompt: plain text without a template, or messages rendered with the generation prompt.

    known: ids of the conversation so far, as they were decoded. The tokenizer may split the same text into other ids,
    which no cache would contain. So if the rendered messages begin with the text of `known`, these ids are kept.
    date: what a template that asks for the date gets; None is the present. tools: functions in OpenAI's format, shown
    by the template, or if it cannot, in the system message (`with_tools`).
    A special token that a message quotes is encoded as text, as in training. In plain text it stays a special token.
    Raises UsageError for an empty prompt, for messages without a chat template, and for messages that the template
    refuses.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("the prompt is empty; give some text")
        return leading_ids(tokenizer) + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not prompt or not any(message.get("content") for message in prompt):
        raise UsageError("the prompt is empty; give a message with some text")
    if not tokenizer.chat_template:
        raise UsageError("this model's tokenizer has no chat template; give a plain prompt (generate: --raw)")
    try:
        if tools and not re.search(r"\btools\b", template_of(tokenizer, tools)):
            prompt, tools = with_tools(prompt, tools), None
        rendered = ChatTemplate(tokenizer, prompt, tools, date).render(prompt=True)
    except DataError as error:
        raise UsageError(str(error)) from None
    text, quoted = rendered
    if known:
        prefix = str(tokenizer.decode(known))
        if text.startswith(prefix):
            start = len(prefix)
            rest = Rendered(text[start:], [position - start for position in quoted if position > start])
            ids = known + _encode(rest, tokenizer)
            if tokenizer.decode(ids) == text:  # some tokenizers add a space at the start of a text
                return ids
    return _encode(rendered, tokenizer)


def with_tools(messages: list[dict[str, str]], tools: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Messages whose system message shows the tools, for a chat template without tools. The format is Hermes'."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        f"You can call functions. These are their signatures:\n<tools>\n{listed}\n</tools>\n"
        "To call a function, answer with its name and its arguments:\n"
        '<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>'
    )
    first, rest = messages[0], messages[1:]
    if first["role"] == "system":
        return [first | {"content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _encode(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of rendered messages. Raises UsageError for a quoted special token that cannot be text."""
    if not rendered.quoted:
        return list(tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
    (tokens,) = encode_rendered([rendered], tokenizer)
    if isinstance(tokens, DataError):
        raise UsageError(f"the prompt {tokens}; remove the token")
    return [int(token) for token in tokens.ids]


def end_ids(tokenizer: PreTrainedTokenizerBase, listed: int | list[int] | None) -> tuple[int, ...]:
    """Ids of the tokens that end a text, without duplicates; the tokenizer's end-of-text token is the first.

    listed: `eos_token_id` of the model's generation_config.json. Qwen3 lists two: one ends a turn, the other a text. The
    special token that closes an assistant's turn in the chat template ends a text, too.
    """
    more = [listed] if isinstance(listed, int) else listed or []
    known = [token for token in (tokenizer.eos_token_id, *more, *_turn_end(tokenizer)) if token is not None]
    return tuple(dict.fromkeys(token for token in known if token != tokenizer.mask_token_id))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first special token that the chat template puts after an assistant's message; [] if there is none."""
    if tokenizer.chat_template is None:
        return []
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye"}]
    try:
        text = ChatTemplate(tokenizer, messages, None, None).render().text
    except DataError:
        return []  # encode_prompt reports a template that refuses the user's messages
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = tokenizer(text.rpartition("Goodbye")[2], add_special_tokens=False)["input_ids"]
    return [token for token in after if token in special][:1]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts in a file, see `read_asked`."""
    return [ids for ids, _ in read_asked(path, tokenizer)]


def read_asked(
    path: Path, tokenizer: PreTrainedTokenizerBase, rejects: Rejects | None = None
) -> list[tuple[list[int], str]]:
    """Read prompts from a file: (token ids, text) of each, where the text of a conversation is its first user message.

    In JSON files (arrays or JSON lines, also .gz and .zst) each record has "prompt" (plain text), "messages" that end
    with a user message, or a format of instruction data, whose last answer is left out. In other files each line is a
    user message, or plain text if the tokenizer has no chat template. Bad records are counted in `rejects`; without it,
    the first raises DataError, which names file and line. Raises DataError for a file without prompts.
    """
    counted = Rejects() if rejects is None else rejects
    prompts = []
    for number, prompt in _read(path, tokenizer.chat_template is not None, counted):
        try:
            asked = prompt
            if not isinstance(prompt, str):
                asked = next((m["content"] for m in prompt if m["role"] == "user"), prompt[0]["content"])
            prompts.append((encode_prompt(tokenizer, prompt, date=TRAINING_DATE), str(asked)))
        except UsageError as error:
            counted.add(str(error), path, number)
        if rejects is None:
            _raise_first(counted)
    if rejects is None:
        _raise_first(counted)
    if not prompts and not counted.total:
        raise DataError(f"{path}: no prompts in the file")
    return prompts


def _raise_first(rejects: Rejects) -> None:
    """Raises DataError for the first record that was counted."""
    for reason, (place, *_) in rejects.examples.items():
        raise DataError(f"{place}: {reason}")


def _read(path: Path, chat: bool, rejects: Rejects) -> Iterator[tuple[int, str | list[Message]]]:
    """Yield (number, plain text or messages) of each record of a file of prompts."""
    if path.name.endswith(instruct.SUFFIXES):
        for number, record in instruct.read_records(str(path), rejects):
            try:
                yield number, _prompt_of(record)
            except DataError as error:
                rejects.add(f'expected {{"prompt": ...}} or {{"messages": [...]}} ({error})', path, number)
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            rejects.add("invalid UTF-8", path, number)
            continue
        yield number, [{"role": "user", "content": text}] if chat else text


def _prompt_of(record: dict[str, Any]) -> str | list[Message]:
    """The prompt of a record: plain text or messages. Raises DataError for a record with neither."""
    messages = to_prompt(record)
    plain = record.get("prompt")
    if isinstance(plain, str) and "completion" not in record and messages == [{"role": "user", "content": plain}]:
        return plain
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]
