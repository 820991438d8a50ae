from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hildanext.config import SourceConfig
from hildanext.data.corpus import make_reader
from hildanext.data.documents import Document, Rejects
from hildanext.data.sources import find_files, lines, opening, pretokenized, tinystories
from hildanext.errors import DataError, UnreachableError, UsageError
from support.sources import jsonl, read

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


# Files


@pytest.mark.parametrize("suffix", PACK)
def test_records_are_the_split_of_the_whole(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "PIECE_BYTES", 7)
    text = b"one\ntwo\n\nthree, a longer line than a piece\nlast"
    path = tmp_path / f"x{suffix}"
    path.write_bytes(PACK[suffix](text))
    expected = list(enumerate(text.split(b"\n"), start=1))
    assert list(lines.read_records(path, b"\n", Rejects())) == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_streams_in_a_file_are_one_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(PACK[suffix](b"a\nb") + PACK[suffix](b"c\nd\n") + (b"\0" * 9 if suffix == ".gz" else b""))
    assert [record for _, record in lines.read_records(path, b"\n", Rejects())] == [b"a", b"bc", b"d"]


@pytest.mark.parametrize(("suffix", "keep"), [(".gz", 0.9), (".zst", 0.9), (".gz", 0.999), (".zst", 0.999)])
def test_a_truncated_file_gives_its_good_lines_and_one_reject(tmp_path: Path, suffix: str, keep: float) -> None:
    rng = np.random.default_rng(0)
    records = [{"text": rng.bytes(300).hex()} for _ in range(2000)]
    whole = PACK[suffix](jsonl(records))
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep)])
    docs, rejects = read("dolma", path)
    assert [doc.text for doc in docs] == [record["text"] for record in records[: len(docs)]]
    assert 1500 < len(docs) < 2000
    assert rejects.by_reason == {"truncated file": 1}
    assert rejects.by_file == {str(path): 1}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression_is_one_reject(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(b"this was never compressed")
    docs, rejects = read("dolma", path)
    assert docs == []
    assert rejects.by_reason == {"damaged compression": 1}


def test_zstd_with_a_long_window_is_read(tmp_path: Path) -> None:
    records = [{"text": f"story {i}"} for i in range(300)]
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    machine = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(machine.compress(jsonl(records)) + machine.flush())
    docs, rejects = read("dolma", path)
    assert [doc.text for doc in docs] == [record["text"] for record in records]
    assert rejects.total == 0


def test_a_skippable_frame_is_no_damage(tmp_path: Path) -> None:
    """pzstd and some object stores begin files with one."""
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + PACK[".zst"](jsonl([{"text": "a"}])))
    docs, rejects = read("dolma", path)
    assert [doc.text for doc in docs] == ["a"]
    assert rejects.total == 0


def test_a_lost_file_counts_as_what_it_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    records = [{"text": rng.bytes(300).hex()} for _ in range(2000)]
    for suffix in (".gz", ".zst"):
        data = bytearray(PACK[suffix](jsonl(records)))
        half = len(data) // 2
        data[half:] = rng.bytes(len(data) - half)
        path = tmp_path / f"x.jsonl{suffix}"
        path.write_bytes(data)
        docs, rejects = read("dolma", path)
        assert len(docs) + rejects.total == pytest.approx(2000, rel=0.25)
        assert rejects.total > 500
        assert f"(about {rejects.by_reason['damaged compression']} records)" in capsys.readouterr().err
        path.write_bytes(b"")
        assert read("dolma", path)[1].by_reason == {"truncated file": 1}
        path.write_bytes(b"no compression" * 10_000)
        assert read("dolma", path)[1].by_reason == {"damaged compression": 140}


def test_files_with_byte_order_marks_may_be_joined(tmp_path: Path) -> None:
    marked = b"\xef\xbb\xbf" + jsonl([{"text": "a"}])
    (tmp_path / "x.jsonl").write_bytes(marked + marked)
    docs, rejects = read("dolma", tmp_path / "x.jsonl")
    assert (len(docs), rejects.total) == (2, 0)


def test_a_record_too_long_to_hold_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(opening, "PIECE_BYTES", 50)
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl([{"text": "a"}, {"text": "b" * 1000}, {"text": "c"}]) + b"d" * 500)
    docs, rejects = read("dolma", path)
    assert [(doc.text, doc.id) for doc in docs] == [("a", "x.jsonl:1"), ("c", "x.jsonl:3")]
    assert rejects.total == 2


