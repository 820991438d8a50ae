"""Reading files as sources publish them: plain, .gz or .zst, in pieces, with what is broken counted and skipped."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hildanext.data.documents import Rejects, parse_json
from hildanext.data.sources.opening import read_bytes
from hildanext.errors import DataError
from hildanext.progress import say

# A record is held in memory whole; what is longer is no document but a file in another format.
MAX_RECORD_BYTES = 64 << 20


class DamagedError(DataError):
    """A compressed file that cannot be read on, at a byte of the compressed file."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


def read_pieces(path: str | Path) -> Iterator[bytes]:
    """A file's bytes in pieces, decompressed by its suffix. Raises DamagedError for a truncated or damaged stream."""
    pieces, name = read_bytes(path), str(path)
    if name.endswith(".gz"):
        return _decompressed(pieces, lambda: zlib.decompressobj(wbits=31), zlib.error)
    if name.endswith(".zst"):
        import zstandard

        return _decompressed(pieces, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
    return pieces


def _decompressed(pieces: Iterator[bytes], machine: Callable[[], Any], failure: type[Exception]) -> Iterator[bytes]:
    """Decompress a file of one stream or several; zlib and zstandard have the same little machine for it."""
    stream = machine()
    begun = False
    offset = 0
    for piece in pieces:
        offset += len(piece)
        while piece:
            try:
                data = stream.decompress(piece)
            except failure:
                raise DamagedError("damaged compression", offset) from None
            begun = True
            if data:
                yield data
            piece = b""
            if stream.eof:
                piece = stream.unused_data.lstrip(b"\0")  # gzip allows zeros as padding
                stream, begun = machine(), False
    if begun:
        raise DamagedError("truncated file", offset)


def read_records(path: str | Path, separator: bytes, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each record between separators.

    A compressed file that ends early or is damaged yields what is whole, then says so and counts one reject.
    """
    rest = b""
    number = 0
    skipping = False
    try:
        for piece in read_pieces(path):
            *records, rest = (rest + piece).split(separator)
            for record in records:
                number += 1
                if not skipping:
                    yield number, record
                skipping = False
            if len(rest) > MAX_RECORD_BYTES:
                if not skipping:
                    rejects.add(f"record longer than {MAX_RECORD_BYTES >> 20} MiB", path, number + 1)
                skipping = True
                rest = rest[-len(separator) :]
    except DamagedError as error:
        tell_damage(path, error, number, rejects)
        return
    if rest and not skipping:
        yield number + 1, rest


def tell_damage(path: str | Path, error: DamagedError, number: int, rejects: Rejects) -> None:
    """Say where a file broke off, `number` records into it, and count it."""
    say(f"{path}: {error} near byte {error.offset}, after record {number}; the rest of this file is not read")
    rejects.add(str(error), path, number + 1)


def read_json_lines(path: str | Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a JSONL file; a broken line is counted and skipped, a blank one skipped.

    Lines up to number `rejects.after` are passed over unread.
    """
    for number, line in read_records(path, b"\n", rejects):
        if number <= rejects.after:
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line or line.isspace():
            continue
        try:
            record = parse_json(line)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        yield number, record
