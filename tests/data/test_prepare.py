from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hildanext.config import Config
from hildanext.data.corpus import is_held_out
from hildanext.data.documents import Document, read_documents
from hildanext.data.prepare import SPLITS, prepare_data
from hildanext.errors import DataError, UsageError
from hildanext.files import replace_together

MakeConfig = Callable[..., Config]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A file of records as a Dolma source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"kind": "dolma", "path": str(path)}


def texts(count: int, word: str = "story") -> list[dict[str, Any]]:
    return [{"id": f"{word}{i}", "text": f"A {word} number {i}."} for i in range(count)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def split(config: Config, name: str) -> list[Document]:
    return list(read_documents(Path(config.paths.data, "processed", f"{name}.jsonl")))


def test_every_document_lands_in_one_split_of_each_use(tmp_path: Path, make_config: MakeConfig) -> None:
    plain = write_jsonl(tmp_path / "in/a.jsonl", texts(300))
    asked = [{"question": f"What is {i}?", "answer": str(i)} for i in range(200)]
    both = write_jsonl(tmp_path / "in/qa.jsonl", asked) | {"kind": "instruct", "into": ["train", "sft"]}
    config = make_config(plain, both, eval_share=0.2)
    manifest = prepare_data(config)
    found = {name: split(config, name) for name in SPLITS}
    assert {name: len(docs) for name, docs in found.items()} == manifest["documents"]
    assert sorted(doc.text for name in ("train", "eval") for doc in found[name] if doc.text) == sorted(
        record["text"] for record in texts(300)
    )
    questions = {
        name: {doc.messages[0]["content"] for doc in docs if doc.messages is not None} for name, docs in found.items()
    }
    assert questions["train"] == questions["sft_train"]
    assert questions["eval"] == questions["sft_eval"]
    assert questions["train"] | questions["eval"] == {record["question"] for record in asked}
    assert not questions["train"] & questions["eval"]
    assert 60 < len(found["eval"]) < 140


def test_manifest_describes_the_files(tmp_path: Path, make_config: MakeConfig) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*texts(100), {"text": ""}])
    config = make_config(source)
    manifest = prepare_data(config)
    processed = Path(config.paths.data, "processed")
    assert json.loads((processed / "manifest.json").read_text()) == manifest
    assert sorted(path.name for path in processed.iterdir()) == sorted(
        [*(f"{name}.jsonl" for name in SPLITS), "humaneval_dummy.jsonl", "manifest.json"]
    )
    assert {
        name: hashlib.sha256((processed / name).read_bytes()).hexdigest() for name in manifest["sha256"]
    } == manifest["sha256"]
    size = Path(source["path"]).stat().st_size
    assert manifest["sources"] == [source | {"files": 1, "bytes": size, "records": 101, "documents": 100}]
    assert manifest["rejects"]["by_reason"] == {"empty document": 1}
    assert manifest["config"]["sources"][0]["path"] == source["path"]
    assert sorted(os.listdir(config.paths.data)) == ["processed"]


def test_runs_agree_and_the_order_of_sources_moves_no_document(tmp_path: Path, make_config: MakeConfig) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", texts(80)), write_jsonl(tmp_path / "b.jsonl", texts(80, "tale"))
    config = make_config(first, second, eval_share=0.3)
    prepare_data(config)
    once = content(Path(config.paths.data))
    prepare_data(config)
    assert content(Path(config.paths.data)) == once
    held_out = {doc.id for doc in split(config, "eval")}
    prepare_data(make_config(second, first, eval_share=0.3))
    assert {doc.id for doc in split(config, "eval")} == held_out


@given(st.text(min_size=1), st.floats(0, 0.5))
def test_the_split_sees_words_only(text: str, share: float) -> None:
    doc = Document("1", "a", text=text)
    shouted = Document("2", "b", text="\n " + "  ".join(text.split()).lower() + "\t")
    assert is_held_out(doc, share) == is_held_out(shouted, share)
    assert not is_held_out(doc, 0.0)


