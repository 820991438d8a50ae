"""Prompts: messages through the tokenizer's chat template, plain text as it is."""

from __future__ import annotations

import jinja2
from transformers import PreTrainedTokenizerBase

from hildanext.documents import leading_ids
from hildanext.errors import UsageError


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
