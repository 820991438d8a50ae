from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hildanext.data.documents import Rejects
from hildanext.data.preferences import read_pairs
from hildanext.data.sources import json_records, opening
from hildanext.model.prompts import read_asked
from support.sources import jsonl, read

PAIR = {"question": "q", "answer": "a"}


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=30), max_size=3), max_size=12),
    st.integers(1, 40),
    st.sampled_from([None, 2]),
)
@settings(max_examples=40, deadline=None)
def test_json_arrays_are_read_as_json_would(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]], piece: int, indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=indent), encoding="utf-8", errors="surrogatepass")
    expected = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "PIECE_BYTES", piece)
        rejects = Rejects()
        assert list(json_records.read_json_array(path, rejects)) == list(enumerate(expected, start=1))
    assert rejects.total == 0


@pytest.mark.parametrize(
    ("text", "good", "reason"),
    [
        (json.dumps([PAIR] * 3)[:-1], 3, "truncated file"),
        (json.dumps([PAIR] * 3)[:-9], 2, "broken JSON array; the rest of the file is not read"),
        (json.dumps([PAIR, 5, "x"]), 1, "not a JSON object"),
        (json.dumps([PAIR])[:-1] + ", {'single': 1}, " + json.dumps(PAIR) + "]", 2, "broken JSON"),
        (json.dumps([PAIR])[:-1] + ', nonsense, "]}", ' + json.dumps(PAIR) + "]", 2, None),
        (json.dumps([PAIR, PAIR], indent=1).replace('"answer": "a"', '"answer": "a', 1), 1, "broken JSON"),
        (json.dumps([PAIR]) + "\n" + json.dumps([PAIR, PAIR]), 3, None),
        (json.dumps([PAIR]) + json.dumps(PAIR), 1, "text after the end of a JSON array; it is not read"),
        ('[{"question": "q", "question": "r", "answer": "a"}]', 0, "a key occurs twice in an object"),
        (json.dumps([PAIR])[:-1] + ', {"x": ' + "[" * 900 + "]" * 900 + "}]", 1, "nested deeper than 64 levels"),
        (json.dumps([PAIR])[:-1] + ', {"x": ' + "[" * 9000 + "]" * 9000 + "}]", 1, "nested deeper than 64 levels"),
        ("[", 0, "truncated file"),
    ],
)
def test_a_broken_array_keeps_its_good_records(tmp_path: Path, text: str, good: int, reason: str | None) -> None:
    (tmp_path / "x.json").write_text(text)
    docs, rejects = read("instruct", tmp_path / "x.json")
    assert len(docs) == good
    if reason is not None:
        assert set(rejects.by_reason) == {reason}


def test_the_rest_of_a_broken_array_is_counted(tmp_path: Path) -> None:
    """A quote is missing, so that no bracket after it can be trusted."""
    good = json.dumps([{"question": "a question", "answer": "an answer"}] * 400)[1:-1]
    (tmp_path / "x.json").write_text("[" + good + ', {"question": "a, "answer": [}, ' + good + "]")
    docs, rejects = read("instruct", tmp_path / "x.json")
    assert len(docs) + rejects.total == pytest.approx(801, abs=10)


