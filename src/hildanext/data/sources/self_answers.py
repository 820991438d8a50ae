"""Answers written by the base model (`hildanext.model.self_answers`): token ids of a prompt and its answer per line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from hildanext.config import SourceConfig
from hildanext.data.documents import Document, Rejects, check_ids
from hildanext.data.sources.lines import read_json_lines
from hildanext.data.sources.opening import File
from hildanext.errors import DataError

ASKED = ("max_documents", "max_new_tokens", "temperature", "batch")  # settings that change the answers


def written_file(data: str, source: SourceConfig) -> Path:
    """The file with the answers to the prompts of a source. Its name depends on the prompts' path and the settings."""
    assert source.path is not None
    asked = json.dumps([source.path, *(getattr(source, key) for key in ASKED)])
    digest = hashlib.blake2b(asked.encode(), digest_size=4).hexdigest()
    return Path(data) / "self" / f"{Path(source.path).stem}-{digest}.jsonl"


def find(path: Path) -> list[File]:
    """The file of answers. Raises DataError when it does not exist."""
    if not path.is_file():
        raise DataError(f"{path}: does not exist; run 'hildanext prepare-data' first")
    return [File(str(path), path.stat().st_size)]


def read(path: str, cut_repeats: int | None, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (line, document) from one file. Answers are cut where they repeat (see `until_repeat`).

    Lines without 'input_ids' (answers that duplicate an earlier answer) are skipped.
    """
    for number, record in read_json_lines(path, rejects):
        if "input_ids" not in record:
            continue
        try:
            ids, n_prompt = check_ids(record["input_ids"]), record.get("n_prompt")
            if type(n_prompt) is not int or not 0 < n_prompt < len(ids):
                raise DataError("no 'n_prompt'")
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        ids = ids[: n_prompt + until_repeat(ids[n_prompt:], cut_repeats)]
        asked = str(record["asked"]) if "asked" in record else None
        yield number, Document(str(record.get("id")), "self", input_ids=ids, n_prompt=n_prompt, asked=asked)


def until_repeat(ids: list[int], n: int | None) -> int:
    """Number of tokens before the first run of `n` tokens that occurred earlier; all tokens if `n` is None."""
    if n is None:
        return len(ids)
    seen: set[tuple[int, ...]] = set()
    for start in range(len(ids) - n + 1):
        run = tuple(ids[start : start + n])
        if run in seen:
            return start
        seen.add(run)
    return len(ids)
