"""Lists and opens the files of a source: local paths, globs and fsspec URLs (hf://, s3://, gs://, https://, ...)."""

from __future__ import annotations

import glob
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import fsspec
import httpx2
from fsspec.registry import known_implementations
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hildanext.errors import DataError, UnreachableError, UsageError
from hildanext.progress import say

PIECE_BYTES = 1 << 18
# Retries of an interrupted read, after 1, 2, 4 ... seconds.
RETRIES = 5
FIRST_WAIT_S = 1.0
TABLES = (".parquet", ".arrow", ".feather", ".ipc")  # read by `tables`
# Exceptions of fsspec's backends that are not OSErrors, by module. They share no base class.
FOREIGN_ERRORS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
}


class File(NamedTuple):
    """A file of a source: its path or URL, and its size in bytes (0 if the server does not report it)."""

    path: str
    size: int


def is_url(path: str) -> bool:
    """Whether a path is opened through fsspec."""
    return "://" in path


def file_name(path: str) -> str:
    """The last part of a path or URL."""
    return PurePosixPath(path.partition("?")[0]).name if is_url(path) else Path(path).name


def is_table(path: str) -> bool:
    """Whether a path or URL names a parquet or Arrow file."""
    return file_name(path).endswith(TABLES)


def list_files(path: str, suffixes: tuple[str, ...], without: str | None = None) -> list[File]:
    """The files at `path` that end in one of `suffixes`, sorted. `path` is a file, a folder, a glob or a URL of these.

    Folders are searched recursively. Hidden names and folders named `without` are ignored. Raises UsageError for a path
    that does not exist or a file with another suffix, DataError for a folder without matching files, and
    UnreachableError for a URL that cannot be reached.
    """
    single, listed = _at_url(path) if is_url(path) else _at_path(path)
    if single is not None:
        if not file_name(path).endswith(suffixes):
            raise UsageError(f"data.sources: '{path}' is not one of {', '.join(suffixes)}")
        return [single]
    kept = []
    for below, file in listed:
        *folders, name = below.replace(os.sep, "/").split("/")
        hidden = any(part.startswith(".") for part in (*folders, name))
        if name.endswith(suffixes) and not hidden and without not in folders:
            kept.append(file)
    if not kept:
        raise DataError(f"{path}: no files that end in {', '.join(suffixes)}")
    return sorted(kept)


# The file that a path names, or else (path relative to the named folder, file) of every file in the folder or glob.
Listing = tuple[File | None, list[tuple[str, File]]]


def _is_glob(path: str) -> bool:
    """Whether a path or URL has wildcards. A '?' in a web address begins its query."""
    return glob.has_magic(path.partition("?")[0] if path.startswith(("http://", "https://")) else path)


def _fixed_folder(path: str) -> str:
    """The folder of a glob, up to its first wildcard."""
    return re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0] if _is_glob(path) else path


def _at_path(path: str) -> Listing:
    root = Path(path)
    sys.audit("hildanext.path", _fixed_folder(path) or ".")
    if root.is_file():
        return File(path, root.stat().st_size), []
    if root.is_dir():
        names = [os.path.join(folder, name) for folder, _, files in os.walk(root) for name in files]
        top: str | Path = root
    elif glob.has_magic(path):
        names = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
        top = _fixed_folder(path) or "."
    else:
        raise UsageError(f"data.sources: path '{path}' does not exist")
    for name in names:
        sys.audit("hildanext.path", name)
    return None, [(os.path.relpath(name, top), File(name, os.path.getsize(name))) for name in names]