def test_a_truncated_compressed_array_keeps_what_came_before(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = gzip.compress(json.dumps([{"question": rng.bytes(200).hex(), "answer": "a"}] * 3000).encode())
    (tmp_path / "x.json.gz").write_bytes(whole[:-200])
    docs, rejects = read("instruct", tmp_path / "x.json.gz")
    assert len(docs) > 1000
    assert rejects.total == 1


def test_records_behind_damage_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = [{"question": rng.bytes(200).hex(), "answer": "a"} for _ in range(3000)]
    for name, text in (("x.json.gz", json.dumps(records).encode()), ("x.jsonl.gz", jsonl(records))):
        data = bytearray(gzip.compress(text))
        data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
        (tmp_path / name).write_bytes(data)
        docs, rejects = read("instruct", tmp_path / name)
        assert 500 < len(docs) < 1500
        assert len(docs) + rejects.total == pytest.approx(3000, rel=0.35)


def test_bad_bytes_in_an_array_spoil_one_record(tmp_path: Path) -> None:
    text = json.dumps([PAIR, {"question": "BAD", "answer": "a"}, PAIR]).encode().replace(b"BAD", b"\xff\xfe")
    (tmp_path / "x.json").write_bytes(text)
    docs, rejects = read("instruct", tmp_path / "x.json")
    assert len(docs) == 2
    assert rejects.examples == {"invalid UTF-8 (a lone surrogate)": [f"{tmp_path / 'x.json'}:2"]}


USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SHAPES: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"messages": [USER, REPLY]}, [USER, REPLY]),
    ({"messages": [{"role": "system", "content": ""}, USER, REPLY, USER]}, [USER, REPLY]),
    ({"messages": [SYSTEM, USER, {**REPLY, "loss_weight": 0}, USER, {**REPLY, "loss_weight": 1.0}]},
     [SYSTEM, USER, {**REPLY, "train": False}, USER, REPLY]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                   {"role": "assistant", "content": [{"type": "text", "value": "a"}]}]}, [USER, REPLY]),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                   {"role": "tool", "content": ""}, REPLY]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, {"role": "tool", "content": ""}, REPLY]),
    ({"instruction": "q", "input": "", "output": "a"}, [USER, REPLY]),
    ({"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
     [SYSTEM, USER, REPLY, {"role": "user", "content": "q\ni"}, REPLY]),
    ({"question": "q", "answer": "a <<1+1=2>>\n#### 2"}, [USER, {"role": "assistant", "content": "a <<1+1=2>>\n#### 2"}]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        {"from": "observation", "value": "o"}, {"from": "gpt", "value": "a"}]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, {"role": "tool", "content": "o"}, REPLY]),
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {}}, [USER, REPLY]),
    ({"instruction": "q", "chosen": "a", "rejected": "b"}, [USER, REPLY]),
    ({"prompt": "q", "chosen": [USER, REPLY], "rejected": [USER, REPLY]}, [USER, REPLY]),
    ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, [USER, REPLY]),
    ({"prompt": "q", "completion": "a"}, [USER, REPLY]),
    ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, [SYSTEM, USER, REPLY]),
    ({"prompt": [USER], "chosen": [REPLY], "rejected": [{**REPLY, "content": "b"}]}, [USER, REPLY]),
    ({"prompt": "q", "chosen": [REPLY], "rejected": [REPLY]}, [USER, REPLY]),
    ({"instruction": "q", "context": "c", "response": "a", "category": "open"}, [{"role": "user", "content": "q\nc"}, REPLY]),
    ({"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, USER, REPLY]),
    ({"prompt": " q", "prompt_id": "1", "messages": [USER, REPLY]}, [USER, REPLY]),
    ({"messages": [{"role": "User", "content": "q"}, {"role": "model", "content": "a"}]}, [USER, REPLY]),
    ({"messages": [REPLY, USER, REPLY]}, [REPLY, USER, REPLY]),
    ({"messages": [USER, {**REPLY, "reasoning": "r"}, {**USER, "name": "n"}, {**REPLY, "thinking": "r"}]},
     [USER, {**REPLY, "reasoning_content": "r"}, {**USER, "name": "n"}, {**REPLY, "reasoning_content": "r"}]),
    ({"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                   {"role": "function", "name": "f", "content": "1"}, REPLY]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, {"role": "tool", "name": "f", "content": "1"}, REPLY]),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALLED}]},
                   {"role": "tool", "tool_call_id": "c1", "content": "1"}, REPLY]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALLED}]},
      {"role": "tool", "tool_call_id": "c1", "content": "1"}, REPLY]),
    *(({"messages": [USER, {**REPLY, **flag}, USER, {**REPLY, "weight": 1}]}, [USER, {**REPLY, "train": False}, USER, REPLY])
      for flag in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss_weight": 0}, {"loss": False}, {"training": False},
                   {"masked": True}, {"weight": 1, "train": False})),
]  # fmt: skip


