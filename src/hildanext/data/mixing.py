"""Documents of several sources in one order: one source after another, or mixed by weight. Any place can be gone back to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hildanext.data.documents import Document, Rejects

# Reads one file: (number, document) with numbers that go up. What it cannot use it counts.
Read = Callable[[str, Rejects], Iterator[tuple[int, Document]]]


class DocumentPlace(NamedTuple):
    """Where a document stands: its file and its line (or record) there, from 1."""

    file: str
    number: int


class Reader:
    """The documents of some files, in order, `epochs` times over, at most `limit` of them an epoch.

    `state` is the place after the last document given, small enough for JSON; `restore` goes there in a reader of the
    same files by passing over what lies before it in the file.
    """

    COUNTERS = ("epoch", "file", "after", "taken", "documents", "size")

    def __init__(self, read: Read, files: Sequence[str], *, epochs: int = 1, limit: int | None = None) -> None:
        self.read, self.files, self.epochs, self.limit = read, files, epochs, limit
        self.rejects = Rejects()
        # Epoch, file in it, number of the last document given from it, documents given in this epoch.
        self.epoch = self.file = self.after = self.taken = 0
        self.documents = self.size = 0  # given in all, and their text in bytes
        self.given = self._read()

    @property
    def done(self) -> bool:
        """Whether the last epoch has ended."""
        return self.epoch == self.epochs

    @property
    def epochs_read(self) -> int:
        """Epochs begun."""
        return min(self.epoch + (self.taken > 0 or self.file > 0), self.epochs)

    def next(self) -> tuple[DocumentPlace, Document] | None:
        """The next document; None once all are given."""
        return next(self.given, None)

    def finish(self) -> None:
        """Give no more."""
        self.epoch = self.epochs
        self.given = self._read()

    def _read(self) -> Iterator[tuple[DocumentPlace, Document]]:
        while not self.done:
            while self.file < len(self.files) and self.taken != self.limit:
                yield from self._read_file(self.files[self.file], self.after)
                if self.taken != self.limit:
                    self.file, self.after = self.file + 1, 0
            self.epoch, self.file, self.after, self.taken = self.epoch + 1, 0, 0, 0

    def _read_file(self, path: str, after: int) -> Iterator[tuple[DocumentPlace, Document]]:
        self.rejects.after = after
        for number, doc in self.read(path, self.rejects):
            if number <= after:
                continue
            self.after = number
            self.taken += 1
            self.documents += 1
            self.size += doc.size
            yield DocumentPlace(path, number), doc
            if self.taken == self.limit:
                return

    def state(self) -> dict[str, Any]:
        """Where it stands, JSON-able."""
        return {name: self.__dict__[name] for name in self.COUNTERS} | {"rejects": self.rejects.to_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a reader of the same files stood."""
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        self.rejects = Rejects()
        self.rejects.merge(state["rejects"])
        self.given = self._read()


class Mix:
    """The documents of several readers.

    Without `weights` one reader follows the other. With them the next document comes from the reader whose text so far
    is the smallest for its weight, so that after every document all shares are right to within one document; the mix
    ends where a reader runs dry, or with `to_the_end` goes on with the others.
    """

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float] | None, to_the_end: bool = False) -> None:
        self.readers, self.weights, self.to_the_end = readers, weights, to_the_end

    def __iter__(self) -> Iterator[tuple[Reader, DocumentPlace, Document]]:
        while (reader := self._next_reader()) is not None:
            found = reader.next()
            if found is not None:
                yield reader, *found

    def _next_reader(self) -> Reader | None:
        todo = [index for index, reader in enumerate(self.readers) if not reader.done]
        if not todo:
            return None
        if self.weights is None:
            return self.readers[todo[0]]
        if len(todo) < len(self.readers) and not self.to_the_end:
            return None
        weights = self.weights
        return self.readers[min(todo, key=lambda index: self.readers[index].size / weights[index])]

    def state(self) -> list[dict[str, Any]]:
        """Where each reader stands."""
        return [reader.state() for reader in self.readers]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Go to where a mix of the same readers stood."""
        for reader, one in zip(self.readers, state, strict=True):
            reader.restore(one)
