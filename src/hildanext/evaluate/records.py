"""Data files of the tasks: JSON-lines records with checked fields, and documents cut to a fixed length."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hildanext.config import Config
from hildanext.data.documents import read_documents
from hildanext.data.encode import encode_document
from hildanext.errors import DataError


def read_records(path: Path, fields: tuple[str, ...], limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` records of a .jsonl or .jsonl.gz file; every name in `fields` must hold a string.

    Raises DataError, naming file and line, if the file is missing, empty or has an invalid record.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        missing = [f for f in fields if not (isinstance(record, dict) and isinstance(record.get(f), str))]
        if missing:
            raise DataError(f"{path}:{number}: no text '{missing[0]}'; expected the fields {', '.join(fields)}")
        found.append(record)
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"{path}: no records in it")
    return found


LOCAL = {"local_gsm8k": ("question", "answer"), "local_multiple_choice": ("question",), "local_rolling": ("text",)}


def check_local(task: str, path: Path) -> None:
    """Check every record of a file for one of our lm-eval tasks (LOCAL): lm-eval scores a malformed record as wrong.

    Raises DataError, naming file and record.
    """
    for number, record in enumerate(read_records(path, LOCAL[task], None), start=1):
        if task != "local_multiple_choice":
            continue
        choices, answer = record.get("choices"), record.get("answer")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"{path}: record {number}: 'choices' is not a list of two texts or more")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise DataError(f"{path}: record {number}: 'answer' is {answer!r}, not the index of a choice (from 0)")


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        # 'utf-8-sig' drops the byte order mark of files that Windows saved.
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def text_path(config: Config, task: str) -> Path:
    """Path of a text task's documents: the configured file, else the held-out split. Raises DataError if missing."""
    given = config.evaluate.data.get(task)
    path = Path(given) if given else Path(config.paths.data) / "processed" / "eval.jsonl"
    if not path.is_file():
        hint = "" if given else f"; give --data {task}=FILE, or run 'hildanext prepare-data'"
        raise DataError(f"{path}: no documents for the task '{task}'{hint}")
    return path


def token_pieces(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None) -> list[list[int]]:
    """The first `length` tokens of each document with at least that many, up to `limit` documents.

    End-of-text tokens do not count. Raises DataError if no document is long enough.
    """
    found: list[list[int]] = []
    for document in read_documents(path):
        ids: np.ndarray = encode_document(document, tokenizer, all_tokens=True).input_ids[:-1]
        if len(ids) >= length:
            found.append(ids[:length].tolist())
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"{path}: no document has {length} tokens or more")
    return found