def test_missing_wrong_and_empty_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"path '.*nowhere' does not exist"):
        read("dolma", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no files that end in \.jsonl"):
        read("dolma", tmp_path)
    (tmp_path / "x.pdf").write_bytes(b"")
    with pytest.raises(UsageError, match=r"x\.pdf' is not one of \.jsonl"):
        read("dolma", tmp_path / "x.pdf")


# Dolma


def test_dolma_tree_in_every_packing(tmp_path: Path) -> None:
    names = ["a/000.json.gz", "a/deep/er/1.jsonl.gz", "b/2.jsonl.zst", "b/3.jsonl"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            PACK["" if name.endswith("l") else path.suffix](jsonl([{"text": name, "id": name, "source": "s"}]))
        )
    for noise in ("attributes/pii/000.json.gz", ".hidden.jsonl", "notes.md"):
        (tmp_path / noise).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / noise).write_bytes(b"not a document")
    docs, rejects = read("dolma", tmp_path)
    assert docs == [Document(name, "s", text=name) for name in names]
    assert rejects.total == 0


def test_dolma_bad_records_are_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "byte order mark"}\n{"text"\n\n{"text": "\xff\xfe"}\n{"text": ""}\n{"id": 1}\n7\n'
        b'{"text": "\\ud83d"}\n{"text": "windows line"}\r\n{"text": "last"}'
    )
    docs, rejects = read("dolma", path)
    assert [doc.text for doc in docs] == ["byte order mark", "windows line", "last"]
    assert rejects.by_reason == {
        "broken JSON": 1,
        "invalid UTF-8": 1,
        "empty document": 1,
        "no 'text'": 1,
        "not a JSON object": 1,
        "invalid UTF-8 (a lone surrogate)": 1,
    }
    assert rejects.examples["invalid UTF-8"] == [f"{path}:4"]


def test_real_dolma_with_attributes(shared: Callable[[str], Path]) -> None:
    root = shared("dolma")
    docs, rejects = read("dolma", root)
    assert rejects.total == 0
    expected = [
        json.loads(line)
        for path in sorted(root.rglob("*.gz"))
        if "attributes" not in path.parts
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert [(doc.id, doc.text) for doc in docs] == [(record["id"], record["text"]) for record in expected]
    assert len(docs) > 20
    limited, _ = read("dolma", root, max_documents=5)
    assert limited == docs[:5]


# TinyStories


@pytest.mark.parametrize("mark", ["\n<|endoftext|>\n", "<|endoftext|>"])
def test_marked_stories(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "PIECE_BYTES", 5)
    stories = ["One day.\n\nA second paragraph.", "Two.", "Three."]
    path = tmp_path / "x.txt"
    path.write_text("\ufeff" + mark.join(stories) + mark, encoding="utf-8")
    docs, rejects = read("tinystories", path)
    assert [doc.text for doc in docs] == stories
    assert rejects.total == 0
    text = path.read_text(encoding="utf-8-sig")
    for doc in docs:
        line = text[: text.index(str(doc.text))].count("\n") + 1
        assert doc.id == f"x.txt:{line}"


def test_stories_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\r\nOne\r\nday.\r\n \r\n\r\nTwo.\n\nbad \xff\n\nThree.")
    docs, rejects = read("tinystories", path)
    assert [(doc.text, doc.id) for doc in docs] == [
        ("One\nday.", "x.txt:2"),
        ("Two.", "x.txt:6"),
        ("Three.", "x.txt:10"),
    ]
    assert rejects.examples == {"invalid UTF-8": [f"{path}:8"]}
    (tmp_path / "empty.txt").write_bytes(b"")
    assert read("tinystories", tmp_path / "empty.txt")[0] == []


def test_stories_from_json_lines_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "One."}, {"text": ""}]))
    pq.write_table(pa.table({"text": ["Two.", None, "Three."], "n": [1, 2, 3]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    docs, rejects = read("tinystories", tmp_path)
    assert [(doc.text, doc.id) for doc in docs] == [
        ("One.", "a.jsonl:1"),
        ("Two.", "b.parquet:1"),
        ("Three.", "b.parquet:3"),
    ]
    assert rejects.by_reason == {"empty document": 1, "no 'text'": 1, "no column 'text'": 1, "damaged parquet file": 1}


def test_a_bad_value_in_a_parquet_column_costs_its_row(tmp_path: Path) -> None:
    broken = pa.array([b"One.", b"\xff\xfe", b"Three."], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([b"Four.", b"\xff"], pa.binary())}), tmp_path / "b.parquet")
    docs, rejects = read("tinystories", tmp_path)
    assert [(doc.text, doc.id) for doc in docs] == [
        ("One.", "a.parquet:1"),
        ("Three.", "a.parquet:3"),
        ("Four.", "b.parquet:1"),
    ]
    assert rejects.examples == {"invalid UTF-8": [f"{tmp_path / 'a.parquet'}:2", f"{tmp_path / 'b.parquet'}:2"]}


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.bytes(100).hex() for _ in range(900)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=300, use_dictionary=False)
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[at : at + 5000] = b"\xff" * 5000
    path.write_bytes(data)
    docs, rejects = read("tinystories", path)
    assert [doc.text for doc in docs] == texts[:300] + texts[600:]
    assert rejects.by_reason == {"damaged parquet file": 300}