def test_every_shape_becomes_messages(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for record, messages in SHAPES:
        with subtests.test(record=record, messages=messages):
            (tmp_path / "x.jsonl").write_bytes(jsonl([record]))
            docs, rejects = read("instruct", tmp_path / "x.jsonl")
            assert str(rejects) == ""
            assert docs[0].messages == messages


UNMAPPED: list[tuple[dict[str, Any], str]] = [
    ({"text": "t"}, "unknown record shape"),
    ({"messages": [{"role": "narrator", "content": "x"}, REPLY]}, "a message without a known role"),
    ({"messages": ["hello"]}, "a message is not an object"),
    ({"messages": [USER]}, "no assistant turn"),
    ({"messages": []}, "no assistant turn"),
    ({"messages": [USER, {**REPLY, "loss_weight": 0}]}, "no supervised turn"),
    ({"messages": [USER, {**REPLY, "loss_weight": "heavy"}]}, "'loss_weight' of a message is neither 0 nor 1"),
    ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "'weight' of a message is neither 0 nor 1"),
    ({"messages": [USER, {**REPLY, "reasoning": "r", "thinking": "t"}]}, "the reasoning of a message is not one text"),
    ({"messages": [USER, {**REPLY, "images": ["u"]}]}, "'images' of a message is not supported"),
    ({"messages": [{**USER, "name": ["n"]}, REPLY]}, "'name' of a message is not text"),
    ({"question": "q", "answer": "a", "weight": 0}, "no supervised turn"),
    ({"prompt": "q", "completion": "a", "label": False}, "no supervised turn"),
    ({"prompt": "other", "chosen": [USER, REPLY]}, "'prompt' is not used beside the other keys of the record"),
    ({"prompt": "q", "rejected": "b", "completion": "a"}, "'rejected' is not used beside the other keys of the record"),
    ({"messages": [USER, REPLY], "context": "c"}, "'context' is not used beside the other keys of the record"),
    ({"messages": [SYSTEM, USER, REPLY], "system": "t"}, "'system' is not used beside the other keys of the record"),
    ({"question": "q", "answer": "a", "reasoning": "r"}, "'reasoning' is not used beside the other keys of the record"),
    ({"question": "q", "answer": "a", "solution": "s"}, "'solution' is not used beside the other keys of the record"),
    ({"question": "q", "answer": "a", "images": ["u"]}, "'images' is not used beside the other keys of the record"),
    ({"question": "q", "answer": "a", "tools": "[" * 99 + "]" * 99}, "nested deeper than 64 levels"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, REPLY]},
        "a content part that is not text",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, REPLY]}, "a content part without text"),
    ({"messages": [{"role": "user", "content": 5}, REPLY]}, "a message without text content"),
    ({"instruction": "q", "output": ""}, "empty message"),
    ({"instruction": "q"}, "a message without text content"),
    ({"instruction": "q", "output": "a", "history": ["x"]}, "'history' is not a list of pairs"),
    ({"conversations": [{"from": "function_call", "value": "not json"}]}, "broken JSON in a tool call or tool list"),
    ({"conversations": [{"from": "function_call", "value": "[{}]"}]}, "a tool call without a name"),
    ({"question": "q", "answer": "a", "tools": "{}x"}, "broken JSON in a tool call or tool list"),
    ({"question": "q", "answer": "a", "tools": [1]}, "'tools' is not a list of objects"),
]


