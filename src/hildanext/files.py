"""Writing files so that a crash never leaves half a file where a good one stood: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from hildanext.errors import WriteError


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename, a new file) durable. A no-op where folders cannot be opened (Windows)."""
    with contextlib.suppress(PermissionError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make a folder with all it holds durable, folders within it included."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise WriteError, which names `path`, where weights or a tokenizer cannot be written: a full disk, no permission."""
    try:
        yield
    except BaseException as error:
        # safetensors has an exception of its own for a full disk, and tokenizers raises a bare Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise WriteError(f"{path}: cannot be written: {reason}; make room, or choose another folder") from None
        raise


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing ("w" text as UTF-8, "wb" bytes); it appears only when the block ends without an error.

    Until then the old file stays. The text goes to `.NAME.tmp` in the same folder, which is removed on failure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def workspace(data: Path, name: str) -> Iterator[Path]:
    """A temporary folder beside the outputs (same file system), removed at the end whatever happens.

    What a killed run left in it is removed first, so leftovers never pile up.
    """
    folder = data / f".{name}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a file or a folder with all it holds; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_together(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename each (new, final) file or folder to its final name: all of them, or none.

    What stood under the final names waits as `.NAME.old` until every rename is done, and comes back if one fails. The
    pairs must lie in one file system. Raises OSError of the rename that failed.
    """
    undo: list[tuple[Path, Path | None]] = []
    try:
        for new, final in moves:
            old = final.with_name(f".{final.name}.old")
            _remove(old)
            if final.exists():
                os.rename(final, old)
                undo.append((final, old))
            else:
                undo.append((final, None))
            os.replace(new, final)
    except BaseException:
        for final, saved in reversed(undo):
            _remove(final)
            if saved is not None:
                os.rename(saved, final)
        raise
    for final, saved in undo:
        if saved is not None:
            _remove(saved)
        fsync_folder(final.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_open(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:
    # Python 3.10 has no hashlib.file_digest.
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
