"""The source kind 'text': its documents are the values of a column, as pandas or pyarrow wrote them, in order."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.config import SourceConfig
from hildanext.data.corpus import make_reader
from hildanext.data.documents import Document
from hildanext.data.sources import find_files, text
from hildanext.errors import UsageError
from support.sources import jsonl, read

Write = Callable[[pa.Table, Path], None]


def parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=7)


def plain_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path.with_suffix(".parquet"), use_dictionary=False, compression="none", row_group_size=10**6)


def arrow_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def arrow_stream(table: pa.Table, path: Path) -> None:
    """As the library datasets keeps its tables."""
    with pa.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def feather_file(table: pa.Table, path: Path) -> None:
    feather.write_feather(table, str(path.with_suffix(".feather")), compression="lz4")


def json_lines(table: pa.Table, path: Path) -> None:
    path.with_suffix(".jsonl").write_bytes(jsonl(table.to_pylist()))


def json_lines_gz(table: pa.Table, path: Path) -> None:
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(jsonl(table.to_pylist())))


def json_array(table: pa.Table, path: Path) -> None:
    data = json.dumps(table.to_pylist(), indent=1).encode()
    path.with_suffix(".json.zst").write_bytes(zstandard.ZstdCompressor().compress(data))


TABLES: list[Write] = [parquet, plain_parquet, arrow_file, arrow_stream, feather_file]
ALL: list[Write] = [*TABLES, json_lines, json_lines_gz, json_array]
TEXTS = st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=40)


def usable(values: list[str | None]) -> list[str]:
    return [value for value in values if value and not value.isspace()]


@given(TEXTS, st.sampled_from(ALL), st.sampled_from([pa.string(), pa.large_string(), pa.binary()]))
@settings(max_examples=60, deadline=None)
def test_documents_are_the_values_of_the_column_in_order(
    tmp_path_factory: pytest.TempPathFactory, values: list[str | None], write: Write, kind: pa.DataType
) -> None:
    folder = tmp_path_factory.mktemp("column")
    kind = kind if write in TABLES else pa.string()  # JSON has no bytes
    given_first = ["first", *values]  # a JSON file of nulls would have no such column
    table = pa.table({"n": range(len(given_first)), "body": pa.array(given_first, pa.string()).cast(kind)})
    write(table, folder / "x")
    docs, rejects = read("text", folder, column="body")
    assert [doc.text for doc in docs] == usable(given_first)
    assert len(docs) + rejects.total == len(given_first)
    assert rejects.by_reason["no 'body'"] == values.count(None)


def test_pandas_dumps_with_an_index_and_categories(tmp_path: Path) -> None:
    words = ["red", "green", "blue"] * 20
    frame = pd.DataFrame({"colour": pd.Categorical(words), "n": range(60)}, index=range(100, 160))
    frame.to_parquet(tmp_path / "a.parquet")
    frame.reset_index().to_feather(tmp_path / "b.feather")
    frame.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    docs, rejects = read("text", tmp_path, column="colour")
    assert [doc.text for doc in docs] == words * 3
    assert docs[60] == Document("b.feather:1", "b", text="red")
    assert rejects.total == 0


NESTED = [
    {"id": 1, "meta": {"lang": "en", "text": "one"}, "pages": [{"n": 1, "text": "p1"}, {"n": 2, "text": "p2"}]},
    {"id": 2, "meta": {"lang": "de", "text": None}, "pages": []},
    {"id": 3, "meta": None, "pages": None},
    {"id": 4, "meta": {"lang": "fr", "text": "four"}, "pages": [{"n": 1, "text": "p4"}]},
]


def test_nested_columns_are_named_by_their_path(tmp_path: Path, subtests: pytest.Subtests) -> None:
    table = pa.Table.from_pylist(NESTED)
    for write in ALL:
        with subtests.test(write=write.__name__):
            folder = tmp_path / write.__name__
            folder.mkdir()
            write(table, folder / "x")
            assert [doc.text for doc in read("text", folder, column="meta.text")[0]] == ["one", "four"]
            docs, rejects = read("text", folder, column="pages.0.text")
            assert [doc.text for doc in docs] == ["p1", "p4"]
            assert rejects.by_reason == {"no 'pages.0.text'": 2}
            assert [doc.text for doc in read("text", folder, column="pages.1.text")[0]] == ["p2"]


def test_a_name_with_dots_is_a_column_first(tmp_path: Path) -> None:
    table = pa.table({"meta.text": ["flat"], "meta": [{"text": "deep"}]})
    for write in (parquet, arrow_file, json_lines):
        write(table, tmp_path / write.__name__)
    assert {doc.text for doc in read("text", tmp_path, column="meta.text")[0]} == {"flat"}


def test_only_the_column_is_read(tmp_path: Path) -> None:
    """The pages of the other column are noise: reading them fails."""
    path = tmp_path / "x.parquet"
    table = pa.table({"text": ["one", "two"], "other": ["a" * 500, "b" * 500]})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    at = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[at : at + 900] = b"\xff" * 900
    path.write_bytes(data)
    with pytest.raises(OSError):  # noqa: PT011
        pq.read_table(path)
    docs, rejects = read("text", path)
    assert [doc.text for doc in docs] == ["one", "two"]
    assert rejects.total == 0


def test_a_missing_column_is_one_line_with_the_columns_there_are(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for write in ALL:
        with subtests.test(write=write.__name__):
            folder = tmp_path / write.__name__
            folder.mkdir()
            write(pa.Table.from_pylist(NESTED), folder / "x")
            for column in ("body", "meta.body", "meta.lang.x", "pages.0.body"):
                with pytest.raises(UsageError) as error:
                    read("text", folder, column=column)
                known = "id, meta.lang, meta.text, pages" if write in TABLES else "id, meta, pages"
                assert str(error.value).endswith(f"{known}; set 'column' of the source")
                assert f"no '{column}'" in str(error.value) or f"no column '{column}'" in str(error.value)
                assert "\n" not in str(error.value)


def test_a_column_that_is_not_text_is_named(tmp_path: Path) -> None:
    for write in TABLES:
        write(pa.table({"text": [1, 2]}), tmp_path / "x")
        with pytest.raises(UsageError, match="column 'text' holds int64, not text; the columns are text"):
            read("text", tmp_path)
        next(tmp_path.iterdir()).unlink()
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"text": 1}, {"text": ["a"]}, {"text": "good"}, {"text": ""}, {}]))
    docs, rejects = read("text", tmp_path)
    assert [doc.id for doc in docs] == ["x.jsonl:3"]
    assert rejects.by_reason == {"'text' is not text": 2, "empty document": 1, "no 'text'": 1}


def test_a_later_file_without_the_column_counts_its_rows(tmp_path: Path) -> None:
    good, bad = pa.table({"text": ["one"]}), pa.table({"body": ["a"] * 12})
    for write in (parquet, arrow_file, feather_file):
        (tmp_path / write.__name__).mkdir()
        write(good, tmp_path / write.__name__ / "a")
        write(bad, tmp_path / write.__name__ / "b")
        docs, rejects = read("text", tmp_path / write.__name__)
        assert [doc.text for doc in docs] == ["one"]
        assert rejects.by_reason == {"no column 'text'": 12}


def test_a_bad_value_costs_its_row(tmp_path: Path) -> None:
    values = pa.array([b"One.", b"\xff\xfe", b"Three."], pa.binary()).view(pa.string())
    for number, write in enumerate((parquet, arrow_file, arrow_stream, feather_file)):
        write(pa.table({"text": values}), tmp_path / f"{number}")
    docs, rejects = read("text", tmp_path)
    assert [doc.text for doc in docs] == ["One.", "Three."] * 4
    assert rejects.by_reason == {"invalid UTF-8": 4}


def test_wild_offsets_of_an_arrow_file_cost_their_rows(tmp_path: Path) -> None:
    """Arrow itself would read whatever lies behind the buffer."""
    texts = [f"text number {number}" for number in range(20)]
    path = tmp_path / "x.arrow"
    with pa.ipc.new_file(path, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": texts}))
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32).tobytes()
    data = path.read_bytes()
    wild = bytearray(offsets)
    wild[40:44] = b"\xff\xff\xff\x6f"  # the end of text 9 and the start of text 10
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, bytes(wild)))
    docs, rejects = read("text", path)
    assert [doc.text for doc in docs] == texts[:9] + texts[11:]
    assert rejects.by_reason == {"damaged value": 2}


@pytest.mark.parametrize("write", [arrow_file, arrow_stream, feather_file, parquet])
def test_a_cut_or_spoilt_file_is_counted(tmp_path: Path, write: Write) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.bytes(200).hex() for _ in range(400)]
    write(pa.table({"text": texts}), tmp_path / "x")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    docs, rejects = read("text", path)
    assert [doc.text for doc in docs] == texts[: len(docs)]
    assert rejects.total > 0
    # A footer and a single batch are all or nothing; the other batches before the cut are read.
    assert len(docs) == (pytest.approx(200, abs=10) if path.suffix == ".arrow" else 0)
    path.write_bytes(b"no table at all" * 100)
    docs, rejects = read("text", path)
    assert (docs, rejects.total) == ([], 2)
    assert set(rejects.by_reason) <= {"damaged parquet file", "damaged Arrow file"}


def test_plain_text_is_split_as_stories_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("One\nday.\n\nTwo.\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Three.\n\nStill three.<|endoftext|>Four."))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"Five."))
    docs, _ = read("text", tmp_path, column="of no matter")
    assert [(doc.text, doc.id) for doc in docs] == [
        ("One\nday.", "a.txt:1"),
        ("Two.", "a.txt:4"),
        ("Three.\n\nStill three.", "b.txt.gz:1"),
        ("Four.", "b.txt.gz:3"),
        ("Five.", "c.txt.zst:1"),
    ]
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"Six.\n\nSeven.")[:-9])
    docs, rejects = read("text", tmp_path / "d.txt.gz")
    assert [doc.text for doc in docs] == ["Six."]
    assert set(rejects.by_reason) == {"truncated file"}
    monkeypatch.setattr(text, "MAX_RECORD_BYTES", 100)
    (tmp_path / "e.txt").write_text("short\n\n" + "a line of a long text\n" * 50 + "\nshort again")
    docs, rejects = read("text", tmp_path / "e.txt")
    assert [doc.text for doc in docs] == ["short", "short again"]
    assert rejects.examples == {"more than 0 MiB without a blank line or '<|endoftext|>'": [f"{tmp_path / 'e.txt'}:3"]}


@pytest.mark.parametrize("write", ALL)
def test_reading_resumes_after_any_document(tmp_path: Path, write: Write) -> None:
    values = [None if n % 5 == 3 else f"text {n}" for n in range(33)]
    for name in ("a", "b"):
        write(pa.table({"text": values}), tmp_path / name)
    source = SourceConfig(kind="text", path=str(tmp_path))
    files = find_files(source, "data")
    undisturbed = make_reader(source, files, 0)
    expected = [doc for _, doc in iter(undisturbed.next, None)]
    for stop in range(0, len(expected), 6):
        first = make_reader(source, files, 0)
        before = [first.next() for _ in range(stop)]
        second = make_reader(source, files, 0)
        second.restore(json.loads(json.dumps(first.state())))
        after = [doc for _, doc in iter(second.next, None)]
        assert [item[1] for item in before if item] + after == expected
        assert second.rejects.to_dict() == undisturbed.rejects.to_dict()


def test_finished_row_groups_are_not_read_again(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {n} {'x' * 1000}" for n in range(300)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=100, use_dictionary=False)
    asked: list[Any] = []
    original = pq.ParquetFile.iter_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pq.ParquetFile, "iter_batches", lambda self, *a, **k: asked.append(a[1]) or original(self, *a, **k)
        )
        source = SourceConfig(kind="text", path=str(tmp_path / "x.parquet"))
        reader = make_reader(source, find_files(source, "data"), 0)
        state = reader.state() | {"after": 250, "taken": 250, "documents": 250}
        reader.restore(state)
        docs = [doc for _, doc in iter(reader.next, None)]
    assert [doc.id for doc in docs] == [f"x.parquet:{n}" for n in range(251, 301)]
    assert asked == [[2]]


# Run in a process of its own: reads a file and prints by how many MiB its memory has grown.
GROWTH = """
import sys
from pathlib import Path
import psutil, pyarrow.parquet
from hildanext.data.documents import Rejects
from hildanext.data.sources import instruct, text
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
kind, path = sys.argv[1:]
read = {"text": lambda: text.read(path, "text", Rejects()), "instruct": lambda: instruct.read(path, Rejects())}[kind]
next(read())
before = psutil.Process().memory_info().rss / 2**20
n_bytes = sum(doc.size for _, doc in read())
print(n_bytes, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["many", "large", "repeated", "messages"])
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path, shape: str) -> None:
    """One row group of 150 MB: reading the whole column at once, as Arrow does by default, would be seen."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.parquet"
    if shape == "many":
        table = pa.table({"text": [rng.bytes(1500).hex() for _ in range(50_000)], "other": ["y" * 3000] * 50_000})
    elif shape == "large":
        table = pa.table({"text": [rng.bytes(250_000).hex() for _ in range(300)]})
    elif shape == "repeated":  # the file is small, its text is not
        letters = pa.array([letter * 200_000 for letter in "abcde"])
        table = pa.table({"text": letters.take(pa.array([0, 1, 2, 3, 4] * 150))})
    else:
        answers = [{"role": "assistant", "content": rng.bytes(1500).hex()} for _ in range(50_000)]
        table = pa.table({"messages": [[{"role": "user", "content": "q"}, answer] for answer in answers]})
    # pyarrow ends a page of 1 MB after a multiple of `write_batch_size` rows, by default 1024: 500 MB of these texts.
    pq.write_table(table, path, row_group_size=10**7, write_batch_size=8 if shape == "large" else None)
    assert pq.ParquetFile(path).num_row_groups == 1
    command = [sys.executable, "-c", GROWTH, "instruct" if shape == "messages" else "text", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    n_bytes, growth = map(float, done.stdout.split())
    assert n_bytes >= 150e6
    assert growth < 48, f"{growth:.0f} MiB"
