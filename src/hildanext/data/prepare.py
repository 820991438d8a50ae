"""prepare-data: sources into data/processed, split by a hash of the text, all files or none.

With data.mode 'direct' or 'stream' the training text stays where it is, and only held-out documents are copied.
"""

from __future__ import annotations

import importlib.resources
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hildanext import __version__
from hildanext.config import Config
from hildanext.data.corpus import PARTS, Found, Use, find_sources, is_held_out, make_reader, written_order
from hildanext.data.documents import Document, Rejects
from hildanext.data.mixing import Mix, Reader
from hildanext.errors import DataError
from hildanext.files import replace_together, sha256_of, workspace, write_json
from hildanext.progress import Advance, progress, say

SPLITS = ("train", "eval", "sft_train", "sft_eval")


def prepare_data(config: Config) -> dict[str, Any]:
    """Write `{paths.data}/processed/{train,eval,sft_train,sft_eval,humaneval_dummy}.jsonl` and `manifest.json`.

    All splits are written, empty where no source feeds them; without the training ones unless data.mode is 'copy'. The
    answers of 'self' sources must be there already (`model.self_answers.write_answers`). Returns the manifest. Raises UsageError
    for a source path that does not exist, DataError when too many records are rejected or no document is left; then, as
    after any other failure, what stood there before still stands.
    """
    data = Path(config.paths.data)
    splits = SPLITS if config.data.mode == "copy" else tuple(held_out for _, held_out in PARTS.values())
    with workspace(data, "prepare") as folder:
        manifest = _write_splits(config, folder, splits)
        names = [f"{split}.jsonl" for split in (*splits, "humaneval_dummy")]
        manifest["sha256"] = {name: sha256_of(folder / name) for name in names}
        write_json(folder / "manifest.json", manifest)
        processed = data / "processed"
        processed.mkdir(exist_ok=True)
        replace_together([(folder / name, processed / name) for name in [*names, "manifest.json"]])
    counts = manifest["documents"]
    if config.data.eval_share > 0:
        for train, held_out in PARTS.values():
            if counts.get(train) and not counts[held_out]:
                say(f"prepare-data: no document fell into '{held_out}'; there are few, or data.eval_share is small")
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """The manifest in a line a split, for people."""
    records = sum(source["records"] for source in manifest["sources"])
    lines = [f"{split}: {count} documents" for split, count in manifest["documents"].items()]
    return "\n".join([*lines, f"{records} records read, {manifest['rejects']['total']} rejected"])


class SplitFiles:
    """The split files, open for writing, and how many documents went into each."""

    def __init__(self, folder: Path, splits: Sequence[str]) -> None:
        self.files = {split: open(folder / f"{split}.jsonl", "wb") for split in splits}  # noqa: SIM115
        self.counts = dict.fromkeys(splits, 0)

    def __enter__(self) -> SplitFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            file.close()

    def write(self, doc: Document, split: str) -> None:
        """Append a document to a split."""
        self.files[split].write(doc.to_line())
        self.counts[split] += 1

    def sync(self) -> None:
        """Make what is written durable."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())


def _write_splits(config: Config, folder: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Stream every source into the split files under `folder`; returns the manifest without the files' hashes."""
    # Every path is looked up before anything is read: a misspelt last source fails at once.
    found = {use: find_sources(config, use) for use in PARTS}
    told: dict[int, dict[str, Any]] = {}  # of each source, in the use that reads it first
    rejects = Rejects()
    with SplitFiles(folder, splits) as files, progress("prepare-data", None, "documents") as advance:
        for use, sources in found.items():
            mix = _order(config, sources)
            _copy(config, mix, use, files, advance)
            for one, reader in zip(sources, mix.readers, strict=True):
                (index,) = (i for i, source in enumerate(config.data.sources) if source is one.source)
                if index not in told:
                    told[index] = _told(one, reader, config.data.mode == "copy")
                    rejects.merge(reader.rejects.to_dict())
        files.sync()
    accepted = sum(source["documents"] for source in told.values())
    rejects.check(accepted, config.data.max_reject_share)
    if accepted == 0:
        raise DataError(f"no document in {', '.join(str(source.path) for source in config.data.sources)}")
    if rejects.total:
        say(f"prepare-data: {rejects.total} records rejected: {rejects}")
    humaneval = importlib.resources.files("hildanext.data.sources") / "humaneval_dummy.jsonl"
    (folder / "humaneval_dummy.jsonl").write_bytes(humaneval.read_bytes())
    return {
        "version": __version__,
        "sources": [told[index] for index in sorted(told)],
        "documents": files.counts,
        "rejects": rejects.to_dict(),
        "config": config.data.model_dump(mode="json"),
        "seed": config.train.seed,
    }


def _order(config: Config, sources: Sequence[Found]) -> Mix:
    """The order of the documents; where training text is not copied, held-out ones of all sources side by side."""
    if config.data.mode == "copy":
        return written_order(sources, config.train.seed)
    return Mix([make_reader(one, config.train.seed) for one in sources], [1.0] * len(sources), to_the_end=True)


def _copy(config: Config, mix: Mix, use: Use, files: SplitFiles, advance: Advance) -> None:
    """Write the documents of a use into its splits."""
    train, held_out = PARTS[use]
    data = config.data
    kept: Counter[int] = Counter()  # held-out documents of each source
    read = sum(files.counts.values())
    for reader, _, doc in mix:
        read += 1
        advance(read)
        if is_held_out(doc, data.eval_share):
            # An epoch more brings no document that was not held out before.
            if reader.epoch == 0 and kept[id(reader)] < data.max_eval_documents:
                files.write(doc, held_out)
                kept[id(reader)] += 1
        elif data.mode == "copy":
            files.write(doc, train)
        if data.mode != "copy" and (kept[id(reader)] == data.max_eval_documents or data.eval_share == 0):
            reader.finish()


def _told(found: Found, reader: Reader, whole: bool) -> dict[str, Any]:
    """What the manifest says of a source; `whole`: it was read for all it has to give."""
    source = found.source
    if reader.documents == 0:
        say(f"prepare-data: no usable document in {source.path}")
    files, size = (0, 0) if source.path is None else (len(found.files), found.size)
    told = {"kind": source.kind, "path": source.path, "files": files, "bytes": size}
    told |= {"records": reader.documents + reader.rejects.total, "documents": reader.documents}
    if source.weight is None or not whole:
        return told
    if reader.done:
        say(f"prepare-data: the mix ends where {source.path} was read {source.max_epochs} times (max_epochs)")
    return told | {"weight": source.weight, "text_bytes": reader.size, "epochs": reader.epochs_read}
