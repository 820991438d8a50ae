"""prepare-data: all sources into data/processed, split by a hash of the text, all files or none."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from hildanext import __version__
from hildanext.config import Config
from hildanext.documents import Document, Rejects
from hildanext.errors import DataError
from hildanext.files import replace_together, sha256_of, workspace, write_json
from hildanext.progress import progress, say
from hildanext.sources import find_files, read_source

SPLITS = ("train", "eval", "sft_train", "sft_eval")
# The split of a use, for documents that train and for those held out.
PARTS = {"train": ("train", "eval"), "sft": ("sft_train", "sft_eval")}


def is_held_out(doc: Document, share: float) -> bool:
    """Whether a document belongs to evaluation: a pure function of its text, whatever its source, id or neighbours.

    The hash covers the text without case and spacing; for messages the first user message, so that one question never
    stands on both sides; for token ids the ids.
    """
    if doc.input_ids is not None:
        key = np.asarray(doc.input_ids, dtype=np.uint32).tobytes()
    else:
        text = doc.text
        if doc.messages is not None:
            asked = (message["content"] for message in doc.messages if message["role"] == "user")
            text = next(asked, doc.messages[0]["content"])
        key = " ".join(str(text).lower().split()).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def prepare_data(config: Config) -> dict[str, Any]:
    """Write `{paths.data}/processed/{train,eval,sft_train,sft_eval,humaneval_dummy}.jsonl` and `manifest.json`.

    All four splits are written, empty where no source feeds them. Returns the manifest. Raises UsageError for a source
    path that does not exist, DataError when too many records are rejected or no document is left; then, as after any
    other failure, what stood there before still stands.
    """
    data = Path(config.paths.data)
    with workspace(data, "prepare") as folder:
        manifest = _write_splits(config, folder)
        names = [f"{split}.jsonl" for split in (*SPLITS, "humaneval_dummy")]
        manifest["sha256"] = {name: sha256_of(folder / name) for name in names}
        write_json(folder / "manifest.json", manifest)
        processed = data / "processed"
        processed.mkdir(exist_ok=True)
        replace_together([(folder / name, processed / name) for name in [*names, "manifest.json"]])
    counts = manifest["documents"]
    if config.data.eval_share > 0:
        for train, held_out in PARTS.values():
            if counts[train] and not counts[held_out]:
                say(f"prepare-data: no document fell into '{held_out}'; there are few, or data.eval_share is small")
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """The manifest in a line a split, for people."""
    records = sum(source["records"] for source in manifest["sources"])
    lines = [f"{split}: {count} documents" for split, count in manifest["documents"].items()]
    return "\n".join([*lines, f"{records} records read, {manifest['rejects']['total']} rejected"])


class SplitFiles:
    """The four split files, open for writing, and how many documents went into each."""

    def __init__(self, folder: Path, eval_share: float) -> None:
        self.eval_share = eval_share
        self.files = {split: open(folder / f"{split}.jsonl", "wb") for split in SPLITS}  # noqa: SIM115
        self.counts = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> SplitFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            file.close()

    def write(self, doc: Document, uses: Sequence[Literal["train", "sft"]]) -> None:
        """Append a document to its split of each use."""
        line = doc.to_line()
        held_out = is_held_out(doc, self.eval_share)
        for use in uses:
            split = PARTS[use][held_out]
            self.files[split].write(line)
            self.counts[split] += 1

    def sync(self) -> None:
        """Make what is written durable."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())


def _write_splits(config: Config, folder: Path) -> dict[str, Any]:
    """Stream every source into the split files under `folder`; returns the manifest without the files' hashes."""
    rejects = Rejects()
    # Every path is looked up before anything is read: a misspelt last source fails at once.
    found = [(source, find_files(source)) for source in config.data.sources]
    sources: list[dict[str, Any]] = []
    accepted = 0
    with SplitFiles(folder, config.data.eval_share) as splits, progress("prepare-data", None, "documents") as advance:
        for source, paths in found:
            accepted_before, rejected_before = accepted, rejects.total
            for doc in read_source(source, paths, config.train.seed, rejects):
                splits.write(doc, source.splits)
                accepted += 1
                advance(accepted)
            documents = accepted - accepted_before
            if documents == 0:
                say(f"prepare-data: no usable document in {source.path}")
            size = sum(path.stat().st_size for path in paths)
            records = documents + rejects.total - rejected_before
            named = {"kind": source.kind, "path": source.path, "files": len(paths), "bytes": size}
            sources.append({**named, "records": records, "documents": documents})
        splits.sync()
    rejects.check(accepted, config.data.max_reject_share)
    if accepted == 0:
        raise DataError(f"no document in {', '.join(str(source.path) for source in config.data.sources)}")
    if rejects.total:
        say(f"prepare-data: {rejects.total} records rejected: {rejects}")
    humaneval = importlib.resources.files("hildanext.sources") / "humaneval_dummy.jsonl"
    (folder / "humaneval_dummy.jsonl").write_bytes(humaneval.read_bytes())
    return {
        "version": __version__,
        "sources": sources,
        "documents": splits.counts,
        "rejects": rejects.to_dict(),
        "config": config.data.model_dump(mode="json"),
        "seed": config.train.seed,
    }