def test_what_cannot_be_mapped_is_counted(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for record, reason in UNMAPPED:
        with subtests.test(record=record, reason=reason):
            (tmp_path / "x.jsonl").write_bytes(jsonl([PAIR, record]))
            docs, rejects = read("instruct", tmp_path / "x.jsonl")
            assert len(docs) == 1
            assert rejects.examples == {reason: [f"{tmp_path / 'x.jsonl'}:2"]}


def test_a_file_that_is_one_object_counts_as_its_records(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": [PAIR] * 7}))
    docs, rejects = read("instruct", tmp_path / "x.json")
    assert docs == []
    assert rejects.by_reason == {"unknown record shape": 7}


def test_keys_that_no_shape_knows_are_counted(tmp_path: Path) -> None:
    odd = {"messages": [USER, {**REPLY, "mood": "calm"}, USER], "category": "open", "score": None}
    (tmp_path / "x.jsonl").write_bytes(jsonl([odd, PAIR, {**PAIR, "category": "closed"}]))
    docs, rejects = read("instruct", tmp_path / "x.jsonl")
    assert (len(docs), rejects.total) == (3, 0)
    assert rejects.to_dict()["ignored_keys"] == {
        "category": 2,
        "messages[].mood": 1,
        "messages[] after the last answer": 1,
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k/test.jsonl", 1319),
        ("instruct/alpaca_en_demo.json", 999),
        ("instruct/v1_sft_demo.jsonl", 500),
        ("instruct/glaive_toolcall_en_demo.json", 300),
        ("instruct/dpo_en_demo.json", 300),
    ],
)
def test_real_instruction_sets_are_read_whole(shared: Callable[[str], Path], name: str, count: int) -> None:
    docs, rejects = read("instruct", shared(name))
    assert len(docs) + rejects.total == count
    assert rejects.total <= count // 100
    assert all(doc.messages and doc.messages[-1]["role"] == "assistant" for doc in docs)


def test_real_gsm8k_answers_stay_as_published(shared: Callable[[str], Path]) -> None:
    docs, _ = read("instruct", shared("gsm8k/test.jsonl"))
    first = json.loads(shared("gsm8k/test.jsonl").read_bytes().splitlines()[0])
    assert docs[0].messages == [
        {"role": "user", "content": first["question"]},
        {"role": "assistant", "content": first["answer"]},
    ]


RECORDS: list[dict[str, Any]] = [
    {"messages": [USER, {**REPLY, "reasoning_content": "r"}], "id": "a", "source": "s"},
    {"messages": [SYSTEM, USER, {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}, REPLY]},
    {"messages": [USER, {**REPLY, "tool_calls": [{"function": {"name": "g", "arguments": {"city": "Rome"}}}]}, REPLY]},
    {"messages": [USER, {**REPLY, "weight": 0.0}]},
    {"messages": None, "prompt": "q", "response": "a"},
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"prompt": "q", "response": None},
    {"prompt": "q", "chosen": "b", "tools": '[{"name": "f"}]'},
]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_tables_are_read_like_json_lines(tmp_path: Path, suffix: str) -> None:
    """Arrow gives every struct the fields of all, as nulls; these count as absent."""
    (tmp_path / "x.jsonl").write_bytes(jsonl(RECORDS))
    expected, refused = read("instruct", tmp_path / "x.jsonl")
    table = pa.Table.from_pylist(
        [dict.fromkeys((*RECORDS[0], *RECORDS[4], *RECORDS[-1])) | record for record in RECORDS]
    )
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    elif suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        feather.write_feather(table, str(path))
    docs, rejects = read("instruct", path)
    assert len(docs) == 5
    assert [(doc.messages, doc.tools, doc.source) for doc in docs] == [
        (doc.messages, doc.tools, doc.source) for doc in expected
    ]
    assert docs[0].id == "a"
    assert docs[-1].id == f"x{suffix}:8"
    assert rejects.by_reason == refused.by_reason


def test_columns_that_no_shape_knows_are_not_read(tmp_path: Path) -> None:
    when = [datetime(2025, 1, 1), None]
    table = pa.table({"question": ["q", "q"], "answer": ["a", "a"], "created": when, "id": [b"one", b"two"]})
    pq.write_table(table, tmp_path / "x.parquet")
    docs, rejects = read("instruct", tmp_path / "x.parquet")
    assert (len(docs), rejects.total) == (2, 0)
    assert rejects.ignored == {"created": 2}
    pq.write_table(pa.table({"question": when, "answer": ["a", "a"]}), tmp_path / "x.parquet")
    pq.write_table(pa.table({"text": ["a"] * 5}), tmp_path / "y.parquet")
    docs, rejects = read("instruct", tmp_path)
    assert docs == []
    assert rejects.by_reason == {"a value of type datetime": 1, "unknown record shape": 6}


def test_pairs_and_prompts_come_from_tables_too(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(jsonl(pairs))
    found = [
        [pair.chosen.messages, pair.rejected.messages] for pair in read_pairs(str(tmp_path / "x.parquet"), Rejects())
    ]
    expected = [
        [pair.chosen.messages, pair.rejected.messages] for pair in read_pairs(str(tmp_path / "x.jsonl"), Rejects())
    ]
    assert len(found) == 3
    assert found == expected
    asked = [read_asked(tmp_path / name, tiny_tokenizer) for name in ("x.parquet", "x.jsonl")]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 3
