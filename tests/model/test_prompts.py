"""Files of prompts are read as carefully as sources."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hildanext.data.documents import Rejects
from hildanext.errors import DataError
from hildanext.model.prompts import encode_prompt, read_asked
from support.sources import jsonl

MARK = b"\xef\xbb\xbf"
USER = {"role": "user", "content": "hello there"}


def asked(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [text for _, text in read_asked(path, tokenizer)]


def test_marks_arrays_and_compression(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"prompt": "hello there"}, {"messages": [USER]}, {"question": "second", "answer": "a"}]
    files = {
        "a.txt": MARK + b"hello there\r\n\r\nsecond\r\n",
        "a.jsonl": MARK + jsonl(records),
        "a.json": MARK + json.dumps(records, indent=1).encode(),
        "a.jsonl.gz": gzip.compress(jsonl(records)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        texts = asked(tmp_path / name, tiny_tokenizer)
        assert texts == (["hello there", "second"] if name == "a.txt" else ["hello there", "hello there", "second"])
    ids = [ids for ids, _ in read_asked(tmp_path / "a.json", tiny_tokenizer)]
    assert ids[0] == encode_prompt(tiny_tokenizer, "hello there")
    assert ids[1] == encode_prompt(tiny_tokenizer, [USER])


PROMPTS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]}, [USER]),
    ({"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]}, [USER]),
    ({"messages": [USER, {"role": "assistant", "content": "a"}, USER]}, [USER, {"role": "assistant", "content": "a"}, USER]),
    ({"instruction": "hello there"}, [USER]),
    ({"prompt": "hello there", "chosen": "a", "rejected": "b", "system": "s"}, [{"role": "system", "content": "s"}, USER]),
    ({"conversations": [{"from": "human", "value": "hello there"}], "chosen": "a", "rejected": "b"}, [USER]),
]  # fmt: skip


def test_every_shape_gives_its_prompt(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, subtests: pytest.Subtests
) -> None:
    for record, messages in PROMPTS:
        with subtests.test(record=record):
            (tmp_path / "x.jsonl").write_bytes(jsonl([record]))
            assert read_asked(tmp_path / "x.jsonl", tiny_tokenizer) == [
                (encode_prompt(tiny_tokenizer, messages), "hello there")
            ]


def test_the_first_bad_prompt_is_named_or_all_are_counted(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "x.jsonl"
    bad: list[object] = [
        {"promt": "a"},
        5,
        {"prompt": "a", "context": "lost", "completion": "b", "tools": [{"name": "f"}]},
    ]
    path.write_bytes(jsonl([{"prompt": "fine"}, *bad]))
    with pytest.raises(DataError, match=r"x\.jsonl:2: expected \{\"prompt\": \.\.\.\}"):
        read_asked(path, tiny_tokenizer)
    rejects = Rejects()
    assert [text for _, text in read_asked(path, tiny_tokenizer, rejects)] == ["fine"]
    assert rejects.total == 3
    (tmp_path / "x.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"x\.txt:2: invalid UTF-8"):
        read_asked(tmp_path / "x.txt", tiny_tokenizer)
    (tmp_path / "x.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match="no prompts in the file"):
        read_asked(tmp_path / "x.jsonl", tiny_tokenizer)