def test_a_parquet_file_without_one_text_column_counts_its_rows(tmp_path: Path) -> None:
    columns = [pa.array(["a", "b", "c"]), pa.array(["d", "e", "f"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text"]), tmp_path / "a.parquet")
    pq.write_table(pa.table({"story": ["a", "b"]}), tmp_path / "b.parquet")
    docs, rejects = read("tinystories", tmp_path)
    assert docs == []
    assert rejects.by_reason == {"several columns 'text'": 3, "no column 'text'": 2}


def test_real_tinystories(shared: Callable[[str], Path]) -> None:
    docs, rejects = read("tinystories", shared("tinystories/stories.jsonl"))
    assert (len(docs), rejects.total) == (1060, 0)


def test_synthetic_stories_follow_the_seed() -> None:
    source = SourceConfig(kind="tinystories", documents=20)
    readers = [make_reader(source, find_files(source, "data"), seed) for seed in (1, 1, 2)]
    first, again, other = ([doc for _, doc in iter(reader.next, None)] for reader in readers)
    assert len(first) == 20
    assert first == again
    assert [doc.text for doc in first] != [doc.text for doc in other]


def test_hub_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UnreachableError) as error:
        tinystories.find("hub")
    assert str(error.value) == (
        "cannot download roneneldan/TinyStories (no connection); go online, or set the path in data.sources to a local file"
    )


# Pretokenized


def write_shard(folder: Path, name: str, docs: list[list[int]], dtype: str, header: bool = False) -> Path:
    """A shard as `dolma tokens` writes it (dolma/tokenizer/memmap_writer.py): raw ids, and boundaries by csv.writer."""
    path = folder / f"{name}.npy"
    ids = np.array([token for doc in docs for token in doc], dtype=dtype)
    if header:
        np.save(path, ids)
    else:
        view = np.memmap(path, mode="w+", dtype=dtype, shape=(len(ids),))
        view[:] = ids
        view.flush()
    text = io.StringIO()
    writer = csv.writer(text)
    start = 0
    for number, doc in enumerate(docs, start=1):
        writer.writerow((start, start + len(doc), f"doc, {number}", "s3://bucket/a.json.gz", number))
        start += len(doc)
    (folder / f"{name}.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    return path


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_dolma_shards(tmp_path: Path, dtype: str, header: bool) -> None:
    docs = [[1, 2, 3], [65535], [7] * 50]
    write_shard(tmp_path, "part-0-00000", docs, dtype, header)
    found, rejects = read("pretokenized", tmp_path, dtype=dtype)
    assert [doc.input_ids for doc in found] == docs
    assert [doc.id for doc in found] == ["doc, 1", "doc, 2", "doc, 3"]
    assert rejects.total == 0


def test_broken_boundaries_are_counted(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "x", [[1, 2], [3]], "uint16")
    rows = b"0,2,a,s,1\r\n2,9,b,s,2\r\nx,y\r\n2,2,c,s,3\r\n2,3,d,s,4\r\n"
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(rows))
    docs, rejects = read("pretokenized", path)
    assert [(doc.id, doc.input_ids) for doc in docs] == [("a", [1, 2]), ("d", [3])]
    assert rejects.by_reason == {"boundaries outside the shard": 2, "broken boundaries": 1}
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(rows)[:-10])
    assert read("pretokenized", path)[1].by_reason["truncated file"] == 1


@pytest.mark.parametrize(("declared", "true"), [("uint16", "uint32"), ("uint32", "uint16")])
def test_a_declared_type_that_contradicts_the_boundaries_is_named(tmp_path: Path, declared: str, true: str) -> None:
    path = write_shard(tmp_path, "x", [[1, 2, 3], [4, 5, 6]] * 10, true)
    with pytest.raises(DataError, match=rf"x\.npy: .* x\.csv\.gz ends at 60; set 'dtype' of the source to '{true}'"):
        read("pretokenized", path, dtype=declared)
    assert len(read("pretokenized", path, dtype=true)[0]) == 20
    if true == "uint32":
        (tmp_path / "x.csv.gz").unlink()
        with pytest.raises(DataError, match=r"x\.npy: every second id is 0; set 'dtype' of the source to 'uint32'"):
            read("pretokenized", path, dtype=declared)


def test_tokens_that_no_document_holds_are_told(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "x", [[1, 2], [3]], "uint16")
    path.write_bytes(path.read_bytes() + b"\x04\x00\x05\x00")
    docs, rejects = read("pretokenized", path)
    assert [doc.input_ids for doc in docs] == [[1, 2], [3]]
    assert rejects.by_reason == {"tokens after the last boundary": 1}


def test_an_unreadable_shard_counts_its_documents(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "x", [[1], [2], [3]], "uint16")
    path.write_bytes(path.read_bytes()[:-1])
    assert read("pretokenized", path)[1].by_reason == {"not a raw array of uint16": 3}


def test_padding_is_left_out_and_lengths_are_compared(tmp_path: Path) -> None:
    records = [
        {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0], "length": 4, "labels": [5]},
        {"input_ids": [5, 6], "attention_mask": [1]},
        {"input_ids": [5, 6], "attention_mask": [0, 0]},
        {"input_ids": [5, 6], "length": 3},
    ]
    (tmp_path / "x.jsonl").write_bytes(jsonl(records))
    docs, rejects = read("pretokenized", tmp_path / "x.jsonl")
    assert [doc.input_ids for doc in docs] == [[5, 6]]
    assert rejects.by_reason == {
        "'attention_mask' has another length than 'input_ids'": 1,
        "empty document": 1,
        "'length' is not the number of 'input_ids'": 1,
    }
    assert rejects.ignored == {"labels": 1}


