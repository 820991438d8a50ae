"""Prompts: messages through the tokenizer's chat template, plain text as it is."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hildanext.documents import leading_ids
from hildanext.errors import UsageError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt. A string is continued as it stands; messages are rendered with the generation prompt.

    Raises UsageError for an empty prompt, or for messages when the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("the prompt is empty; give some text")
        return leading_ids(tokenizer) + list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not prompt or not any(message.get("content") for message in prompt):
        raise UsageError("the prompt is empty; give a message with some text")
    if tokenizer.chat_template is None:
        raise UsageError("this model's tokenizer has no chat template; give a plain prompt (generate: --raw)")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
