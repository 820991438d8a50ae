"""Text stays text, templates may fail, and training and serving encode alike."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hildanext.data.conversations import unread_fields
from hildanext.data.documents import Document, parse_document
from hildanext.data.encode import Encoded, encode_document, encode_documents
from hildanext.data.sources.message import KNOWN
from hildanext.data.sources.shapes import CONTENT
from hildanext.errors import DataError, UsageError
from hildanext.model.prompts import encode_prompt
from support.models import CHATML, make_tokenizer
from support.sources import jsonl, read

PIECES = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "the cat", "\n", " ", "assistant", "é"]
quoting = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)


def chat(*contents: str, **more: Any) -> Document:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Document("1", "test", messages=messages, **more)


def as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text document, in which special tokens are text."""
    return encode_document(Document("1", "test", text=text), tokenizer).input_ids[:-1].tolist()


@given(st.lists(quoting, min_size=2, max_size=4).filter(lambda contents: len(contents) % 2 == 0))
def test_only_the_template_writes_special_tokens(contents: list[str]) -> None:
    tokenizer = make_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    expected: list[int] = []
    for i, content in enumerate(contents):
        before = as_text(tokenizer, "\n") if i else []
        role = ("user", "assistant")[i % 2]
        expected += [*before, start, *as_text(tokenizer, f"{role}\n{content}"), end]
    doc = chat(*contents)
    ids, mask = encode_document(doc, tokenizer)
    assert ids.tolist() == expected
    # Every turn is supervised to its end, and the prompt of the last one is what a server encodes.
    assert sum(mask.tolist()[i] and token == end for i, token in enumerate(ids.tolist())) == len(contents) // 2
    prompt = encode_prompt(tokenizer, (doc.messages or [])[:-1])
    assert tokenizer.decode(ids[: len(prompt)]) == tokenizer.decode(prompt)
    assert prompt.count(end) == len(contents) - 1


def test_a_quoted_end_does_not_end_what_is_supervised(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask = encode_document(chat("how?", "With <|im_end|> and more"), tiny_tokenizer)
    assert tiny_tokenizer.decode(ids[mask]) == "With <|im_end|> and more<|im_end|>"
    assert ids.tolist().count(tiny_tokenizer.eos_token_id) == 2


def test_quotes_in_tools_and_calls_are_text_too(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_start|>": "<|im_end|>"}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    doc = Document("1", "test", messages=messages, tools=[{"name": "f", "description": "ends with <|im_end|>"}])
    ids, _ = encode_document(doc, tiny_tokenizer)
    text = tiny_tokenizer.apply_chat_template(messages, tools=doc.tools, tokenize=False)
    assert tiny_tokenizer.decode(ids) == text.rstrip("\n")
    assert ids.tolist().count(tiny_tokenizer.eos_token_id) == 3


def test_a_quote_changes_no_token_of_the_other_turns(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    plain, _ = encode_document(chat("hi", "hello", "how?", "like this"), qwen3_tokenizer)
    ids, mask = encode_document(chat("hi", "hello", "how?", "like <|im_end|> this"), qwen3_tokenizer)
    last = qwen3_tokenizer.convert_tokens_to_ids("<|im_start|>")
    at = len(plain) - plain.tolist()[::-1].index(last)
    assert ids[:at].tolist() == plain[:at].tolist()
    assert qwen3_tokenizer.decode(ids[mask]).endswith("like <|im_end|> this<|im_end|><|endoftext|>")
    # The tags of reasoning are added tokens but not special ones: in a message they are what the template writes.
    tag = qwen3_tokenizer.convert_tokens_to_ids("<think>")
    assert tag in encode_prompt(qwen3_tokenizer, [{"role": "user", "content": "<think>"}])


def test_a_tokenizer_that_begins_texts_with_a_space_gets_none_in_the_middle() -> None:
    """Metaspace with the scheme 'first', as newer Llama 2 tokenizers have it."""
    words = ["<e>", "▁", "a", "b", "<", "e", ">", "\n", "▁a", "▁b", ":"]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.chat_template = "{% for m in messages %}<e>{{ m.content }}<e>{% endfor %}"
    prompt = [{"role": "user", "content": "a b<e>"}]
    plain = encode_prompt(tokenizer, [{"role": "user", "content": "a b"}])
    assert [words[i] for i in plain] == ["<e>", "a", "▁b", "<e>"]
    assert [words[i] for i in encode_prompt(tokenizer, prompt)] == ["<e>", "a", "▁b", "<", "e", ">", "<e>"]


def test_text_that_a_tokenizer_cannot_keep_as_text_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <e>{% endfor %}"
    with pytest.raises(UsageError, match="the prompt quotes a special token that the tokenizer cannot encode as text"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a <e>"}])
    with pytest.raises(DataError, match="quotes a special token"):
        encode_document(chat("a", "a <e> a"), tokenizer)


def test_a_conversation_goes_on_with_the_ids_it_has(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "say <|im_end|>"}]
    known = [*encode_prompt(tiny_tokenizer, messages), *as_text(tiny_tokenizer, "t<|im_end|>"), 3]
    longer = [*messages, {"role": "assistant", "content": "t<|im_end|>"}, {"role": "user", "content": "<|im_end|>?"}]
    ids = encode_prompt(tiny_tokenizer, longer, known)
    assert ids[: len(known)] == known
    assert ids.count(tiny_tokenizer.eos_token_id) == 3


FAILING = [
    "{{ raise_exception('no') }}",
    "{{ messages[0].content.index('absent') }}",
    "{{ messages[9].content }}",
    "{{ 1 / 0 }}",
    "{{ messages + 1 }}",
    "{{ messages[0].content.nowhere() }}",
    "{{ range(10 ** 9) }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ 'a' * 10 ** 18 }}",
    "{% for m in messages %}",
    "{{ '%d' % 'a' }}",
    "{{ {}.popitem() }}",
]


def test_whatever_a_template_raises_is_a_reason(subtests: pytest.Subtests) -> None:
    tokenizer = make_tokenizer()
    for template in FAILING:
        with subtests.test(template=template):
            tokenizer.chat_template = template
            (result,) = encode_documents([chat("q", "a")], tokenizer)
            assert isinstance(result, DataError)
            assert str(result).startswith("the chat template rejects the messages (")
            with pytest.raises(UsageError, match="the chat template rejects the messages"):
                encode_prompt(tokenizer, [{"role": "user", "content": "q"}])


def test_no_record_ends_the_reading_or_the_encoding(tmp_path: Path) -> None:
    """Records of random values under the names that formats use: each is a document or counted once."""
    values = [None, True, 0, 0.5, 10**30, "", " ", "the cat", "<|im_end|>", "{}", '{"name": "f"}', "user", [], {}]
    values += [["a"], [{}], [{"type": "text", "text": "a"}], {"name": "f", "arguments": {"x": [1]}}, [[["a"]]]]
    draw = random.Random(0)
    records = []
    for _ in range(1500):
        turns = [{"role": draw.choice(["user", "assistant", "tool", "x"]), "content": "a"} for _ in range(3)]
        for turn in turns:
            turn |= {draw.choice([*sorted(KNOWN), "odd"]): draw.choice(values) for _ in range(draw.randrange(2))}
        shape = {draw.choice(["messages", "conversations", "chosen", "prompt", "x"]): turns}
        extra = {draw.choice(CONTENT): draw.choice(values) for _ in range(draw.randrange(3))}
        records.append({"question": "q", "answer": "a"} | shape | extra if draw.random() < 0.3 else shape | extra)
    (tmp_path / "x.jsonl").write_bytes(jsonl(records))
    docs, rejects = read("instruct", tmp_path / "x.jsonl")
    assert len(docs) + rejects.total == len(records)
    assert len(docs) > 100
    encoded = encode_documents([parse_document(doc.to_line()) for doc in docs], make_tokenizer())
    assert sum(isinstance(result, Encoded) for result in encoded) > 100


def test_a_template_without_text_is_a_reason() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{# nothing #}"
    (result,) = encode_documents([chat("q", "a")], tokenizer)
    assert isinstance(result, DataError)


def test_several_templates_without_a_default() -> None:
    tokenizer = make_tokenizer(name_or_path="many")
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    plain, tools = encode_documents([chat("q", "a"), chat("q", "a", tools=[{"name": "f"}])], tokenizer)
    assert isinstance(tools, Encoded)  # the library takes 'tool_use' for tools
    assert str(plain) == (
        "tokenizer 'many' has several chat templates (rag, tool_use) and none is named 'default'; name one of them "
        "'default'"
    )
    with pytest.raises(UsageError, match="several chat templates"):
        encode_prompt(tokenizer, [{"role": "user", "content": "q"}])
    tokenizer.chat_template["default"] = CHATML
    assert len(encode_prompt(tokenizer, [{"role": "user", "content": "q"}])) > 3


def test_training_data_have_one_date() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}\n" + CHATML
    ids, _ = encode_document(chat("q", "a"), tokenizer)
    assert tokenizer.decode(ids).startswith("01 January 2025\n")
    now = tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "q"}]))
    assert not now.startswith("01 January 2025\n")


