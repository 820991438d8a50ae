"""The documents that feed training or SFT, in the order in which they are written down or streamed."""

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
# The split of a use, for documents that train and for those held out.
PARTS: dict[Use, tuple[str, str]] = {"train": ("train", "eval"), "sft": ("sft_train", "sft_eval")}


class Found(NamedTuple):
    """A source and its files, in order."""

    source: SourceConfig
    files: list[File]

    @property
    def size(self) -> int:
        """Bytes of the files as they lie there."""
        return sum(file.size for file in self.files)


def find_sources(config: Config, use: Use) -> list[Found]:
    """The sources of a use. Raises UsageError, DataError or UnreachableError naming the path."""
    data = config.paths.data
    return [Found(source, find_files(source, data)) for source in config.data.sources if use in source.splits]


def listing_sha256(found: Sequence[Found]) -> str:
    """SHA-256 over the paths and sizes of all files."""
    return hashlib.sha256(json.dumps([list(one.files) for one in found]).encode()).hexdigest()


def make_reader(found: Found, seed: int, files: Sequence[File] | None = None) -> Reader:
    """A reader of a source's files, in the given order or their own."""
    source = found.source
    names = [file.path for file in (found.files if files is None else files)]
    read = partial(read_file, source, seed=seed)
    return Reader(
        lambda path, rejects: read(path, rejects=rejects), names, epochs=source.max_epochs, limit=source.max_documents
    )


def written_order(found: Sequence[Found], seed: int) -> Mix:
    """One source after the other, or mixed by the weights: what prepare-data writes and tokenize reads."""
    weights = [one.source.weight for one in found]
    return Mix([make_reader(one, seed) for one in found], None if None in weights else [w for w in weights if w])


def streamed_order(found: Sequence[Found], seed: int, number: int) -> Mix:
    """Pass `number` of a stream: the files of each source in another order every time, the sources side by side.

    Without weights each source comes as often as its files are large, so that all end together; a source of which only
    `max_documents` are wanted keeps the order of its files, and so its documents.
    """
    readers = []
    for index, one in enumerate(found):
        files = list(one.files)
        if one.source.max_documents is None:
            random.Random(f"{seed}:{number}:{index}").shuffle(files)
        readers.append(make_reader(one, seed, files))
    weighted = all(one.source.weight is not None for one in found)
    weights = [one.source.weight or float(max(one.size, 1)) for one in found]
    return Mix(readers, weights, to_the_end=not weighted)


def is_held_out(doc: Document, share: float) -> bool:
    """Whether a document belongs to evaluation: a pure function of its text, whatever its source, id or neighbours.

    The hash covers the text without case and spacing; for messages the first user message and for what the base wrote the
    question it was asked, so that one question never stands on both sides; for token ids alone the ids.
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
