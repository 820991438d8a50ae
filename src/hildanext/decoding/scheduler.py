"""Continuous batching: sequences join and leave between forwards. A `step` is schedule, run, postprocess.

The text of a sequence depends on its own settings alone. Its batch mates can only change the last bits of a float.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.decoding.constraint import Constraint, walk
from hildanext.decoding.events import Finished, Step, TokenLogprob
from hildanext.decoding.exact import ExactSequence
from hildanext.decoding.rule import forced_logprob, propose, token_logprobs
from hildanext.decoding.runtimes.protocol import GroupRows, Runtime, pad_batch
from hildanext.decoding.sequence import Sequence
from hildanext.decoding.span import Span
from hildanext.errors import ModelError
from hildanext.model.policy import is_out_of_memory
from hildanext.progress import say

AnySequence = Sequence | ExactSequence
SequenceEvent = tuple[AnySequence, Step | Finished | ModelError]


class Scheduled(NamedTuple):
    """A sequence in the next forward."""

    slot: int
    sequence: AnySequence
    span: Span


class Proposals(NamedTuple):
    """What a forward proposes at the P wanted positions of a sequence; nothing for an ExactSequence."""

    ids: list[int]  # v_i
    confidence: list[float]  # c_i
    logprobs: list[TokenLogprob] | None = None  # of the v_i, if the request asks for them
    second: list[int] | None = None  # the likeliest ids but for the v_i, if the sequence's edits go round in a circle


class Output(NamedTuple):
    """The result of a forward for one sequence."""

    hidden: Tensor  # [W, H] hidden states of the span, padding behind it
    logits: Tensor  # [P, V] of the P wanted positions
    proposals: Proposals


class Scheduler:
    """Runs sequences on a runtime, at most `slots` at a time. The others wait in order of arrival."""

    def __init__(self, runtime: Runtime, slots: int, context: int, prefill_chunk: int, scratch: int = 0) -> None:
        """scratch: columns of a slot behind its context, for the keys of mask groups."""
        self.runtime, self.slots, self.prefill_chunk = runtime, slots, prefill_chunk
        self.context, self.scratch = context, scratch
        self.waiting: deque[AnySequence] = deque()
        self.running: list[AnySequence] = []  # running[i] is in slot i
        self.cached_sequences: list[
            AnySequence | None
        ] = []  # whose keys and values each slot holds, running or finished
        self.steps = 0  # the clock of `Sequence.last_step`
        self.has_shrunk = False
        self.is_allocated = False

    def submit(self, sequence: AnySequence) -> None:
        self.waiting.append(sequence)

    def cancel(self, sequence: AnySequence) -> None:
        """Drop a waiting or running sequence. Its slot is free at once."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._release(sequence)

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of finished sequences, so that measurements of equal prompts do not share them."""
        self.cached_sequences = [*self.running, *[None] * (len(self.cached_sequences) - len(self.running))]

    def rest(self) -> None:
        """Free memory while nothing runs. The sequences that were used last stay cached, as far as the runtime allows."""
        left = self.runtime.resting_tokens
        if left is None or not self.is_allocated or not self.is_idle:
            return
        lengths = [0] * self.slots
        for slot in sorted(range(self.slots), key=self._last_step, reverse=True):
            cached = self.cached_sequences[slot]
            if cached is None or cached.num_cached_tokens > left:
                self.cached_sequences[slot] = None
            else:
                lengths[slot] = cached.num_cached_tokens
                left -= lengths[slot]
        self.runtime.rest(lengths)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @torch.inference_mode()
    def step(self) -> list[SequenceEvent]:
        """Run at most one chunk of one prompt and one denoising pass of every sequence past its prompt.

        If memory runs out, the slots are halved, once. Raises ModelError the second time, and if there is one slot.
        """
        events: list[SequenceEvent] = []
        out_of_memory = False
        self.steps += 1
        try:
            for batch in self.schedule():
                events += self.postprocess(batch, self.run(batch))
            for sequence in [sequence for sequence in self.running if sequence.finish_reason]:
                self._release(sequence)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if out_of_memory:  # outside the handler: its traceback would keep the failed forward's tensors alive
            self._shrink()
        return events

    def schedule(self) -> list[list[Scheduled]]:
        """Admit waiting sequences to free slots. Returns this step's batches: a long prompt, then all short spans."""
        if not self.is_allocated:
            self._allocate()
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self._admit(range(len(self.running), self.slots)))
        work = [Scheduled(slot, s, s.next_span(self.prefill_chunk)) for slot, s in enumerate(self.running)]
        # Every sequence of a forward is padded to the widest one, so long spans run alone, one in each step.
        long = [item for item in work if len(item.span.tokens) > item.sequence.decode_width]
        short = [item for item in work if len(item.span.tokens) <= item.sequence.decode_width]
        return [batch for batch in (long[:1], short) if batch]

    def run(self, batch: list[Scheduled]) -> list[Output]:
        """One forward of the scheduled spans, and the proposals at wanted positions. Slots in between are padding."""
        first, last = batch[0].slot, batch[-1].slot
        padded: list[tuple[list[int], int, list[int]]] = [([], 0, [])] * (last - first + 1)
        groups: list[GroupRows | None] = [None] * len(padded)
        for slot, _, span in batch:
            padded[slot - first], groups[slot - first] = (span.tokens, span.start, span.visible), span.groups
        states = self.runtime.body(pad_batch(padded, first, groups))
        hidden = [states[item.slot - first] for item in batch]
        wanting = [(item, own) for item, own in zip(batch, hidden, strict=True) if item.span.wanted]
        logits = (
            self.runtime.head(_join([_predictors(item, own) for item, own in wanting])) if wanting else states[0, :0]
        )
        parts = logits.split([len(item.span.wanted) for item in batch])
        proposals = _proposals([item for item, _ in wanting], logits)
        return [
            Output(own, part, proposals.get(item.slot, Proposals([], [])))
            for item, own, part in zip(batch, hidden, parts, strict=True)
        ]

    def postprocess(self, batch: list[Scheduled], outputs: list[Output]) -> list[SequenceEvent]:
        """Apply the decode rule to each sequence. Returns its pass and the blocks that became final, or its error."""
        events: list[SequenceEvent] = []
        for (slot, sequence, span), (hidden, logits, proposals) in zip(batch, outputs, strict=True):
            sequence.last_step = self.steps
            if not span.wanted:
                sequence.finish_prefill_chunk(span, hidden)
                continue
            try:
                if isinstance(sequence, ExactSequence):
                    events += [(sequence, event) for event in sequence.finish_pass(span, logits, hidden)]
                else:
                    if sequence.constraint is not None:
                        proposals = _walk(sequence, sequence.constraint, span.wanted, logits)
                    ids, confidence, logprobs, second = proposals
                    happened = sequence.finish_pass(span, ids, confidence, hidden, logprobs, second)
                    events += [(sequence, event) for event in happened]
            except ModelError as error:  # this sequence fails alone
                sequence.finish_reason = "error"
                sequence.preempt()  # nothing in its slot may be used again
                self.runtime.erase(slot)  # a masked key still counts if it is NaN: 0 * NaN = NaN
                events.append((sequence, error))
        return events

    def _allocate(self) -> None:
        self.runtime.allocate(self.slots, self.context + self.scratch)  # drops all cached keys and values
        for sequence in (*self.running, *self.waiting):
            sequence.preempt()
        self.cached_sequences = [*self.running, *[None] * (self.slots - len(self.running))]
        self.is_allocated = True

    def _admit(self, free: range) -> AnySequence:
        """Move the first waiting sequence into the first free slot, with its longest prefix that any slot has cached.

        The next turn of a conversation takes over the slot of the turn before. Another common prefix (a system
        prompt) is copied into the free slot that was unused for longest, so that conversations keep their own slots. A
        slot is used by the passes of its sequence and by those who take over its prefix.
        """
        sequence = self.waiting[0]
        shared = [0 if cached is None else sequence.common_prefix(cached) for cached in self.cached_sequences]
        source = max(range(len(shared)), key=shared.__getitem__)
        cached = self.cached_sequences[source]
        is_next_turn = cached is not None and source in free and sequence.continues(cached, shared[source])
        target = source if is_next_turn else min(free, key=self._last_step)
        if cached is not None and shared[source]:
            cached.last_step = self.steps
        if shared[source] and target != source:
            self.cached_sequences[target] = None  # if the copy fails, the slot's content is undefined
            self.runtime.copy(source, target, shared[source])
        sequence.reuse_prefix(shared[source])
        self.cached_sequences[target] = sequence
        self._swap(target, free[0])
        return self.waiting.popleft()

    def _last_step(self, slot: int) -> int:
        cached = self.cached_sequences[slot]
        return -1 if cached is None else cached.last_step

    def _swap(self, slot: int, other: int) -> None:
        if slot == other:
            return
        first, second = self.cached_sequences[slot], self.cached_sequences[other]
        length = max(0 if cached is None else cached.num_cached_tokens for cached in (first, second))
        self.cached_sequences[slot] = self.cached_sequences[other] = None  # as in _admit, should the swap fail
        self.runtime.swap(slot, other, length)
        self.cached_sequences[slot], self.cached_sequences[other] = second, first

    def _release(self, sequence: AnySequence) -> None:
        """Free a slot for a waiting sequence, else for the last running one, so that running slots are contiguous."""
        slot, last = self.running.index(sequence), len(self.running) - 1
        sequence.noise.clear()  # the sequence stays in cached_sequences; of it only tokens and counts are needed
        sequence.constraint = None
        if self.waiting and len(self.running) >= self.slots:
            self.running[slot] = self._admit(range(slot, slot + 1))
            return
        self._swap(slot, last)
        self.running[slot] = self.running[last]
        self.running.pop()

    def _shrink(self) -> None:
        """Halve the slots, once. Running sequences keep their text. Those without a slot wait first in the queue."""
        if self.has_shrunk or self.slots == 1:
            raise ModelError(
                f"out of memory with {self.slots} slots of {self.context} tokens: lower engine.slots or engine.context"
            )
        before, self.slots = self.slots, self.slots // 2
        self.has_shrunk, self.is_allocated = True, False
        say(f"out of memory with {before} slots: continuing with {self.slots}; running requests are cached again")
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        self.waiting.extendleft(reversed(self.running[self.slots :]))
        del self.running[self.slots :]


