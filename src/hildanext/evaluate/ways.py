"""Who completes text, and how: the AR base, or the converted model in one of its modes. Measures what answers cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.config import Config, DecodeConfig, Mode
from hildanext.config.decoding import MODES
from hildanext.decoding.engines.protocol import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.settings import Settings, resolve
from hildanext.diffusion.noise import sample_generator
from hildanext.errors import HildaError, UsageError
from hildanext.evaluate.intervals import Figure, plain, ratio
from hildanext.model.ar_generate import ar_complete_batch
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.progress import Advance, progress


class Models(NamedTuple):
    """The converted model, the engine that decodes it, and its AR base."""

    lm: DiffusionLM
    engine: TransformersEngine
    base: PreTrainedModel


class Way(NamedTuple):
    """A model and its decode settings, under the name that reports use. Settings None: the AR base."""

    name: str
    settings: Settings | None


class Question(NamedTuple):
    """A prompt, its token budget and where to stop. Temperature 0 is greedy."""

    prompt_ids: list[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


class TimedAnswer(NamedTuple):
    """An answer and its cost. `seconds` is its share of the time of a batch; shares add up to the total time."""

    text: str
    token_ids: list[int]
    ended: bool  # by an end-of-text token or a stop string, not by the budget
    seconds: float
    forwards: int  # as in `Stats`: without the forwards that only prefill a long prompt
    edits: int


class Outcome(NamedTuple):
    """Results of one way on one task. `samples` has one record per item, for people to read."""

    way: str
    figures: dict[str, Figure]
    samples: list[dict[str, Any]]


def seeded(config: Config) -> DecodeConfig:
    """The section `decode` with the seed of `evaluate` if it has none: a measurement repeats."""
    seed = config.evaluate.seed if config.decode.seed is None else config.decode.seed
    return config.decode.model_copy(update={"seed": seed})


def ways(config: Config, models: Models) -> list[Way]:
    """The AR base, then Q_MODE and S_MODE with editing on and off, at each of `evaluate.block_sizes`.

    A gated model: the AR base, EXACT, Q_MODE and S_MODE.
    """
    found = [Way("ar", None)]
    if models.lm.gated:
        for mode in MODES:
            decode = seeded(config).model_copy(update={"mode": mode})
            found.append(Way(mode.lower(), resolve(decode, models.lm.block_size or 1, models.engine.presets, "gated")))
        return found
    trained = models.lm.block_size
    assert trained is not None
    sizes: list[int | None] = [*config.evaluate.block_sizes] if config.evaluate.block_sizes else [None]
    modes: tuple[Mode, ...] = ("Q_MODE", "S_MODE")
    for size in sizes:
        for mode in modes:
            for edits in (True, False):
                changes: dict[str, Any] = {"mode": mode}
                changes |= {"block_size": size} if size else {}
                changes |= {} if edits else {"tau_edit": None}
                settings = resolve(seeded(config).model_copy(update=changes), trained, models.engine.presets)
                name = mode.lower() + ("" if edits else "_no_edit") + (f"/{size}" if size else "")
                found.append(Way(name, settings))
    return found


def sampling_seed(seed: int, item: int, sample: int) -> int:
    """A distinct seed for each completion of each item."""
    return int(sample_generator(seed, item, f"sample {sample}").initial_seed())


def require_chat_template(config: Config, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Raise UsageError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise UsageError(
            f"task '{task}': '{config.model.base}' has no chat template; set evaluate.chat=false for plain prompts"
        )


def complete(models: Models, way: Way, questions: list[Question], title: str) -> list[TimedAnswer]:
    """Answers in the order of the questions, up to `engine.slots` at a time. A short warm-up is not timed."""
    with progress(f"{title}, {way.name}", len(questions), "answers") as advance:
        if way.settings is None:
            return _complete_ar(models, questions, advance)
        return _complete_blocks(models.engine, way.settings, questions, advance)


def _complete_blocks(
    engine: TransformersEngine, settings: Settings, questions: list[Question], advance: Advance
) -> list[TimedAnswer]:
    requests = [
        Request(
            question.prompt_ids,
            settings._replace(
                max_new_tokens=question.max_new_tokens,
                stop=question.stop,
                temperature=question.temperature,
                seed=question.seed,
            ),
        )
        for question in questions
    ]
    engine.generate(Request(requests[0].prompt_ids, requests[0].settings._replace(max_new_tokens=1)))
    engine.scheduler.reset_prefix_cache()  # no way may reuse the prompt cache of another
    index_of = {engine.submit(request): index for index, request in enumerate(requests)}
    seconds, done = [0.0] * len(requests), dict[int, Completion]()
    began = time.perf_counter()
    while len(done) < len(requests):
        events = engine.step()
        for sequence, event in events:
            if isinstance(event, HildaError):
                raise event
            if isinstance(event, Completion):
                done[index_of[sequence]] = event
        served = {index_of[sequence] for sequence, _ in events}
        if served:  # a step that only prefills has no events; its time goes to the next step
            now = time.perf_counter()
            for index in served:
                seconds[index] += (now - began) / len(served)
            began = now
        advance(len(done))
    return [
        TimedAnswer(
            completion.text,
            completion.token_ids,
            completion.finish_reason == "stop",
            seconds[index],
            completion.stats.forwards,
            completion.stats.edits,
        )
        for index, completion in sorted(done.items())
    ]


def _batches(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Runs of adjacent questions with the same budget, stop strings and temperature, at most `size` in each."""
    for _, alike in itertools.groupby(questions, lambda q: (q.max_new_tokens, q.stop, q.temperature)):
        group = list(alike)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _complete_ar(models: Models, questions: list[Question], advance: Advance) -> list[TimedAnswer]:
    tokenizer, found = models.lm.tokenizer, list[TimedAnswer]()
    for batch in _batches(questions, models.engine.slots):
        sampling: dict[str, Any] = {"stop": batch[0].stop, "temperature": batch[0].temperature, "seed": batch[0].seed}
        prompts, budget = [question.prompt_ids for question in batch], batch[0].max_new_tokens
        if not found:
            ar_complete_batch(models.base, tokenizer, prompts[:1], 1, **sampling)
        for done in ar_complete_batch(models.base, tokenizer, prompts, budget, **sampling):
            forwards = max(len(done.token_ids), 1)
            found.append(TimedAnswer(done.text, done.token_ids, done.ended, done.seconds, forwards, 0))
        advance(len(found))
    return found


def cost(answers: list[TimedAnswer], resamples: int, seed: int) -> dict[str, Figure]:
    """Tokens per forward and per second over all answers, their tokens and their edits."""
    tokens = [float(len(answer.token_ids)) for answer in answers]
    return {
        "tokens_per_forward": ratio(tokens, [answer.forwards for answer in answers], resamples, seed),
        "tokens_per_second": ratio(tokens, [answer.seconds for answer in answers], resamples, seed),
        "tokens": plain(sum(tokens), len(answers)),
        "edits": plain(sum(answer.edits for answer in answers), len(answers)),
    }
