"""TinyStories: stories from text, JSON lines or parquet files, from the hub, or synthetic stories."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from hildanext.data.documents import Document, Rejects, check_text
from hildanext.data.sources.lines import lost_records, read_json_lines, read_records
from hildanext.data.sources.opening import File, file_name, list_files, network_errors, open_file, read_bytes, reason
from hildanext.data.synthetic import synthetic_stories
from hildanext.errors import DataError, UnreachableError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SEPARATOR = b"<|endoftext|>"
HUB = "roneneldan/TinyStories"


def find(path: str) -> list[File]:
    """The story files at `path`. 'hub' downloads the parquet files of the training set (about 1 GB) unless cached."""
    return list_files(_download() if path == "hub" else path, SUFFIXES)


def _download() -> str:
    from huggingface_hub import snapshot_download

    sys.audit("hildanext.url", "hub")
    try:
        return snapshot_download(HUB, repo_type="dataset", allow_patterns="data/train-*.parquet")
    except network_errors() as error:
        raise UnreachableError(
            f"cannot download {HUB} ({reason(error)}); go online, or set the path in data.sources to a local file"
        ) from None


def read_synthetic(count: int, seed: int) -> Iterator[tuple[int, Document]]:
    """Yield (number, story) for `count` synthetic stories, which depend only on the seed."""
    for number, story in enumerate(synthetic_stories(count, seed), start=1):
        yield number, Document(id=f"synthetic-{seed}-{number}", source="synthetic", text=story)


def read(path: str, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (number, story) from one file. A story's id is the file name and its line (parquet: its row)."""
    name = file_name(path)
    if name.endswith(".txt"):
        stories = _from_text(path, rejects)
    elif name.endswith(".parquet"):
        stories = _from_parquet(path, rejects)
    else:
        stories = ((number, record.get("text")) for number, record in read_json_lines(path, rejects))
    last = 0
    for number, story in stories:
        try:
            text = check_text(story)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        last = max(last + 1, number)  # numbers increase even if stories share a line
        yield last, Document(id=f"{name}:{number}", source="tinystories", text=text)


def _from_text(path: str, rejects: Rejects) -> Iterator[tuple[int, object]]:
    """Yield (first line, story) from a text file, split at '<|endoftext|>' or, in a file without it, at blank lines."""
    raw = _between_marks(path, rejects) if _has_marks(path) else _between_blank_lines(path, rejects)
    for number, story in raw:
        try:
            yield number, story.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            rejects.add("invalid UTF-8", path, number)


def _has_marks(path: str) -> bool:
    tail = b""
    for piece in read_bytes(path):
        tail += piece
        if SEPARATOR in tail:
            return True
        tail = tail[-len(SEPARATOR) :]
    return False


def _between_marks(path: str, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    line = 1
    for _, story in read_records(path, SEPARATOR, rejects):
        begin = len(story) - len(story.lstrip())
        # A mark at the start or end of the file gives an empty piece, which is skipped.
        if begin < len(story):
            yield line + story.count(b"\n", 0, begin), story
        line += story.count(b"\n")


def _between_blank_lines(path: str, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
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


def _from_parquet(path: str, rejects: Rejects) -> Iterator[tuple[int, object]]:
    """Yield (row, value of 'text') from a parquet file. A damaged row group costs its rows, a bad value its own row."""
    import pyarrow
    from pyarrow import parquet

    with open_file(path) as opened:
        try:
            file = parquet.ParquetFile(opened)
        except (pyarrow.ArrowException, OSError) as error:
            _check_is_damage(error)
            rejects.add("damaged parquet file", path, 1, lost_records(0, 0, opened.seek(0, 2)))
            return
        columns = file.schema_arrow.names.count("text")
        if columns != 1:
            reason = "several columns 'text'" if columns else "no column 'text'"
            rejects.add(reason, path, 1, max(1, file.metadata.num_rows))
            return
        number = end = 0
        for group in range(file.num_row_groups):
            end += file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=["text"]):
                    for value in batch.column("text"):
                        number += 1
                        try:
                            story = value.as_py()
                            yield number, story.decode() if isinstance(story, bytes) else story
                        except UnicodeDecodeError:
                            rejects.add("invalid UTF-8", path, number)
            except (pyarrow.ArrowException, OSError) as error:
                _check_is_damage(error)
                rejects.add("damaged parquet file", path, number + 1, max(1, end - number))
            number = end


def _check_is_damage(error: Exception) -> None:
    """Raise `error` again if it comes from the system. Arrow raises OSError for damaged files too, without a number."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
