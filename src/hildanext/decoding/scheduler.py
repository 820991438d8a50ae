"""Continuous batching: sequences join and leave between forwards. One `step` is admit, plan, run, absorb, release.

A sequence's text depends on its own settings only; who runs beside it changes nothing but the last bits of a float.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.decoding.events import Finished, Step
from hildanext.decoding.rule import propose
from hildanext.decoding.runtimes.protocol import Runtime, pad_batch
from hildanext.decoding.sequence import Sequence, Span
from hildanext.errors import ModelError
from hildanext.progress import say


class Event(NamedTuple):
    """What happened to a sequence in this step."""

    sequence: Sequence
    what: Step | Finished


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory: its own type on GPUs, a message of the allocator on CPUs."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Scheduler:
    """Runs sequences on a runtime, at most `slots` at a time; the others wait in order of arrival."""

    def __init__(self, runtime: Runtime, slots: int, context: int, prefill_chunk: int) -> None:
        self.runtime, self.slots, self.context, self.prefill_chunk = runtime, slots, context, prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the i-th lies in slot i
        self.held: list[Sequence | None] = []  # for each slot, whose keys and values lie there, running or not
        self.has_shrunk = False
        self.is_allocated = False

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its slot is free at once."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._release(sequence)

    def forget(self) -> None:
        """Let no later sequence find what slots hold, as measurements of the same prompts need it."""
        self.held = [*self.running, *[None] * (len(self.held) - len(self.running))]

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """At most one chunk of one prompt, and one denoising pass of every sequence past its prompt.

        Raises ModelError when memory runs out a second time, or with one slot.
        """
        events: list[Event] = []
        out_of_memory = False
        try:
            if not self.is_allocated:
                self._allocate()
            while self.waiting and len(self.running) < self.slots:
                self.running.append(self._place(range(len(self.running), self.slots)))
            self._run(events)
            for sequence in [s for s in self.running if s.finish_reason]:
                self._release(sequence)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if out_of_memory:  # outside the handler, whose traceback would keep the failed forward's tensors alive
            self._shrink()
        return events

    def _allocate(self) -> None:
        self.runtime.allocate(self.slots, self.context)  # what was stored is gone
        for sequence in (*self.running, *self.waiting):
            sequence.evict()
        self.held = [*self.running, *[None] * (self.slots - len(self.running))]
        self.is_allocated = True

    def _place(self, free: range) -> Sequence:
        """Let the first that waits begin in the first free slot, with what any slot has stored of its text already.

        The next turn of a conversation takes its slot over. What a text shares with others (a system prompt) is copied
        into the slot unused for longest, so that conversations do not take each other's slots away.
        """
        sequence = self.waiting[0]
        shared = [0 if held is None else sequence.shared_with(held) for held in self.held]
        source = max(range(len(shared)), key=shared.__getitem__)
        held = self.held[source]
        is_next_turn = held is not None and source in free and sequence.continues(held, shared[source])
        target = source if is_next_turn else min(free, key=self._began)
        if shared[source] and target != source:
            self.held[target] = None  # should the copy fail, nothing may be found there
            self.runtime.move(source, target, shared[source])
        sequence.begin_at(shared[source])
        self.held[target] = sequence
        self._swap(target, free[0])
        return self.waiting.popleft()

    def _length(self, slot: int) -> int:
        held = self.held[slot]
        return 0 if held is None else held.stored

    def _began(self, slot: int) -> float:
        held = self.held[slot]
        return 0.0 if held is None else held.began

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        length, held = max(self._length(one), self._length(other)), (self.held[other], self.held[one])
        self.held[one] = self.held[other] = None
        self.runtime.swap(one, other, length)
        self.held[one], self.held[other] = held

    def _run(self, events: list[Event]) -> None:
        spans = [(slot, s, s.next_span(self.prefill_chunk)) for slot, s in enumerate(self.running)]
        # A forward is as wide as its widest sequence: those with more to store than a block go one at a time.
        long = [one for one in spans if len(one[2].tokens) > one[1].usual_width]
        short = [one for one in spans if len(one[2].tokens) <= one[1].usual_width]
        for group in (long[:1], short):
            if group:
                events += self._forward(group)

    def _forward(self, group: list[tuple[int, Sequence, Span]]) -> list[Event]:
        """Run the spans of some slots together; slots between them sit out."""
        first, last = group[0][0], group[-1][0]
        padded: list[tuple[list[int], int, list[int]]] = [([], 0, [])] * (last - first + 1)
        for slot, _, span in group:
            padded[slot - first] = (span.tokens, span.start, span.visible)
        hidden = self.runtime.body(pad_batch(padded, first))
        wanting = [(s, span, hidden[slot - first]) for slot, s, span in group if span.wanted]
        for slot, sequence, span in group:
            if not span.wanted:
                sequence.stored_chunk(span, hidden[slot - first])
        if not wanting:
            return []
        logits = self.runtime.head(_join([_predictors(*one) for one in wanting]))
        counts = [len(span.wanted) for _, span, _ in wanting]
        # Greedy rows go together; what is drawn or penalized depends on each sequence's own text.
        together = all(sequence.is_plain for sequence, _, _ in wanting)
        parts = [logits] if together else logits.split(counts)
        proposed = [_propose(part, sequence, span) for part, (sequence, span, _) in zip(parts, wanting, strict=False)]
        ids, confidence = (_join(column).tolist() for column in zip(*proposed, strict=True))
        events, offset = [], 0
        for sequence, span, states in wanting:
            mine = slice(offset, offset + len(span.wanted))
            offset = mine.stop
            events += [Event(sequence, what) for what in sequence.absorb(span, ids[mine], confidence[mine], states)]
        return events

    def _release(self, sequence: Sequence) -> None:
        """Free a slot: for who waits, else the last sequence changes places with it, so that slots in use are neighbours."""
        slot, last = self.running.index(sequence), len(self.running) - 1
        sequence.noise.clear()  # what it has stored is kept, the rest is not needed any more
        if self.waiting and len(self.running) >= self.slots:
            self.running[slot] = self._place(range(slot, slot + 1))
            return
        self._swap(slot, last)
        self.running[slot] = self.running[last]
        self.running.pop()

    def _shrink(self) -> None:
        """Out of memory: half the slots, once. Sequences keep their text; those without a slot wait first in line."""
        if self.has_shrunk or self.slots == 1:
            raise ModelError(
                f"out of memory with {self.slots} slots of {self.context} tokens: lower engine.slots or engine.context"
            )
        before, self.slots = self.slots, self.slots // 2
        self.has_shrunk, self.is_allocated = True, False
        say(f"out of memory with {before} slots: going on with {self.slots}; requests under way are stored again")
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        self.waiting.extendleft(reversed(self.running[self.slots :]))
        del self.running[self.slots :]


def _join(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _propose(logits: Tensor, sequence: Sequence, span: Span) -> tuple[Tensor, Tensor]:
    """Proposals for the wanted positions of a sequence; for greedy ones, those of its neighbours may come along."""
    vocabulary = sequence.vocabulary
    noise, seen = sequence.block_noise(span.wanted), sequence.seen_before(span.wanted)
    return propose(
        logits,
        mask_token_id=vocabulary.mask_token_id,
        vocab_size=vocabulary.size,
        settings=None if sequence.is_plain else sequence.settings,
        noise=None if noise is None else noise.to(logits.device),
        seen=None if seen is None else seen.to(logits.device),
    )


def _predictors(sequence: Sequence, span: Span, hidden: Tensor) -> Tensor:
    """Hidden states [P, H] that predict the wanted positions; hidden [W, H] of the span."""
    places = [sequence.predictor(p) - span.start for p in span.wanted]
    if places[0] >= 0:
        return hidden[places[0] : places[-1] + 1] if places[-1] - places[0] == len(places) - 1 else hidden[places]
    assert sequence.carry is not None
    first = sequence.carry[None]
    return torch.cat([first, hidden[places[1:]]]) if len(places) > 1 else first