def _join(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _proposals(wanting: list[Scheduled], logits: Tensor) -> dict[int, Proposals]:
    """The proposals of each sequence that edits blocks, by slot. logits: of all wanted positions.

    Those of a constrained sequence depend on each other, see `_walk`.
    """
    # Greedy rows share one call. Sampling and penalties depend on each sequence's settings and text.
    sizes = [len(item.span.wanted) for item in wanting]
    blocks = [item.sequence for item in wanting if isinstance(item.sequence, Sequence)]
    parts = logits.split(sizes)
    found: dict[int, Proposals] = {}
    is_shared = len(blocks) == len(wanting) and len({sequence.never for sequence in blocks}) == 1
    if is_shared and all(sequence.is_greedy for sequence in blocks):
        ids, confidence = _propose(logits, blocks[0], wanting[0].span.wanted)
        proposed = dict(enumerate(zip(ids.split(sizes), confidence.split(sizes), strict=True)))
    else:
        proposed = {
            index: _propose(part, item.sequence, item.span.wanted)
            for index, (item, part) in enumerate(zip(wanting, parts, strict=True))
            if isinstance(item.sequence, Sequence) and item.sequence.constraint is None
        }
    for index, (v, c) in proposed.items():
        item, ids_of = wanting[index], v.tolist()
        second = None
        if isinstance(item.sequence, Sequence) and item.sequence.is_repeated:
            others = parts[index].scatter(1, v[:, None], -torch.inf)
            second = _propose(others, item.sequence, item.span.wanted)[0].tolist()
        found[item.slot] = Proposals(ids_of, c.tolist(), _logprobs(parts[index], ids_of, item.sequence), second)
    return found


def _logprobs(logits: Tensor, ids: list[int], sequence: AnySequence) -> list[TokenLogprob] | None:
    """Of the proposals `ids`, if the request asks for them. logits: of the sequence's wanted positions."""
    if sequence.settings.logprobs is None:
        return None
    vocabulary = sequence.vocabulary
    return token_logprobs(
        logits,
        ids,
        sequence.settings.logprobs,
        mask_token_id=vocabulary.mask_token_id,
        vocab_size=vocabulary.size,
        holes=vocabulary.holes,
    )


def _walk(sequence: Sequence, constraint: Constraint, wanted: list[int], logits: Tensor) -> Proposals:
    """The proposals of a constrained sequence; only the rows that the walk comes to are read."""
    asked: list[int] = []  # where the model chose; the other tokens are forced, or behind the walk

    def propose(i: int, allowed: Tensor) -> tuple[int, float]:
        asked.append(i)
        ids, confidence = _propose(logits[i : i + 1], sequence, wanted[i : i + 1], allowed.to(logits.device))
        return int(ids), float(confidence)

    ids, confidence = walk(constraint, len(wanted), sequence.settings.tau_mask, propose)
    n_top = sequence.settings.logprobs
    if n_top is None:
        return Proposals(ids, confidence)
    logprobs = [forced_logprob(token, n_top) for token in ids]
    for i, chosen in zip(asked, _logprobs(logits[asked], [ids[i] for i in asked], sequence) or [], strict=True):
        logprobs[i] = chosen
    return Proposals(ids, confidence, logprobs)


def _propose(
    logits: Tensor, sequence: Sequence, wanted: list[int], allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Proposals with the settings of a sequence. If it is greedy, `logits` may have rows of other greedy sequences."""
    noise, seen = sequence.gumbel_noise(wanted), sequence.penalized_tokens(wanted)
    counts = sequence.completion_counts(wanted)
    return propose(
        logits,
        mask_token_id=sequence.vocabulary.mask_token_id,
        vocab_size=sequence.vocabulary.size,
        holes=sequence.never,
        settings=None if sequence.is_greedy else sequence.settings,
        noise=None if noise is None else noise.to(logits.device),
        seen=None if seen is None else seen.to(logits.device),
        counts=None if counts is None else counts.to(logits.device),
        allowed=allowed,
    )


def _predictors(item: Scheduled, hidden: Tensor) -> Tensor:
    """The hidden states [P, H] that predict the wanted positions, from those of the span, hidden [W, H]."""
    sequence = item.sequence
    queries = sequence.predictors(item.span)
    if queries[0] >= 0:
        contiguous = queries[-1] - queries[0] == len(queries) - 1
        return hidden[queries[0] : queries[-1] + 1] if contiguous else hidden[queries]
    assert isinstance(sequence, Sequence)
    assert sequence.last_hidden is not None
    first = sequence.last_hidden[None]
    return torch.cat([first, hidden[queries[1:]]]) if len(queries) > 1 else first
