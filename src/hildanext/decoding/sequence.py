"""One request: its text, its place in the key-value cache, and the tokens of its next forward.

A forward runs all tokens that are not cached yet: the rest of the prompt, a finished block that its last pass still
changed, and the current block. So caching block k and the first pass of block k+1 share a forward, and a pass that
changes nothing caches its block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hildanext.decoding.constraint import Constraint
from hildanext.decoding.events import Finished, Stats, Step, TokenLogprob
from hildanext.decoding.rule import Change, counts_before, forced_logprob, gumbel_noise, indel_step, tokens_before
from hildanext.decoding.runtimes.protocol import GroupRows
from hildanext.decoding.settings import Settings, most_passes
from hildanext.decoding.span import CachedText, Span, Vocabulary
from hildanext.diffusion.noise import sample_generator
from hildanext.errors import ModelError, NonFiniteLogitsError
from hildanext.model.text_stream import TextStream


class Sequence:
    """A prompt and its completion. The request must have passed `check_request`."""

    def __init__(
        self,
        prompt_ids: list[int],
        settings: Settings,
        vocabulary: Vocabulary,
        decode_tokens: Callable[[list[int]], str],
        constraint: Constraint | None = None,
        draft: list[int] | None = None,
    ) -> None:
        """draft: tokens that the blocks begin with in place of masks. `self.draft` is what no block has taken yet."""
        if constraint is not None:  # an edit could leave the grammar, and what follows depends on every token
            settings = settings._replace(tau_edit=None, min_indel_confidence=None)
        self.settings, self.vocabulary, self.constraint = settings, vocabulary, constraint
        self.n_prompt, size = len(prompt_ids), settings.block_size
        self.first_block = self.block = self.n_prompt // size
        self.tokens, self.draft, self.has_draft = list(prompt_ids), list(draft or []), bool(draft)
        self.window = self.block * size  # first position that can still change
        self.num_cached_tokens = 0  # positions whose keys and values in the cache are final
        self.last_hidden: Tensor | None = None  # shifted: hidden state [H] of the last cached position
        self.emitted = self.n_prompt
        self.stream = TextStream(decode_tokens, settings.stop)
        self.finish_reason: str | None = None  # "stop", "length" or "error"
        self.passes = self.post_steps = 0  # passes over the current block; those that began without masks
        self.seen: set[tuple[int, ...]] = set()  # with insertions and deletions: the block's states before its passes
        self.noise: dict[int, Tensor] = {}  # Gumbel noise of each block in the window
        self.fixed: dict[int, TokenLogprob] = {}  # by position, if the request asks for log-probabilities
        self.prefix_tokens = 0  # positions that were cached by an earlier sequence
        self.forwards = self.prefill_forwards = self.drafts = self.edits = self.insertions = self.deletions = 0
        self.mask_ratio: list[float] = []
        self.last_step = 0  # the scheduler's last step that used its keys and values
        self.began = time.perf_counter()
        self.seconds = 0.0
        self._open_block()
        if constraint is not None:  # a mask is left for the first pass
            self._fill(constraint.begin(len(self._masked_budget()) - 1))

    def _open_block(self) -> None:
        size = self.settings.block_size
        missing = (self.block + 1) * size - len(self.tokens)
        self.tokens += (self.draft + [self.vocabulary.mask_token_id] * missing)[:missing]
        del self.draft[:missing]
        self.window = max(self.first_block, self.block - self.settings.editable_blocks) * size
        self.passes = self.post_steps = 0
        self.seen.clear()

    def _masked_budget(self) -> list[int]:
        """The masked positions of the current block that are within `max_new_tokens`."""
        end = min(len(self.tokens), self.n_prompt + self.settings.max_new_tokens)
        return [p for p in range(self.window, end) if self.tokens[p] == self.vocabulary.mask_token_id]

    def _fill(self, tokens: list[int]) -> list[int]:
        """Write forced tokens in place of the first masks. Returns their positions."""
        positions, n_top = self._masked_budget()[: len(tokens)], self.settings.logprobs
        for position, token in zip(positions, tokens, strict=True):
            self.tokens[position] = token
            if n_top is not None:
                self.fixed[position] = forced_logprob(token, n_top)
        return positions

    def _force(self, constraint: Constraint, drafts: list[int]) -> list[int]:
        """Write the tokens that new drafts force. Returns their positions in the window."""
        forced = constraint.write(drafts, len(self._masked_budget()))
        return [position - self.window for position in self._fill(forced)]

    def common_prefix(self, other: CachedText) -> int:
        """Length of the prompt prefix whose keys and values `other` has cached, in whole blocks of equal tokens.

        Keys at a position depend on all tokens of its block and of the blocks before it. So blocks are shared whole,
        and only between sequences of the same block size.
        """
        size, n = 1 if self.vocabulary.gated else self.settings.block_size, 0
        if not self.vocabulary.gated and other.settings.block_size != size:
            return 0
        most = min(self.reusable_prompt, other.num_cached_tokens)
        while n < most and self.tokens[n : n + size] == other.tokens[n : n + size]:
            n += size
        return n

    @property
    def reusable_prompt(self) -> int:
        """Length of the prompt in whole blocks. Shifted, the last prompt token must run again: its hidden state, which
        the cache does not keep, predicts the first new token."""
        size = self.settings.block_size
        return (self.n_prompt - self.vocabulary.shifted) // size * size

    def continues(self, other: CachedText, shared: int) -> bool:
        """Whether a common prefix of `shared` positions is all of the other prompt: the next turn of a conversation."""
        return 0 < min(other.reusable_prompt, other.num_cached_tokens) <= shared

    def reuse_prefix(self, n: int) -> None:
        """Before the first forward: the slot already holds the keys and values of the first n positions."""
        self.num_cached_tokens = self.prefix_tokens = n

    def next_span(self, chunk: int) -> Span:
        """The tokens of the next forward: all that are not cached, or whole blocks of at most `chunk` tokens of them.

        A finished block attends to itself and to the blocks before it. The tokens of the window (the editable blocks
        and the current one) attend to the whole text.
        """
        size, start, end = self.settings.block_size, self.num_cached_tokens, len(self.tokens)
        if end - start > max(chunk, end - self.window) and start < self.window:
            end = min(start + max(chunk // size, 1) * size, self.window)
        step = 1 if self.vocabulary.gated else size
        visible = [(p // step + 1) * step if p < self.window else len(self.tokens) for p in range(start, end)]
        wanted = [p for p in range(self.window, end) if self._can_change(p)] if end > self.window else []
        return Span(start, self.tokens[start:end], visible, wanted, self._groups(start, end))

    def _groups(self, start: int, end: int) -> GroupRows | None:
        """Gated: the tokens before the window are clean, those of the window denoised."""
        if not self.vocabulary.gated:
            return None
        positions = list(range(start, end))
        return GroupRows(positions, [(0, 0)] * len(positions), [p >= self.window for p in positions])

    def _can_change(self, position: int) -> bool:
        if self.tokens[position] == self.vocabulary.mask_token_id:
            return True
        if self.settings.tau_edit is None or position < self.n_prompt:
            return False
        # Shifted, the first token of a block is predicted by cached text alone: a later pass would propose it again.
        opens_block = position == self.window == self.block * self.settings.block_size
        return not (self.vocabulary.shifted and opens_block) or (self.has_draft and self.passes == 0)

    @property
    def _is_last_pass(self) -> bool:
        return self.passes + 1 >= most_passes(self.settings.block_size, self.settings)

    @property
    def never(self) -> tuple[int, ...]:
        """Ids that the next pass cannot propose: those that no text has, except for DELETE and INSERT while they apply."""
        settings, vocabulary = self.settings, self.vocabulary
        is_over = self.post_steps >= settings.max_post_steps or self._is_last_pass
        if settings.min_indel_confidence is None or vocabulary.edit_tokens is None or is_over:
            return vocabulary.holes
        return tuple(token for token in vocabulary.holes if token not in vocabulary.edit_tokens)

    @property
    def is_repeated(self) -> bool:
        """Whether the block was in its present state before: its edits go round in a circle."""
        return (*self.tokens[self.window :], len(self.draft)) in self.seen

    @property
    def decode_width(self) -> int:
        """The most tokens that a forward needs after the prompt: the window and one block to cache."""
        return len(self.tokens) - self.window + self.settings.block_size

    @property
    def is_greedy(self) -> bool:
        """Whether proposals depend on the logits alone: no temperature, no penalty, no bias and no grammar."""
        return self.settings.temperature == 0 and not self.settings.changes_scores and self.constraint is None

    def predictors(self, span: Span) -> list[int]:
        """The rows of a span whose hidden states predict the wanted positions; -1 is the last cached position's."""
        return [position - self.vocabulary.shifted - span.start for position in span.wanted]

    def gumbel_noise(self, wanted: list[int]) -> Tensor | None:
        """Gumbel noise [P, V] of the wanted positions, None if greedy. Seeded by (seed, block), equal in every pass."""
        if self.settings.temperature == 0:
            return None
        size = self.settings.block_size
        for block in range(self.window // size, self.block + 1):
            if block not in self.noise:
                generator = sample_generator(self.settings.seed, block, "decode")
                self.noise[block] = gumbel_noise((size, self.vocabulary.size), generator)
        return torch.stack([self.noise[p // size][p % size] for p in wanted])

    def penalized_tokens(self, wanted: list[int]) -> Tensor | None:
        """[P, V] bool: the tokens that occur before each wanted position; None without a repetition penalty."""
        if self.settings.repetition_penalty == 1.0:
            return None
        return tokens_before(self.tokens, wanted, self.vocabulary.size)

    def completion_counts(self, wanted: list[int]) -> Tensor | None:
        """[P, V]: how often tokens occur in the completion before each wanted position; None if no penalty needs it."""
        if not self.settings.counts_tokens:
            return None
        return counts_before(self.tokens, self.n_prompt, wanted, self.vocabulary.size)

    def finish_prefill_chunk(self, span: Span, hidden: Tensor) -> None:
        """Account for a forward without wanted positions. hidden [n, H]: the hidden states of the span."""
        self.prefill_forwards += 1
        self._mark_cached(span, span.start + len(span.tokens), hidden)

    def _mark_cached(self, span: Span, end: int, hidden: Tensor) -> None:
        if end > self.num_cached_tokens:
            self.num_cached_tokens = end
            # Cloned because the runtime may reuse its buffer.
            self.last_hidden = hidden[end - 1 - span.start].clone() if self.vocabulary.shifted else None

    def finish_pass(
        self,
        span: Span,
        ids: list[int],
        confidence: list[float],
        hidden: Tensor,
        logprobs: list[TokenLogprob] | None = None,
        second: list[int] | None = None,
    ) -> list[Step | Finished]:
        """Apply the decode rule to the proposals of a forward. Returns the pass and the blocks that became final.

        ids, confidence: v_i and c_i of the P positions `span.wanted`; hidden [n, H]: the hidden states of the span;
        logprobs: log p of the v_i, if the request asks for them; second: the second choices, if `is_repeated`.
        Raises NonFiniteLogitsError for a NaN confidence, ModelError if the block does not end within `most_passes`.
        """
        if math.isnan(sum(confidence)):
            raise NonFiniteLogitsError(f"decoding, block {self.block}")
        settings, window = self.settings, self.window
        self.forwards += 1
        self._mark_cached(span, window, hidden)  # blocks before the window, if the span had any
        before = self.tokens[window:]
        shown: list[float | None] = [None] * len(before)
        for position, value in zip(span.wanted, confidence, strict=True):
            shown[position - window] = value
        change = self._change(before, span, ids, [value or 0.0 for value in shown], second)
        self.tokens[window:], drafted, edited = change[:3]
        if logprobs is not None:
            self._fix(change, dict(zip(span.wanted, logprobs, strict=True)))
        shown = [None if source is None else shown[source] for source in change.sources]
        if self.constraint is not None:
            forced = self._force(self.constraint, [self.tokens[window + i] for i in drafted])
            drafted = drafted + forced
            shown = [1.0 if i in forced else value for i, value in enumerate(shown)]
        ratio = before.count(self.vocabulary.mask_token_id) / settings.block_size
        step = Step(self.block, self.passes, self.tokens[window:], drafted, edited, shown, ratio, window, *change[3:5])
        self.passes += 1
        self.drafts += len(drafted)
        self.edits += len(edited)
        self.insertions += len(change.inserted)
        self.deletions += len(change.deleted)
        self.mask_ratio.append(ratio)
        changed = bool(edited or change.inserted or change.deleted)
        if not self._is_done(was_clean=ratio == 0, edited=changed):
            return [step]
        if not drafted and not changed and self.settings.editable_blocks == 0 and not self.vocabulary.gated:
            # The cached keys are those of the final block. Editable blocks are cached when they leave the window: until
            # then they attend to later blocks, which a cached block does not.
            self._mark_cached(span, len(self.tokens), hidden)
        return [step, *self._close_block()]

    def _change(
        self, before: list[int], span: Span, ids: list[int], sure: list[float], second: list[int] | None
    ) -> Change:
        """What a pass does to the window. before, sure: its tokens and the confidence at each; ids: v_i of `span.wanted`."""
        settings, window = self.settings, self.window
        proposed, others = list(before), list(before)
        for i, position in enumerate(span.wanted):
            proposed[position - window] = ids[i]
            others[position - window] = ids[i] if second is None else second[i]
        edit_tokens = None if settings.min_indel_confidence is None else self.vocabulary.edit_tokens
        if edit_tokens is not None:
            self.seen.add((*before, len(self.draft)))
        change = indel_step(
            before,
            proposed,
            sure,
            [position >= self.n_prompt for position in range(window, len(self.tokens))],
            edit_tokens,
            mask_token_id=self.vocabulary.mask_token_id,
            block_size=settings.block_size,
            tau_mask=-1.0 if edit_tokens is not None and self._is_last_pass else settings.tau_mask,
            tau_edit=settings.tau_edit,
            min_indel_confidence=settings.min_indel_confidence or 0.0,
            settled=span.wanted[0] - window if self.constraint else 0 if self.vocabulary.shifted else None,
            second=None if second is None else others,
            behind=self.draft,
        )
        # Without a draft, what was cut off is drafted anew in the next block.
        self.draft = [t for t in change.rest if t != self.vocabulary.mask_token_id] if self.has_draft else []
        return change

    def _fix(self, change: Change, found: dict[int, TokenLogprob]) -> None:
        """Keep the log-probabilities of the tokens that a pass wrote; those of tokens that moved move along."""
        before = dict(self.fixed)
        for i, source in enumerate(change.sources):
            known = found if i in change.drafted or i in change.edited else before
            if source is not None and self.window + source in known:
                self.fixed[self.window + i] = known[self.window + source]

    def _is_done(self, was_clean: bool, edited: bool) -> bool:
        """Whether the current block is final.

        Every block ends: a pass over masks drafts at least one of them, and `most_passes` limits the passes. Raises
        ModelError if masks remain at that limit.
        """
        settings, editing = self.settings, self.settings.tau_edit is not None
        self.post_steps += was_clean
        # With editing off, tokens behind the end of the completion cannot change it: they stay undrafted.
        relevant = self.tokens[self.window :] if editing else self._completion()
        is_drafted = self.vocabulary.mask_token_id not in relevant
        is_last = self.passes >= most_passes(settings.block_size, settings)
        if is_last and not is_drafted:
            raise ModelError(f"decoding, block {self.block}: masks remain after {self.passes} passes")
        if not editing or not is_drafted:
            return is_drafted
        if is_last or self.post_steps >= settings.max_post_steps or (was_clean and not edited):
            return True
        # Shifted with blocks of one token: a drafted token cannot change, so no pass is spent to confirm it.
        return not any(self._can_change(p) for p in range(self.window, len(self.tokens)))

    def _completion(self) -> list[int]:
        """The completion so far, cut to the budget and after the first end of text. May contain masks."""
        new = self.tokens[self.n_prompt :][: self.settings.max_new_tokens]
        ends = [new.index(eos) + 1 for eos in self.vocabulary.eos_token_ids if eos in new]
        return new[: min(ends)] if ends else new

    def _close_block(self) -> list[Finished]:
        """Open the next block, or end the completion. Returns the blocks that became final."""
        is_decided = False
        while not is_decided:
            completion = self._completion()
            if completion[-1] in self.vocabulary.eos_token_ids:
                self.finish_reason = "stop"
            elif len(completion) == self.settings.max_new_tokens:
                self.finish_reason = "length"
            else:
                self.block += 1
                self._open_block()
                if self.constraint is not None:  # which may force the whole block
                    self._force(self.constraint, [])
            is_forced = self.constraint is not None and self.vocabulary.mask_token_id not in self._completion()
            is_decided = self.finish_reason is not None or not is_forced
        final = self.n_prompt + len(completion) if self.finish_reason else self.window
        return self._emit(final)

    def _emit(self, final: int) -> list[Finished]:
        """Events of the blocks below position `final` that were not emitted yet. A stop string ends the completion."""
        size, events = self.settings.block_size, []
        while self.emitted < final and not self.stream.stopped:
            block = self.emitted // size
            new = self.tokens[self.emitted : min((block + 1) * size, final)]
            self.emitted += len(new)
            n_before = len(self.stream.token_ids)
            text = self.stream.push(new, last=self.finish_reason is not None and self.emitted == final)
            logprobs = None if self.logprobs is None else self.logprobs[n_before:]
            events.append(Finished(block, self.stream.token_ids[n_before:], text, logprobs))
            self.noise.pop(block, None)
        if self.stream.stopped:
            self.finish_reason = "stop"
        if self.finish_reason:
            self.seconds = time.perf_counter() - self.began
        return events

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of the completion's tokens so far, each from the pass that fixed it; None if the request asks for none."""
        if self.settings.logprobs is None:
            return None
        return [self.fixed[self.n_prompt + i] for i in range(len(self.stream.token_ids))]

    def stats(self) -> Stats:
        """The cost of a completion that ended."""
        n = len(self.stream.token_ids)
        return Stats(
            self.forwards,
            self.prefill_forwards,
            n / self.forwards,
            self.mask_ratio,
            self.drafts,
            self.edits,
            self.seconds,
            n / self.seconds,
            self.prefix_tokens,
            self.settings.used_seed,
            self.insertions,
            self.deletions,
        )

    def preempt(self) -> None:
        """The sequence lost its slot: its whole text must be cached again. Text and passes are kept."""
        self.num_cached_tokens, self.prefix_tokens, self.last_hidden = 0, 0, None