def _at_url(url: str) -> Listing:
    sys.audit("hildanext.url", url)
    try:
        system, root = filesystem(url)
        if _is_glob(url):
            listed = system.glob(root, detail=True)
        else:
            info = system.info(root)
            # fsspec reports the folders of a web server as files.
            if info["type"] == "file" and not url.endswith("/"):
                return File(url, info.get("size") or 0), []
            listed = system.find(root, detail=True)
    except FileNotFoundError as error:
        # fsspec's HTTP backend raises this for every failure, with the actual error as its cause.
        cause = "" if error.__cause__ is None else f" ({reason(error.__cause__)})"
        raise UsageError(f"data.sources: path '{url}' does not exist{cause}") from None
    except network_errors() as error:
        raise UnreachableError(f"{url}: cannot be reached ({reason(error)})") from None
    except ValueError as error:  # a malformed pattern or address
        raise UsageError(f"data.sources: path '{url}': {reason(error)}") from None
    top = _fixed_folder(root)
    return None, [
        (name.removeprefix(top).lstrip("/"), File(str(system.unstrip_protocol(name)), info.get("size") or 0))
        for name, info in listed.items()
        if info["type"] == "file"
    ]


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises UsageError for a missing package or a bad protocol."""
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        hint = reason(error) if package == "fsspec" else f"pip install {package}"
        raise UsageError(f"data.sources: '{url}' needs a package that is not installed: {hint}") from None
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise UsageError(f"data.sources: '{url}': fsspec does not support the protocol '{protocol}'") from None
        raise


def network_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that listing and reading a URL can raise."""
    foreign = [
        getattr(sys.modules[module], name)
        for module, names in FOREIGN_ERRORS.items()
        if module in sys.modules
        for name in names
    ]
    return (OSError, httpx2.HTTPError, HfHubHTTPError, OfflineModeIsEnabled, *foreign)


def reason(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def file_exists(path: str) -> bool:
    """Whether a local path or a URL is a file."""
    if not is_url(path):
        return os.path.isfile(path)
    system, root = filesystem(path)
    try:
        return bool(system.isfile(root))
    except network_errors() as error:
        raise UnreachableError(f"{path}: cannot be reached ({reason(error)})") from None


def open_file(path: str | Path) -> IO[bytes]:
    """Open a local path or a URL for reading bytes anywhere in it. Raises OSError, or UnreachableError for a URL."""
    if not is_url(str(path)):
        sys.audit("hildanext.path", path)
        return open(path, "rb")
    return cast(IO[bytes], UrlFile(str(path)))


class UrlFile(io.RawIOBase):
    """A URL as a file in which one can seek. Interrupted reads are repeated, as `read_bytes` does."""

    def __init__(self, url: str) -> None:
        self.url, (self.system, self.root) = url, filesystem(url)
        self.at, self.file = 0, cast(Any, None)
        try:
            self.size: int = self._opened().seek(0, os.SEEK_END)
        except network_errors() as error:
            raise UnreachableError(f"{url}: cannot be opened ({reason(error)})") from None
        except ValueError:
            raise self._is_whole() from None

    def _opened(self) -> Any:
        if self.file is None:
            self.file = self.system.open(self.root, "rb")
        return self.file

    def _is_whole(self) -> UnreachableError:
        return UnreachableError(f"{self.url}: the server sends only whole files; download it and give its local path")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        """All bytes asked for, unless the file ends. Raises UnreachableError after RETRIES failures in a row."""
        failures = 0
        while True:
            try:
                self._opened().seek(self.at)
                data = bytes(self._opened().read(size))
            except network_errors() as error:
                failures, self.file = failures + 1, None
                wait_to_retry(self.url, self.at, failures, error)
            except ValueError:
                raise self._is_whole() from None
            else:
                self.at += len(data)
                return data

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()


def read_bytes(path: str | Path) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces. Interrupted reads of a URL resume from the last byte.

    Raises OSError for a local file. For a URL raises UnreachableError naming the byte after RETRIES failures in a row.
    """
    if not is_url(str(path)):
        sys.audit("hildanext.path", path)
        with open(path, "rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
        return
    system, root = filesystem(str(path))
    offset = failures = 0
    while True:
        try:
            with system.open(root, "rb") as file:
                _skip(file, offset)
                while piece := file.read(PIECE_BYTES):
                    yield piece
                    offset += len(piece)
                    failures = 0
                return
        except FileNotFoundError:
            raise UnreachableError(f"{path}: no such file") from None
        except network_errors() as error:
            failures += 1
            wait_to_retry(path, offset, failures, error)


def wait_to_retry(path: str | Path, offset: int, failures: int, error: BaseException) -> None:
    """Report a lost connection and wait. Raises UnreachableError after RETRIES failures in a row."""
    if failures > RETRIES:
        raise UnreachableError(f"{path}: cannot be read past byte {offset} ({reason(error)})") from None
    say(f"{path}: connection lost at byte {offset} ({reason(error)}); retrying")
    time.sleep(FIRST_WAIT_S * 2 ** (failures - 1))


def _skip(file: IO[bytes], offset: int) -> None:
    """Move to a byte offset; read up to it if the server cannot seek."""
    if file.seekable():
        file.seek(offset)
    while not file.seekable() and offset > 0:
        offset -= len(file.read(min(PIECE_BYTES, offset))) or offset
