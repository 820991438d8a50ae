"""Logs and metrics of jobs: their ends, and what is added to them. They may be large: neither is held whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from hildanext.jobs.store import ENDED, MissingError, StoreError
from hildanext.jobs.watcher import Jobs
from hildanext.server.answers import sse, status_of

FOLLOW_S = 0.25
PIECE = 262_144


def last_lines(path: Path, most: int) -> tuple[bytes, int]:
    """The whole lines among the last `most` bytes of a file, and how many bytes come before them. No file: none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - most)
            # One byte more tells whether a line begins there.
            file.seek(max(0, start - 1))
            text = file.read(size - max(0, start - 1))
    except FileNotFoundError:
        return b"", 0
    kept = text.split(b"\n", 1)[1] if start and b"\n" in text else text[start > 0 :]
    return kept, size - len(kept)


def rows_of(text: bytes) -> list[Any]:
    """Rows of JSON lines; NaN, which JSON does not have, is null, and a line that is none is left out."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line, parse_constant=lambda name: None))
        except ValueError:
            continue
    return rows


class LogPosition(NamedTuple):
    """How far a file has been read, and which file it was."""

    offset: int = 0
    inode: int | None = None


def _next_piece(path: Path, place: LogPosition, *, to_the_end: bool) -> tuple[str, LogPosition, bool]:
    """What comes next as events, where that ends, and whether there may be more at once."""
    try:
        with open(path, "rb") as file:
            inode, size = path.stat().st_ino, file.seek(0, 2)
            is_new = place.inode not in (None, inode) or size < place.offset
            offset = 0 if is_new else place.offset
            file.seek(offset)
            new = file.read(PIECE)
    except FileNotFoundError:
        return "", place, False
    is_full = len(new) == PIECE
    cut = new.rfind(b"\n") + 1 or (len(new) if is_full else 0)  # a line without end is sent in pieces
    if to_the_end and not is_full:
        cut = len(new)
    whole = new[:cut]
    shown = rows_of(whole) if path.suffix == ".jsonl" else whole.decode(errors="replace").splitlines()
    events = (sse({}, "reset") if is_new else "") + "".join(map(sse, shown))
    return events, LogPosition(offset + cut, inode), is_full


async def follow(jobs: Jobs, job_id: str, path: Path) -> AsyncIterator[str]:
    """Whole lines of a growing file, to the end of the job. A file that was replaced is read again from its start.

    While the database or the disk does not answer it waits; `error` is for a job that was deleted.
    """
    place = LogPosition()
    while True:
        try:
            job = await asyncio.to_thread(jobs.store.get, job_id)
            more = True
            while more:
                events, place, more = await asyncio.to_thread(_next_piece, path, place, to_the_end=job.state in ENDED)
                if events:
                    yield events
        except MissingError as error:
            yield sse({"detail": str(error), "status": status_of(error)}, "error")
            return
        except (StoreError, OSError):
            await asyncio.sleep(FOLLOW_S)
            continue
        if job.state in ENDED:
            yield sse({"state": job.state}, "end")
            return
        await asyncio.sleep(FOLLOW_S)
