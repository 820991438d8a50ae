"""Turn prompts into token ids: plain text, messages (through the tokenizer's chat template), and files of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from hildanext.data.documents import check_text, parse_json
from hildanext.data.sources.shapes import to_messages
from hildanext.data.tokenizer import leading_ids
from hildanext.errors import DataError, UsageError


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], known: list[int] | None = None
) -> list[int]:
    """Token ids of a prompt: plain text without a template, or messages rendered with the generation prompt.

    known: ids of the conversation so far, as they were decoded. The tokenizer may split the same text into other ids,
    which no cache would contain. So if the rendered messages begin with the text of `known`, these ids are kept.
    Raises UsageError for an empty prompt, for messages without a chat template, and for messages that the template
    refuses.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("the prompt is empty; give some text")
        return leading_ids(tokenizer) + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not prompt or not any(message.get("content") for message in prompt):
        raise UsageError("the prompt is empty; give a message with some text")
    if tokenizer.chat_template is None:
        raise UsageError("this model's tokenizer has no chat template; give a plain prompt (generate: --raw)")
    try:
        text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        raise UsageError(f"the model's chat template refuses these messages: {error}") from None
    if known:
        prefix = str(tokenizer.decode(known))
        if text.startswith(prefix):
            ids = known + list(tokenizer(text[len(prefix) :], add_special_tokens=False)["input_ids"])
            if tokenizer.decode(ids) == text:  # some tokenizers add a space at the start of a text
                return ids
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return []  # encode_prompt reports a template that refuses the user's messages
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = tokenizer(text.rpartition("Goodbye")[2], add_special_tokens=False)["input_ids"]
    return [token for token in after if token in special][:1]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts in a file, see `read_asked`."""
    return [ids for ids, _ in read_asked(path, tokenizer)]


def read_asked(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], str]]:
    """Read prompts from a file: (token ids, text) of each, where the text of a conversation is its first user message.

    In a `.jsonl` file each record has "prompt" (plain text), "messages" that end with a user message, or a format of
    instruction data, whose last answer is left out. In other files each line is a user message, or plain text if the
    tokenizer has no chat template. Raises DataError, which names file and line.
    """
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt: Any = _prompt_of(line) if path.suffix == ".jsonl" else line.decode("utf-8")
            if path.suffix != ".jsonl" and tokenizer.chat_template:
                prompt = [{"role": "user", "content": prompt}]
            asked = prompt
            if not isinstance(prompt, str):
                asked = next((m["content"] for m in prompt if m["role"] == "user"), prompt[0]["content"])
            prompts.append((encode_prompt(tokenizer, prompt), str(asked)))
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number}: invalid UTF-8") from None
        except (DataError, UsageError) as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise DataError(f"{path}: no prompts in the file")
    return prompts


def _prompt_of(line: bytes) -> str | list[dict[str, Any]]:
    """Parse a JSON line into plain text or messages. Raises DataError for a record with neither."""
    try:
        record = parse_json(line)
        if isinstance(record.get("prompt"), str) and "completion" not in record:
            return str(record["prompt"])
        messages = record.get("messages")
        if isinstance(messages, list) and messages and messages[-1]["role"] == "user":
            return [{"role": str(message["role"]), "content": check_text(message["content"])} for message in messages]
        return to_messages(record)[:-1]
    except (DataError, KeyError, TypeError):
        raise DataError('expected {"prompt": ...} or {"messages": [...]}') from None
