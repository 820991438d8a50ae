from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from hildanext.data.documents import Document, Rejects, parse_document, read_documents
from hildanext.data.encode import Encoded, encode_document, encode_documents, fill_block
from hildanext.errors import DataError
from hildanext.model.prompts import encode_prompt
from support.models import make_tokenizer

TURN = {"role": "assistant", "content": "hi"}


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def test_documents_survive_their_line(tmp_path: Path) -> None:
    docs = [
        Document("1", "a", text="Ünïcode \u2028 line\nend"),
        Document("2", "b", input_ids=[1, 2, 3]),
        Document(
            "3", "c", messages=[{"role": "user", "content": "?"}, {**TURN, "train": False}], tools=[{"name": "f"}]
        ),
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(doc.to_line() for doc in docs))
    assert list(read_documents(path)) == docs


BAD_LINES = {
    b"{broken": "broken JSON",
    b"[" * 100_000: "nested deeper than 64 levels",
    b'{"text": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}": "nested deeper than 64 levels",
    b'{"text": "a", "text": "b"}': "a key occurs twice in an object",
    b"[1]": "not a JSON object",
    b'{"text": "\xff"}': "invalid UTF-8",
    rb'{"text": "\ud800"}': "invalid UTF-8 (a lone surrogate)",
    b'{"text": " \\n "}': "empty document",
    b'{"text": 3}': "no 'text'",
    b'{"text": "a", "input_ids": [1]}': "not exactly one of 'text', 'input_ids', 'messages'",
    b"{}": "not exactly one of 'text', 'input_ids', 'messages'",
    b'{"input_ids": []}': "empty document",
    b'{"input_ids": [1, true]}': "'input_ids' are not token ids",
    b'{"input_ids": [1, 2.0]}': "'input_ids' are not token ids",
    b'{"input_ids": [-1]}': "'input_ids' are not token ids",
    b'{"input_ids": [99999999999999999999]}': "'input_ids' are not token ids",
    b'{"input_ids": "12"}': "no 'input_ids'",
    b'{"messages": []}': "no 'messages'",
    b'{"messages": [{"role": "robot", "content": ""}]}': "a message without a known role",
    b'{"messages": [{"role": "user", "content": null}]}': "a message without text content",
    b'{"messages": [{"role": "user", "content": "a"}]}': "no assistant turn",
    b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}': "a tool call without a function",
    b'{"messages": [{"role": "assistant", "content": "a"}], "tools": {}}': "'tools' is not a list of objects",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", b'{"text": "good"}', line, b'{"text": "good too"}', b"")
    with pytest.raises(DataError) as error:
        list(read_documents(path))
    assert str(error.value) == f"{path}:2: {reason}"
    rejects = Rejects()
    assert [doc.text for doc in read_documents(path, rejects)] == ["good", "good too"]
    assert rejects.to_dict() == {
        "total": 1,
        "by_reason": {reason: 1},
        "by_file": {str(path): 1},
        "examples": {reason: [f"{path}:2"]},
        "ignored_keys": {},
    }


def test_rejects_are_limited_by_share() -> None:
    rejects = Rejects()
    rejects.check(0, 0.0)
    for line in range(1, 6):
        rejects.add("broken JSON", "a.jsonl", line)
    rejects.check(95, 0.05)
    with pytest.raises(
        DataError, match=r"5 of 99 records .*max_reject_share 0\.05: broken JSON x5 \(a\.jsonl:1, .*, \.\.\.\)"
    ):
        rejects.check(94, 0.05)


