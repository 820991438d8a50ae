"""Streaming rows: documents are read from the sources, tokenized, packed and shuffled while the model trains.

A window is an independently packed group of documents (about data.shard_mb of text). Its rows are read in a
pseudorandom order while a thread prepares the next window. A pass reads every source as tokenize would, with its files
in a different order each time. The order depends only on the seed, so a checkpoint stores only the start of a window.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from hildanext.config import Config
from hildanext.data.corpus import Use, find_sources, is_held_out, listing_sha256, streamed_order
from hildanext.data.documents import Document, Rejects
from hildanext.data.packing import Row
from hildanext.data.pipeline import Tally, read_groups
from hildanext.data.rows import RowOrder, to_batch
from hildanext.data.shards import Shard
from hildanext.data.workers import Encoding
from hildanext.errors import CheckpointError, DataError
from hildanext.progress import say

if TYPE_CHECKING:
    import torch

# The share of rejected records is not checked before this many records were read.
ENOUGH_RECORDS = 10_000


class Position(NamedTuple):
    """The start of a window."""

    number: int = 0  # of the pass
    mix: list[dict[str, Any]] | None = None  # state of the pass's mix; None at its start
    window: int = 0  # number of the window, over all passes
    first: int = 0  # its first global sample


class Window(NamedTuple):
    """The rows of global samples `start.first` to `end.first` (exclusive)."""

    rows: Shard
    start: Position
    end: Position

    def row(self, sample: int, seed: int) -> Row:
        """The row of a global sample."""
        n_rows = self.rows.n_rows
        return self.rows.row(RowOrder(n_rows, seed).row(self.start.window * n_rows + sample - self.start.first))


class RowStream:
    """A `RowSource` that reads the sources of a use in endless passes. Every process of a training reads all documents.

    Raises UsageError, DataError or UnreachableError for sources that cannot be found. `batch` raises them for errors
    while reading.
    """

    def __init__(self, config: Config, use: Use, encoding: Encoding) -> None:
        self.config, self.encoding, self.seed = config, encoding, config.train.seed
        self.sources = find_sources(config, use)
        if not self.sources:
            raise DataError(f"no source for '{use}'; add a source to data.sources")
        self.position = Position()
        self.window: Window | None = None
        self.before: Window | None = None  # the previous window: a step that ran out of memory reads its samples again
        self.windows: Generator[Window, None, None] | None = None
        self.ahead: Future[Window] | None = None
        self.pool = ThreadPoolExecutor(max_workers=1)

    def batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of global samples, see `rows.to_batch`. Raises ValueError for samples before the previous window."""
        rows = {}
        for sample in sorted(samples):
            rows[sample] = self._window_of(sample).row(sample, self.seed)
        return to_batch([rows[sample] for sample in samples])

    def _window_of(self, sample: int) -> Window:
        if self.windows is None:
            self.windows = self._make_windows(self.position)
            self.ahead = self.pool.submit(next, self.windows)
        while self.window is None or sample >= self.window.end.first:
            assert self.ahead is not None
            self.before, self.window = self.window, self.ahead.result()
            self.ahead = self.pool.submit(next, self.windows)
        for window in (self.window, self.before):
            if window is not None and window.start.first <= sample:
                return window
        raise ValueError(f"sample {sample} of the stream is no longer in memory")

    def _make_windows(self, position: Position) -> Generator[Window, None, None]:
        def keep(doc: Document) -> bool:
            return not is_held_out(doc, self.config.data.eval_share)

        while True:
            mix = streamed_order(self.sources, self.seed, position.number)
            if position.mix is not None:
                mix.restore(position.mix)
            made = position.mix is not None
            for group in read_groups(mix, keep, self.encoding, self.config.data):
                self._check(group.end, group.tally, whole=False)
                if group.rows.n_rows == 0:
                    continue
                made = True
                first = position.first + group.rows.n_rows
                end = Position(position.number, group.end, position.window + 1, first)
                yield Window(group.rows, position, end)
                position = end
            self._check(mix.state(), Tally(), whole=True)
            if not made:
                raise DataError(f"no documents to train on in {self._paths()}")
            say(f"data: pass {position.number + 1} over the sources ended after {position.first} rows; starting next")
            position = Position(position.number + 1, None, position.window, position.first)

    def _check(self, state: list[dict[str, Any]], tally: Tally, whole: bool) -> None:
        """Raises DataError for too many rejects up to `state`, or too many replaced ids in the window of `tally`.

        `whole`: the pass has ended.
        """
        rejects = Rejects()
        for reader in state:
            rejects.merge(reader["rejects"])
        rejects.merge(tally.rejects.to_dict())
        documents = sum(reader["documents"] for reader in state)
        if whole or documents + rejects.total >= ENOUGH_RECORDS:
            rejects.check(documents, self.config.data.max_reject_share)
        if whole and rejects.total:
            say(f"data: {rejects.total} records rejected: {rejects}")
        tally.check_unknown_ids(self.config.data.max_unk_share, self._paths())

    def _paths(self) -> str:
        return ", ".join(str(files.source.path) for files in self.sources)

    def describe(self, samples: Sequence[int] | None = None) -> str:
        """The sample numbers and their pass, or the files that are streamed."""
        if samples is None:
            n_files = sum(len(files) for _, files in self.sources)
            return f"a stream of {n_files} files, {sum(files.size for files in self.sources) / 1e6:.1f} MB"
        number = self.position.number if self.window is None else self.window.start.number
        return f"samples {sorted(samples)} of the stream, pass {number + 1}"

    def state(self, next_sample: int) -> dict[str, Any]:
        """The start of the window of `next_sample` or of an earlier one, and the SHA-256 of the list of files."""
        position = self.position
        if self.window is not None:
            position = self.window.end if next_sample >= self.window.end.first else self.window.start
        return {"files_sha256": listing_sha256(self.sources), **position._asdict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises CheckpointError when the files of the sources have changed."""
        if state.get("files_sha256") != listing_sha256(self.sources):
            raise CheckpointError("the files of data.sources, or their sizes, have changed since the run started")
        self.close()
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.position = Position(*(state[name] for name in Position._fields))
        self.before = self.window = self.windows = self.ahead = None

    def close(self) -> None:
        """Stop reading ahead."""
        self.pool.shutdown(cancel_futures=True)
        if self.windows is not None:
            self.windows.close()
