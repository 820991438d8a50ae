"""The tokens that end a text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hildanext.model.prompts import end_ids
from support.models import make_tokenizer


def test_the_ends_are_the_tokenizers_the_listed_and_the_turns() -> None:
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    text, turn = (tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>"))
    assert end_ids(tokenizer, None) == (text, turn)  # the template closes a turn with another token
    assert end_ids(tokenizer, text) == (text, turn)
    assert end_ids(tokenizer, [turn, text, 77]) == (text, turn, 77)
    tokenizer.chat_template = None
    assert end_ids(tokenizer, None) == (text,)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_ids(tokenizer, [turn]) == (text, turn)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} and on{% endfor %}"
    assert end_ids(tokenizer, None) == (text,)


def test_the_mask_token_is_no_end() -> None:
    tokenizer = make_tokenizer(mask_token="<|mask|>")
    assert end_ids(tokenizer, [tokenizer.mask_token_id, 5]) == (tokenizer.eos_token_id, 5)


def test_qwen3_has_two_ends(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    """As its generation_config.json lists them; its template alone names both, too."""
    text, turn = (qwen3_tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>"))
    assert end_ids(qwen3_tokenizer, [turn, text]) == end_ids(qwen3_tokenizer, None) == (text, turn)
