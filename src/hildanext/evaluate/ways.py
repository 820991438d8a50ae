"""Who completes text, and how: the AR base, and the converted model in each mode. Prompts in, answers and their cost out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hildanext.config import Config, Mode
from hildanext.decoding.engines.protocol import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.rule import Settings, resolve
from hildanext.diffusion.noise import sample_generator
from hildanext.errors import HildaError
from hildanext.evaluate.intervals import Figure, plain, ratio
from hildanext.model.ar_generate import ar_complete_batch
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.progress import progress


class Models(NamedTuple):
    """The converted model, the engine that decodes it, and its AR base."""

    lm: DiffusionLM
    engine: TransformersEngine
    base: PreTrainedModel


class Way(NamedTuple):
    """A way to complete text; without settings it is the AR base's."""

    name: str
    settings: Settings | None


class Question(NamedTuple):
    """A prompt and how far to go on from it."""

    prompt_ids: list[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


class WayAnswer(NamedTuple):
    """`seconds` is this answer's part of the time it ran beside others: the parts add up to the time of all."""

    text: str
    token_ids: list[int]
    ended: bool  # by an end-of-text token or a stop string, not by the budget
    seconds: float
    forwards: int  # as `Stats` counts them: chunks of a long prompt apart
    edits: int


def ways(config: Config, models: Models) -> list[Way]:
    """AR, then Q_MODE and S_MODE with editing on and off, at each block size asked for."""
    found = [Way("ar", None)]
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
                settings = resolve(config.decode.model_copy(update=changes), trained, models.engine.presets)
                name = mode.lower() + ("" if edits else "_no_edit") + (f"/{size}" if size else "")
                found.append(Way(name, settings))
    return found


def sampling_seed(seed: int, item: int, sample: int) -> int:
    """A seed of its own for each completion."""
    return int(sample_generator(seed, item, f"sample {sample}").initial_seed())


def answer(models: Models, way: Way, questions: list[Question], title: str) -> list[WayAnswer]:
    """Answers in the order of the questions, `engine.slots` of them side by side. A short warm-up is not counted."""
    with progress(f"{title}, {way.name}", len(questions), "answers") as advance:
        if way.settings is None:
            return _ar_answers(models, questions, advance)
        return _engine_answers(models.engine, way.settings, questions, advance)


def _engine_answers(
    engine: TransformersEngine, settings: Settings, questions: list[Question], advance: Any
) -> list[WayAnswer]:
    requests = [
        Request(
            one.prompt_ids,
            settings._replace(
                max_new_tokens=one.max_new_tokens, stop=one.stop, temperature=one.temperature, seed=one.seed
            ),
        )
        for one in questions
    ]
    engine.generate(Request(requests[0].prompt_ids, requests[0].settings._replace(max_new_tokens=1)))
    engine.scheduler.forget()  # every way computes its prompts
    place = {engine.submit(request): index for index, request in enumerate(requests)}
    seconds, done = [0.0] * len(requests), dict[int, Completion]()
    began = time.perf_counter()
    while len(done) < len(requests):
        happened = engine.step()
        for sequence, what in happened:
            if isinstance(what, HildaError):
                raise what
            if isinstance(what, Completion):
                done[place[sequence]] = what
        served = {place[sequence] for sequence, _ in happened}
        if served:  # a chunk of a prompt alone is counted with the next step
            now = time.perf_counter()
            for index in served:
                seconds[index] += (now - began) / len(served)
            began = now
        advance(len(done))
    return [
        WayAnswer(
            one.text,
            one.token_ids,
            one.finish_reason == "stop",
            seconds[index],
            one.stats.forwards,
            one.stats.edits,
        )
        for index, one in sorted(done.items())
    ]


def _alike(questions: list[Question], most: int) -> Iterator[list[Question]]:
    """Neighbours that one batch can answer."""
    for _, alike in itertools.groupby(questions, lambda one: (one.max_new_tokens, one.stop, one.temperature)):
        some = list(alike)
        for start in range(0, len(some), most):
            yield some[start : start + most]


def _ar_answers(models: Models, questions: list[Question], advance: Any) -> list[WayAnswer]:
    tokenizer, found = models.lm.tokenizer, list[WayAnswer]()
    for group in _alike(questions, models.engine.slots):
        how: dict[str, Any] = {"stop": group[0].stop, "temperature": group[0].temperature, "seed": group[0].seed}
        prompts, budget = [one.prompt_ids for one in group], group[0].max_new_tokens
        if not found:
            ar_complete_batch(models.base, tokenizer, prompts[:1], 1, **how)
        for one in ar_complete_batch(models.base, tokenizer, prompts, budget, **how):
            found.append(WayAnswer(one.text, one.token_ids, one.ended, one.seconds, max(len(one.token_ids), 1), 0))
        advance(len(found))
    return found


def cost(answers: list[WayAnswer], resamples: int, seed: int) -> dict[str, Figure]:
    """Speed of some answers. The time is that of all of them together, side by side as they ran."""
    tokens = [float(len(one.token_ids)) for one in answers]
    return {
        "tokens_per_forward": ratio(tokens, [one.forwards for one in answers], resamples, seed),
        "tokens_per_second": ratio(tokens, [one.seconds for one in answers], resamples, seed),
        "tokens": plain(sum(tokens), len(answers)),
        "edits": plain(sum(one.edits for one in answers), len(answers)),
    }


class Outcome(NamedTuple):
    """What a way gave on a task. `samples`: one record an item, for people to read."""

    way: str
    figures: dict[str, Figure]
    samples: list[dict[str, Any]]
