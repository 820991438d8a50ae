"""Reads plain, .gz and .zst files in pieces and splits them into records. Broken records are counted and skipped."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hildanext.data.documents import Rejects, parse_json
from hildanext.data.sources.opening import file_name, read_bytes
from hildanext.errors import DataError
from hildanext.progress import say

# Records are held in memory, so longer ones are rejected; a file with such a record usually has another format.
MAX_RECORD_BYTES = 64 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The largest window of zstd (--long=31). Files with a window above 128 MB are refused otherwise.
MAX_WINDOW_BYTES = 1 << 31
# A file of which no record can be read counts as one record for this many bytes.
TYPICAL_RECORD_BYTES = 1000


class DamagedError(DataError):
    """A truncated or damaged compressed file. `offset`: bytes of the compressed file that were read, of `size`."""

    def __init__(self, reason: str, offset: int, size: int) -> None:
        super().__init__(reason)
        self.offset, self.size = offset, size


def read_pieces(path: str | Path) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces, decompressed for .gz and .zst. Raises DamagedError for a damaged file."""
    pieces, name = read_bytes(path), file_name(str(path))
    if name.endswith(".gz"):
        return _decompressed(pieces, lambda: zlib.decompressobj(wbits=31), zlib.error)
    if name.endswith(".zst"):
        import zstandard

        def make() -> Any:
            return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()

        return _decompressed(pieces, make, zstandard.ZstdError)
    return pieces


def _decompressed(pieces: Iterator[bytes], make: Callable[[], Any], failure: type[Exception]) -> Iterator[bytes]:
    """Decompress one or more concatenated streams. `make` returns a decompression object of zlib or zstandard."""
    stream = make()
    begun = False
    offset = 0
    for piece in pieces:
        done: list[bytes] = []
        # A failing call returns nothing, so that slices keep what comes before the damage.
        length = max(256, len(piece) // 64)
        for start in range(0, len(piece), length):
            rest = piece[start : start + length]
            try:
                while rest:
                    done.append(stream.decompress(rest))
                    begun, rest = True, b""
                    if stream.eof:
                        rest = stream.unused_data.lstrip(b"\0")  # gzip allows zeros as padding
                        stream, begun = make(), False
            except failure:
                yield b"".join(done)
                size = offset + len(piece) - start + sum(map(len, pieces))
                raise DamagedError("damaged compression", offset, size) from None
            offset += len(piece[start : start + length])
        yield b"".join(done)
    if begun or not offset:  # even compressed nothing has some bytes
        raise DamagedError("truncated file", offset, offset)


def read_records(path: str | Path, separator: bytes, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, bytes) for each record between separators.

    A truncated or damaged file yields its complete records; then the damage is reported and the lost records are
    counted.
    """
    rest = b""
    number = total = 0
    skipping = False
    try:
        for piece in read_pieces(path):
            total += len(piece)
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
        report_damage(path, error, number, total - len(rest), total, rejects)
        return
    if rest and not skipping:
        yield number + 1, rest


def report_damage(path: str | Path, error: DamagedError, number: int, used: int, total: int, rejects: Rejects) -> None:
    """Report that a file is damaged after `number` records, and count those behind them by an estimate.

    `total`: bytes of text before the damage, of which the records took `used`. Damaged compression may give senseless
    text for a while before it fails.
    """
    lost = lost_records(number, used, total * error.size / error.offset if error.offset else error.size)
    say(
        f"{path}: {error} near byte {error.offset}, after record {number}; the rest of this file is not read (about "
        f"{lost} records)"
    )
    rejects.add(str(error), path, number + 1, lost)


def lost_records(number: int, read: int, size: float) -> int:
    """Estimate the records in the rest of a file, at least 1, when its first `read` of `size` bytes held `number`."""
    return max(1, round(number * (size - read) / read if number and read else size / TYPICAL_RECORD_BYTES))


def read_json_lines(path: str | Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line of a JSONL file. Skips blank lines; counts and skips broken lines.

    Lines up to number `rejects.after` are skipped without parsing.
    """
    for number, line in read_records(path, b"\n", rejects):
        if number <= rejects.after:
            continue
        line = line.removeprefix(BYTE_ORDER_MARK)  # files that Windows saved, also when several were joined
        if not line or line.isspace():
            continue
        try:
            record = parse_json(line)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        yield number, record