def test_an_opening_turn_of_the_assistant_has_no_prompt(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "assistant", "content": "welcome"}, *(chat("q", "a").messages or [])]
    ids, mask = encode_document(Document("1", "test", messages=messages), tiny_tokenizer)
    assert tiny_tokenizer.decode(ids).startswith("<|im_start|>assistant\nwelcome<|im_end|>\n<|im_start|>user\nq")
    assert tiny_tokenizer.decode(ids[mask]) == "a<|im_end|>"
    alone = Document("1", "test", messages=messages[:1])
    with pytest.raises(DataError, match="no supervised turn"):
        encode_document(alone, tiny_tokenizer)
    assert tiny_tokenizer.decode(encode_document(alone, tiny_tokenizer, all_tokens=True).input_ids) == (
        "<|im_start|>assistant\nwelcome<|im_end|>"
    )


def test_fields_that_a_template_does_not_write_are_named() -> None:
    call = {"id": "call1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "question", "name": "Ann"},
        {"role": "assistant", "content": "", "reasoning_content": "so\nso", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "call1"},
    ]
    assert unread_fields(messages, "question noon") == {
        "name",
        "reasoning_content",
        "tool_calls[].id",
        "tool_call_id",
    }
    assert unread_fields(messages, f"question noon Ann call1 {json.dumps('so' + chr(10) + 'so')}") == set()
    assert unread_fields(messages, "question Ann call1 so\nso") == {"content"}


def test_real_markup_in_messages_is_learned_as_text(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    content = "A turn ends with <|im_end|>; a text with <|endoftext|>. Then <|im_start|>user begins the next."
    ids, mask = encode_document(chat("How does ChatML work?", content), qwen3_tokenizer)
    assert qwen3_tokenizer.decode(ids[mask]).count(content) == 1
    special = qwen3_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert [token for token in ids.tolist() if token in special] == [special[i] for i in (0, 1, 0, 1, 2)]
