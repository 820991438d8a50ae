"""The reference engine: any model that the loader accepts, many requests at once, with a key-value cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from hildanext.config import MOST_ROWS, Config, EngineName
from hildanext.decoding.constraint import CompiledGrammar, GrammarCompiler
from hildanext.decoding.drafter import GroupDrafter, fresh_chances
from hildanext.decoding.engines.protocol import AS_USUAL, Completion, Event, Prompt, Rendering, Request, last_completion
from hildanext.decoding.exact import ExactSequence
from hildanext.decoding.grammar import Grammar
from hildanext.decoding.memory import return_freed_memory
from hildanext.decoding.runtimes import open_runtime
from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.scheduler import AnySequence, Scheduler
from hildanext.decoding.sequence import Sequence
from hildanext.decoding.settings import (
    MODES_OF,
    VERIFYING,
    Kind,
    Settings,
    check_draft,
    check_ids,
    check_request,
    read_presets,
    resolve,
)
from hildanext.decoding.span import Vocabulary
from hildanext.errors import HildaError, UsageError
from hildanext.model.backbone import length_limit, max_positions
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import locate, read_record
from hildanext.model.prompts import decode_prompt, encode_prompt, end_ids
from hildanext.progress import say

MOST_CONTEXT = 4096  # tokens of a slot, unless engine.context is set


def choose_context(asked: int | None, model: PreTrainedModel) -> int:
    """Tokens of a slot: `engine.context`, by default as many as the model runs exactly, but no more than MOST_CONTEXT.

    Raises UsageError when more tokens are asked for than the model runs exactly.
    """
    limit = length_limit(model)
    if limit is None:
        return asked or MOST_CONTEXT
    name = model.config.model_type
    if asked is not None and asked > limit.length:
        raise UsageError(f"'engine.context': {asked} tokens, but {name} {limit.reason}; set at most {limit.length}")
    usual = min(max_positions(model) or MOST_CONTEXT, MOST_CONTEXT)
    if asked is None and limit.length < usual:
        say(f"context: {limit.length} tokens instead of {usual}: {name} {limit.reason}")
    return asked or min(limit.length, MOST_CONTEXT)


class TransformersEngine:
    """A scheduler and a runtime, used from one thread. Iterating a request's `stream` advances all requests.

    It keeps a given model in `lm`, and one that it loads itself unless the runtime has weights of its own: then it is freed.
    """

    name: EngineName = "transformers"

    def __init__(self, config: Config, reasons: dict[str, str], lm: DiffusionLM | None = None) -> None:
        given = lm
        if lm is None:
            lm = load_diffusion_lm(config.model)[0]
        self.reasons, self.tokenizer, self.trained_block = reasons, lm.tokenizer, lm.block_size
        self.device: str | None = str(lm.device)
        self.dtype: str | None = str(lm.model.dtype).removeprefix("torch.")
        self.policy: dict[str, object] | None = choose_policy(config.model.device, config.model.dtype).as_dict()
        self.vocabulary = Vocabulary(
            lm.vocab_size,
            lm.mask_token_id,
            end_ids(lm.tokenizer, lm.model.generation_config.eos_token_id),
            lm.convention == "shifted",
            tuple(lm.holes),
            gated=lm.gated,
            edit_tokens=lm.edit_tokens,
        )
        self.kind: Kind = "base" if lm.block_size is None else "gated" if lm.gated else "blocks"
        never = [self.vocabulary.mask_token_id, *self.vocabulary.holes]
        self.grammars = GrammarCompiler(
            lm.tokenizer,
            lm.vocab_size,
            [token for token in never if token < lm.vocab_size],
            self.vocabulary.eos_token_ids,
        )
        self.modes = MODES_OF[self.kind]
        self.has_base = self.kind == "gated"
        self.drafter = GroupDrafter(lm, fresh_chances(lm)) if lm.record.get("gate") else None
        self.presets = read_presets(lm.modes)
        context = choose_context(config.engine.context, lm.model)
        settings = self.settings(config)
        widths = (settings.block_size, 2 * settings.block_size) if settings.tau_accept is None else (settings.rows,)
        of_modes = (
            () if self.kind == "blocks" else tuple({(VERIFYING | self.presets)[mode].rows for mode in self.modes})
        )
        self.runtime = open_runtime(config.engine, lm, widths, of_modes)
        self.lm = lm if isinstance(self.runtime, EagerRuntime) else given
        del lm
        gc.collect()
        return_freed_memory()
        scratch = 0 if self.kind == "blocks" else MOST_ROWS
        chunk = config.engine.prefill_chunk or (128 if self.device == "cpu" else 512)
        self.scheduler = Scheduler(self.runtime, config.engine.slots, context, chunk, scratch)
        self.context: int | None = context
        self.mask_token_id: int | None = self.vocabulary.mask_token_id
        self.eos_token_ids = self.vocabulary.eos_token_ids
        # What `events` and `generate_batch` did not deliver yet.
        self.listeners: dict[AnySequence, list[Event | HildaError]] = {}

    @staticmethod
    def can_serve(config: Config) -> str | None:
        record = read_record(config.model)
        if record is None:
            if config.decode.mode == "EXACT":
                return None
            return f"'{config.model.base}' is not a converted checkpoint; run 'hildanext convert-wsd' first"
        if "adapter" in record:
            try:
                locate(record["adapter"]["base"])
            except UsageError as error:
                return f"adapter '{config.model.base}' needs its base: {error}"
        return None

    def encode(self, prompt: Prompt, known: list[int] | None = None, rendering: Rendering = AS_USUAL) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, known, **rendering._asdict())

    def settings(self, config: Config) -> Settings:
        has_indels = self.vocabulary.edit_tokens is not None
        return resolve(config.decode, self.trained_block or 1, self.presets, self.kind, has_indels)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        return self.grammars.compile(grammar)

    def decode_tokens(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def detokenize(self, token_ids: list[int]) -> str:
        return decode_prompt(self.tokenizer, token_ids)

    def submit(self, request: Request) -> AnySequence:
        """Queue a request.

        Raises UsageError for an empty prompt, for a token in prompt or draft that no text has and for a draft that nothing
        could repair; ContextError if the request is too long.
        """
        check_request(request.prompt_ids, request.settings, self.context)
        for name, given in (("prompt", request.prompt_ids), ("draft", request.draft or [])):
            if self.vocabulary.mask_token_id in given:
                raise UsageError(f"the {name} contains the mask token, which marks text to be drafted; remove it")
            if not {*(self.vocabulary.edit_tokens or ())}.isdisjoint(given):
                raise UsageError(f"the {name} contains DELETE or INSERT, which no text has; remove it")
            check_ids(name, given, self.vocabulary.size)
        if request.draft is not None:
            check_draft(request.settings, request.grammar is not None)
        check_ids("logit_bias", [token for token, _ in request.settings.logit_bias], self.vocabulary.size)
        sequence: AnySequence
        constraint = None if request.grammar is None else request.grammar.start()
        if request.settings.tau_accept is None:
            sequence = Sequence(
                request.prompt_ids, request.settings, self.vocabulary, self.decode_tokens, constraint, request.draft
            )
        else:
            sequence = ExactSequence(
                request.prompt_ids, request.settings, self.vocabulary, self.decode_tokens, self.drafter, constraint
            )
        self.runtime.prepare(sequence.decode_width)
        self.scheduler.submit(sequence)
        return sequence

    def cancel(self, sequence: AnySequence) -> None:
        """Drop a request and free its slot."""
        self.scheduler.cancel(sequence)
        self.listeners.pop(sequence, None)

    @property
    def slots(self) -> int:
        return self.scheduler.slots

    def step(self) -> list[tuple[AnySequence, Event | HildaError]]:
        """Run one step of the scheduler: schedule, run, postprocess. A sequence that ended also gets its Completion.

        The last event of a sequence that failed is its error.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.runtime.torch_threads or threads)
        try:
            events: list[tuple[AnySequence, Event | HildaError]] = [*self.scheduler.step()]
        finally:  # the caller may compute between steps (an AR base, a judge) and needs its threads
            torch.set_num_threads(threads)
        ended = dict.fromkeys(s for s, _ in events if s.finish_reason in ("stop", "length"))
        return events + [(sequence, self._completion(sequence)) for sequence in ended]

    def _step(self) -> None:
        """Run a step and append its events to the lists of their requests."""
        for sequence, event in self.step():
            self.listeners.setdefault(sequence, []).append(event)

    def events(self, sequence: AnySequence) -> Iterator[Event]:
        """The events of a submitted request, up to its Completion. Closing the iterator early drops the request.

        Raises the error that ended the request.
        """
        self.listeners.setdefault(sequence, [])
        try:
            while True:
                while not self.listeners[sequence]:
                    self._step()
                waiting, self.listeners[sequence] = self.listeners[sequence], []
                for event in waiting:
                    if isinstance(event, HildaError):
                        raise event
                    yield event
                if isinstance(waiting[-1], Completion):
                    return
        finally:
            self.cancel(sequence)

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield steps and finished blocks, then the Completion. The first `next` raises UsageError as `submit` does."""
        yield from self.events(self.submit(request))

    def generate(self, request: Request) -> Completion:
        return last_completion(self.stream(request))

    def generate_batch(
        self, requests: list[Request], on_event: Callable[[int, Event], None] | None = None
    ) -> list[Completion]:
        """Complete requests side by side, at most `engine.slots` at a time. The completions keep the requests' order.

        `on_event(index, event)` is called for every step, finished block and completion as it happens. All requests are
        checked before the first one runs; raises UsageError as `submit` does, and the error that ended a request.
        """
        sequences: list[AnySequence] = []
        done: dict[int, Completion] = {}
        try:
            for request in requests:
                sequences.append(self.submit(request))
                self.listeners[sequences[-1]] = []
            while len(done) < len(requests):
                self._step()
                for index, sequence in enumerate(sequences):
                    for event in self.listeners[sequence]:
                        if isinstance(event, HildaError):
                            raise event
                        if on_event is not None:
                            on_event(index, event)
                        if isinstance(event, Completion):
                            done[index] = event
                    self.listeners[sequence].clear()
        finally:
            for sequence in sequences:
                self.cancel(sequence)
        return [done[index] for index in range(len(requests))]

    def _completion(self, sequence: AnySequence) -> Completion:
        settings, token_ids = sequence.settings, sequence.stream.token_ids
        assert sequence.finish_reason is not None
        return Completion(
            text=sequence.stream.text,
            token_ids=token_ids,
            finish_reason=sequence.finish_reason,
            engine=self.name,
            engine_reasons=self.reasons,
            mode="AR" if settings.tau_accept is not None and settings.rows == 1 else settings.mode,
            tau_mask=settings.tau_mask,
            tau_edit=settings.tau_edit,
            stats=sequence.stats(),
            runtime=self.runtime.name,
            logprobs=sequence.logprobs,
        )

    def rest(self) -> None:
        self.scheduler.rest()
        return_freed_memory()

    def close(self) -> None:
        self.runtime.close()
        self.scheduler.is_allocated = False
