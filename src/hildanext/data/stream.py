"""Training straight from the sources: documents are read, tokenized, packed and shuffled while the model trains.

A window is a group of documents (about data.shard_mb of text) packed by itself; its rows come in a pseudorandom order,
and the next one is made meanwhile. A pass reads every source as tokenize would, its files in another order each time.
All is a function of the seed, so where a window begins is all that a checkpoint has to keep.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from hildanext.config import Config
from hildanext.data.corpus import Use, find_sources, is_held_out, listing_sha256, streamed_order
from hildanext.data.documents import Rejects
from hildanext.data.packing import Row
from hildanext.data.pipeline import Tally, read_groups
from hildanext.data.rows import RowOrder, to_batch
from hildanext.data.shards import Shard
from hildanext.data.workers import Encoding
from hildanext.errors import CheckpointError, DataError
from hildanext.progress import say

if TYPE_CHECKING:
    import torch

# Fewer records than these say little of the share of bad ones.
ENOUGH_RECORDS = 10_000


class Position(NamedTuple):
    """Where a window begins: the pass, where its mix stands (None: at its start), the window's number, its first sample."""

    number: int = 0
    mix: list[dict[str, Any]] | None = None
    window: int = 0
    first: int = 0


class Window(NamedTuple):
    """The rows of samples `start.first` up to, not including, `end.first`."""

    rows: Shard
    start: Position
    end: Position

    def row(self, sample: int, seed: int) -> Row:
        """The row of a global sample."""
        n_rows = self.rows.n_rows
        return self.rows.row(RowOrder(n_rows, seed).row(self.start.window * n_rows + sample - self.start.first))


class RowStream:
    """A `RowSource` that reads the sources of a use; every process of a training reads all of it.

    Passes follow one another without end. Raises UsageError, DataError or UnreachableError for sources that cannot be
    found, and, from `batch`, for what is wrong with what is read.
    """

    def __init__(self, config: Config, use: Use, job: Encoding) -> None:
        self.config, self.job, self.seed = config, job, config.train.seed
        self.found = find_sources(config, use)
        if not self.found:
            raise DataError(f"no source feeds '{use}'; add one to data.sources")
        self.position = Position()
        self.window: Window | None = None
        self.before: Window | None = None  # the one before it: a step that ran out of memory is asked for again
        self.windows: Generator[Window, None, None] | None = None
        self.ahead: Future[Window] | None = None
        self.pool = ThreadPoolExecutor(max_workers=1)

    def batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of global samples, see `rows.to_batch`. Raises ValueError for a sample of a window that is gone."""
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
        raise ValueError(f"sample {sample} of the stream is past")

    def _make_windows(self, position: Position) -> Generator[Window, None, None]:
        data = self.config.data
        while True:
            mix = streamed_order(self.found, self.seed, position.number)
            if position.mix is not None:
                mix.restore(position.mix)
            made = position.mix is not None
            for group in read_groups(
                mix,
                lambda doc: not is_held_out(doc, data.eval_share),
                self.job,
                round(data.shard_mb * 1e6),
                data.workers,
            ):
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
                raise DataError(f"no document to train on in {', '.join(str(one.source.path) for one in self.found)}")
            say(f"data: pass {position.number + 1} over the sources ends after {position.first} rows; another begins")
            position = Position(position.number + 1, None, position.window, position.first)

    def _check(self, state: list[dict[str, Any]], tally: Tally, whole: bool) -> None:
        """Raises DataError when what was read up to `state` has too many bad records, or a window too many unknown ids."""
        rejects = Rejects()
        for reader in state:
            rejects.merge(reader["rejects"])
        rejects.merge(tally.rejects.to_dict())
        documents = sum(reader["documents"] for reader in state)
        if whole or documents + rejects.total >= ENOUGH_RECORDS:
            rejects.check(documents, self.config.data.max_reject_share)
        if whole and rejects.total:
            say(f"data: {rejects.total} records rejected: {rejects}")
        share = self.config.data.max_unk_share
        if tally.unknown_ids > share * tally.given_ids:
            raise DataError(
                f"{tally.unknown_ids} of {tally.given_ids} pretokenized ids are not in the tokenizer, above "
                f"data.max_unk_share {share:g}; set data.foreign_ids to 'retokenize'"
            )

    def describe(self, samples: Sequence[int] | None = None) -> str:
        """Sample numbers and the pass they belong to; what is streamed."""
        if samples is None:
            files = sum(len(one.files) for one in self.found)
            return f"a stream of {files} files, {sum(one.size for one in self.found) / 1e6:.1f} MB as they lie"
        number = self.position.number if self.window is None else self.window.start.number
        return f"samples {sorted(samples)} of the stream, pass {number + 1}"

    def state(self, next_sample: int) -> dict[str, Any]:
        """Where the window of `next_sample` begins, or one before it, and which files the sources have."""
        position = self.position
        if self.window is not None:
            position = self.window.end if next_sample >= self.window.end.first else self.window.start
        return {"files_sha256": listing_sha256(self.found), **position._asdict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a state. Raises CheckpointError when the sources have other files than the run began with."""
        if state.get("files_sha256") != listing_sha256(self.found):
            raise CheckpointError(
                "the sources of data.sources have other files, or of other sizes, than this run began with"
            )
        self.close()
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.position = Position(*(state[name] for name in Position._fields))
        self.before = self.window = self.windows = self.ahead = None

    def close(self) -> None:
        """End the reading ahead."""
        self.pool.shutdown(cancel_futures=True)
        if self.windows is not None:
            self.windows.close()
