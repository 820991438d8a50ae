"""Reads plain, .gz and .zst files in pieces and splits them into records. Broken records are counted and skipped."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hildanext.data.documents import Rejects, parse_json
from hildanext.data.sources.opening import read_bytes
from hildanext.errors import DataError
from hildanext.progress import say

# Records are held in memory, so longer ones are rejected; a file with such a record usually has another format.
MAX_RECORD_BYTES = 64 << 20


class DamagedError(DataError):
    """A truncated or damaged compressed file. `offset` is the approximate position in the compressed file, in bytes."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


def read_pieces(path: str | Path) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces, decompressed for .gz and .zst. Raises DamagedError for a damaged file."""
    pieces, name = read_bytes(path), str(path)
    if name.endswith(".gz"):
        return _decompressed(pieces, lambda: zlib.decompressobj(wbits=31), zlib.error)
    if name.endswith(".zst"):
        import zstandard

        return _decompressed(pieces, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
    return pieces


def _decompressed(pieces: Iterator[bytes], make: Callable[[], Any], failure: type[Exception]) -> Iterator[bytes]:
    """Decompress one or more concatenated streams. `make` returns a decompression object of zlib or zstandard."""
    stream = make()
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
                stream, begun = make(), False
    if begun:
        raise DamagedError("truncated file", offset)


def read_records(path: str | Path, separator: bytes, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, bytes) for each record between separators.

    A truncated or damaged file yields its complete records; then the damage is reported and one reject is counted.
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
        report_damage(path, error, number, rejects)
        return
    if rest and not skipping:
        yield number + 1, rest


def report_damage(path: str | Path, error: DamagedError, number: int, rejects: Rejects) -> None:
    """Report that a file is damaged after `number` records, and count one reject."""
    say(f"{path}: {error} near byte {error.offset}, after record {number}; the rest of this file is not read")
    rejects.add(str(error), path, number + 1)


def read_json_lines(path: str | Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line of a JSONL file. Skips blank lines; counts and skips broken lines.

    Lines up to number `rejects.after` are skipped without parsing.
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
