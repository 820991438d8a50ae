"""Write files atomically: to a temporary name first, then fsync and rename. A crash never leaves a partial file."""

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
    """Make a folder's entries (a rename, a new file) durable. On Windows, which cannot open folders, do nothing."""
    with contextlib.suppress(PermissionError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make a folder and everything in it durable, subfolders included."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing weights or a tokenizer (full disk, no permission) into a WriteError that names `path`."""
    try:
        yield
    except BaseException as error:
        # On a full disk, safetensors raises its own exception and tokenizers a bare Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise WriteError(f"{path}: cannot be written: {reason}; free some space or choose another folder") from None
        raise


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing, with mode "w" (UTF-8 text) or "wb". The file is replaced when the block ends.

    Until then the data is in `.NAME.tmp` in the same folder. On an exception that file is removed and an existing file
    at `path` is left untouched.
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
    """A temporary folder `.NAME.tmp` in `data`, on the file system of the outputs. It is removed when the block ends.

    The folder of an earlier, killed run is removed first.
    """
    folder = data / f".{name}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` at the end of the block, or removed if the block fails.

    Raises WriteError if it cannot be written, for example because the disk is full.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(out):
            temporary.mkdir(parents=True)
            yield temporary
            fsync_tree(temporary)
            os.replace(temporary, out)
            fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_together(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename each (new, final) file or folder to its final name: all or none.

    Existing files are kept as `.NAME.old` until every rename is done, and are restored if a rename fails. The two
    paths of a pair must be on one file system. Raises the OSError of the failed rename.
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
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # Python 3.10 has no hashlib.file_digest
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
