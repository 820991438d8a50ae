"""Read the end of a job's log or metrics, and follow new lines. The files may be large, so they are read in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from hildanext.jobs.store import ENDED, MissingError, StoreError
from hildanext.jobs.watcher import Jobs
from hildanext.server.answers import error_event, sse

FOLLOW_S = 0.25
PIECE = 262_144


def last_lines(path: Path, most: int) -> tuple[bytes, int]:
    """Return the complete lines in the last `most` bytes, and the number of bytes before them. No file: (b"", 0)."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - most)
            # One extra byte shows whether a line begins at `start`.
            file.seek(max(0, start - 1))
            text = file.read(size - max(0, start - 1))
    except FileNotFoundError:
        return b"", 0
    kept = text.split(b"\n", 1)[1] if start and b"\n" in text else text[start > 0 :]
    return kept, size - len(kept)


def rows_of(text: bytes) -> list[Any]:
    """Parse JSON lines. NaN and infinity become null, which JSON requires; invalid lines are skipped."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line, parse_constant=lambda name: None))
        except ValueError:
            continue
    return rows


class LogPosition(NamedTuple):
    """How far a file has been read, and the inode that identifies it."""

    offset: int = 0
    inode: int | None = None


def _next_piece(path: Path, place: LogPosition, *, to_the_end: bool) -> tuple[str, LogPosition, bool]:
    """Return the next lines as events, the position after them, and whether more may be available at once."""
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
    cut = new.rfind(b"\n") + 1 or (len(new) if is_full else 0)  # a very long line is sent in pieces
    if to_the_end and not is_full:
        cut = len(new)
    whole = new[:cut]
    shown = rows_of(whole) if path.suffix == ".jsonl" else whole.decode(errors="replace").splitlines()
    events = (sse({}, "reset") if is_new else "") + "".join(map(sse, shown))
    return events, LogPosition(offset + cut, inode), is_full


async def follow(jobs: Jobs, job_id: str, path: Path) -> AsyncIterator[str]:
    """Stream the complete lines of a growing file until the job ends. A replaced file is read from its start.

    Waits while the database or the disk does not answer. Ends with an `error` event if the job was deleted.
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
            yield error_event(error)
            return
        except (StoreError, OSError):
            await asyncio.sleep(FOLLOW_S)
            continue
        if job.state in ENDED:
            yield sse({"state": job.state}, "end")
            return
        await asyncio.sleep(FOLLOW_S)
