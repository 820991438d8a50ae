"""Documents of a mix, encoded and packed in groups: a group is a shard of `tokenize`, or a window of a stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hildanext.data.documents import Document, Rejects
from hildanext.data.encode import Encoded
from hildanext.data.mixing import Mix
from hildanext.data.packing import pack
from hildanext.data.shards import Shard, compact
from hildanext.data.tokenizer import pad_id
from hildanext.data.workers import Chunk, DocumentBatch, Encoding, batches, encode_batches


@dataclass
class Tally:
    """What documents came to when they were encoded."""

    rejects: Rejects = field(default_factory=Rejects)
    documents: int = 0
    size: int = 0  # bytes of text
    tokens: int = 0
    supervised: int = 0
    cut: int = 0  # documents longer than a row
    given_ids: int = 0
    unknown_ids: int = 0
    tools_as_text: int = 0

    def add(self, batch: DocumentBatch, chunk: Chunk, seq_len: int) -> None:
        """Count a batch that was encoded."""
        for reason, index in chunk.rejects:
            self.rejects.add(reason, *batch.places[index])
        self.documents += len(chunk.lengths)
        self.size += batch.size
        self.tokens += len(chunk.input_ids)
        self.supervised += int(chunk.loss_mask.sum())
        self.cut += int((chunk.lengths > seq_len).sum())
        self.given_ids += chunk.given_ids
        self.unknown_ids += chunk.unknown_ids
        self.tools_as_text += chunk.tools_as_text

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self.__dict__ | {"rejects": self.rejects.to_dict()}

    def merge(self, counts: dict[str, Any]) -> None:
        """Add what another one's `to_dict` holds."""
        self.rejects.merge(counts["rejects"])
        for name in set(counts) - {"rejects"}:
            setattr(self, name, self.__dict__[name] + counts[name])


class Group(NamedTuple):
    """Packed rows of a group, where the mix stands after it, and what its documents came to."""

    rows: Shard
    end: list[dict[str, Any]]
    tally: Tally


def read_groups(
    mix: Mix, keep: Callable[[Document], bool], job: Encoding, group_bytes: int, workers: int
) -> Generator[Group, None, None]:
    """Groups of the documents that `keep` wants, from where the mix stands: the same for any number of workers.

    Groups do not depend on each other: one can be made again alone from where the one before it ended. Raises DataError
    for foreign ids that are not allowed.
    """
    with closing(encode_batches(batches(mix, keep, group_bytes), job, workers)) as encoded:
        for first in encoded:
            tally, end = Tally(), [first[0].state]
            documents = _documents(first, encoded, job.seq_len, tally, end)
            rows = compact(pack(documents, job.seq_len, pad_id(job.tokenizer)), job.seq_len)
            if tally.documents or tally.rejects.total:
                yield Group(rows, end[0], tally)


def _documents(
    first: tuple[DocumentBatch, Chunk],
    rest: Iterator[tuple[DocumentBatch, Chunk]],
    seq_len: int,
    tally: Tally,
    end: list[list[dict[str, Any]]],
) -> Iterator[Encoded]:
    """The documents of one group, whose first batch is taken already; `tally` and `end` follow."""
    batch, chunk = first
    while True:
        tally.add(batch, chunk, seq_len)
        end[0] = batch.state
        yield from chunk.documents()
        if batch.ends_group:
            return
        batch, chunk = next(rest)
