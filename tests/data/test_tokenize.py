from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from hildanext.config import Config
from hildanext.data import workers
from hildanext.data.documents import Document, read_documents
from hildanext.data.encode import encode_document
from hildanext.data.mixing import DocumentPlace
from hildanext.data.packing import pack
from hildanext.data.prepare import SPLITS, prepare_data
from hildanext.data.rows import Rows
from hildanext.data.shards import write_shard
from hildanext.data.tokenize import tokenize_data
from hildanext.data.tokenizer import fingerprint
from hildanext.data.verify import verify_data
from hildanext.errors import DataError, UsageError
from hildanext.files import sha256_of
from support.half_sent import PatchedEncoding
from support.models import CHATML, make_tokenizer

MakeConfig = Callable[..., Config]


def put(config: Config, split: str, docs: list[Document], extra: bytes = b"") -> Path:
    """A processed file, written by hand."""
    path = Path(config.paths.data, "processed", f"{split}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(doc.to_line() for doc in docs) + extra)
    return path


def stories(count: int) -> list[Document]:
    return [Document(f"d{i}", "test", text="the cat saw a dog " * (1 + i % 7) + str(i)) for i in range(count)]


def chats(count: int) -> list[Document]:
    return [
        Document(
            f"c{i}",
            "test",
            messages=[
                {"role": "user", "content": f"the {i}?"},
                {"role": "assistant", "content": "a dog " * (1 + i % 5)},
            ],
        )
        for i in range(count)
    ]


def outputs(config: Config) -> dict[str, bytes]:
    folder = Path(config.paths.data, "tokenized")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def open_rows(config: Config, split: str) -> Rows:
    return Rows.open(Path(config.paths.data, "tokenized", f"{split}.rows"))


def documents_of(rows: Rows) -> list[tuple[list[int], list[bool]]]:
    """Every document of the rows: its ids and loss mask."""
    found = []
    for batch in (rows.batch([i]) for i in range(len(rows))):
        for doc_id in range(int(batch["doc_ids"].max()) + 1):
            at = batch["doc_ids"][0] == doc_id
            found.append((batch["input_ids"][0][at].tolist(), batch["loss_mask"][0][at].tolist()))
    return found


def test_rows_are_the_documents_encoded_one_by_one(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(seq_len=32)
    docs = [*stories(40), Document("ids", "x", input_ids=[5, 6, 7])]
    put(config, "train", docs)
    manifest = tokenize_data(config, tiny_tokenizer)
    expected = [encode_document(doc, tiny_tokenizer).input_ids.tolist() for doc in docs]
    rows = open_rows(config, "train")
    assert sorted(ids for ids, _ in documents_of(rows)) == sorted(
        ids[i : i + 32] for ids in expected for i in range(0, len(ids), 32)
    )
    assert all(all(mask) for _, mask in documents_of(rows))
    meta = manifest["splits"]["train"]
    assert meta == rows.meta
    assert (meta["documents"], meta["rows"], meta["seq_len"]) == (41, len(rows), 32)
    assert meta["tokens"] == sum(map(len, expected))
    assert meta["cut_documents"] == sum(len(ids) > 32 for ids in expected) > 0
    assert meta["padding_share"] == pytest.approx(1 - meta["tokens"] / (32 * len(rows)))
    assert meta["tokenizer"] == fingerprint(tiny_tokenizer)
    assert meta["plan"]["origin"]["sha256"] == sha256_of(Path(config.paths.data, "processed/train.jsonl"))


def test_both_forms_hold_the_same(make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    config = make_config(seq_len=48)
    put(config, "train", stories(20))
    put(config, "sft_train", chats(20))
    tokenize_data(config, tiny_tokenizer)
    assert {path.split(".")[0].split("/")[0] for path in outputs(config)} == {"train", "sft_train", "manifest"}
    for split in ("train", "sft_train"):
        rows = open_rows(config, split)
        lines = Path(config.paths.data, f"tokenized/{split}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        batch = rows.batch(range(len(rows)))
        assert [record["input_ids"] for record in records] == batch["input_ids"].tolist()
        assert [record["doc_ids"] for record in records] == batch["doc_ids"].tolist()
        if split == "train":
            assert {key for record in records for key in record} == {"input_ids", "doc_ids"}
        else:
            assert [record["response_mask"] for record in records] == batch["loss_mask"].int().tolist()


def test_answers_fill_whole_blocks_with_supervised_ends(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(seq_len=64, sft={"block_size": 8})
    docs = chats(15)
    put(config, "sft_train", docs)
    put(config, "train", docs)
    tokenize_data(config, tiny_tokenizer)
    assert open_rows(config, "sft_train").meta["block_size"] == 8
    found = sorted(documents_of(open_rows(config, "sft_train")))
    for (ids, mask), encoded in zip(
        found, sorted(encode_document(doc, tiny_tokenizer)[0].tolist() for doc in docs), strict=True
    ):
        assert len(ids) % 8 == 0
        assert ids[: len(encoded)] == encoded
        assert set(ids[len(encoded) :]) <= {tiny_tokenizer.eos_token_id}
        assert all(mask[len(encoded) :])
        assert 0 < sum(mask) < len(mask)
    # the same messages for conversion: no fill, every token supervised
    assert sorted(ids for ids, _ in documents_of(open_rows(config, "train"))) == sorted(
        encode_document(doc, tiny_tokenizer)[0].tolist() for doc in docs
    )
    assert open_rows(config, "train").meta["supervised"] == open_rows(config, "train").meta["tokens"]


def test_block_size_defaults_to_the_decoding_block(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(seq_len=128)
    put(config, "sft_eval", chats(3))
    tokenize_data(config, tiny_tokenizer)
    assert open_rows(config, "sft_eval").meta["block_size"] == config.wsd.final_block


def test_chunks_and_workers_do_not_change_the_output(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(seq_len=64)
    put(config, "train", stories(400), extra=b"{broken\n")
    tokenize_data(config, tiny_tokenizer)
    alone = outputs(config)
    monkeypatch.setattr(workers, "BATCH_BYTES", 1500)
    tokenize_data(config, tiny_tokenizer)
    assert outputs(config) == alone
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    tokenize_data(make_config(seq_len=64, workers=2), tiny_tokenizer)
    assert outputs(config) == alone


def test_an_error_in_a_worker_reaches_the_caller(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    config = make_config(seq_len=64, workers=2)
    put(config, "train", [*stories(5), Document("bad", "x", input_ids=[70_000])])
    with pytest.raises(DataError, match="document 'bad' has token id 70000"):
        tokenize_data(config, tiny_tokenizer)


class Deadly:
    """A stand-in for a tokenizer that ends the process that receives it, as a lack of memory would."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return os._exit, (9,)


def test_a_dead_worker_is_told(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    encoding: Any = workers.Encoding(Deadly(), all_tokens=True, seq_len=16)  # type: ignore[arg-type]
    batch = workers.DocumentBatch(stories(3), [DocumentPlace("x", n) for n in range(3)], 100, [], True)
    with pytest.raises(DataError, match="a tokenize process died"):
        list(workers.encode_batches(iter([batch]), encoding, workers=2))


def test_a_worker_killed_while_it_sends_is_told(
    tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches before it arrive in order; then the error comes at once, and no process is left."""
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    todo = [
        workers.DocumentBatch([Document(name, "test", text=f"the cat {name}")], [DocumentPlace("x", 1)], 100, [], True)
        for name in ("a", "b", "deadly", *"cdefghijkl")
    ]
    encoded = workers.encode_batches(
        iter(todo), PatchedEncoding(tiny_tokenizer, all_tokens=True, seq_len=16), workers=2
    )
    texts: list[object] = []
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="a tokenize process died"):
        texts.extend(tiny_tokenizer.decode(chunk.input_ids, skip_special_tokens=True) for _, chunk in encoded)
    assert texts == ["the cat a", "the cat b"]
    assert set(multiprocessing.active_children()) <= before


def test_bad_lines_are_counted_by_line_up_to_the_share(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BATCH_BYTES", 300)
    config = make_config(seq_len=64, max_reject_share=0.1)
    path = put(config, "train", stories(30), extra=b'\n{"text": "\xff"}\n')
    meta = tokenize_data(config, tiny_tokenizer)["splits"]["train"]
    assert meta["rejects"]["examples"] == {"invalid UTF-8": [f"{path}:32"]}
    assert meta["documents"] == 30
    before = outputs(config)
    with pytest.raises(DataError, match=r"1 of 31 records rejected .*train\.jsonl:32"):
        tokenize_data(make_config(seq_len=64, max_reject_share=0.01), tiny_tokenizer)
    assert outputs(config) == before


def foreign(share: int) -> list[Document]:
    """Pretokenized documents of which every `share`-th token is not in the tokenizer."""
    return [Document(f"d{i}", "shard", input_ids=[5 + i, 6, 7, 60_000 if i % share == 0 else 8]) for i in range(40)]


def test_foreign_ids_stop_the_run_by_default(make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    config = make_config(seq_len=16)
    path = put(config, "train", foreign(40))
    with pytest.raises(DataError) as error:
        tokenize_data(config, tiny_tokenizer)
    assert str(error.value) == (
        f"{path}: document 'd0' has token id 60000, but tokenizer '{tiny_tokenizer.name_or_path}' has "
        f"{len(tiny_tokenizer)} tokens; set data.foreign_ids to 'unk' or 'retokenize'"
    )
    assert outputs(config) == {}


def test_foreign_ids_become_unknown_within_a_share(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(unk_token="<|pad|>")
    config = make_config(seq_len=16, foreign_ids="unk", max_unk_share=0.01)
    put(config, "train", foreign(40))
    meta = tokenize_data(config, tokenizer)["splits"]["train"]
    assert meta["unknown_ids"] == 1
    assert [5, 6, 7, tokenizer.unk_token_id] in [ids for ids, _ in documents_of(open_rows(config, "train"))]
    assert "1 of 160 ids replaced" in capsys.readouterr().err
    put(config, "train", foreign(10))
    with pytest.raises(DataError, match=r"4 of 160 pretokenized ids .* data\.max_unk_share 0\.01"):
        tokenize_data(config, tokenizer)
    with pytest.raises(DataError, match="has no unknown token"):
        tokenize_data(config, make_tokenizer())


def test_foreign_ids_are_retokenized(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = make_tokenizer()
    other.add_tokens([f"word{i}" for i in range(50)])
    other.save_pretrained(tmp_path / "other")
    ids = other("the cat word7")["input_ids"]
    assert max(ids) >= len(tiny_tokenizer)
    config = make_config(seq_len=32, foreign_ids="retokenize", source_tokenizer=str(tmp_path / "other"))
    put(config, "train", [Document("1", "shard", input_ids=[*ids, other.eos_token_id])])
    tokenize_data(config, tiny_tokenizer)
    ((found, _),) = documents_of(open_rows(config, "train"))
    assert tiny_tokenizer.decode(found) == "the cat word7<|im_end|>"
    config = make_config(seq_len=32, foreign_ids="retokenize", source_tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"data\.source_tokenizer '.*nowhere' cannot be loaded"):
        tokenize_data(config, tiny_tokenizer)


def test_ids_that_the_source_tokenizer_does_not_have_are_counted(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "other")
    config = make_config(seq_len=32, foreign_ids="retokenize", source_tokenizer=str(tmp_path / "other"))
    put(config, "train", [Document("1", "shard", input_ids=[*tiny_tokenizer("the cat")["input_ids"], 60_000])])
    with pytest.raises(DataError, match=r"1 of \d+ pretokenized ids are not in the tokenizer"):
        tokenize_data(config, tiny_tokenizer)


def test_the_bases_own_answers_keep_their_prompt(make_config: MakeConfig, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "other")
    config = make_config(seq_len=32, foreign_ids="retokenize", source_tokenizer=str(tmp_path / "other"))
    put(config, "sft_train", [Document("1", "self", input_ids=[5, 6, 7, 3], n_prompt=2, asked="q")])
    tokenize_data(config, make_tokenizer())
    ((ids, mask),) = documents_of(open_rows(config, "sft_train"))
    assert (ids[:4], mask[:4]) == ([5, 6, 7, 3], [False, False, True, True])


def test_no_conversation_ends_the_run(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A template that fails for one, a value too deep, and a field that is not written."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("message.content }}", "message.content[message.content.index('a'):] }}")
    good = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "a", "reasoning_content": "thought"}]
    records = [
        {"messages": good},
        {"messages": [good[0], {"role": "assistant", "content": "e"}]},
        {"messages": good, "tools": [{"x": json.loads("[" * 900 + "]" * 900)}]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"kind": "instruct", "path": str(tmp_path / "x.jsonl")}
    config = make_config(source, seq_len=64, eval_share=0.0, max_reject_share=0.9)
    assert prepare_data(config)["rejects"]["by_reason"] == {"nested deeper than 64 levels": 1}
    meta = tokenize_data(config, tokenizer)["splits"]["sft_train"]
    assert meta["documents"] == 1
    assert meta["rejects"]["by_reason"] == {"the chat template rejects the messages (substring not found)": 1}
    assert meta["unread_fields"] == {"reasoning_content": 1}
    assert "the chat template does not write 'reasoning_content' of 1 conversations" in capsys.readouterr().err


def test_a_processed_file_that_was_changed_is_named(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config({"kind": "tinystories", "documents": 20}, seq_len=64)
    prepare_data(config)
    path = Path(config.paths.data, "processed/train.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"train\.jsonl: differs from the SHA-256 in manifest\.json"):
        tokenize_data(config, tiny_tokenizer)
    manifest = path.with_name("manifest.json")
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        tokenize_data(config, tiny_tokenizer)
    manifest.unlink()
    assert tokenize_data(config, tiny_tokenizer)["splits"]["train"]["documents"] > 0


def test_missing_and_empty_splits(make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    config = make_config(seq_len=32)
    with pytest.raises(UsageError, match="run 'hildanext prepare-data' first"):
        tokenize_data(config, tiny_tokenizer)
    put(config, "train", [])
    with pytest.raises(DataError, match="no documents in any split"):
        tokenize_data(config, tiny_tokenizer)
    put(config, "eval", stories(1))
    assert tokenize_data(config, tiny_tokenizer)["splits"]["train"]["rows"] == 0
    assert len(open_rows(config, "train")) == 0
    assert len(open_rows(config, "eval")) == 1


def test_prepare_then_tokenize_synthetic_stories(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config({"kind": "tinystories", "documents": 60}, seq_len=64, eval_share=0.3)
    prepare_data(config)
    manifest = tokenize_data(config, tiny_tokenizer)
    assert set(manifest["splits"]) == set(SPLITS)
    docs = list(read_documents(Path(config.paths.data, "processed/train.jsonl")))
    expected = list(pack((encode_document(doc, tiny_tokenizer) for doc in docs), 64, tiny_tokenizer.pad_token_id))
    rows = open_rows(config, "train")
    assert rows.batch(range(len(rows)))["input_ids"].tolist() == [row.input_ids.tolist() for row in expected]
    assert json.loads(Path(config.paths.data, "tokenized/manifest.json").read_text()) == manifest
    assert sorted(os.listdir(config.paths.data)) == ["processed", "tokenized"]


@pytest.mark.parametrize("failing", [0, 3])
def test_a_full_disk_leaves_the_old_rows(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    config = make_config(seq_len=32)
    put(config, "train", stories(10))
    put(config, "eval", stories(5))
    tokenize_data(config, tiny_tokenizer)
    before = outputs(config)
    put(config, "train", stories(20))
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if not str(source).endswith(".tmp"):
            calls.append(target)
            if len(calls) > failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        tokenize_data(config, tiny_tokenizer)
    assert outputs(config) == before
    assert len(calls) == failing + 1


def shards_of(config: Config, split: str) -> list[Path]:
    return sorted(Path(config.paths.data, "tokenized", f"{split}.rows").glob("*.safetensors"))


SMALL: dict[str, Any] = {"seq_len": 32, "shard_mb": 0.002, "max_reject_share": 0.1}


def test_shards_are_groups_packed_by_themselves(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(**SMALL)
    docs = stories(200)
    put(config, "train", docs)
    tokenize_data(config, tiny_tokenizer)
    groups: list[list[Document]] = [[]]
    for doc in docs:
        if sum(len(str(one.text)) for one in groups[-1]) >= 2000:
            groups.append([])
        groups[-1].append(doc)
    expected = [
        row.input_ids.tolist()
        for group in groups
        for row in pack((encode_document(doc, tiny_tokenizer) for doc in group), 32, tiny_tokenizer.pad_token_id or 0)
    ]
    rows = open_rows(config, "train")
    assert len(shards_of(config, "train")) == len(groups) > 3
    assert rows.batch(range(len(rows)))["input_ids"].tolist() == expected


class Killed(BaseException):
    """Ends a run at once, as a signal would; what runs on the way out of a killed process does not run here either."""


def test_a_run_killed_before_any_rename_goes_on_with_the_next_shard(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plan, a shard, a record, a meta, the JSON lines, the manifest, and of the finished folders."""
    config = make_config(**SMALL)
    put(config, "train", stories(80), extra=b"{broken\n")
    put(config, "eval", stories(20))
    tokenize_data(config, tiny_tokenizer)
    expected = outputs(config)
    n_shards = sum(name.endswith(".safetensors") for name in expected)
    for moment in range(100):
        shutil.rmtree(Path(config.paths.data, "tokenized"))
        with monkeypatch.context() as patch:
            calls = kill_at(moment, patch)
            try:
                tokenize_data(config, tiny_tokenizer)
            except Killed:
                pass
            else:
                break
        written: list[Path] = []
        with monkeypatch.context() as patch:
            patch.setattr("hildanext.data.tokenize.write_shard", lambda *a: written.append(a[0]) or write_shard(*a))  # noqa: B023
            tokenize_data(config, tiny_tokenizer)
        assert outputs(config) == expected
        assert sorted(os.listdir(config.paths.data)) == ["processed", "tokenized"]
        finished = sum(path.suffix == ".json" and path.name.startswith("shard-") for path in calls)
        assert len(written) == n_shards - finished
    assert moment > 2 * n_shards + 10


def kill_at(moment: int, patch: pytest.MonkeyPatch) -> list[Path]:
    """Die before rename `moment`; from then on nothing tidies up. Returns what was renamed."""
    real_replace, real_rmtree = os.replace, shutil.rmtree
    calls: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if len(calls) == moment:
            raise Killed
        calls.append(Path(target))
        real_replace(source, target)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if len(calls) < moment:
            real_rmtree(path, ignore_errors)

    patch.setattr(os, "replace", replace)
    patch.setattr(shutil, "rmtree", rmtree)
    patch.setattr("hildanext.data.tokenize.replace_together", moves_only)
    return calls


def moves_only(moves: list[tuple[Path, Path]]) -> None:
    """`replace_together` of a process that dies in it: no way back."""
    for new, final in moves:
        os.replace(new, final)


def test_other_input_or_settings_start_again(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**SMALL | {"max_reject_share": 0.0})
    put(config, "train", stories(80), extra=b"{broken\n")
    with pytest.raises(DataError, match="1 of 81 records rejected"):
        tokenize_data(config, tiny_tokenizer)
    with pytest.raises(DataError, match="1 of 81 records rejected"):
        tokenize_data(config, tiny_tokenizer)
    assert "finished shards in" in capsys.readouterr().err
    tokenize_data(make_config(**SMALL | {"shard_mb": 0.003}), tiny_tokenizer)
    assert "the input or the settings changed" in capsys.readouterr().err
    put(config, "train", stories(50))
    meta = tokenize_data(make_config(**SMALL), tiny_tokenizer)["splits"]["train"]
    assert meta["documents"] == 50


def test_verify_rebuilds_a_damaged_shard_alone(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**SMALL)
    put(config, "train", stories(100))
    tokenize_data(config, tiny_tokenizer)
    before, paths = outputs(config), shards_of(config, "train")
    assert verify_data(config, tiny_tokenizer) == {"train": {"shards": len(paths), "rebuilt": []}}
    for damage in (0, len(paths) // 2, len(paths) - 1):
        data = bytearray(paths[damage].read_bytes())
        data[len(data) // 2] ^= 1
        paths[damage].write_bytes(data)
    paths[1].unlink()
    rebuilt = [str(paths[i]) for i in sorted({0, 1, len(paths) // 2, len(paths) - 1})]
    assert verify_data(config, tiny_tokenizer)["train"]["rebuilt"] == rebuilt
    assert f"{paths[0]}: damaged" in capsys.readouterr().err
    assert outputs(config) == before
    paths[0].write_bytes(b"")
    put(config, "train", stories(99))
    with pytest.raises(
        DataError, match="a shard is damaged and cannot be rebuilt, because the input or the settings changed"
    ):
        verify_data(config, tiny_tokenizer)


def test_a_template_with_the_date_gives_the_same_shard_on_another_day(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + CHATML
    config = make_config(**SMALL)
    put(config, "sft_train", chats(60))
    tokenize_data(config, tokenizer)
    before, paths = outputs(config), shards_of(config, "sft_train")
    for path in paths:
        path.write_bytes(b"damaged")

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2125, 3, 4)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert "04 March 2125" in str(tokenizer.apply_chat_template(chats(1)[0].messages or [], tokenize=False))
    assert len(verify_data(config, tokenizer)["sft_train"]["rebuilt"]) == len(paths)
    assert outputs(config) == before


def test_verify_names_a_meta_that_contradicts_itself(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(**SMALL)
    put(config, "train", stories(100))
    tokenize_data(config, tiny_tokenizer)
    path = Path(config.paths.data, "tokenized/train.rows/meta.json")
    meta = json.loads(path.read_text())
    for damage in ({"rows": meta["rows"] + 1}, {"shards": meta["shards"][:-1]}, {"shards": None}):
        path.write_text(json.dumps(meta | damage))
        with pytest.raises(DataError, match=r"meta\.json: missing or damaged; run 'hildanext tokenize' again"):
            verify_data(config, tiny_tokenizer)


def test_verify_needs_rows(make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="no tokenized rows"):
        verify_data(make_config(), tiny_tokenizer)


@pytest.mark.parametrize("weighted", [False, True])
def test_straight_from_the_sources_gives_the_rows_of_the_copy(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, weighted: bool
) -> None:
    sources: list[dict[str, Any]] = []
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {i} " + str(doc.text)}) for i, doc in enumerate(stories(120))]
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, "{broken"]).encode()))
        more = {"weight": 1.0 + len(sources), "max_epochs": 2} if weighted else {}
        sources.append({"kind": "dolma", "path": str(tmp_path / f"{name}.jsonl.gz"), **more})
    chats = [{"question": f"What is {i}?", "answer": str(i)} for i in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    sources.append({"kind": "instruct", "path": str(tmp_path / "c.jsonl")})
    found = {}
    for mode in ("copy", "direct"):
        config = make_config(*sources, mode=mode, eval_share=0.2, **SMALL)
        prepare_data(config)
        tokenize_data(config, tiny_tokenizer)
        found[mode] = {
            split: open_rows(config, split).batch(range(len(open_rows(config, split))))
            for split in ("train", "sft_train")
        }
        assert Path(config.paths.data, "processed/train.jsonl").exists() == (mode == "copy")
        assert len(open_rows(config, "eval")) > 0
        assert verify_data(config, tiny_tokenizer)["train"]["rebuilt"] == []
        shutil.rmtree(config.paths.data)
    for split, batch in found["copy"].items():
        assert all(batch[name].equal(found["direct"][split][name]) for name in batch)


def test_json_lines_are_left_out_beyond_a_size(
    make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(seq_len=32)
    put(config, "train", stories(40))
    lines = Path(config.paths.data, "tokenized/train.jsonl")
    for wanted in (None, False, True):
        meta = tokenize_data(make_config(seq_len=32, json_lines=wanted), tiny_tokenizer)["splits"]["train"]
        assert meta["json_lines"] == lines.exists() == (wanted is not False)
    monkeypatch.setattr("hildanext.data.tokenize.JSON_LINES_TOKENS", 31)
    assert not tokenize_data(config, tiny_tokenizer)["splits"]["train"]["json_lines"]
    assert not lines.exists()


def test_fingerprint_sees_the_vocabulary_not_a_mask_token() -> None:
    plain, masked, other = make_tokenizer(), make_tokenizer(), make_tokenizer(eos_token="<|endoftext|>")
    masked.add_special_tokens({"mask_token": "<|mask|>"})
    assert fingerprint(plain) == fingerprint(masked)
    assert fingerprint(plain) != fingerprint(other)
    changed = make_tokenizer()
    state: dict[str, Any] = json.loads(changed.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:-1]
    changed._tokenizer = changed.backend_tokenizer.from_str(json.dumps(state))
    assert fingerprint(plain) != fingerprint(changed)


def test_fingerprint_survives_saving(tmp_path: Path, qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    qwen3_tokenizer.save_pretrained(tmp_path)
    assert fingerprint(type(qwen3_tokenizer).from_pretrained(tmp_path)) == fingerprint(qwen3_tokenizer)


def test_real_chats_and_texts_with_qwen3(
    make_config: MakeConfig, shared: Callable[[str], Path], qwen3_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(
        {"kind": "dolma", "path": str(shared("dolma"))},
        {"kind": "instruct", "path": str(shared("instruct/v1_sft_demo.jsonl")), "max_documents": 40},
        {"kind": "instruct", "path": str(shared("instruct/glaive_toolcall_en_demo.json")), "max_documents": 40},
        seq_len=512,
    )
    prepare_data(config)
    manifest = tokenize_data(config, qwen3_tokenizer)
    assert all(meta["rejects"]["total"] == 0 for meta in manifest["splits"].values())
    rows = open_rows(config, "sft_train")
    decoded = []
    for ids, mask in documents_of(rows):
        decoded.append(qwen3_tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]))
    assert not any("<|im_start|>" in text for text in decoded)
    batch = rows.batch(range(len(rows)))
    assert not batch["loss_mask"][batch["doc_ids"] < 0].any()
    assert np.array_equal(batch["position_ids"][:, 0], np.zeros(len(rows)))