def test_the_split_of_messages_is_that_of_the_question() -> None:
    for i in range(50):
        question = {"role": "user", "content": f"question {i}"}
        one = Document("1", "a", messages=[question, {"role": "assistant", "content": "yes"}])
        other = Document("2", "b", messages=[{"role": "system", "content": "s"}, question])
        assert is_held_out(one, 0.5) == is_held_out(other, 0.5)
    shares = [is_held_out(Document(str(i), "x", input_ids=[i]), 0.1) for i in range(4000)]
    assert 320 < sum(shares) < 480
    assert len({is_held_out(Document(str(i), "x", input_ids=[1, 2]), 0.5) for i in range(50)}) == 1


def test_synthetic_stories_need_no_files(make_config: MakeConfig) -> None:
    config = make_config({"kind": "tinystories", "documents": 200})
    manifest = prepare_data(config)
    assert manifest["documents"]["train"] + manifest["documents"]["eval"] == 200
    assert manifest["sources"][0]["path"] is None


def test_humaneval_dummy_is_solved_by_its_own_solutions(make_config: MakeConfig) -> None:
    config = make_config({"kind": "tinystories", "documents": 10})
    prepare_data(config)
    lines = Path(config.paths.data, "processed/humaneval_dummy.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    assert len(problems) == 8
    for problem in problems:
        assert set(problem) == {"task_id", "prompt", "canonical_solution", "test", "entry_point"}
        space: dict[str, Any] = {}
        exec(problem["prompt"] + problem["canonical_solution"] + "\n" + problem["test"], space)
        space["check"](space[problem["entry_point"]])
        with pytest.raises(AssertionError):
            space["check"](lambda *_: "wrong")


def test_too_many_rejects_leave_nothing(tmp_path: Path, make_config: MakeConfig) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(95) + [{"text": ""}] * 5)
    config = make_config(source, max_reject_share=0.04)
    with pytest.raises(DataError, match=r"5 of 100 records .* empty document x5 \(.*a\.jsonl:96"):
        prepare_data(config)
    assert content(Path(config.paths.data)) == {}
    prepare_data(make_config(source, max_reject_share=0.05))
    before = content(Path(config.paths.data))
    assert before
    with pytest.raises(DataError):
        prepare_data(config)
    assert content(Path(config.paths.data)) == before


