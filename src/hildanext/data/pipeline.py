"""Encodes and packs the documents of a mix in groups. A group becomes a shard of `tokenize` or a window of a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hildanext.config import DataConfig
from hildanext.data.documents import Document, Rejects
from hildanext.data.encode import Encoded
from hildanext.data.mixing import Mix
from hildanext.data.packing import pack
from hildanext.data.shards import Shard, compact
from hildanext.data.tokenizer import pad_id
from hildanext.data.workers import Chunk, DocumentBatch, Encoding, batches, encode_batches
from hildanext.errors import DataError


@dataclass
class Tally:
    """Counts over encoded documents."""

    rejects: Rejects = field(default_factory=Rejects)
    documents: int = 0
    size: int = 0  # bytes of text
    tokens: int = 0
    supervised: int = 0
    cut: int = 0  # documents longer than a row
    given_ids: int = 0
    unknown_ids: int = 0
    tools_as_text: int = 0
    unread_fields: Counter[str] = field(default_factory=Counter)

    def add(self, batch: DocumentBatch, chunk: Chunk, seq_len: int) -> None:
        """Count an encoded batch."""
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
        self.unread_fields += chunk.unread_fields

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return self.__dict__ | {"rejects": self.rejects.to_dict(), "unread_fields": dict(self.unread_fields)}

    def merge(self, counts: dict[str, Any]) -> None:
        """Add the counts of another tally's `to_dict`."""
        self.rejects.merge(counts["rejects"])
        self.unread_fields.update(counts.get("unread_fields", {}))
        for name in set(counts) - {"rejects", "unread_fields"}:
            setattr(self, name, self.__dict__[name] + counts[name])

    def check_unknown_ids(self, max_share: float, origin: str) -> None:
        """Raises DataError naming `origin` when the share of replaced pretokenized ids is above `max_share`."""
        if self.unknown_ids > max_share * self.given_ids:
            raise DataError(
                f"{origin}: {self.unknown_ids} of {self.given_ids} pretokenized ids are not in the tokenizer, above "
                f"data.max_unk_share {max_share:g}; set data.foreign_ids to 'retokenize'"
            )


class Group(NamedTuple):
    """The packed rows of a group, the state of the mix after it, and the counts of its documents."""

    rows: Shard
    end: list[dict[str, Any]]
    tally: Tally


def read_groups(
    mix: Mix, keep: Callable[[Document], bool], encoding: Encoding, data: DataConfig, workers: int | None = None
) -> Generator[Group, None, None]:
    """Groups of about data.shard_mb of documents for which `keep` returns True, from the current position of the mix.

    `workers` defaults to data.workers; the groups do not depend on it. Groups are independent: a group can be rebuilt
    from the state at the end of the previous one. Raises DataError for foreign ids that are not allowed.
    """
    todo = batches(mix, keep, round(data.shard_mb * 1e6))
    with closing(encode_batches(todo, encoding, workers or data.workers)) as encoded:
        for first in encoded:
            tally, end = Tally(), [first[0].state]
            documents = _documents(first, encoded, encoding.seq_len, tally, end)
            rows = compact(pack(documents, encoding.seq_len, pad_id(encoding.tokenizer)), encoding.seq_len)
            if tally.documents or tally.rejects.total:
                yield Group(rows, end[0], tally)


def _documents(
    first: tuple[DocumentBatch, Chunk],
    rest: Iterator[tuple[DocumentBatch, Chunk]],
    seq_len: int,
    tally: Tally,
    end: list[list[dict[str, Any]]],
) -> Iterator[Encoded]:
    """The documents of the group that begins with batch `first`. Updates `tally` and `end` on the way."""
    batch, chunk = first
    while True:
        tally.add(batch, chunk, seq_len)
        end[0] = batch.state
        yield from chunk.documents()
        if batch.ends_group:
            return
        batch, chunk = next(rest)
