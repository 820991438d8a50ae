from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hildanext.data.documents import Document, Rejects
from hildanext.data.encode import encode_document
from hildanext.data.sources import instruct
from hildanext.errors import DataError
from support.models import make_tokenizer

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "saw a dog"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "saw the cat"},
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}


def supervised(doc: Document, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The decoded supervised stretches of a document, special tokens shown."""
    ids, mask = encode_document(doc, tokenizer)
    stretches, open_ = [], False
    for token, on in zip(ids.tolist(), mask.tolist(), strict=True):
        if on:
            stretches = stretches if open_ else [*stretches, []]
            stretches[-1].append(token)
        open_ = on
    return [tokenizer.decode(stretch) for stretch in stretches]


def chat(messages: list[dict[str, Any]], **kwargs: Any) -> Document:
    return Document("1", "test", messages=messages, **kwargs)


def test_ids_are_the_templates_and_end_with_the_last_turn(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids, _ = encode_document(chat(CHAT), tiny_tokenizer)
    text = tiny_tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids.tolist() == tiny_tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert ids[-1] == tiny_tokenizer.eos_token_id


def test_every_assistant_turn_is_supervised_to_its_end(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert supervised(chat(CHAT), tiny_tokenizer) == ["saw a dog<|im_end|>", "saw the cat<|im_end|>"]


def test_a_turn_that_is_not_trained_stays_unsupervised(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    quiet = [{**message, "train": False} if i == 2 else message for i, message in enumerate(CHAT)]
    assert supervised(chat(quiet), tiny_tokenizer) == ["saw the cat<|im_end|>"]
    silent = [{**message, "train": False} if message["role"] == "assistant" else message for message in CHAT]
    with pytest.raises(DataError, match="no supervised turn"):
        encode_document(chat(silent), tiny_tokenizer)


def test_conversion_supervises_all_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask = encode_document(chat(CHAT), tiny_tokenizer, all_tokens=True)
    assert mask.all()
    assert ids.tolist() == encode_document(chat(CHAT), tiny_tokenizer).input_ids.tolist()


def test_another_end_of_turn_token_ends_the_turn_and_the_end_of_text_follows() -> None:
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    assert supervised(chat(CHAT), tokenizer) == ["saw a dog<|im_end|>", "saw the cat<|im_end|><|endoftext|>"]


def test_a_template_without_any_end_token_ends_turns_with_their_content() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    # The space after the colon belongs to the turn: the prompt ends before it.
    assert supervised(chat(CHAT), tokenizer) == [" saw a dog", " saw the cat<|im_end|>"]


def test_a_token_across_the_start_of_a_turn_is_supervised() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    # byte-level BPE joins the prompt's space to the word
    assert supervised(chat(CHAT), tokenizer)[0] == " saw a dog<|im_end|>"


def test_text_after_the_last_turn_is_kept_unsupervised(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [*CHAT, {"role": "user", "content": "more?"}]
    assert supervised(chat(asked), tiny_tokenizer) == ["saw a dog<|im_end|>", "saw the cat<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="renders earlier turns differently"):
        encode_document(chat(CHAT), tokenizer)


def test_a_template_that_refuses_is_quoted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"document '1' of 'test': the chat template rejects .*no system role"):
        encode_document(chat(CHAT), tokenizer)


def test_tools_reach_a_template_that_knows_them(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    doc = chat(messages, tools=[{"name": "look"}])
    (turn,) = supervised(doc, tiny_tokenizer)
    assert turn.startswith("<call>")
    assert '"look"' in turn
    assert turn.endswith("</call><|im_end|>")
    ids, _ = encode_document(doc, tiny_tokenizer)
    assert ids.tolist() == tiny_tokenizer.apply_chat_template(messages, tools=doc.tools)["input_ids"][: len(ids)]


def test_tools_are_written_as_text_where_the_template_drops_them() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    doc = chat(messages, tools=[{"name": "look"}])
    assert supervised(doc, tokenizer) == ['{"name": "look", "arguments": {"at": "cat"}}<|im_end|>']
    assert '[{"name": "look"}]' in tokenizer.decode(encode_document(doc, tokenizer).input_ids)


def test_qwen3_turns_and_its_thinking_block(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    first, last = supervised(chat(CHAT), qwen3_tokenizer)
    assert first == "saw a dog<|im_end|>"
    assert last == "<think>\n\n</think>\n\nsaw the cat<|im_end|><|endoftext|>"


@pytest.mark.parametrize(
    "name", ["v1_sft_demo.jsonl", "glaive_toolcall_en_demo.json", "dpo_en_demo.json", "alpaca_en_demo.json"]
)
def test_real_instruction_data_has_its_answers_supervised(
    shared: Callable[[str], Path], qwen3_tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    rejects = Rejects()
    docs = [doc for _, doc in instruct.read(str(shared(f"instruct/{name}")), rejects)][:60]
    assert len(docs) == 60
    for doc in docs:
        turns = [message for message in doc.messages or [] if message["role"] == "assistant"]
        stretches = supervised(doc, qwen3_tokenizer)
        assert len(stretches) == len(turns)
        for turn, stretch in zip(turns, stretches, strict=True):
            assert turn["content"].strip() in stretch
            assert stretch.count("<|im_end|>") == 1
            assert "<|im_start|>" not in stretch
            for call in turn.get("tool_calls", []):
                assert f'{{"name": "{call["function"]["name"]}"' in stretch