def test_no_documents_is_an_error(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    config = make_config({"kind": "dolma", "path": str(tmp_path / "empty.jsonl")})
    with pytest.raises(DataError, match=r"no documents in .*empty\.jsonl"):
        prepare_data(config)


def test_a_missing_source_fails_before_anything_is_read(tmp_path: Path, make_config: MakeConfig) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", texts(5))
    config = make_config(good, {"kind": "dolma", "path": str(tmp_path / "nowhere")})
    with pytest.raises(UsageError, match="nowhere"):
        prepare_data(config)
    assert content(Path(config.paths.data)) == {}


def test_few_documents_without_a_held_out_one_are_told(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", texts(2)), eval_share=0.0001))
    assert "'eval' is empty" in capsys.readouterr().err


@pytest.mark.parametrize("failing", [0, 3, 5])
def test_a_full_disk_leaves_the_old_files(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", texts(50))))
    config = make_config(write_jsonl(tmp_path / "b.jsonl", texts(50, "other")))
    before = content(Path(config.paths.data))
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        # manifest.json is written atomically first; the moves follow
        if not str(source).endswith(".tmp"):
            calls.append(target)
            if len(calls) > failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        prepare_data(config)
    assert content(Path(config.paths.data)) == before


def test_a_full_disk_while_writing_leaves_the_old_files(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", texts(50))))
    config = make_config(write_jsonl(tmp_path / "b.jsonl", texts(50, "other")))
    before = content(Path(config.paths.data))

    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        prepare_data(config)
    assert content(Path(config.paths.data)) == before


def test_folders_are_replaced_together_too(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner/file").write_text(name)
    replace_together([(tmp_path / "new", tmp_path / "old")])
    assert content(tmp_path) == {"old/inner/file": b"new"}
    with pytest.raises(FileNotFoundError):
        replace_together([(tmp_path / "old", tmp_path / "there"), (tmp_path / "missing", tmp_path / "x")])
    assert not (tmp_path / "there").exists()


def test_weights_mix_the_text_and_tell_the_epochs(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", texts(40, "rare")) | {"weight": 1.0, "max_epochs": 2}
    many = write_jsonl(tmp_path / "many.jsonl", texts(500, "frequent")) | {"weight": 3.0}
    config = make_config(few, many, eval_share=0.2)
    manifest = prepare_data(config)
    read = {source["path"]: source for source in manifest["sources"]}
    rare, frequent = read[few["path"]], read[many["path"]]
    assert (rare["documents"], rare["epochs"], frequent["epochs"]) == (80, 2, 1)
    assert frequent["text_bytes"] / rare["text_bytes"] == pytest.approx(3.0, abs=0.05)
    assert f"the mix ends because {few['path']} was read 2 times" in capsys.readouterr().err
    train, held_out = [doc.id for doc in split(config, "train")], [doc.id for doc in split(config, "eval")]
    # An epoch more trains on the same documents once more, and never on one held out.
    rare_train = [name for name in train if name.startswith("rare")]
    assert sorted(rare_train) == sorted([*set(rare_train)] * 2)
    assert len(held_out) == len(set(held_out))
    assert not set(train) & set(held_out)


def test_weights_for_some_sources_only_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    one, other = ({"kind": "dolma", "path": f"{name}.jsonl"} for name in "ab")
    with pytest.raises(UsageError, match=r"'data\.sources': .* give each of them a weight"):
        make_config(one | {"weight": 1.0}, other)
    with pytest.raises(UsageError, match="max_epochs': values above 1 need a weight"):
        make_config(one | {"max_epochs": 2})


@pytest.mark.parametrize("mode", ["direct", "stream"])
def test_without_a_copy_only_held_out_documents_are_written(tmp_path: Path, make_config: MakeConfig, mode: str) -> None:
    sources = [write_jsonl(tmp_path / f"{word}.jsonl", texts(400, word)) for word in ("tale", "story")]
    config = make_config(*sources, mode=mode, eval_share=0.2, max_eval_documents=10)
    manifest = prepare_data(config)
    assert manifest["documents"] == {"eval": 20, "sft_eval": 0}
    assert not Path(config.paths.data, "processed/train.jsonl").exists()
    ids = [doc.id for doc in split(config, "eval")]
    # The first ones of each source, side by side; and nothing is read beyond them.
    copied = make_config(*sources, eval_share=0.2)
    prepare_data(copied)
    assert {doc.id for doc in split(copied, "eval")} > set(ids)
    assert {"tale", "story"} == {name.rstrip("0123456789") for name in ids[:6]}
    assert all(source["records"] < 200 for source in manifest["sources"])


def test_held_out_documents_beyond_the_bound_are_not_trained_on(tmp_path: Path, make_config: MakeConfig) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(400))
    everything = prepare_data(make_config(source, eval_share=0.2))["documents"]
    bounded = prepare_data(make_config(source, eval_share=0.2, max_eval_documents=10))["documents"]
    assert bounded == everything | {"eval": 10}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_shard_in_the_middle_is_named_and_counted(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str], suffix: str, how: str
) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[suffix]
    # Always the same texts: in some, the changed byte is still valid, and only the checksum at the file's end is wrong.
    rng = random.Random(1)
    for name in "abc":
        write_jsonl(tmp_path / f"in/{name}.jsonl", [{"text": rng.randbytes(200).hex()} for _ in range(300)])
        plain = tmp_path / f"in/{name}.jsonl"
        plain.with_suffix(f".jsonl{suffix}").write_bytes(pack(plain.read_bytes()))
        plain.unlink()
    path = tmp_path / f"in/b.jsonl{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data)
    source = {"kind": "dolma", "path": str(tmp_path / "in")}
    manifest = prepare_data(make_config(source, max_reject_share=0.5))
    told = capsys.readouterr().err
    assert f"{path}: {'truncated file' if how == 'truncated' else 'damaged compression'} near byte " in told
    assert "the rest of this file is not read" in told
    assert 600 <= sum(manifest["documents"].values()) < 900
    assert manifest["rejects"]["by_file"].keys() == {str(path)}
    with pytest.raises(DataError, match=r"above data\.max_reject_share 0"):
        prepare_data(make_config(source, max_reject_share=0.0))
