"""Documents: what a source yields, what a line of data/processed holds, and what the tokenizer makes of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hildanext.data.conversations import Message, check_messages, encode_conversations
from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class Encoded(NamedTuple):
    """A document's tokens. `input_ids` [n] int32, `loss_mask` [n] bool (tokens that may be noised and supervised)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-text id. Raises DataError for a tokenizer that has none, or that is not a fast one."""
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' is not a fast tokenizer; use one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' has no end-of-text token; set its eos_token")
    return int(tokenizer.eos_token_id)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what turns ordinary text into ids: normalizer, pre-tokenizer, model, end-of-text and padding ids.

    Added tokens stay out, so that a tokenizer that gained a mask token is still the one that wrote the rows. A missing
    padding token counts as the end-of-text token, which stands in for it.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: parts[key] for key in ("normalizer", "pre_tokenizer", "model")}
    kept["ids"] = [eos_id(tokenizer), pad_id(tokenizer)]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows: the padding token, or the end-of-text token where there is none."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer itself puts before a text: Llama's and Gemma's begin-of-text token; most newer ones none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def encode_document(doc: Document, tokenizer: PreTrainedTokenizerBase, all_tokens: bool = False) -> Encoded:
    """`input_ids` [n] int32 and `loss_mask` [n] bool of one document; see `encode_documents`. Raises DataError."""
    (result,) = encode_documents([doc], tokenizer, all_tokens)
    if isinstance(result, DataError):
        raise DataError(f"document '{doc.id}' of '{doc.source}': {result}")
    return result


def encode_documents(
    docs: Sequence[Document], tokenizer: PreTrainedTokenizerBase, all_tokens: bool = False
) -> list[Encoded | DataError]:
    """Tokens of each document, in order; a document that cannot be encoded gives a DataError with the reason instead.

    Text is encoded as text, whatever it looks like (a literal '<|endoftext|>' inside it is no special token), and gets
    the tokenizer's begin-of-text token, if it writes one, and one end-of-text token at its end. Token ids are taken as they are and must lie below the tokenizer's length.
    Messages are rendered with the chat template; their loss mask covers the assistant's turns, or every token with
    `all_tokens`. The mask token is allowed in none of them. Raises DataError for an unfit tokenizer.
    """
    eos, leading = eos_id(tokenizer), leading_ids(tokenizer)
    results: list[Encoded | DataError] = [DataError("empty document")] * len(docs)
    for index, ids in _encode_texts(docs, tokenizer):
        if ids:
            results[index] = _all_supervised([*leading, *ids, eos], len(leading))
    for index, doc in enumerate(docs):
        if doc.input_ids is not None:
            results[index] = _checked_ids(doc.input_ids, len(tokenizer), 0 if all_tokens else doc.n_prompt or 0)
    chats = [index for index, doc in enumerate(docs) if doc.messages is not None]
    conversations = [(docs[index].messages or [], docs[index].tools) for index in chats]
    for index, encoded in zip(chats, encode_conversations(conversations, tokenizer, eos), strict=True):
        results[index] = encoded if isinstance(encoded, DataError) else _conversation(*encoded, all_tokens)
    mask = tokenizer.mask_token_id
    if mask is not None:
        for index, result in enumerate(results):
            if isinstance(result, Encoded) and (result.input_ids == mask).any():
                results[index] = DataError("contains the mask token")
    return results


def _encode_texts(docs: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, list[int]]]:
    """(index, ids) of the documents that are text, without an end-of-text token."""
    indices = [index for index, doc in enumerate(docs) if doc.text is not None]
    backend = tokenizer.backend_tokenizer
    # transformers sets all three again before each call of its own.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch_fast([docs[index].text for index in indices], add_special_tokens=False)
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    for index, encoding in zip(indices, encodings, strict=True):
        yield index, encoding.ids


def _all_supervised(ids: list[int], n_given: int = 0) -> Encoded:
    """All tokens but the first `n_given`, which no model has to predict."""
    array = np.array(ids, dtype=np.int32)
    return Encoded(array, np.arange(len(array)) >= n_given)


def _checked_ids(ids: list[int], vocabulary: int, n_given: int) -> Encoded | DataError:
    if min(ids) < 0 or max(ids) >= vocabulary:
        return DataError("token ids outside the tokenizer's vocabulary")
    return _all_supervised(ids, n_given) if n_given < len(ids) else DataError("no supervised turn")


def _conversation(ids: np.ndarray, mask: np.ndarray, all_tokens: bool) -> Encoded | DataError:
    if all_tokens:
        return Encoded(ids, np.ones_like(mask))
    return Encoded(ids, mask) if mask.any() else DataError("no supervised turn")


def fill_block(encoded: Encoded, block_size: int, limit: int, eos: int) -> Encoded:
    """Round the length up to whole blocks with supervised end-of-text tokens, so that a model learns to stop.

    The fill never carries a document past `limit` tokens (the row), where it would be cut. A document that does not end
    with end-of-text was cut off itself and stays as it is.
    """
    if encoded.input_ids[-1] != eos:
        return encoded
    n = len(encoded.input_ids)
    missing = min(-n % block_size, max(limit - n, 0))
    return Encoded(
        np.concatenate([encoded.input_ids, np.full(missing, eos, dtype=np.int32)]),
        np.concatenate([encoded.loss_mask, np.ones(missing, dtype=bool)]),
    )
