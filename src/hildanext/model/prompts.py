"""Prompts: messages through the tokenizer's chat template, plain text as it is; files of them."""

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
    """Token ids of a prompt. A string is continued as it stands; messages are rendered with the generation prompt.

    `known`: ids that a conversation begins with, as it was decoded. The tokenizer may cut that text otherwise, and then
    nothing of it would be found in a cache: where the messages render to the same text, these ids are kept.
    Raises UsageError for an empty prompt, for messages when the tokenizer has no chat template, or that it refuses.
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
        begun = str(tokenizer.decode(known))
        if text.startswith(begun):
            ids = known + list(tokenizer(text[len(begun) :], add_special_tokens=False)["input_ids"])
            if tokenizer.decode(ids) == text:  # some tokenizers add a space to what they take for a beginning
                return ids
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of `read_asked`."""
    return [ids for ids, _ in read_asked(path, tokenizer)]


def read_asked(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], str]]:
    """Prompts as token ids, each with its text or the first message of its user: a line of text each, which is a user's turn, or JSON lines.

    A record of a `.jsonl` has "prompt" (text, continued as it stands), "messages" that end with the user's, or a shape of
    instruction data, of which the last answer is left out. Without a chat template every text is continued as it stands.
    Raises DataError that names file and line.
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
        raise DataError(f"{path}: no prompts in it")
    return prompts


def _prompt_of(line: bytes) -> str | list[dict[str, Any]]:
    """Text to continue, or messages. Raises DataError for a record that has neither."""
    try:
        record = parse_json(line)
        if isinstance(record.get("prompt"), str) and "completion" not in record:
            return str(record["prompt"])
        messages = record.get("messages")
        if isinstance(messages, list) and messages and messages[-1]["role"] == "user":
            return [{"role": str(one["role"]), "content": check_text(one["content"])} for one in messages]
        return to_messages(record)[:-1]
    except (DataError, KeyError, TypeError):
        raise DataError('expected {"prompt": ...} or {"messages": [...]}') from None
