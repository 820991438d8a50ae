"""Continuations of stories that training has not seen, judged by the AR parent."""

from __future__ import annotations

from hildanext.config import Config
from hildanext.evaluate.intervals import plain, ratio, share
from hildanext.evaluate.judge import distinct_2, parent_log_likelihood
from hildanext.evaluate.ways import Models, Outcome, Question, Way, answer, cost

NAME = "stories"


def evaluate(config: Config, models: Models, prompts: list[list[int]], way: Way) -> Outcome:
    """Mean log-likelihood a token under the parent, variety, and the share that ends by itself.

    What repeats itself is likely: the first figure means nothing without the second.
    """
    how = config.evaluate
    answers = answer(models, way, [Question(prompt, how.story_tokens) for prompt in prompts], NAME)
    counts = [len(one.token_ids) for one in answers]
    log_p = [
        parent_log_likelihood(models.base, prompt, one.token_ids) * len(one.token_ids) if one.token_ids else 0.0
        for prompt, one in zip(prompts, answers, strict=True)
    ]
    decode = models.engine.decode_tokens
    samples = [
        {"prompt": decode(prompt), "continuation": one.text, "log_likelihood": score, "tokens": n}
        for prompt, one, score, n in zip(prompts, answers, log_p, counts, strict=True)
    ]
    figures = {
        "log_likelihood": ratio(log_p, counts, how.resamples, how.seed),
        # No interval: a bootstrap sample holds texts twice, which is just what is measured.
        "distinct_2": plain(distinct_2([one.token_ids for one in answers]), len(answers)),
        "ended": share([one.ended for one in answers]),
    }
    return Outcome(way.name, figures | cost(answers, how.resamples, how.seed), samples)
