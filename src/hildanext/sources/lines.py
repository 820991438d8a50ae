"""Reading files as sources publish them: plain, .gz or .zst, in pieces, with what is broken counted and skipped."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hildanext.documents import Rejects, parse_json
from hildanext.errors import DataError, UsageError

PIECE_BYTES = 1 << 18
# A record is held in memory whole; what is longer is no document but a file in another format.
MAX_RECORD_BYTES = 64 << 20


def list_files(path: str, suffixes: tuple[str, ...], without: str | None = None) -> list[Path]:
    """Files at `path` (a file, or a folder with all below it) that end in one of `suffixes`, sorted.

    Hidden names and folders named `without` are left out. Raises UsageError for a path that does not exist or a file of
    another kind, DataError for a folder without such files.
    """
    root = Path(path)
    if root.is_file():
        if not root.name.endswith(suffixes):
            raise UsageError(f"data.sources: '{path}' is not one of {', '.join(suffixes)}")
        return [root]
    if not root.is_dir():
        raise UsageError(f"data.sources: path '{path}' does not exist")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != without and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
    if not found:
        raise DataError(f"{path}: no files that end in {', '.join(suffixes)}")
    return sorted(found)


def read_pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes in pieces, decompressed by its suffix. Raises DataError for a truncated or damaged stream."""
    with open(path, "rb") as file:
        if path.suffix == ".gz":
            yield from _decompressed(file.read, lambda: zlib.decompressobj(wbits=31), zlib.error)
        elif path.suffix == ".zst":
            import zstandard

            yield from _decompressed(file.read, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
        else:
            while piece := file.read(PIECE_BYTES):
                yield piece


def _decompressed(
    read: Callable[[int], bytes], machine: Callable[[], Any], failure: type[Exception]
) -> Iterator[bytes]:
    """Decompress a file of one stream or several; zlib and zstandard have the same little machine for it."""
    stream = machine()
    begun = False
    while piece := read(PIECE_BYTES):
        while piece:
            try:
                data = stream.decompress(piece)
            except failure:
                raise DataError("damaged compression") from None
            begun = True
            if data:
                yield data
            piece = b""
            if stream.eof:
                piece = stream.unused_data.lstrip(b"\0")  # gzip allows zeros as padding
                stream, begun = machine(), False
    if begun:
        raise DataError("truncated file")


def read_records(path: Path, separator: bytes, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each record between separators.

    A compressed file that ends early or is damaged yields what is whole, then counts one reject.
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
    except DataError as error:
        rejects.add(str(error), path, number + 1)
        return
    if rest and not skipping:
        yield number + 1, rest


def read_json_lines(path: Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a JSONL file; a broken line is counted and skipped, a blank one skipped."""
    for number, line in read_records(path, b"\n", rejects):
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
