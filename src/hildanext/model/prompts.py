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
from hildanext.data.sources.message import to_tool_calls
from hildanext.data.sources.shapes import to_prompt
from hildanext.data.tokenizer import leading_ids
from hildanext.errors import DataError, UsageError


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[int] | list[Message],
    known: list[int] | None = None,
    date: datetime | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a prompt: plain text without a template, token ids as they are, or messages rendered by the template.

    Messages end with the generation prompt, or with the last message left open (`continue_final_message`). Plain text
    begins with the ids that the tokenizer puts before a text (`add_special_tokens`).

    known: ids of the conversation so far, as they were decoded. The tokenizer may split the same text into other ids,
    which no cache would contain. So if the rendered messages begin with the text of `known`, these ids are kept.
    date: what a template that asks for the date gets; None is the present. tools: functions in OpenAI's format, shown
    by the template, or if it cannot, in the system message (`with_tools`). Calls in messages and the answers to them are
    written by the template, or if it cannot, as text (`as_text`).
    A special token that a message quotes is encoded as text, as in training. In plain text it stays a special token.
    Raises UsageError for an empty prompt, for messages without a chat template, and for messages that the template
    refuses.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("the prompt is empty; give some text")
        leading = leading_ids(tokenizer) if add_special_tokens else []
        return leading + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if prompt and isinstance(prompt[0], int):
        return [int(token) for token in prompt if isinstance(token, int)]
    messages = [_with_calls(message) for message in prompt if isinstance(message, dict)]
    if not any(message.get("content") for message in messages):
        raise UsageError("the prompt is empty; give a message with some text")
    if not tokenizer.chat_template:
        raise UsageError(
            "this model's tokenizer has no chat template; give a plain prompt (generate: --raw, Python: raw=True)"
        )
    try:
        own = template_of(tokenizer, tools)
        if tools and not re.search(r"\btools\b", own):
            messages, tools = with_tools(messages, tools), None
        if not re.search(r"\btool_calls\b", own):
            messages = as_text(messages)
        template = ChatTemplate(tokenizer, messages, tools, date)
        rendered = template.render(prompt=add_generation_prompt, continues=continue_final_message)
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


def decode_prompt(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of token ids, special tokens included. Raises UsageError for an id without a token."""
    names = tokenizer.convert_ids_to_tokens(token_ids)
    unknown = next((token for token, name in zip(token_ids, names, strict=True) if name is None), None)
    if unknown is not None:
        raise UsageError(f"the vocabulary has no token {unknown}; remove it")
    return str(tokenizer.decode(token_ids))


def _with_calls(message: Message) -> Message:
    """A message with its tool calls in the format of chat templates. Raises UsageError for broken ones."""
    if not message.get("tool_calls"):
        return message
    try:
        return message | {"tool_calls": to_tool_calls(message["tool_calls"])}
    except DataError as error:
        raise UsageError(f"'messages': {error}; repair it") from None


def with_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
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


def as_text(messages: list[Message]) -> list[Message]:
    """Messages for a chat template without tool calls: calls and the tools' answers are text, in the format of Hermes.

    As in Qwen's template, the user gives the tools' answers, those to one message together.
    """
    found: list[Message] = []
    for message, before in zip(messages, [None, *messages], strict=False):
        if message["role"] == "tool":
            answer = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before is not None and before["role"] == "tool":
                found[-1]["content"] += f"\n{answer}"
            else:
                found.append({"role": "user", "content": answer})
        elif message.get("tool_calls"):
            functions = [call["function"] for call in message["tool_calls"]]
            written = [{"name": item["name"], "arguments": item["arguments"]} for item in functions]
            calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in written]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            found.append(rest | {"content": "\n".join([message["content"], *calls] if message["content"] else calls)})
        else:
            found.append(message)
    return found


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

    In JSON files (arrays or JSON lines, also .gz and .zst) and tables each record has "prompt" (plain text), "messages"
    that end with a user message, or a format of instruction data, whose last answer is left out. In other files each line
    is a user message, or plain text if the tokenizer has no chat template. Bad records are counted in `rejects`; without
    it, the first raises DataError, which names file and line. Raises DataError for a file without prompts.
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
