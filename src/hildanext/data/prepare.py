"""The prepare-data command: copies the documents of all sources to data/processed, split by a hash of their text.

With data.mode 'direct' or 'stream' only held-out documents are copied; training reads the sources.
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
from hildanext.config import Config, SourceConfig
from hildanext.data.corpus import PARTS, Use, find_sources, is_held_out, make_reader, written_order
from hildanext.data.documents import Document, Rejects
from hildanext.data.mixing import Mix, Reader
from hildanext.data.sources.opening import File
from hildanext.errors import DataError
from hildanext.files import replace_together, sha256_of, workspace, write_json
from hildanext.progress import Advance, progress, say

SPLITS = ("train", "eval", "sft_train", "sft_eval")


def prepare_data(config: Config) -> dict[str, Any]:
    """Write `{paths.data}/processed/{train,eval,sft_train,sft_eval,humaneval_dummy}.jsonl` and `manifest.json`.

    Training splits are written only if data.mode is 'copy'. Splits without a source are empty files. The answers of
    'self' sources must exist (see `model.self_answers.write_answers`). Returns the manifest. Raises UsageError for a
    source path that does not exist, and DataError when too many records are rejected or no documents are left. On
    failure, existing output is left untouched.
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
                say(f"prepare-data: '{held_out}' is empty; there are few documents, or data.eval_share is small")
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """A readable summary of the manifest, one line per split."""
    records = sum(source["records"] for source in manifest["sources"])
    lines = [f"{split}: {count} documents" for split, count in manifest["documents"].items()]
    return "\n".join([*lines, f"{records} records read, {manifest['rejects']['total']} rejected"])


class SplitFiles:
    """The open split files, and the number of documents written to each."""

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
        """Flush all files to disk (fsync)."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())


def _write_splits(config: Config, folder: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Copy every source into the split files under `folder`. Returns the manifest without the hashes of the files."""
    # All paths are resolved before any file is read, so that a wrong path fails at once.
    sources_of = {use: find_sources(config, use) for use in PARTS}
    entries: dict[int, dict[str, Any]] = {}  # by index of the source; from the first use that reads it
    rejects = Rejects()
    with SplitFiles(folder, splits) as files, progress("prepare-data", None, "documents") as advance:
        for use, sources in sources_of.items():
            if config.data.mode == "copy":
                mix = written_order(sources, config.train.seed)
            else:  # held-out documents come from all sources equally
                readers = [make_reader(source, listed, config.train.seed) for source, listed in sources]
                mix = Mix(readers, [1.0] * len(sources), to_the_end=True)
            _copy(config, mix, use, files, advance)
            for (source, listed), reader in zip(sources, mix.readers, strict=True):
                (index,) = (i for i, candidate in enumerate(config.data.sources) if candidate is source)
                if index not in entries:
                    entries[index] = _manifest_entry(source, listed, reader, config.data.mode == "copy")
                    rejects.merge(reader.rejects.to_dict())
        files.sync()
    accepted = sum(entry["documents"] for entry in entries.values())
    rejects.check(accepted, config.data.max_reject_share)
    if accepted == 0:
        raise DataError(f"no documents in {', '.join(str(source.path) for source in config.data.sources)}")
    if rejects.total:
        say(f"prepare-data: {rejects.total} records rejected: {rejects}")
    if rejects.ignored:
        keys = ", ".join(f"'{key}' of {count} records" for key, count in rejects.ignored.most_common())
        say(f"prepare-data: not used: {keys}")
    humaneval = importlib.resources.files("hildanext.data.sources") / "humaneval_dummy.jsonl"
    (folder / "humaneval_dummy.jsonl").write_bytes(humaneval.read_bytes())
    return {
        "version": __version__,
        "sources": [entries[index] for index in sorted(entries)],
        "documents": files.counts,
        "rejects": rejects.to_dict(),
        "config": config.data.model_dump(mode="json"),
        "seed": config.train.seed,
    }


def _copy(config: Config, mix: Mix, use: Use, files: SplitFiles, advance: Advance) -> None:
    """Write the documents of a use to its splits."""
    train, held_out = PARTS[use]
    data = config.data
    kept: Counter[int] = Counter()  # held-out documents per reader
    read = sum(files.counts.values())
    for reader, _, doc in mix:
        read += 1
        advance(read)
        if is_held_out(doc, data.eval_share):
            # Later epochs repeat the documents of the first.
            if reader.epoch == 0 and kept[id(reader)] < data.max_eval_documents:
                files.write(doc, held_out)
                kept[id(reader)] += 1
        elif data.mode == "copy":
            files.write(doc, train)
        if data.mode != "copy" and (kept[id(reader)] == data.max_eval_documents or data.eval_share == 0):
            reader.finish()


def _manifest_entry(source: SourceConfig, listed: Sequence[File], reader: Reader, whole: bool) -> dict[str, Any]:
    """The manifest's entry of a source. `whole`: training text was copied too, not only held-out documents."""
    if reader.documents == 0:
        say(f"prepare-data: no usable documents in {source.path}")
    files = [] if source.path is None else listed
    entry: dict[str, Any] = {"kind": source.kind, "path": source.path}
    entry |= {"files": len(files), "bytes": sum(file.size for file in files)}
    entry |= {"records": reader.documents + reader.rejects.total, "documents": reader.documents}
    if source.weight is None or not whole:
        return entry
    if reader.done:
        say(f"prepare-data: the mix ends because {source.path} was read {source.max_epochs} times (max_epochs)")
    return entry | {"weight": source.weight, "text_bytes": reader.size, "epochs": reader.epochs_read}
