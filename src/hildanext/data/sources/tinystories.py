"""TinyStories: stories from text, JSON lines or parquet files, from the hub, or synthetic stories."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from hildanext.data.documents import Document, Rejects
from hildanext.data.sources import text
from hildanext.data.sources.opening import File, list_files, network_errors, reason
from hildanext.data.synthetic import synthetic_stories
from hildanext.errors import UnreachableError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
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
    return text.read(path, "text", rejects, source="tinystories")
