"""Files of documents, and what a source reads from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hildanext.config import SourceConfig
from hildanext.data.corpus import make_reader
from hildanext.data.documents import Document, Rejects
from hildanext.data.sources import find_files


def jsonl(records: Iterable[object]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(kind: str, path: Path | str, **more: Any) -> tuple[list[Document], Rejects]:
    """All documents of a source, and its rejects."""
    source = SourceConfig(kind=kind, path=str(path), **more)
    reader = make_reader(source, find_files(source, "data"), seed=0)
    return [doc for _, doc in iter(reader.next, None)], reader.rejects