def test_shards_without_boundaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], dtype=np.int64))
    np.array([5, 6], dtype=np.uint16).tofile(tmp_path / "b.npy")
    docs, _ = read("pretokenized", tmp_path)
    assert [(doc.id, doc.input_ids) for doc in docs] == [("a.npy:1", [1, 2]), ("a.npy:2", [3, 4]), ("b.npy", [5, 6])]
    monkeypatch.setattr(pretokenized, "MAX_UNBOUNDED", 1)
    with pytest.raises(DataError, match=r"b\.npy: 2 tokens without b\.csv\.gz"):
        read("pretokenized", tmp_path / "b.npy")


def test_unreadable_shards_are_counted(tmp_path: Path) -> None:
    (tmp_path / "odd.npy").write_bytes(b"123")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "floats.npy", np.array([1.5]))
    np.save(tmp_path / "negative.npy", np.array([3, -1]))
    docs, rejects = read("pretokenized", tmp_path)
    assert docs == []
    assert rejects.by_reason == {
        "not a raw array of uint16": 2,
        "damaged numpy file": 1,
        "not an array of token ids": 1,
        "'input_ids' are not token ids": 1,
    }


@pytest.mark.parametrize("suffix", PACK)
def test_ids_in_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](jsonl([{"input_ids": [1, 2], "id": "a"}, {"input_ids": ["1"]}, {"text": "t"}])))
    docs, rejects = read("pretokenized", path)
    assert docs == [Document("a", "pretokenized", input_ids=[1, 2])]
    assert rejects.total == 2
