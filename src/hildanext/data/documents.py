"""Documents: the records of a source, and their JSON lines in data/processed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hildanext.data.conversations import Message, check_messages
from hildanext.errors import DataError

EXAMPLES_PER_REASON = 3
MAX_REASONS = 100  # the messages of chat templates may quote the record
# Deeper records are rejected: chat templates, JSON writers and pipes between processes follow a value recursively.
MAX_DEPTH = 64
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


@dataclass(frozen=True)
class Document:
    """One document: exactly one of `text`, `input_ids` (token ids of the source) and `messages` is set.

    A message has `role` and `content`; an assistant message may have `tool_calls`, and `"train": false` if it must not
    be supervised. `tools` are the function descriptions for `messages`. The first `n_prompt` of `input_ids` are the
    prompt of an answer, which SFT does not supervise; `asked` is the question in that prompt as text.
    """

    id: str
    source: str
    text: str | None = None
    input_ids: list[int] | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    n_prompt: int | None = None
    asked: str | None = None

    @property
    def size(self) -> int:
        """Bytes of its text, or of message contents with their reasoning, in UTF-8; 4 bytes per token id."""
        if self.input_ids is not None:
            return 4 * len(self.input_ids)
        texts = [self.text]
        if self.messages is not None:
            texts = [
                text for message in self.messages for text in (message["content"], message.get("reasoning_content"))
            ]
        return sum(len(str(text).encode("utf-8", "surrogatepass")) for text in texts if text is not None)

    def to_line(self) -> bytes:
        """The document as a line of JSON in UTF-8, including the newline."""
        fields = {name: value for name, value in self.__dict__.items() if value is not None}
        # Only ids made from file names can contain invalid UTF-8.
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class Rejects:
    """Counts of rejected records by reason and by file, with the first few places of each reason.

    `ignored` counts the accepted records with a key that no format uses, by key. Records of the current file up to number `after` are not counted: a resumed reader reads them a second time.
    """

    def __init__(self) -> None:
        self.after = 0
        self.by_reason: Counter[str] = Counter()
        self.by_file: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.ignored: Counter[str] = Counter()

    def add(self, reason: str, file: str | Path, line: int, count: int = 1) -> None:
        """Count `count` records from `line` on: the line number from 1, or the record number in files without lines."""
        if line <= self.after:
            return
        if reason not in self.by_reason and len(self.by_reason) == MAX_REASONS:
            reason = "other reasons"
        self.by_reason[reason] += count
        self.by_file[str(file)] += count
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(f"{file}:{line}")

    def ignore(self, keys: Iterable[str], line: int) -> None:
        """Count the unused keys of the accepted record at `line`."""
        if line > self.after:
            self.ignored.update(keys)

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Add the counts of another `to_dict`."""
        self.ignored.update(counts.get("ignored_keys", {}))
        self.by_reason.update(counts["by_reason"])
        self.by_file.update(counts["by_file"])
        for reason, places in counts["examples"].items():
            self.examples[reason] = [*self.examples.get(reason, []), *places][:EXAMPLES_PER_REASON]

    @property
    def total(self) -> int:
        return self.by_reason.total()

    def check(self, accepted: int, max_share: float) -> None:
        """Raises DataError with the counts when rejects are more than `max_share` of all records."""
        records = accepted + self.total
        if self.total > max_share * records:
            raise DataError(
                f"{self.total} of {records} records rejected ({self.total / records:.1%}), above data.max_reject_share "
                f"{max_share:g}: {self}; repair the files or raise data.max_reject_share"
            )

    def __str__(self) -> str:
        return ", ".join(
            f"{reason} x{count} ({', '.join(self.examples[reason])}{', ...' if count > EXAMPLES_PER_REASON else ''})"
            for reason, count in self.by_reason.most_common()
        )

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON values, for a manifest."""
        return {
            "total": self.total,
            "by_reason": dict(self.by_reason),
            "by_file": dict(self.by_file),
            "examples": {reason: list(places) for reason, places in self.examples.items()},
            "ignored_keys": dict(self.ignored),
        }


def parse_json(line: bytes) -> dict[str, Any]:
    """Parse a line of bytes as a JSON object. Raises DataError; its reason quotes no values, so it can be counted."""
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise DataError("invalid UTF-8") from None
    except RecursionError:
        raise DataError(TOO_DEEP) from None
    except ValueError:
        raise DataError("broken JSON") from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        check_depth(value)
    if rb"\ud" in line or rb"\uD" in line:
        check_unicode(value)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`. Raises DataError for a key that occurs twice, of which JSON readers keep the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise DataError("a key occurs twice in an object")
    return made


def check_depth(value: object) -> None:
    """Raises DataError for a JSON value of more than MAX_DEPTH nested lists and objects."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise DataError(TOO_DEEP)


def check_unicode(value: object) -> None:
    """Raises DataError for a lone surrogate in a JSON value: JSON can escape it, but UTF-8 cannot encode it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("invalid UTF-8 (a lone surrogate)") from None


def check_text(value: object) -> str:
    """Return a document's text unchanged. Raises DataError when it is not a string, empty or only white space."""
    if not isinstance(value, str):
        raise DataError("no 'text'")
    if not value or value.isspace():
        raise DataError("empty document")
    return value


def check_ids(value: object) -> list[int]:
    """Return token ids unchanged: a non-empty list of integers from 0 to 2^31-1. Raises DataError otherwise."""
    if not isinstance(value, list):
        raise DataError("no 'input_ids'")
    if not value:
        raise DataError("empty document")
    # Comparing types also rejects booleans and floats, which numpy would convert.
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**31:
        raise DataError("'input_ids' are not token ids")
    return value


def parse_document(line: bytes) -> Document:
    """Parse a line of a processed file. Raises DataError with the reason."""
    record = parse_json(line)
    kinds = [kind for kind in ("text", "input_ids", "messages") if record.get(kind) is not None]
    if len(kinds) != 1:
        raise DataError("not exactly one of 'text', 'input_ids', 'messages'")
    name, source = str(record.get("id", "")), str(record.get("source", ""))
    if kinds == ["input_ids"]:
        rest = {key: record.get(key) for key in ("n_prompt", "asked")}
        return Document(name, source, input_ids=check_ids(record["input_ids"]), **rest)
    if kinds == ["text"]:
        return Document(name, source, text=check_text(record["text"]))
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("'tools' is not a list of objects")
    return Document(name, source, messages=check_messages(record["messages"]), tools=tools)


def read_documents(path: str | Path, rejects: Rejects | None = None) -> Iterator[Document]:
    """Documents of a processed JSONL file, in order.

    Bad lines are counted in `rejects` and skipped. Without `rejects`, a bad line raises DataError naming file and line.
    """
    return (document for _, document in numbered_documents(path, rejects))


def numbered_documents(path: str | Path, rejects: Rejects | None = None) -> Iterator[tuple[int, Document]]:
    """`read_documents` with line numbers. Lines up to number `rejects.after` are skipped without parsing."""
    after = 0 if rejects is None else rejects.after
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number <= after or line.isspace():
                continue
            try:
                document = parse_document(line)
            except DataError as error:
                if rejects is None:
                    raise DataError(f"{path}:{number}: {error}") from None
                rejects.add(str(error), path, number)
                continue
            yield number, document
