"""Constrained decoding: the tokens with which a text can go on so that it matches a grammar in the end.

llguidance compiles a JSON Schema or a grammar for a tokenizer and gives the allowed tokens after each text
(https://github.com/guidance-ai/llguidance: an Earley parser over derivatives of regular expressions). JSON is written
without white space. Where the grammar leaves one continuation only, llguidance allows the token with which the
tokenizer itself would go on. Such a token is forced: it is written without asking the model.

Both kinds of sequences obey the allowed tokens: `sequence.py` drafts a block from left to right (`walk`), `exact.py`
masks the rows that verify drafts.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from math import isnan
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hildanext.decoding.grammar import Grammar
from hildanext.errors import ModelError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

KEPT = 32  # compiled grammars of an engine
Allowed = np.ndarray  # [V] bool


class NextTokens(NamedTuple):
    """The tokens that may follow a text."""

    allowed: Allowed
    only: int | None  # the forced token

    @property
    def tensor(self) -> Tensor:
        """[V] bool: `allowed`."""
        return torch.from_numpy(self.allowed)


class Constraint:
    """Where the text of one completion stands in its grammar."""

    def __init__(self, matcher: LLMatcher, size: int, never: list[int], ends: tuple[int, ...]) -> None:
        self.matcher, self.size, self.never, self.ends = matcher, size, never, ends
        self.followed: list[int] = []  # drafts behind the text that the matcher has consumed as well
        self.states: list[NextTokens] = []  # what may follow the text and its first, second, ... followed draft

    def advance(self, tokens: list[int]) -> None:
        """Add tokens to the text. Raises ModelError if they do not match."""
        same = _common(self.followed, tokens)
        if same == len(tokens):
            self.followed, self.states = self.followed[same:], self.states[same:]
            return
        self.matcher.rollback(len(self.followed) - same)
        self.followed, self.states = [], []
        if not self.matcher.consume_tokens(tokens[same:]):
            raise ModelError(f"decoding: the text left its grammar: {_first_line(self.matcher.get_error())}")

    def ahead(self, drafts: list[int]) -> list[NextTokens]:
        """The next tokens behind the text and behind each of its drafts.

        Ends before the first draft that is not allowed, and before one that ends the text: nothing follows those.
        """
        self.states = self.states or [self._next()]
        same = _common(self.followed, drafts)
        if same < len(drafts):
            self.matcher.rollback(len(self.followed) - same)
            del self.followed[same:], self.states[same + 1 :]
        for draft in drafts[same:]:
            if draft in self.ends or not self.states[-1].allowed[draft]:
                break
            self.matcher.consume_tokens([draft])
            self.followed.append(draft)
            self.states.append(self._next())
        return self.states[: len(drafts) + 1]

    def behind(self, drafts: list[int]) -> NextTokens:
        """The next tokens behind fitting drafts, of which none ends the text."""
        return self.ahead(drafts)[-1]

    def fitting(self, drafts: list[int]) -> int:
        """How many of the drafts the grammar allows."""
        states = self.ahead(drafts)
        n = len(states) - 1
        return n + (n < len(drafts) and bool(states[-1].allowed[drafts[n]]))

    def restrict(self, scores: Tensor, drafts: list[int]) -> Tensor:
        """scores [n + 1, V] of the tokens behind the text and behind each of n fitting drafts: sets others to -inf."""
        states = self.ahead(drafts)  # not of the row behind a draft that ends the text
        forbidden = ~torch.from_numpy(np.stack([state.allowed for state in states])).to(scores.device)
        scores[: len(states)].masked_fill_(forbidden, -torch.inf)
        return scores

    def write(self, tokens: list[int], most: int) -> list[int]:
        """Add tokens that the model chose, then those that they force: returns these, at most `most`.

        An end of text is the last token, and stays outside the grammar's text.
        """
        if tokens and tokens[-1] in self.ends:
            return []
        self.advance(tokens)
        forced: list[int] = []
        while len(forced) < most and (only := self.behind([]).only) is not None:
            forced.append(only)
            if only in self.ends:
                break
            self.advance([only])
        return forced

    def begin(self, most: int) -> list[int]:
        """The tokens that are forced before the model has chosen any, at most `most`; never an end of text."""
        forced = self.write([], most)
        return forced[:-1] if forced and forced[-1] in self.ends else forced

    def _next(self) -> NextTokens:
        allowed = np.zeros(self.size, dtype=np.bool_)
        packed = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: self.size]
        if self.matcher.is_error():
            raise ModelError(
                f"decoding: the grammar is too complex for this text: {_first_line(self.matcher.get_error())}; simplify it"
            )
        if self.matcher.is_stopped():  # nothing but an end of text may follow; of several, the tokenizer's own is taken
            allowed[self.ends[0]] = True
            return NextTokens(allowed, self.ends[0])
        allowed[: len(bits)] = bits
        allowed[self.never] = False
        return NextTokens(allowed, int(allowed.argmax()) if np.count_nonzero(allowed) == 1 else None)


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def walk(
    constraint: Constraint, n: int, tau_mask: float, propose: Callable[[int, Tensor], tuple[int, float]]
) -> tuple[list[int], list[float]]:
    """Proposals v_i and confidences c_i for the n masked positions of a block, from left to right.

    propose(i, allowed [1, V]) gives the likeliest allowed token of position i, and its probability among all tokens:
    what the model would write there without a grammar lowers it, so the thresholds keep their meaning. A forced token's
    confidence is 1. The walk ends behind the first position whose confidence is not above `tau_mask`, except the first
    of all, and behind an end of text. Positions behind it get confidence 0. Raises ModelError where the settings leave
    no token that the grammar allows.
    """
    ids, confidence, drafts = [0] * n, [0.0] * n, list[int]()
    for i in range(n):
        state = constraint.behind(drafts)
        if state.only is not None:
            ids[i], confidence[i] = state.only, 1.0
        else:
            ids[i], confidence[i] = propose(i, state.tensor[None])
        if isnan(confidence[i]):
            break
        if not state.allowed[ids[i]]:
            raise dead_end()
        drafts.append(ids[i])
        if ids[i] in constraint.ends or (i and confidence[i] <= tau_mask):
            break
    return ids, confidence


def dead_end() -> ModelError:
    return ModelError(
        "decoding: the grammar allows no token that the model can write here; change the schema or settings"
    )


class CompiledGrammar:
    """A grammar for the vocabulary of one engine."""

    def __init__(self, matcher: LLMatcher, size: int, never: list[int], ends: tuple[int, ...]) -> None:
        self.matcher, self.size, self.never, self.ends = matcher, size, never, ends

    def start(self) -> Constraint:
        """The constraint of a new completion."""
        return Constraint(self.matcher.deep_copy(), self.size, self.never, self.ends)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the last KEPT of them. Any thread may use it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, never: list[int], ends: tuple[int, ...]) -> None:
        """size: V, all token ids are below it. never: ids that no text has. ends: ids of which any ends a text."""
        self.tokenizer, self.size, self.never, self.ends = tokenizer, size, never, ends
        self.wrapped: LLTokenizer | None = None
        self.kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self.lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Takes milliseconds, the first time a second. Raises UsageError for what is not supported, naming the keyword."""
        with self.lock:
            if grammar in self.kept:
                self.kept.move_to_end(grammar)
                return self.kept[grammar]
            if self.wrapped is None:
                self.wrapped = self._wrap()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # else an error repeats the grammar
        matcher = LLMatcher(self.wrapped, grammar.source, log_level=0, limits=limits)
        if matcher.is_error():
            raise UsageError(_reason(matcher.get_error()))
        compiled = CompiledGrammar(matcher, self.size, self.never, self.ends)
        with self.lock:
            self.kept[grammar] = compiled
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return compiled

    def _wrap(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise UsageError("structured output needs the package llguidance; run: pip install llguidance") from None
        if not self.tokenizer.is_fast or not self.ends:
            raise UsageError("structured output needs a fast tokenizer with an end-of-text token")
        try:
            return LLTokenizer(
                self.tokenizer.backend_tokenizer.to_str(),
                n_vocab=max(self.size, len(self.tokenizer)),
                eos_token=list(self.ends),
            )
        except ValueError as error:
            raise UsageError(
                f"structured output cannot use this model's tokenizer: {_first_line(str(error))}"
            ) from None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _reason(error: str) -> str:
    """A compiler's error as one line that names the keyword."""
    line = " ".join(error.replace("<non-verbose/>", "").split())[:300]  # it may quote the schema
    if found := re.search(r"Unimplemented keys: \[(.*)\]", line):
        names = found[1].replace('"', "'")
        return f"the JSON schema uses {names}, which is not supported; remove the keyword or express it in another way"
    for sign, keyword in (
        ("oneOf constraints", "oneOf"),
        ("Unknown format", "format"),
        ("regex parse error", "pattern"),
        ("patternProperty", "patternProperties"),
        ("Resource", "$ref"),
        ("Invalid type", "type"),
    ):
        if sign in line:
            return f"the JSON schema's '{keyword}' is not supported: {line}"
    return f"the JSON schema or grammar cannot be compiled: {line}"
