"""Renders messages with a tokenizer's chat template and encodes the text. Training and serving encode alike.

Text stays text: a special token that a message quotes is encoded as ordinary text. Only the special tokens that the
template writes become special tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates may ask for the current date. Training data get this date, so that a shard that is rebuilt on another day is
# the same.
TRAINING_DATE = datetime(2025, 1, 1)
# A template is a program. These are the exceptions of its expressions, filters and calls, beside Jinja's own.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


class Rendered(NamedTuple):
    """A rendered conversation. `quoted`: a position inside each special token that a message quotes, increasing."""

    text: str
    quoted: list[int]


class ChatTemplate:
    """The chat template of a tokenizer for one conversation.

    `messages` and `tools` are the conversation with a mark inside each special token that they quote. A template only
    copies the mark, so the quoted tokens can be told from those that the template writes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        date: datetime | None,
    ) -> None:
        self.tokenizer, self.date = tokenizer, date
        pattern = _special_pattern(tokenizer)
        self.mark = ""
        self.messages: list[dict[str, Any]] = list(messages)
        self.tools = tools
        if any(pattern.search(text) for text in _strings([self.messages, tools])):
            # Digits survive changes of case. No text contains the hash of itself.
            texts = "\0".join(_strings([self.messages, tools]))
            digest = hashlib.blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self.mark = f"{int.from_bytes(digest, 'big'):020d}"
            self.messages, self.tools = _marked([self.messages, tools], pattern, self.mark)

    def render(self, until: int | None = None, prompt: bool = False, continues: bool = False) -> Rendered:
        """Render the first `until` messages, all by default; with `prompt`, followed by the generation prompt.

        continues: end the text with the last message's content, so that it can be continued.

        Raises DataError when the template refuses the messages, whatever it raises, and when the tokenizer has several
        templates without a default.
        """
        import jinja2

        template = template_of(self.tokenizer, self.tools)
        if self.date is not None and "strftime_now" in template:
            template = _dated(template, self.date)
        options: dict[str, Any] = {"chat_template": template, "tools": self.tools, "tokenize": False}
        try:
            marked = str(
                self.tokenizer.apply_chat_template(
                    self.messages[:until],
                    add_generation_prompt=prompt,
                    continue_final_message=continues,
                    **options,
                )
            )
        except (jinja2.TemplateError, *FAILURES) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the chat template rejects the messages ({reason.replace(self.mark, '')})") from None
        if not self.mark:
            return Rendered(marked, [])
        pieces = marked.split(self.mark)
        ends = np.cumsum([len(piece) for piece in pieces[:-1]])
        return Rendered("".join(pieces), ends.tolist())


def template_of(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None) -> str:
    """The template for a conversation. Raises DataError when there are several without a default."""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template or {}))
        raise DataError(
            f"tokenizer '{tokenizer.name_or_path}' has several chat templates ({names}) and none is named 'default'; "
            "name one of them 'default'"
        ) from None


def _dated(template: str, date: datetime) -> str:
    """The template with a `strftime_now` that gives `date`. Transformers passes no functions to templates."""
    written = "format"
    for letter in "aAbBcdHIjmMpSUwWxXyYzZ":
        value = date.strftime(f"%{letter}")
        written += f" | replace('%{letter}', {value!r}) | replace('%-{letter}', {value.lstrip('0') or '0'!r})"
    # Jinja drops the line's end after a block, so the template begins as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ {written} }}}}{{% endmacro %}}\n{template}"


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches special tokens; the longest first, as the tokenizer does."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    return re.compile("|".join(map(re.escape, sorted(contents, key=lambda text: (-len(text), text)))) or "(?!)")


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _marked(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """Insert `mark` after the first character of every special token in the strings of a JSON value."""
    if isinstance(value, str):
        return pattern.sub(lambda match: f"{match[0][0]}{mark}{match[0][1:]}", value)
    if isinstance(value, dict):
        return {_marked(key, pattern, mark): _marked(item, pattern, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item, pattern, mark) for item in value]
    return value


class Tokens(NamedTuple):
    """Encoded text: `ids` [n] int32, and `offsets` [n, 2] int64, the start and end (exclusive) in characters."""

    ids: np.ndarray
    offsets: np.ndarray


def encode_rendered(rendered: Iterable[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens | DataError]:
    """Encode rendered conversations, in order, without adding special tokens.

    A conversation that quotes a special token which the tokenizer produces from plain text too gives a DataError.
    """
    conversations = list(rendered)
    backend = tokenizer.backend_tokenizer
    # transformers sets all three before each of its own calls.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    encodings = backend.encode_batch([item.text for item in conversations], add_special_tokens=False)
    for item, encoding in zip(conversations, encodings, strict=True):
        tokens = Tokens(np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets).reshape(-1, 2))
        yield _with_quotes(tokens, item, tokenizer) if item.quoted else tokens


def _with_quotes(tokens: Tokens, item: Rendered, tokenizer: PreTrainedTokenizerBase) -> Tokens | DataError:
    """Encode the sections that quote special tokens again, as plain text.

    A section is the text between two special tokens of the template. All other tokens are those of the whole text.
    """
    ids, offsets = tokens
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    is_special = np.isin(ids, special)
    inside = np.searchsorted(item.quoted, offsets, side="right")  # a quote's position is in (start, end]
    is_quote = is_special & (inside[:, 1] > inside[:, 0])
    edges = [-1, *np.flatnonzero(is_special & ~is_quote).tolist(), len(ids)]
    parts: list[Tokens] = []
    for left, right in pairwise(edges):
        section = slice(left + 1, right)
        if is_quote[section].any():
            start = int(offsets[left, 1]) if left >= 0 else 0
            end = int(offsets[right, 0]) if right < len(ids) else len(item.text)
            plain = _plain(item.text[start:end], tokenizer, None if is_quote[section][0] else int(ids[section][0]))
            if np.isin(plain.ids, special).any():
                return DataError("quotes a special token that the tokenizer cannot encode as text")
            parts.append(Tokens(plain.ids, plain.offsets + start))
        else:
            parts.append(Tokens(ids[section], offsets[section]))
        parts.append(Tokens(ids[right : right + 1], offsets[right : right + 1]))
    return Tokens(np.concatenate([part.ids for part in parts]), np.concatenate([part.offsets for part in parts]))


def _plain(text: str, tokenizer: PreTrainedTokenizerBase, first: int | None) -> Tokens:
    """Encode text without special tokens. `first`: its first token within the whole text; None if unknown.

    Some tokenizers put a space before the beginning of a text. A section in the middle gets none if the whole got none.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        encoding = backend.encode(text, add_special_tokens=False)
        lead = 0
        if first is not None and encoding.ids[0] != first:
            newline = backend.encode("\n", add_special_tokens=False).ids
            after = backend.encode("\n" + text, add_special_tokens=False)
            if after.ids[: len(newline)] == newline:
                encoding, lead = after, len(newline)
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[lead:] - (1 if lead else 0)
    return Tokens(np.array(encoding.ids[lead:], dtype=np.int32), offsets)
