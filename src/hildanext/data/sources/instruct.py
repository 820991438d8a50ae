"""Instruction data: JSON arrays and JSON lines. Records may have any shape that `shapes` supports."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from hildanext.data.documents import Document, Rejects, check_unicode
from hildanext.data.sources.lines import MAX_RECORD_BYTES, DamagedError, read_json_lines, read_pieces, report_damage
from hildanext.data.sources.opening import File, file_name, list_files
from hildanext.data.sources.shapes import to_messages, to_tools
from hildanext.errors import DataError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
SPACE = " \t\r\n"


def find(path: str) -> list[File]:
    """The JSON files at `path`."""
    return list_files(path, SUFFIXES)


def read(path: str, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (record number, conversation) from one file. Keeps the record's 'id' and 'source' if present."""
    for number, record in read_records(path, rejects):
        try:
            messages, tools = to_messages(record), to_tools(record)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        name = str(record.get("id") or f"{file_name(path)}:{number}")
        origin = str(record.get("source") or file_name(path).split(".")[0])
        yield number, Document(id=name, source=origin, messages=messages, tools=tools)


def read_records(path: str, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, record) from a file that holds a JSON array or JSON lines."""
    records = read_json_array(path, rejects) if _is_array(path) else read_json_lines(path, rejects)
    for number, record in records:
        try:
            check_unicode(record)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        yield number, record


def _is_array(path: str) -> bool:
    try:
        for piece in read_pieces(path):
            start = piece.removeprefix(b"\xef\xbb\xbf").lstrip()
            if start:
                return start.startswith(b"[")
    except DamagedError:
        pass  # the reader meets the damage again and counts it
    return False


class JsonWindow:
    """A window over the text of a file: `text` from `at` on is not consumed yet; `ended` means all text was read."""

    def __init__(self, path: str) -> None:
        self.pieces = read_pieces(path)
        # Invalid bytes become lone surrogates, so that only their own record is rejected, not the rest of the array.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False
        self.failure: DataError = DataError("truncated file")

    def grow(self) -> None:
        """Drop the consumed text and read until the rest has doubled in size.

        Doubling keeps the number of attempts to parse a long record small.
        """
        parts, size = [self.text[self.at :]], 0
        while size <= len(parts[0]) and not self.ended:
            try:
                piece = next(self.pieces, b"")
            except DamagedError as error:
                piece, self.failure = b"", error
            self.ended = not piece
            parts.append(self.decoder.decode(piece, final=self.ended))
            size += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def next_after(self, characters: str) -> str:
        """The next character not in `characters`, without consuming it; '' at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in characters:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def parse(self) -> Any:
        """Parse and consume the JSON value at `at`. Raises DataError for broken JSON."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                # A number at the end of the text may be incomplete; an object is complete.
                if end < len(self.text) or isinstance(value, dict) or self.ended:
                    self.at = end
                    return value
            except (ValueError, RecursionError):
                if self.ended or len(self.text) - self.at > MAX_RECORD_BYTES:
                    raise DataError("broken JSON array; the rest of the file is not read") from None
            self.grow()


def read_json_array(path: str, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, object) from a file with one JSON array, without loading the whole file.

    After broken JSON the next record cannot be found: reading stops and one reject is counted.
    """
    window = JsonWindow(path)
    window.next_after("\ufeff" + SPACE)
    window.at += 1  # the bracket
    number = 0
    try:
        while (character := window.next_after(SPACE + ",")) != "]":
            if not character:
                raise window.failure
            value = window.parse()
            number += 1
            if isinstance(value, dict):
                yield number, value
            else:
                rejects.add("not a JSON object", path, number)
    except DataError as error:
        if isinstance(window.failure, DamagedError):
            report_damage(path, window.failure, number, rejects)
        else:
            rejects.add(str(error), path, number + 1)
