"""EXACT decoding: the base's own rows verify what was drafted, so greedy text equals the base's token for token.

A pass has the clean rows [last known token, drafts d_1 ... d_m], gate closed and causal, then groups of mask rows, gate
open, each behind one of those clean rows. The longest prefix of drafts with d_j = the base's choice at the row before it
is accepted; that row's own choice comes free after it. Only accepted clean rows stay in the cache. The group behind the
last accepted draft makes the drafts of the next pass; the other groups are dropped.

With temperature, the base's choice at a position is argmax(log p / T + Gumbel noise of that position), a sample of its
distribution. Drafts are made with the same noise, so they agree often, and the text does not depend on them: it is the
text that the base samples token by token with this seed (Daliri et al. 2024, arXiv 2408.07978).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hildanext.decoding.constraint import Constraint, dead_end
from hildanext.decoding.events import Finished, Stats, Step, TokenLogprob
from hildanext.decoding.lookup import Lookup
from hildanext.decoding.plan import Plan, plan_rows
from hildanext.decoding.rule import (
    choose,
    counts_before,
    decodable_scores,
    forced_logprob,
    gumbel_noise,
    repeated_pairs,
    token_logprobs,
    tokens_before,
    verify_step,
)
from hildanext.decoding.runtimes.protocol import GroupRows
from hildanext.decoding.settings import Settings
from hildanext.decoding.span import CachedText, Span, Vocabulary
from hildanext.diffusion.noise import sample_generator
from hildanext.errors import NonFiniteLogitsError
from hildanext.model.text_stream import TextStream

NO_CHOICE = -1
PRIOR = 8  # an offset's expected acceptance counts like this many drafts of the sequence's own
# Chance that a draft from a lookup is right, by the length of the n-gram that was found; measured on SmolLM2's text.
LOOKUP_CHANCES = {2: 0.3, 3: 0.5, 4: 0.7}


class Drafter(Protocol):
    """Makes drafts from the mask rows of a group."""

    fresh: list[float]  # for row 1 ... k, the measured chance that its draft is right if all before it are

    def drafts(
        self,
        hidden: Tensor,
        logits: Tensor,
        before: int,
        settings: Settings,
        noise: Tensor | None,
        constraint: Constraint | None = None,
    ) -> tuple[list[int], list[float]]:
        """Drafts and their chances. hidden [n, H], logits [n, V]: of the rows; before: the token before the first draft.

        noise [n, V]: Gumbel noise of the drafts' positions, None for greedy drafts. constraint: what the drafts must fit.
        """
        ...


class Draft(NamedTuple):
    """A draft for one position."""

    token: int
    chance: float  # that it is right if all before it are
    offset: int  # its row's number in the group, from 1; 0 for a lookup


class ExactSequence:
    """A prompt and its completion. The request must have passed `check_request`."""

    def __init__(
        self,
        prompt_ids: list[int],
        settings: Settings,
        vocabulary: Vocabulary,
        decode_tokens: Callable[[list[int]], str],
        drafter: Drafter | None,
        constraint: Constraint | None = None,
    ) -> None:
        assert settings.tau_accept is not None
        self.settings, self.vocabulary, self.drafter = settings, vocabulary, drafter
        self.tau_accept = settings.tau_accept
        self.n_prompt = len(prompt_ids)
        self.tokens = list(prompt_ids)  # all known; the last one is never cached
        self.pending: list[Draft] = []
        self.plan = Plan(0, [0])
        self.lookup = None if settings.lookup is None else Lookup(settings.lookup, 4)
        if self.lookup:
            self.lookup.extend(prompt_ids)
        self.num_cached_tokens = self.prefix_tokens = 0
        self.stream = TextStream(decode_tokens, settings.stop)
        self.finish_reason: str | None = None
        self.noise: dict[int, Tensor] = {}  # Gumbel noise by position
        self.fixed: list[TokenLogprob] = []  # of the completion, if the request asks for log-probabilities
        self.forwards = self.prefill_forwards = self.rows = 0
        k = len(drafter.fresh) if drafter else 0
        self.tried, self.right = [0] * (k + 1), [0] * (k + 1)  # drafts verified after right ones, by offset; 0: lookup
        self.constraint, self.forced = constraint, 0  # forced: tokens that the last pass's choice forced
        if constraint is not None:
            self._force(constraint.begin(settings.max_new_tokens - 1))
        self.last_step = 0  # of the scheduler, in which it or its cached prefix was used
        self.began, self.seconds = time.perf_counter(), 0.0

    def common_prefix(self, other: CachedText) -> int:
        """Length of the prompt prefix whose keys and values `other` has cached."""
        most, n = min(self.reusable_prompt, other.num_cached_tokens), 0
        while n < most and self.tokens[n] == other.tokens[n]:
            n += 1
        return n

    @property
    def reusable_prompt(self) -> int:
        """Length of the prompt without its last token, whose row makes the first choice."""
        return self.n_prompt - 1

    def continues(self, other: CachedText, shared: int) -> bool:
        """Whether a common prefix of `shared` positions is all of the other prompt: the next turn of a conversation."""
        return 0 < min(other.reusable_prompt, other.num_cached_tokens) <= shared

    def reuse_prefix(self, n: int) -> None:
        """Before the first forward: the slot already holds the keys and values of the first n positions."""
        self.num_cached_tokens = self.prefix_tokens = n

    @property
    def decode_width(self) -> int:
        """The most rows that a forward needs after the prompt."""
        return self.settings.rows

    def next_span(self, chunk: int) -> Span:
        """The rows of the next forward: a chunk of the prompt, or the known tokens that are not cached and the plan's rows."""
        start, end = self.num_cached_tokens, len(self.tokens)
        if end - start > max(chunk, self.settings.rows):
            tokens = self.tokens[start : start + chunk]
            return Span(start, tokens, list(range(start + 1, start + len(tokens) + 1)), [])
        self.plan = self._plan()
        drafts = [draft.token for draft in self.pending[: self.plan.n_drafts]]
        clean = self.tokens[start:] + drafts
        positions = list(range(start, start + len(clean)))
        visible = [position + 1 for position in positions]
        own, column = [(0, 0)] * len(clean), start + len(clean)
        for behind, size in enumerate(self.plan.groups):
            anchor = end - 1 + behind
            positions += range(anchor + 1, anchor + size + 1)
            visible += [anchor + 1] * size
            own += [(column, column + size)] * size
            column += size
        n_masks = sum(self.plan.groups)
        tokens = clean + [self.vocabulary.mask_token_id] * n_masks
        gate = [False] * len(clean) + [True] * n_masks
        wanted = list(range(end - 1, start + len(tokens)))
        return Span(start, tokens, visible, wanted, GroupRows(positions, own, gate) if n_masks else None)

    def _plan(self) -> Plan:
        left = self.settings.max_new_tokens - (len(self.tokens) - self.n_prompt)
        chances = [draft.chance for draft in self.pending][: left - 1]
        rows = max(1, self.settings.rows - self.forced)  # forced tokens are clean rows, too
        return plan_rows(chances, self._fresh() if left > 2 else [], rows)

    def _fresh(self) -> list[float]:
        """The chance of each draft of a new group: as measured for the checkpoint, and in this text so far."""
        if self.drafter is None:
            return []
        counts = zip(self.drafter.fresh, self.tried[1:], self.right[1:], strict=True)
        return [(PRIOR * measured + right) / (PRIOR + tried) for measured, tried, right in counts]

    def predictors(self, span: Span) -> list[int]:
        """The rows of a span whose logits are needed: from the last known token on."""
        return [column - span.start for column in span.wanted]

    def finish_prefill_chunk(self, span: Span, hidden: Tensor) -> None:
        """Account for a forward without wanted rows."""
        self.prefill_forwards += 1
        self.num_cached_tokens = span.start + len(span.tokens)

    def finish_pass(self, span: Span, logits: Tensor, hidden: Tensor) -> list[Step | Finished]:
        """Verify the drafts, and make new ones from the group that survives. logits [P, V], hidden [W, H].

        The P rows are those of `span.wanted`: the last known token's, the drafts' and the groups'.
        """
        n_drafts = self.plan.n_drafts
        self.forwards += 1
        self.rows += len(span.tokens)
        settings, tried = self.settings, self.pending[:n_drafts]
        end = len(self.tokens)
        drafts = [draft.token for draft in tried]
        choices, ratios = self._choices(logits[: n_drafts + 1], drafts)
        repeats = [False] * n_drafts if self.tau_accept == 1.0 else repeated_pairs(self.tokens[self.n_prompt :], drafts)
        run = verify_step(drafts, choices, ratios, repeats, self.tau_accept)
        if choices[run] == NO_CHOICE:
            raise dead_end()
        for index, draft in enumerate(tried[: run + 1]):
            self.tried[draft.offset] += 1
            self.right[draft.offset] += index < run
        self.num_cached_tokens = end + run
        new = [*drafts[:run], choices[run]]
        kept = self._append(new)
        if settings.logprobs is not None:
            self.fixed += self._logprobs(logits[:kept], new[:kept], settings.logprobs)
        corrects = run < n_drafts and kept == run + 1
        chances: list[float | None] = [*(draft.chance for draft in tried[:run]), None][:kept]
        if self.constraint is not None and self.finish_reason is None:
            left = self.settings.max_new_tokens - (len(self.tokens) - self.n_prompt)
            self.forced = self._force(self.constraint.write(new, left))
            chances += [None] * self.forced
        drafted, edited = list(range(min(run, kept))), [run] if corrects else []
        step = Step(self.forwards - 1, 0, self.tokens[end:], drafted, edited, chances, 1.0, end)
        if self.finish_reason is None:
            self._draft(logits, hidden[span.wanted[0] - span.start :], run)
        return [step, *self._emit()]

    def _choices(self, logits: Tensor, drafts: list[int]) -> tuple[list[int], list[float]]:
        """The base's choice at each clean row, and p(draft) / max p of each draft at the row before it."""
        settings, vocabulary, end = self.settings, self.vocabulary, len(self.tokens)
        positions = range(end, end + len(logits))
        noise, seen, counts, text = self._noise(positions), None, None, self.tokens + drafts
        if settings.repetition_penalty != 1.0:
            seen = tokens_before(text, positions, vocabulary.size).to(logits.device)
        if settings.counts_tokens:
            counts = counts_before(text, self.n_prompt, positions, vocabulary.size).to(logits.device)
        scores = decodable_scores(
            logits, vocabulary.mask_token_id, vocabulary.size, settings, seen, vocabulary.holes, counts
        )
        if self.constraint is not None:
            scores = self.constraint.restrict(scores, drafts)
        ids, best = choose(scores, settings, None if noise is None else noise.to(logits.device))
        # A row whose allowed tokens are all at -inf has no choice, which only matters if the text comes to it.
        if not bool((best.isfinite() if self.constraint is None else best < torch.inf).all()):
            raise NonFiniteLogitsError(f"decoding, position {end}")
        choices = ids.masked_fill(best == -torch.inf, NO_CHOICE).tolist()
        ratios = [1.0] * len(drafts)
        if self.tau_accept != 1.0 and drafts:
            at = scores[: len(drafts)].gather(1, torch.tensor(drafts, device=scores.device)[:, None])[:, 0]
            ratios = (at - best[: len(drafts)]).exp().nan_to_num(0.0).tolist()
        return choices, ratios

    def _logprobs(self, logits: Tensor, new: list[int], n_top: int) -> list[TokenLogprob]:
        """Of verified tokens. A forced one is certain, whether a draft or not, so they do not depend on the drafts."""
        mask_token_id, size, holes = self.vocabulary.mask_token_id, self.vocabulary.size, self.vocabulary.holes
        found = token_logprobs(logits, new, n_top, mask_token_id=mask_token_id, vocab_size=size, holes=holes)
        states = [] if self.constraint is None else self.constraint.ahead(new[:-1])
        for i, state in enumerate(states):
            if state.only is not None:
                found[i] = forced_logprob(new[i], n_top)
        return found

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of the completion's tokens so far; None if the request asks for none."""
        return None if self.settings.logprobs is None else self.fixed[: len(self.stream.token_ids)]

    def _noise(self, positions: range) -> Tensor | None:
        """Gumbel noise [n, V] of text positions, None if greedy. Seeded by (seed, position)."""
        if self.settings.temperature == 0:
            return None
        for position in positions:
            if position not in self.noise:
                generator = sample_generator(self.settings.seed, position, "decode")
                self.noise[position] = gumbel_noise((self.vocabulary.size,), generator)
        return torch.stack([self.noise[position] for position in positions])

    def _append(self, new: list[int]) -> int:
        """Add verified tokens up to the end of the completion. Returns how many were added."""
        left = self.settings.max_new_tokens - (len(self.tokens) - self.n_prompt)
        new = new[:left]
        ends = [i for i, token in enumerate(new) if token in self.vocabulary.eos_token_ids]
        if ends:
            new, self.finish_reason = new[: ends[0] + 1], "stop"
        elif len(new) == left:
            self.finish_reason = "length"
        self.tokens += new
        if self.lookup:
            self.lookup.extend(new)
        for position in [position for position in self.noise if position < len(self.tokens)]:
            del self.noise[position]
        return len(new)

    def _force(self, forced: list[int]) -> int:
        """Add forced tokens. Returns how many were added."""
        kept, n_top = self._append(forced), self.settings.logprobs
        if n_top is not None:
            self.fixed += [forced_logprob(token, n_top) for token in forced[:kept]]
        return kept

    def _draft(self, logits: Tensor, hidden: Tensor, run: int) -> None:
        """The drafts of the next pass. logits, hidden: from the last known token's row on."""
        self.pending, settings = [], self.settings
        size, first = self.plan.groups[run], 1 + self.plan.n_drafts + sum(self.plan.groups[:run])
        size, first = max(0, size - self.forced), first + self.forced  # rows of forced tokens have nothing to draft
        if size and self.drafter is not None:
            rows, end = slice(first, first + size), len(self.tokens)
            noise = self._noise(range(end, end + size))
            tokens, chances = self.drafter.drafts(
                hidden[rows], logits[rows], self.tokens[-1], settings, noise, self.constraint
            )
            self.pending = [
                Draft(token, chance, j)
                for j, (token, chance) in enumerate(zip(tokens, chances, strict=True), start=1 + self.forced)
            ]
        if self.lookup is not None:
            self._look_up(self.lookup)
        if self.constraint is not None:
            del self.pending[self.constraint.fitting([draft.token for draft in self.pending]) :]

    def _look_up(self, lookup: Lookup) -> None:
        """Use the lookup where it is likelier than the group's drafts, else put it behind them."""
        most = self.settings.rows - 1
        tokens, n = lookup.drafts([], most)
        if tokens and (not self.pending or LOOKUP_CHANCES[n] > self.pending[0].chance):
            self.pending = [Draft(token, LOOKUP_CHANCES[n], 0) for token in tokens]
        elif len(self.pending) < most:
            tokens, n = lookup.drafts([draft.token for draft in self.pending], most - len(self.pending))
            self.pending += [Draft(token, LOOKUP_CHANCES[n], 0) for token in tokens]

    def _emit(self) -> list[Finished]:
        """The text that became certain with this pass. A stop string ends the completion."""
        before = len(self.stream.token_ids)
        new = self.tokens[self.n_prompt + before :]
        text = self.stream.push(new, last=self.finish_reason is not None)
        if self.stream.stopped:
            self.finish_reason = "stop"
        if self.finish_reason:
            self.seconds = time.perf_counter() - self.began
        logprobs = None if self.logprobs is None else self.logprobs[before:]
        return [Finished(self.forwards - 1, self.stream.token_ids[before:], text, logprobs)]

    def stats(self) -> Stats:
        """The cost of a completion that ended."""
        n = len(self.stream.token_ids)
        return Stats(
            self.forwards,
            self.prefill_forwards,
            n / self.forwards,
            mask_ratio=[],
            drafts=sum(self.tried),
            edits=0,
            seconds=self.seconds,
            tokens_per_second=n / self.seconds,
            prefix_tokens=self.prefix_tokens,
            seed=self.settings.used_seed,
            accepted=sum(self.right),
            rows=self.rows,
            tried_by_offset=self.tried,
            right_by_offset=self.right,
        )

    def preempt(self) -> None:
        """The sequence lost its slot: its whole text must be cached again. Text and drafts are kept."""
        self.num_cached_tokens, self.prefix_tokens = 0, 0
