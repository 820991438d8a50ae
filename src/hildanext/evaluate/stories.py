"""Continuations of unseen stories, scored by the AR base."""

from __future__ import annotations

from hildanext.config import Config
from hildanext.evaluate.intervals import plain, ratio, share
from hildanext.evaluate.judge import distinct_2, total_log_likelihood
from hildanext.evaluate.ways import Models, Outcome, Question, Way, complete, cost

NAME = "stories"


def evaluate(config: Config, models: Models, prompts: list[list[int]], way: Way) -> Outcome:
    """Log-likelihood per token under the base, distinct-2, and the share of continuations that end before the budget.

    Repetitive text has a high likelihood, so read the likelihood together with distinct-2.
    """
    options = config.evaluate
    answers = complete(models, way, [Question(prompt, options.story_tokens) for prompt in prompts], NAME)
    counts = [len(answer.token_ids) for answer in answers]
    log_p = [
        total_log_likelihood(models.base, prompt, answer.token_ids)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    decode = models.engine.decode_tokens
    samples = [
        {"prompt": decode(prompt), "continuation": answer.text, "log_likelihood": score, "tokens": n}
        for prompt, answer, score, n in zip(prompts, answers, log_p, counts, strict=True)
    ]
    figures = {
        "log_likelihood": ratio(log_p, counts, options.resamples, options.seed),
        # No interval: a bootstrap sample repeats texts, and repetition is what this figure measures.
        "distinct_2": plain(distinct_2([answer.token_ids for answer in answers]), len(answers)),
        "ended": share([answer.ended for answer in answers]),
    }
    return Outcome(way.name, figures | cost(answers, options.resamples, options.seed), samples)
