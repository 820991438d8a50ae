"""What the base model wrote (`hildanext.model.self_answers`): token ids of a prompt and its answer, a line each."""

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

ASKED = ("max_documents", "max_new_tokens", "temperature", "batch")  # what answers depend on, beside the prompts


def written_file(data: str, source: SourceConfig) -> Path:
    """Where the answers to a source's prompts are kept: a file for each way to ask them."""
    assert source.path is not None
    asked = json.dumps([source.path, *(getattr(source, key) for key in ASKED)])
    digest = hashlib.blake2b(asked.encode(), digest_size=4).hexdigest()
    return Path(data) / "self" / f"{Path(source.path).stem}-{digest}.jsonl"


def find(path: Path) -> list[File]:
    """The file of answers. Raises DataError when it is not there yet."""
    if not path.is_file():
        raise DataError(f"{path}: not written yet; run 'hildanext prepare-data' first")
    return [File(str(path), path.stat().st_size)]


def read(path: str, cut_repeats: int | None, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """(line, document) of a file, answers cut where they repeat themselves; lines of those that stood there before hold none."""
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
    """How many tokens come before the first run of `n` that stood there before; all of them for None."""
    if n is None:
        return len(ids)
    seen: set[tuple[int, ...]] = set()
    for start in range(len(ids) - n + 1):
        run = tuple(ids[start : start + n])
        if run in seen:
            return start
        seen.add(run)
    return len(ids)
