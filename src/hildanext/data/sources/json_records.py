"""Records of a file that holds a JSON array or JSON lines. Arrays are read piece by piece; broken records are counted."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from hildanext.data.documents import TOO_DEEP, Rejects, check_depth, check_unicode, unique_keys
from hildanext.data.sources.lines import (
    BYTE_ORDER_MARK,
    MAX_RECORD_BYTES,
    DamagedError,
    lost_records,
    read_json_lines,
    read_pieces,
    report_damage,
)
from hildanext.errors import DataError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
SPACE = " \t\r\n"
# What gives a JSON text its structure. A string ends at its line's end, where a broken one would run on.
STRUCTURE = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[\[\]{},]')
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def read_json(path: str, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, record) from a file that holds a JSON array or JSON lines."""
    records = read_json_array(path, rejects) if _is_array(path) else read_json_lines(path, rejects)
    for number, record in records:
        try:
            check_depth(record)
            check_unicode(record)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        yield number, record


def _is_array(path: str) -> bool:
    try:
        for piece in read_pieces(path):
            start = piece.removeprefix(BYTE_ORDER_MARK).lstrip()
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
        self.size = 0  # bytes read so far
        self.damage: DamagedError | None = None

    def grow(self) -> None:
        """Drop the consumed text and read until the rest has doubled in size.

        Doubling keeps the number of attempts to parse a long record small.
        """
        parts, size = [self.text[self.at :]], 0
        while size <= len(parts[0]) and not self.ended:
            try:
                piece = next(self.pieces, b"")
            except DamagedError as error:
                piece, self.damage = b"", error
            self.ended = not piece
            self.size += len(piece)
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
        """Parse and consume the JSON value at `at`.

        Raises DataError for a value that cannot be parsed; it is consumed if its end is found. Raises EOFError if not.
        """
        while True:
            reason, end = "broken JSON", None
            try:
                value, after = DECODER.raw_decode(self.text, self.at)
                # A number at the end of the text may be incomplete; an object is complete.
                if after < len(self.text) or isinstance(value, dict) or self.ended:
                    self.at = after
                    return value
            except DataError as error:
                reason, end = str(error), self._end_of_value()
            except RecursionError:
                reason, end = TOO_DEEP, self._end_of_value()
            except ValueError:
                end = self._end_of_value()
            if end is not None:
                self.at = end
                raise DataError(reason)
            if self.ended or len(self.text) - self.at > MAX_RECORD_BYTES:
                raise EOFError
            self.grow()

    def _end_of_value(self) -> int | None:
        """Index after the value at `at` by its brackets and strings alone; None if its end is not in the text."""
        depth = 0
        for match in STRUCTURE.finditer(self.text, self.at):
            mark = match[0]
            if depth == 0 and mark in ("]", "}", ","):
                return max(match.start(), self.at + 1)
            depth += (mark in ("[", "{")) - (mark in ("]", "}"))
            if depth == 0 and mark in ("]", "}"):
                return match.end()
        return None

    def rest(self) -> int:
        """Bytes of the text behind `at`. Reads the file to its end, or to its damage."""
        left = len(self.text[self.at :].encode("utf-8", "surrogateescape"))
        try:
            unread = sum(map(len, self.pieces))
        except DamagedError as error:
            unread, self.damage = 0, error
        self.size += unread
        return left + unread


def read_json_array(path: str, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, object) from a file of one or more JSON arrays, without loading the whole file.

    A record that cannot be parsed is counted. Where its end cannot be found, reading stops, and the records in the rest
    of the file are counted by an estimate.
    """
    window = JsonWindow(path)
    window.next_after("\ufeff" + SPACE)
    window.at += 1  # the bracket
    number = 0
    reason = "truncated file"
    while character := window.next_after(SPACE + ","):
        if character == "]":
            window.at += 1
            follows = window.next_after(SPACE)
            if not follows:
                return
            if follows != "[":
                reason = "text after the end of a JSON array; it is not read"
                break
            window.at += 1
            continue
        try:
            value = window.parse()
        except EOFError:
            reason = "broken JSON array; the rest of the file is not read"
            break
        except DataError as error:
            number += 1
            rejects.add(str(error), path, number)
            continue
        number += 1
        if isinstance(value, dict):
            yield number, value
        else:
            rejects.add("not a JSON object", path, number)
    used = window.size - window.rest()
    if window.damage is not None:
        report_damage(path, window.damage, number, used, window.size, rejects)
    else:
        rejects.add(reason, path, number + 1, lost_records(number, used, window.size))
