"""TinyStories: stories from text, JSON lines or parquet, from the hub, or made up here (`hildanext.synthetic`)."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from hildanext.documents import Document, Rejects, check_text
from hildanext.errors import DataError
from hildanext.sources.lines import list_files, read_json_lines, read_records
from hildanext.synthetic import synthetic_stories

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SEPARATOR = b"<|endoftext|>"
HUB = "roneneldan/TinyStories"


def find(path: str) -> list[Path]:
    """The story files at `path`; 'hub' downloads the training set's parquet files (about 1 GB) or finds them cached."""
    return list_files(_download() if path == "hub" else path, SUFFIXES)


def _download() -> str:
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(HUB, repo_type="dataset", allow_patterns="data/train-*.parquet")
    except (OSError, HfHubHTTPError, httpx2.HTTPError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"cannot download {HUB} ({reason}); go online, or give a local file as data.sources path"
        ) from None


def made_up(count: int, seed: int) -> Iterator[Document]:
    """`count` synthetic stories, the same for the same seed."""
    for number, story in enumerate(synthetic_stories(count, seed), start=1):
        yield Document(id=f"synthetic-{seed}-{number}", source="synthetic", text=story)


def read(path: Path, rejects: Rejects) -> Iterator[Document]:
    """The stories of one file. A story's id is the file's name and its line (parquet: its row)."""
    if path.suffix == ".txt":
        stories = _from_text(path, rejects)
    elif path.suffix == ".parquet":
        stories = _from_parquet(path, rejects)
    else:
        stories = ((number, record.get("text")) for number, record in read_json_lines(path, rejects))
    for number, story in stories:
        try:
            text = check_text(story)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        yield Document(id=f"{path.name}:{number}", source="tinystories", text=text)


def _from_text(path: Path, rejects: Rejects) -> Iterator[tuple[int, object]]:
    """(first line, story) of a text file: between '<|endoftext|>' marks, or between blank lines where it has none."""
    raw = _between_marks(path, rejects) if _has_marks(path) else _between_blank_lines(path, rejects)
    for number, story in raw:
        try:
            yield number, story.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            rejects.add("invalid UTF-8", path, number)


def _has_marks(path: Path) -> bool:
    if path.stat().st_size == 0:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(SEPARATOR) >= 0


def _between_marks(path: Path, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    line = 1
    for _, story in read_records(path, SEPARATOR, rejects):
        begin = len(story) - len(story.lstrip())
        # A mark at the start or the end of the file leaves an empty piece, which is no story.
        if begin < len(story):
            yield line + story.count(b"\n", 0, begin), story
        line += story.count(b"\n")


def _between_blank_lines(path: Path, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    story: list[bytes] = []
    number = 0
    for number, line in read_records(path, b"\n", rejects):
        if line and not line.isspace():
            story.append(line.rstrip(b"\r"))
        elif story:
            yield number - len(story), b"\n".join(story)
            story = []
    if story:
        yield number + 1 - len(story), b"\n".join(story)


def _from_parquet(path: Path, rejects: Rejects) -> Iterator[tuple[int, object]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                rejects.add("no column 'text'", path, 1)
                return
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for story in batch.column("text").to_pylist():
                    number += 1
                    yield number, story
    except pyarrow.ArrowException:
        rejects.add("damaged parquet file", path, number + 1)
    except UnicodeDecodeError:
        rejects.add("invalid UTF-8", path, number + 1)