@given(st.lists(st.text(min_size=1).filter(lambda text: not text.isspace()), min_size=1, max_size=5))
def test_text_is_the_tokenizers_ids_and_one_end(texts: list[str]) -> None:
    tokenizer = make_tokenizer()
    docs = [Document(str(i), "x", text=text) for i, text in enumerate(texts) if "<|" not in text]
    for doc, encoded in zip(docs, encode_documents(docs, tokenizer), strict=True):
        assert isinstance(encoded, Encoded)
        expected = tokenizer(doc.text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert encoded.input_ids.tolist() == expected
        assert encoded.input_ids.dtype == np.int32
        assert encoded.loss_mask.dtype == bool
        assert encoded.loss_mask.all()


def test_special_tokens_written_in_a_text_stay_text(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids, _ = encode_document(Document("1", "x", text="a<|im_end|>b"), tiny_tokenizer)
    assert ids.tolist().count(tiny_tokenizer.eos_token_id) == 1
    assert tiny_tokenizer.decode(ids[:-1]) == "a<|im_end|>b"
    # and the tokenizer is as it was
    assert tiny_tokenizer("<|im_end|>")["input_ids"] == [tiny_tokenizer.eos_token_id]


def test_truncation_left_in_a_tokenizer_does_not_cut_documents() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    ids, _ = encode_document(Document("1", "x", text="the cat saw a dog " * 5), tokenizer)
    assert len(ids) == len(make_tokenizer()("the cat saw a dog " * 5)["input_ids"]) + 1


def test_given_ids_are_kept_and_checked(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask = encode_document(Document("1", "x", input_ids=[5, 6, 7]), tiny_tokenizer)
    assert ids.tolist() == [5, 6, 7]
    assert mask.all()
    size = len(tiny_tokenizer)
    assert encode_document(Document("1", "x", input_ids=[size - 1]), tiny_tokenizer).input_ids.tolist() == [size - 1]
    with pytest.raises(DataError, match="document 'd7' of 'shard': token ids outside"):
        encode_document(Document("d7", "shard", input_ids=[size]), tiny_tokenizer)


def test_the_mask_token_is_no_data() -> None:
    tokenizer = make_tokenizer(mask_token="<|mask|>")
    assert tokenizer.mask_token_id is not None
    with pytest.raises(DataError, match="contains the mask token"):
        encode_document(Document("1", "x", input_ids=[5, tokenizer.mask_token_id]), tokenizer)
    chat = [{"role": "user", "content": "say <|mask|>"}, TURN]
    assert tokenizer.mask_token_id not in encode_document(Document("1", "x", messages=chat), tokenizer).input_ids
    assert tokenizer.mask_token_id not in encode_document(Document("1", "x", text="a <|mask|>"), tokenizer).input_ids


def test_unfit_tokenizers_are_named() -> None:
    no_template = make_tokenizer(name_or_path="plain")
    no_template.chat_template = None
    with pytest.raises(DataError, match="tokenizer 'plain' has no chat template"):
        encode_document(Document("1", "x", messages=[TURN]), no_template)
    no_end = make_tokenizer(name_or_path="endless", eos_token=None)
    with pytest.raises(DataError, match="tokenizer 'endless' has no end-of-text token"):
        encode_document(Document("1", "x", text="a"), no_end)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 60))
def test_fill_reaches_whole_blocks_but_not_past_the_row(n: int, block: int, limit: int) -> None:
    ids = np.append(np.arange(n - 1, dtype=np.int32), np.int32(7))
    filled = fill_block(Encoded(ids, np.zeros(n, dtype=bool)), block, limit, eos=7)
    size = len(filled.input_ids)
    assert size == max(n, min(-(-n // block) * block, limit))
    assert (filled.input_ids[n:] == 7).all()
    assert filled.loss_mask[n:].all()
    assert not filled.loss_mask[:n].any()
    assert (filled.input_ids.dtype, filled.loss_mask.dtype) == (np.int32, bool)


def test_parse_keeps_ids_of_any_type() -> None:
    assert parse_document(json.dumps({"id": 5, "text": "a"}).encode()).id == "5"


def test_a_text_begins_as_its_tokenizer_begins_it():
    """Llama's and Gemma's tokenizers put a begin-of-text token first; models trained so are lost without it."""
    tokenizer = make_tokenizer(bos_token="<|endoftext|>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert encode_document(Document("1", "a", text="the cat"), tokenizer).input_ids.tolist() == [*plain, eos]
    assert encode_prompt(tokenizer, "the cat") == plain
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    encoded = encode_document(Document("1", "a", text="the cat"), tokenizer)
    assert encoded.input_ids.tolist() == [*tokenizer("the cat")["input_ids"], eos]
    assert encoded.input_ids[0] == bos
    assert encoded.loss_mask.tolist() == [False] + [True] * (len(plain) + 1)  # given, never noised
    assert encode_prompt(tokenizer, "the cat") == [bos, *plain]
