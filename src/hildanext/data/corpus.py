"""The documents of training and SFT, in the order in which they are copied or streamed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from hildanext.config import Config, SourceConfig
from hildanext.data.documents import Document
from hildanext.data.mixing import Mix, Reader
from hildanext.data.sources import find_files, read_file
from hildanext.data.sources.opening import File

Use = Literal["train", "sft"]
# Per use: the split of the training documents and the split of the held-out documents.
PARTS: dict[Use, tuple[str, str]] = {"train": ("train", "eval"), "sft": ("sft_train", "sft_eval")}


class SourceFiles(NamedTuple):
    """A source and its files, in order."""

    source: SourceConfig
    files: list[File]

    @property
    def size(self) -> int:
        """Bytes of the files, compressed files as stored."""
        return sum(file.size for file in self.files)


def find_sources(config: Config, use: Use) -> list[SourceFiles]:
    """The sources of a use. Raises UsageError, DataError or UnreachableError naming the path."""
    data = config.paths.data
    return [SourceFiles(source, find_files(source, data)) for source in config.data.sources if use in source.splits]


def listing_sha256(sources: Sequence[SourceFiles]) -> str:
    """SHA-256 over the paths and sizes of all files."""
    return hashlib.sha256(json.dumps([files for _, files in sources]).encode()).hexdigest()


def make_reader(source: SourceConfig, files: Sequence[File], seed: int) -> Reader:
    """A reader of a source's files, in the given order."""
    read = partial(read_file, source, seed=seed)
    return Reader(
        lambda path, rejects: read(path, rejects=rejects),
        [file.path for file in files],
        epochs=source.max_epochs,
        limit=source.max_documents,
    )


def written_order(sources: Sequence[SourceFiles], seed: int) -> Mix:
    """The order of prepare-data and tokenize: sources mixed by weight or, without weights, one after another."""
    weights = [source.weight for source, _ in sources if source.weight is not None]
    readers = [make_reader(source, files, seed) for source, files in sources]
    return Mix(readers, weights if len(weights) == len(sources) else None)


def streamed_order(sources: Sequence[SourceFiles], seed: int, number: int) -> Mix:
    """The order of pass `number` over a stream: sources mixed, the files of each source shuffled in every pass.

    Without weights, sources are mixed by file size, so that all end at about the same time. A source with
    `max_documents` keeps its file order, so that every pass reads the same documents.
    """
    readers = []
    for index, (source, files) in enumerate(sources):
        order = list(files)
        if source.max_documents is None:
            random.Random(f"{seed}:{number}:{index}").shuffle(order)
        readers.append(make_reader(source, order, seed))
    weighted = all(source.weight is not None for source, _ in sources)
    weights = [files.source.weight or float(max(files.size, 1)) for files in sources]
    return Mix(readers, weights, to_the_end=not weighted)


def is_held_out(doc: Document, share: float) -> bool:
    """Whether a document is held out for evaluation. Depends only on its content and `share`.

    The decision hashes the text, ignoring case and white space. Messages are represented by the first user message and
    self-generated answers by their question, so the same question is never both trained on and held out. Documents of
    token ids are represented by their ids.
    """
    if doc.input_ids is not None and doc.asked is None:
        key = np.asarray(doc.input_ids[: doc.n_prompt], dtype=np.uint32).tobytes()
    else:
        text = doc.text if doc.asked is None else doc.asked
        if doc.messages is not None:
            asked = (message["content"] for message in doc.messages if message["role"] == "user")
            text = next(asked, doc.messages[0]["content"])
        key = " ".join(str(text).lower().split()).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
