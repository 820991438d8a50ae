"""Documents: what a source yields, what a line of data/processed holds, and what the tokenizer makes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.data.conversations import Message, check_messages
from hildanext.errors import DataError

if TYPE_CHECKING:
    pass

EXAMPLES_PER_REASON = 3


@dataclass(frozen=True)
class Document:
    """One document: exactly one of `text`, `input_ids` (token ids of the source) and `messages` is set.

    A message is `{"role", "content"}`, an assistant's also `tool_calls`, and `"train": false` where it must not be
    supervised. `tools` are the function descriptions that go with `messages`. `n_prompt`: how many of `input_ids` are
    the prompt of an answer, which SFT does not supervise; `asked`: that prompt's question as text.
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
        """Bytes of its text in UTF-8, whatever else stands around it; a token id counts as 4."""
        if self.input_ids is not None:
            return 4 * len(self.input_ids)
        texts = [self.text] if self.messages is None else [message["content"] for message in self.messages]
        return sum(len(str(text).encode("utf-8", "surrogatepass")) for text in texts)

    def to_line(self) -> bytes:
        """The document as a line of JSON in UTF-8, newline included."""
        fields = {name: value for name, value in self.__dict__.items() if value is not None}
        # Only an id made from a file name that is no UTF-8 has anything to replace.
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class Rejects:
    """Counts of records that could not be used, by reason and by file, with the first few places of each reason.

    `after`: records of the file being read up to this number were counted before; a resumed reader meets them again.
    """

    def __init__(self) -> None:
        self.after = 0
        self.by_reason: Counter[str] = Counter()
        self.by_file: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, file: str | Path, line: int) -> None:
        """Count one record. `line` counts from 1: the line, or the record where a file has no lines."""
        if line <= self.after:
            return
        self.by_reason[reason] += 1
        self.by_file[str(file)] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(f"{file}:{line}")

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Add what another one's `to_dict` holds."""
        self.by_reason.update(counts["by_reason"])
        self.by_file.update(counts["by_file"])
        for reason, places in counts["examples"].items():
            self.examples[reason] = [*self.examples.get(reason, []), *places][:EXAMPLES_PER_REASON]

    @property
    def total(self) -> int:
        return self.by_reason.total()

    def check(self, accepted: int, max_share: float) -> None:
        """Raises DataError with the counts when the rejected share of all records is above `max_share`."""
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
        """JSON-able counts for a manifest."""
        return {
            "total": self.total,
            "by_reason": dict(self.by_reason),
            "by_file": dict(self.by_file),
            "examples": {reason: list(places) for reason, places in self.examples.items()},
        }


def parse_json(line: bytes) -> dict[str, Any]:
    """One JSON object from a line of bytes. Raises DataError with a reason that names no value."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise DataError("broken JSON") from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object")
    if rb"\ud" in line or rb"\uD" in line:
        check_unicode(value)
    return value


def check_unicode(value: object) -> None:
    """Raises DataError for a lone surrogate anywhere in a JSON value: JSON can escape one, UTF-8 and tokenizers cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("invalid UTF-8 (a lone surrogate)") from None


def check_text(value: object) -> str:
    """A document's text as it stands. Raises DataError when it is not a string or only white space."""
    if not isinstance(value, str):
        raise DataError("no 'text'")
    if not value or value.isspace():
        raise DataError("empty document")
    return value


def check_ids(value: object) -> list[int]:
    """Token ids: a non-empty list of integers from 0 to 2^31-1. Raises DataError otherwise."""
    if not isinstance(value, list):
        raise DataError("no 'input_ids'")
    if not value:
        raise DataError("empty document")
    # A list that holds anything but plain integers fails the type test, whatever numpy would make of it.
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**31:
        raise DataError("'input_ids' are not token ids")
    return value


def parse_document(line: bytes) -> Document:
    """A document from a line of a processed file. Raises DataError with the reason."""
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
    return Document(name, source, messages=check_messages(record["messages"]), tools=record.get("tools"))


def read_documents(path: str | Path, rejects: Rejects | None = None) -> Iterator[Document]:
    """Documents of a processed JSONL file, in order.

    A bad line is counted in `rejects` by file and line and skipped; without `rejects` it raises DataError that names both.
    """
    return (document for _, document in numbered_documents(path, rejects))


def numbered_documents(path: str | Path, rejects: Rejects | None = None) -> Iterator[tuple[int, Document]]:
    """`read_documents` with each document's line; lines up to number `rejects.after` are passed over unread."""
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
