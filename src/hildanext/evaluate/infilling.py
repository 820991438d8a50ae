"""Infilling: fill a masked span in the middle of a text, with both sides visible to the diffusion model.

The whole text is one block under the document mask (LLaDA2.0 eq. 4), as in the stable phase of a conversion whose peak
block is the full row. A checkpoint trained on shorter blocks only has never seen this mask. There is no cache: every
pass is a forward over the whole text.
"""

from __future__ import annotations

import math
import time

import torch

from hildanext.config import Config
from hildanext.decoding.rule import edit_step, propose
from hildanext.decoding.settings import Settings, most_passes
from hildanext.diffusion.noise import sample_generator
from hildanext.errors import NonFiniteLogitsError
from hildanext.evaluate.intervals import mean, share
from hildanext.evaluate.judge import mean_log_likelihood
from hildanext.evaluate.ways import Models, Outcome, Question, TimedAnswer, Way, complete, cost
from hildanext.model.backbone import check_length
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.progress import progress

NAME = "infilling"


@torch.inference_mode()
def infill(lm: DiffusionLM, tokens: list[int], span: range, settings: Settings) -> tuple[list[int], int, int]:
    """Denoise `tokens[span]` greedily, given both sides; returns (tokens of the span, forwards, edits).

    Uses the decode rule and its thresholds (`edit_step`); tokens outside the span never change. A `shifted` model
    cannot predict a text's first token, so the span must not start at 0. Raises NonFiniteLogitsError.
    """
    text = list(tokens)
    text[span.start : span.stop] = [lm.mask_token_id] * len(span)
    positions = torch.arange(len(text), device=lm.device)[None]
    wanted = (positions >= span.start) & (positions < span.stop)
    forwards = edits = post_steps = 0
    limit = most_passes(len(span), settings)
    while True:
        ids = torch.tensor([text], device=lm.device)
        hidden = lm(Batch([0], ids, torch.zeros_like(ids), positions, wanted), ids, wanted, len(text))
        proposed, confidence = propose(
            lm.head(hidden), mask_token_id=lm.mask_token_id, vocab_size=lm.vocab_size, holes=lm.holes
        )
        sure = confidence.tolist()
        if math.isnan(sum(sure)):
            raise NonFiniteLogitsError("infilling")
        before = text[span.start : span.stop]
        was_clean = lm.mask_token_id not in before
        after, _, edited = edit_step(
            before,
            proposed.tolist(),
            sure,
            [True] * len(span),
            mask_token_id=lm.mask_token_id,
            tau_mask=settings.tau_mask,
            tau_edit=settings.tau_edit,
        )
        text[span.start : span.stop] = after
        forwards, edits, post_steps = forwards + 1, edits + len(edited), post_steps + was_clean
        settled = settings.tau_edit is None or (was_clean and not edited) or post_steps >= settings.max_post_steps
        settled |= forwards >= limit  # a pass drafts at least one mask, so none is left then
        if lm.mask_token_id not in after and settled:
            return after, forwards, edits


def _spans(texts: list[list[int]], length: int, seed: int) -> list[range]:
    """A random span for each text with at least one token on both sides; seeded by (seed, index of the text)."""
    found = []
    for index, text in enumerate(texts):
        generator = sample_generator(seed, index, "span")
        start = 1 + int(torch.randint(len(text) - length - 1, (1,), generator=generator))
        found.append(range(start, start + length))
    return found


def _fill(models: Models, way: Way, texts: list[list[int]], spans: list[range]) -> list[TimedAnswer]:
    if way.settings is None:
        # The AR base sees the left side only and writes as many tokens as the span has.
        questions = [Question(text[: span.start], len(span)) for text, span in zip(texts, spans, strict=True)]
        return complete(models, way, questions, NAME)
    answers = []
    with progress(f"{NAME}, {way.name}", len(texts), "answers") as advance:
        infill(models.lm, texts[0], spans[0], way.settings)  # warm-up
        for text, span in zip(texts, spans, strict=True):
            began = time.perf_counter()
            ids, forwards, edits = infill(models.lm, text, span, way.settings)
            seconds = time.perf_counter() - began
            answers.append(TimedAnswer(models.engine.decode_tokens(ids), ids, False, seconds, forwards, edits))
            advance(len(answers))
    return answers


def evaluate(config: Config, models: Models, texts: list[list[int]], way: Way) -> Outcome:
    """Share of spans restored exactly, share of their tokens, and the base's mean log-likelihood of the whole text."""
    options = config.evaluate
    check_length(models.lm.model, options.infill_tokens, "evaluate.infill_tokens")
    spans = _spans(texts, options.span, options.seed)
    answers = _fill(models, way, texts, spans)
    exact, right, log_p, samples = [], [], [], []
    for text, span, answer in zip(texts, spans, answers, strict=True):
        truth = text[span.start : span.stop]
        whole = [*text[: span.start], *answer.token_ids, *text[span.stop :]]
        exact.append(answer.token_ids == truth)
        # strict=False: an AR answer that ended early is shorter than the span.
        right.append(sum(a == b for a, b in zip(answer.token_ids, truth, strict=False)) / len(span))
        log_p.append(mean_log_likelihood(models.base, whole[:1], whole[1:]))
        decode = models.engine.decode_tokens
        sides = {"left": decode(text[: span.start]), "right": decode(text[span.stop :])}
        samples.append(sides | {"span": decode(truth), "filled": answer.text, "log_likelihood": log_p[-1]})
    figures = {
        "exact_match": share(exact),
        "token_match": mean(right, options.resamples, options.seed),
        "log_likelihood": mean(log_p, options.resamples, options.seed),
    }
    return Outcome(way.name, figures | cost(answers, options.resamples, options.seed), samples)
