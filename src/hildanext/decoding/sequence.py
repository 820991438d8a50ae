"""One request in flight: its text, how much of it lies in the cache, and what its next forward must cover.

Every forward covers all that is not stored yet: the rest of the prompt, a finished block whose last pass still changed it,
and the current block. So storing block k and the first denoising pass of block k+1 share a forward, and the pass that
found nothing to change has stored its block.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.decoding.events import Finished, Step
from hildanext.decoding.rule import edit_step
from hildanext.decoding.settings import Settings
from hildanext.diffusion.noise import sample_generator
from hildanext.model.text_stream import TextStream


class Vocabulary(NamedTuple):
    """What decoding must know of a model: its ids, and whether logits at i-1 predict token i (`shifted`)."""

    size: int
    mask_token_id: int
    eos_token_id: int
    shifted: bool


class Span(NamedTuple):
    """Tokens of one sequence in one forward. Place p of the text is query p - start."""

    start: int  # text position of the first token = tokens stored before it
    tokens: list[int]
    visible: list[int]  # each query sees the text positions below this
    wanted: list[int]  # text positions whose proposal the rule can use; none in a prefill chunk


class Sequence:
    """A prompt being completed. Raises nothing: requests are checked before (`check_request`)."""

    def __init__(
        self,
        prompt_ids: list[int],
        settings: Settings,
        vocabulary: Vocabulary,
        decode_tokens: Callable[[list[int]], str],
    ) -> None:
        self.settings, self.vocabulary = settings, vocabulary
        self.n_prompt, size = len(prompt_ids), settings.block_size
        self.first_block = self.block = self.n_prompt // size
        self.tokens = list(prompt_ids)
        self.window = self.block * size  # first position that can still change
        self.stored = 0  # positions whose keys and values in the cache are final
        self.carry: Tensor | None = None  # shifted: hidden state [H] of the last stored position
        self.emitted = self.n_prompt
        self.stream = TextStream(decode_tokens, settings.stop)
        self.finish_reason: str | None = None
        self.step = self.post_steps = 0
        self.noise: dict[int, Tensor] = {}  # Gumbel noise of the blocks in the window
        self.prefix_tokens = 0  # positions that a slot had stored already
        self.forwards = self.prefill_forwards = self.drafts = self.edits = 0
        self.mask_ratio: list[float] = []
        self.began = time.perf_counter()
        self.seconds = 0.0
        self._open_block()

    def _open_block(self) -> None:
        size = self.settings.block_size
        self.tokens += [self.vocabulary.mask_token_id] * ((self.block + 1) * size - len(self.tokens))
        self.window = max(self.first_block, self.block - self.settings.editable_blocks) * size
        self.step = self.post_steps = 0

    def shared_with(self, other: Sequence) -> int:
        """Positions at the beginning of the prompt whose keys and values `other` has stored: whole blocks of equal tokens.

        Keys at a position depend on every token up to the end of its block, so a block counts whole or not at all, and on
        the same grid only.
        """
        size, n = self.settings.block_size, 0
        if other.settings.block_size != size:
            return 0
        most = min(self._prompt_blocks(), other.stored)
        while n < most and self.tokens[n : n + size] == other.tokens[n : n + size]:
            n += size
        return n

    def _prompt_blocks(self) -> int:
        """Positions of the prompt's blocks that need not run. Shifted, its last token must: its hidden state, which no slot
        keeps, predicts the first new one."""
        size = self.settings.block_size
        return (self.n_prompt - self.vocabulary.shifted) // size * size

    def continues(self, other: Sequence, shared: int) -> bool:
        """Whether the `shared` positions are the other one's whole prompt, as in the next turn of its conversation."""
        return 0 < min(other._prompt_blocks(), other.stored) <= shared

    def begin_at(self, n: int) -> None:
        """Before its first forward: the slot holds the keys and values of its first n positions."""
        self.stored = self.prefix_tokens = n

    def next_span(self, chunk: int) -> Span:
        """What the next forward must cover: all that is not stored, or a chunk of whole blocks of it when that is longer.

        A finished block sees itself and what is before it. The window (the current block and the editable ones before it)
        is seen whole by each of its tokens.
        """
        size, end = self.settings.block_size, len(self.tokens)
        if end - self.stored > max(chunk, end - self.window) and self.stored < self.window:
            end = min(self.stored + max(chunk // size, 1) * size, self.window)
        visible = [(p // size + 1) * size if p < self.window else len(self.tokens) for p in range(self.stored, end)]
        wanted = [p for p in range(self.window, end) if self._can_change(p)] if end > self.window else []
        return Span(self.stored, self.tokens[self.stored : end], visible, wanted)

    def _can_change(self, position: int) -> bool:
        if self.tokens[position] == self.vocabulary.mask_token_id:
            return True
        if self.settings.tau_edit is None or position < self.n_prompt:
            return False
        # Shifted, a block's first token is predicted by the stored text alone, and was drafted as predicted.
        opens_block = position == self.window == self.block * self.settings.block_size
        return not (self.vocabulary.shifted and opens_block)

    @property
    def usual_width(self) -> int:
        """Tokens of its widest forward past the prompt: the window and one block to store."""
        return len(self.tokens) - self.window + self.settings.block_size

    @property
    def is_plain(self) -> bool:
        """Greedy, and no token is penalized."""
        return self.settings.temperature == 0 and self.settings.repetition_penalty == 1.0

    def predictor(self, position: int) -> int:
        """Text position whose hidden state predicts `position`."""
        return position - 1 if self.vocabulary.shifted else position

    def block_noise(self, wanted: list[int]) -> Tensor | None:
        """Gumbel noise [P, V] of the wanted positions, the same at every pass; None for greedy. Seeded by (seed, block)."""
        if self.settings.temperature == 0:
            return None
        size = self.settings.block_size
        for block in range(self.window // size, self.block + 1):
            if block not in self.noise:
                generator = sample_generator(self.settings.seed, block, "decode")
                drawn = torch.empty(size, self.vocabulary.size).exponential_(generator=generator)
                self.noise[block] = drawn.log_().neg_()
        return torch.stack([self.noise[p // size][p % size] for p in wanted])

    def seen_before(self, wanted: list[int]) -> Tensor | None:
        """[P, V] bool: tokens that stand before each wanted position; None without a repetition penalty."""
        if self.settings.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(len(wanted), self.vocabulary.size, dtype=torch.bool)
        for row, position in enumerate(wanted):
            seen[row, torch.tensor(self.tokens[:position], dtype=torch.long)] = True
        return seen

    def stored_chunk(self, span: Span, hidden: Tensor) -> None:
        """A prefill chunk went through. hidden: [n, H] of its tokens."""
        self.prefill_forwards += 1
        self._store(span, span.start + len(span.tokens), hidden)

    def _store(self, span: Span, upto: int, hidden: Tensor) -> None:
        if upto > self.stored:
            self.stored = upto
            # A copy: the runtime may reuse its buffer.
            self.carry = hidden[upto - 1 - span.start].clone() if self.vocabulary.shifted else None

    def absorb(self, span: Span, ids: list[int], confidence: list[float], hidden: Tensor) -> list[Step | Finished]:
        """Apply the rule to a forward's proposals. ids, confidence: of the P `span.wanted`; hidden [n, H] of the span."""
        settings, window, mask_id = self.settings, self.window, self.vocabulary.mask_token_id
        self.forwards += 1
        self._store(span, window, hidden)  # whatever was waiting before the window
        before = self.tokens[window:]
        proposed, sure = list(before), [0.0] * len(before)
        shown: list[float | None] = [None] * len(before)
        for position, token, value in zip(span.wanted, ids, confidence, strict=True):
            proposed[position - window] = token
            sure[position - window] = shown[position - window] = value
        after, drafted, edited = edit_step(
            before,
            proposed,
            sure,
            [position >= self.n_prompt for position in range(window, len(self.tokens))],
            mask_token_id=mask_id,
            tau_mask=settings.tau_mask,
            tau_edit=settings.tau_edit,
            settled=0 if self.vocabulary.shifted else None,
        )
        self.tokens[window:] = after
        ratio = before.count(mask_id) / settings.block_size
        step = Step(self.block, self.step, after, drafted, edited, shown, ratio, window)
        self.step += 1
        self.drafts += len(drafted)
        self.edits += len(edited)
        self.mask_ratio.append(ratio)
        if not self._is_done(was_clean=ratio == 0, edited=bool(edited)):
            return [step]
        if not drafted and not edited and self.settings.editable_blocks == 0:
            # What lies in the cache is the block as it stays. With editable blocks it is not: they see what comes after
            # them, a stored block does not. Those are stored when they leave the window.
            self._store(span, len(self.tokens), hidden)
        return [step, *self._close_block()]

    def _is_done(self, was_clean: bool, edited: bool) -> bool:
        """Is the current block at rest, or out of passes? Every pass with masks left drafts one, so this always comes."""
        settings, mask_id = self.settings, self.vocabulary.mask_token_id
        if settings.tau_edit is None:
            return mask_id not in self._kept()  # what is cut off need not be drafted: nothing before it can change
        self.post_steps += was_clean
        if mask_id in self.tokens[self.window :]:
            return False
        if self.post_steps >= settings.max_post_steps or (was_clean and not edited):
            return True
        # Shifted blocks of one token: what was drafted cannot change, a pass to find that out would be wasted.
        return not any(self._can_change(p) for p in range(self.window, len(self.tokens)))

    def _kept(self) -> list[int]:
        """The completion as it stands: within the budget, up to the first end of text. May hold masks."""
        new = self.tokens[self.n_prompt :][: self.settings.max_new_tokens]
        eos = self.vocabulary.eos_token_id
        return new[: new.index(eos) + 1] if eos in new else new

    def _close_block(self) -> list[Finished]:
        """The current block is at rest: go on to the next one, or end. Returns the blocks that became final."""
        kept = self._kept()
        if kept[-1] == self.vocabulary.eos_token_id:
            self.finish_reason = "stop"
        elif len(kept) == self.settings.max_new_tokens:
            self.finish_reason = "length"
        else:
            self.block += 1
            self._open_block()
        final = self.n_prompt + len(kept) if self.finish_reason else self.window
        return self._emit(final)

    def _emit(self, final: int) -> list[Finished]:
        """Blocks below position `final` that were not handed out yet. A stop string in them ends the sequence."""
        size, events = self.settings.block_size, []
        while self.emitted < final and not self.stream.stopped:
            block = self.emitted // size
            new = self.tokens[self.emitted : min((block + 1) * size, final)]
            self.emitted += len(new)
            n_before = len(self.stream.token_ids)
            text = self.stream.push(new, last=self.finish_reason is not None and self.emitted == final)
            events.append(Finished(block, self.stream.token_ids[n_before:], text))
            self.noise.pop(block, None)
        if self.stream.stopped:
            self.finish_reason = "stop"
        if self.finish_reason:
            self.seconds = time.perf_counter() - self.began
        return events

    def evict(self) -> None:
        """The cache was taken away: everything must be stored again. The text and the current pass stay as they are."""
        self.stored, self.prefix_tokens, self.carry = 0, 0, None
