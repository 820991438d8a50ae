"""Streams, against the documents read and encoded one by one: windows, passes, and going on at any sample bit for bit."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hildanext import cli
from hildanext.config import Config
from hildanext.data import workers
from hildanext.data.corpus import is_held_out
from hildanext.data.documents import Document
from hildanext.data.encode import encode_document
from hildanext.data.stream import RowStream
from hildanext.data.tokenize import make_encoding
from hildanext.errors import CheckpointError, DataError
from hildanext.model.loading import load_diffusion_lm
from hildanext.training.run import open_row_source
from support import forked
from support.resume import KILLS, assert_undisturbed
from support.training import material

MakeConfig = Callable[..., Config]
SEQ_LEN = 32


def write_source(folder: Path, name: str, n_files: int, n_documents: int, **more: Any) -> dict[str, Any]:
    """A Dolma source of some files, plain and compressed in turn; no two documents are alike."""
    for number in range(n_files):
        texts = [f"{name} {number} {i} " + "the cat saw a dog " * (i % 5) for i in range(n_documents)]
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path = folder / name / (f"{number}.jsonl" if number % 2 else f"{number}.jsonl.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if number % 2 else gzip.compress(data))
    return {"kind": "dolma", "path": str(folder / name), **more}


@pytest.fixture
def make_stream(
    tmp_path: Path, make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> Callable[..., RowStream]:
    """`make_stream(*sources, **data)`: a stream in small windows; two sources of 3 and 2 files by default."""

    def make(*sources: dict[str, Any], **data: Any) -> RowStream:
        if not sources:
            sources = (write_source(tmp_path, "a", 3, 30), write_source(tmp_path, "b", 2, 20))
        config = make_config(*sources, **{"mode": "stream", "seq_len": SEQ_LEN, "shard_mb": 0.001, **data})
        return RowStream(config, "train", make_encoding(config, "train", tiny_tokenizer))

    return make


def documents(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """The documents of a batch, as ids."""
    found = []
    for ids, doc_ids in zip(batch["input_ids"], batch["doc_ids"], strict=True):
        found += [tuple(ids[doc_ids == doc].tolist()) for doc in range(int(doc_ids.max()) + 1)]
    return found


def expected_documents(stream: RowStream, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """What one pass must hold, read from the files with gzip and json alone."""
    pieces = []
    for _, files in stream.sources:
        for file in files:
            raw = Path(file.path).read_bytes()
            for line in (gzip.decompress(raw) if file.path.endswith(".gz") else raw).splitlines():
                doc = Document("", "", text=json.loads(line)["text"])
                if not is_held_out(doc, stream.config.data.eval_share):
                    ids = encode_document(doc, tokenizer).input_ids.tolist()
                    pieces += [tuple(ids[i : i + SEQ_LEN]) for i in range(0, len(ids), SEQ_LEN)]
    return sorted(pieces)


def pass_ends(stream: RowStream, passes: int) -> list[int]:
    """The first sample of each of the first passes, and of the one after them."""
    firsts, sample = [0], 0
    while len(firsts) <= passes:
        stream.batch([sample])
        assert stream.window is not None
        if stream.window.start.number == len(firsts):
            firsts.append(stream.window.start.first)
        sample = stream.window.end.first
    return firsts


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_pass_holds_every_document_once_and_each_pass_another_order(
    make_stream: Callable[..., RowStream],
    tiny_tokenizer: PreTrainedTokenizerBase,
    n_workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 0 if n_workers > 1 else workers.SMALL_BYTES)
    stream = make_stream(workers=n_workers, eval_share=0.2)
    firsts = pass_ends(stream, 2)
    stream.close()
    stream = make_stream(workers=1, eval_share=0.2)
    expected = expected_documents(stream, tiny_tokenizer)
    passes = [documents(stream.batch(range(start, end))) for start, end in pairwise(firsts)]
    stream.close()
    assert [sorted(found) for found in passes] == [expected, expected]
    assert passes[0] != passes[1]


def test_both_sources_are_spread_over_a_pass(
    make_stream: Callable[..., RowStream], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    stream = make_stream()
    _, end = pass_ends(stream, 1)
    stream.close()
    stream = make_stream()
    letters = [str(tiny_tokenizer.decode(ids))[0] for ids in documents(stream.batch(range(end)))]
    stream.close()
    half = len(letters) // 2
    for letter in "ab":
        share = letters[:half].count(letter) / letters.count(letter)
        assert 0.3 < share < 0.7


def test_weights_hold_and_the_smaller_source_comes_again(
    tmp_path: Path, make_stream: Callable[..., RowStream], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    few = write_source(tmp_path, "few", 1, 20, weight=1.0, max_epochs=3)
    many = write_source(tmp_path, "many", 4, 100, weight=1.0)
    stream = make_stream(few, many, eval_share=0.0)
    _, end = pass_ends(stream, 1)
    stream.close()
    stream = make_stream(few, many, eval_share=0.0)
    texts = [str(tiny_tokenizer.decode(ids)) for ids in documents(stream.batch(range(end)))]
    stream.close()
    sizes = {name: sum(len(text) for text in texts if text.startswith(name)) for name in ("few", "many")}
    assert sizes["few"] / sizes["many"] == pytest.approx(1.0, abs=0.15)
    firsts = [text for text in texts if text.startswith("few")]
    assert len(firsts) == 3 * len(set(firsts))


def test_it_goes_on_at_every_sample(make_stream: Callable[..., RowStream]) -> None:
    stream = make_stream()
    n_samples = pass_ends(stream, 2)[-1] + 3
    stream.close()
    stream = make_stream()
    batches, states = [], []
    for sample in range(0, n_samples, 2):
        states.append(json.loads(json.dumps(stream.state(sample))))
        batches.append(stream.batch([sample, sample + 1]))
    stream.close()
    for at in range(0, len(states), 3):
        resumed = make_stream()
        resumed.restore(states[at])
        for number in range(at, min(at + 3, len(batches))):
            assert same(resumed.batch([2 * number, 2 * number + 1]), batches[number])
        resumed.close()


@pytest.mark.parametrize("samples", [[0, 1, 2, 3, 4, 5], [5, 0, 3, 1], [0, 40, 41]])
def test_the_order_does_not_depend_on_who_asks(make_stream: Callable[..., RowStream], samples: Sequence[int]) -> None:
    """What one of several processes asks for is what one alone would get."""
    alone = make_stream()
    every = [alone.batch([sample]) for sample in range(42)]
    alone.close()
    part = make_stream()
    found = part.batch(samples)
    part.close()
    for place, sample in enumerate(samples):
        assert all(found[name][place].equal(every[sample][name][0]) for name in found)


def test_a_sample_that_is_past_is_refused(make_stream: Callable[..., RowStream]) -> None:
    stream = make_stream()
    first = stream.batch([0])
    assert stream.window is not None
    stream.batch([stream.window.end.first])  # the next window; a step may be done again
    assert same(stream.batch([0]), first)
    stream.batch([100])
    with pytest.raises(ValueError, match="sample 0 of the stream is no longer in memory"):
        stream.batch([0])
    stream.close()


def test_other_files_than_the_run_began_with_are_refused(tmp_path: Path, make_stream: Callable[..., RowStream]) -> None:
    stream = make_stream()
    state = stream.state(0)
    stream.restore(state)
    stream.close()
    (tmp_path / "a/9.jsonl").write_text('{"text": "new"}\n')
    changed = make_stream(
        {"kind": "dolma", "path": str(tmp_path / "a")}, {"kind": "dolma", "path": str(tmp_path / "b")}
    )
    with pytest.raises(CheckpointError, match=r"files of data\.sources.*have changed"):
        changed.restore(state)
    changed.close()


def test_a_corrupt_shard_is_told_and_counted(
    tmp_path: Path, make_stream: Callable[..., RowStream], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path, "a", 3, 400)
    path = tmp_path / "a/0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-200])
    stream = make_stream(source, max_reject_share=0.01)
    _, end = pass_ends(stream, 1)
    stream.close()
    told = capsys.readouterr().err
    assert f"{path}: truncated file near byte {path.stat().st_size}, after record " in told
    assert "data: 1 records rejected: truncated file x1" in told
    assert end > 0
    stream = make_stream(source, max_reject_share=0.0)
    with pytest.raises(DataError, match=r"1 of \d+ records rejected .* above data\.max_reject_share 0"):
        pass_ends(stream, 1)
    stream.close()


def test_nothing_to_train_on_is_an_error(tmp_path: Path, make_stream: Callable[..., RowStream]) -> None:
    (tmp_path / "x.jsonl").write_text("\n\n")
    stream = make_stream({"kind": "dolma", "path": str(tmp_path / "x.jsonl")})
    with pytest.raises(DataError, match=r"no documents to train on in .*x\.jsonl"):
        stream.batch([0])
    stream.close()
    with pytest.raises(DataError, match="no source for 'train'"):
        make_stream({"kind": "instruct", "path": str(tmp_path / "x.jsonl")})


def test_answers_fill_whole_blocks(tmp_path: Path, make_config: MakeConfig, tiny_base: Path) -> None:
    chats = [{"question": f"{i}?", "answer": "the cat " * (i % 3) + str(i)} for i in range(60)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    raw = {"mode": "stream", "seq_len": 64, "eval_share": 0.0}
    config = make_config({"kind": "instruct", "path": str(tmp_path / "chat.jsonl")}, **raw)
    model = config.model.model_copy(update={"base": str(tiny_base), "device": "cpu", "dtype": "float32"})
    lm, _ = load_diffusion_lm(model)
    with closing(open_row_source(config, "sft", lm, 4)) as rows:
        batch = rows.batch(range(20))
    assert all(len(ids) % 4 == 0 or len(ids) == 64 for ids in documents(batch))
    supervised = batch["loss_mask"].float().mean()
    assert 0.05 < supervised < 0.9


def test_a_killed_training_on_a_stream_resumes_bit_for_bit(tmp_path: Path, tiny_base: Path) -> None:
    command, source = "convert-wsd", write_source(tmp_path, "a", 3, 30)
    data = {
        "mode": "stream",
        "shard_mb": 0.0005,
        "max_eval_documents": 10,
        "eval_share": 0.3,
        "sources": [source],
    }
    config = material(tmp_path, tiny_base, data=data)
    shutil.rmtree(tmp_path / "data")
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    for step in ("prepare-data", "tokenize"):
        assert cli.main([step, "--config", str(file)]) == 0
    assert not list((tmp_path / "data").rglob("*train*"))
    run = [command, "--config", str(file), "--run", "killed"]
    assert forked.run(run, tmp_path, KILLS["in a step"]).returncode == -signal.SIGKILL
    assert cli.main([*run, "--resume"]) == 0
    assert cli.main([command, "--config", str(file), "--run", "reference"]) == 0
    assert_undisturbed(tmp_path / "runs/killed", tmp_path / "runs/reference")
    (saved,) = [
        json.loads(path.read_text())["rows"] for path in (tmp_path / "runs/killed").rglob("step-4/trainer.json")
    ]
    assert saved["first"] > 0


# One pass over a source, in windows of 0.5 MB; the peak of the process before and after, in KB.
READER = """
import json, resource, sys
from hildanext.config import parse_config
from hildanext.data.stream import RowStream
from hildanext.model.tiny import story_tokenizer
from hildanext.data.tokenize import make_encoding
source = {"kind": "dolma", "path": sys.argv[1]}
config = parse_config({"data": {"sources": [source], "mode": "stream", "seq_len": 256, "shard_mb": 0.5, "workers": 1}})
stream = RowStream(config, "train", make_encoding(config, "train", story_tokenizer(300)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream.batch([0])
before, sample = peak(), 0
while stream.window.start.number == 0:
    stream.batch([sample])
    sample = stream.window.end.first
print(json.dumps({"before": before, "after": peak(), "windows": stream.window.start.window}))
stream.close()
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Peak resident memory over a whole pass, of a process that streams a corpus and of one that streams ten times as much."""
    text = "the cat saw a dog and the dog saw the cat in a garden of the house " * 60  # 4 KB

    def read(n_files: int) -> dict[str, int]:
        folder = tmp_path / str(n_files)
        folder.mkdir()
        for number in range(n_files):
            lines = [json.dumps({"text": f"{number} {i} {text}"}) for i in range(75)]
            (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
        done = subprocess.run([sys.executable, "-c", READER, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    small, large = read(5), read(50)  # 1.5 and 15 MB
    assert large["windows"] > 8 * small["windows"] > 8
    more = 1024 * ((large["after"] - large["before"]) - (small["after"] - small["before"]))
    assert more < 6e6, (small, large)  # of 13.5 MB more text, which as ids alone takes more
