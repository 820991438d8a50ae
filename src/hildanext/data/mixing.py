"""Orders the documents of several sources: one after another, or mixed by weight. Reading can resume anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hildanext.data.documents import Document, Rejects

# Reads one file and yields (number, document) with increasing numbers. Counts unusable records in the Rejects.
Read = Callable[[str, Rejects], Iterator[tuple[int, Document]]]


class DocumentPlace(NamedTuple):
    """The place of a document: its file, and its line or record number there, from 1."""

    file: str
    number: int


class Reader:
    """Reads the documents of files in order, `epochs` times, at most `limit` documents per epoch.

    `state` is the position after the last document. `restore` sets the position of a reader of the same files; it skips
    the earlier records of the current file.
    """

    COUNTERS = ("epoch", "file", "after", "taken", "documents", "size")

    def __init__(self, read: Read, files: Sequence[str], *, epochs: int = 1, limit: int | None = None) -> None:
        self.read, self.files, self.epochs, self.limit = read, files, epochs, limit
        self.rejects = Rejects()
        # Current epoch, index of the file, number of the last document read from it, documents read in this epoch.
        self.epoch = self.file = self.after = self.taken = 0
        self.documents = self.size = 0  # documents read in total, and the bytes of their text
        self.stream = self._read()

    @property
    def done(self) -> bool:
        """Whether the last epoch is finished."""
        return self.epoch == self.epochs

    @property
    def epochs_read(self) -> int:
        """Epochs started."""
        return min(self.epoch + (self.taken > 0 or self.file > 0), self.epochs)

    def next(self) -> tuple[DocumentPlace, Document] | None:
        """The next document; None at the end."""
        return next(self.stream, None)

    def finish(self) -> None:
        """Stop reading: `done` becomes True."""
        self.epoch = self.epochs
        self.stream = self._read()

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
        """The position as JSON values."""
        return {name: self.__dict__[name] for name in self.COUNTERS} | {"rejects": self.rejects.to_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the `state` of a reader of the same files."""
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        self.rejects = Rejects()
        self.rejects.merge(state["rejects"])
        self.stream = self._read()


class Mix:
    """The documents of several readers in one order.

    Without `weights`, readers are read one after another. With weights, the reader most below its target share of the
    text is read next, so that shares are always exact to within one document. The mix ends with the first reader that
    ends; with `to_the_end` it continues with the others.
    """

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float] | None, to_the_end: bool = False) -> None:
        self.readers, self.weights, self.to_the_end = readers, weights, to_the_end

    def __iter__(self) -> Iterator[tuple[Reader, DocumentPlace, Document]]:
        while (reader := self._next_reader()) is not None:
            document = reader.next()
            if document is not None:
                yield reader, *document

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
        """The position of each reader."""
        return [reader.state() for reader in self.readers]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Continue from the `state` of a mix of the same readers."""
        for reader, position in zip(self.readers, state, strict=True):
            reader.restore(position)
