"""Likelihoods of continuations: the chain against single forwards and the AR model, the bound against every mask."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hildanext.config import Convention
from hildanext.data.packing import Row
from hildanext.data.rows import Rows
from hildanext.decoding.settings import Settings
from hildanext.errors import NonFiniteLogitsError
from hildanext.evaluate.ar_likelihood import ar_likelihood
from hildanext.evaluate.elbo import elbo
from hildanext.evaluate.infilling import infill
from hildanext.evaluate.judge import total_log_likelihood
from hildanext.evaluate.likelihood import TOKENS_PER_FORWARD, bound, chain, score
from hildanext.model.ar_generate import ar_complete, ar_complete_batch
from hildanext.model.diffusion_lm import DiffusionLM
from support.models import make_tokenizer, random_llama, random_lm

VOCAB, MASK = 40, 39
PAIRS = [([5, 6, 7], [8, 9, 10, 11]), ([4], [12, 13]), ([20, 21, 22, 23, 24], [25]), ([30, 31], [32, 33, 34])]
CONVENTIONS: list[Convention] = ["in_place", "shifted"]


@pytest.fixture(params=CONVENTIONS)
def lm(request: pytest.FixtureRequest) -> DiffusionLM:
    """The vocabulary's last id is the mask token."""
    return random_lm(request.param, VOCAB, MASK)


@torch.no_grad()
def masked_forward(lm: DiffusionLM, ids: list[int], masked: tuple[int, ...], size: int) -> Tensor:
    """Logits at the masked places, by transformers' own forward over the text up to the masked block's end."""
    seen = torch.tensor(ids)
    seen[list(masked)] = MASK
    place = torch.arange(len(ids))
    hidden = place[:, None] // size < place[None, :] // size
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    logits = lm.model(input_ids=seen[None], attention_mask=mask[None, None], position_ids=place[None]).logits[0]
    logits[:, MASK] = -torch.inf
    at = torch.tensor(masked)
    return logits[at - 1 if lm.convention == "shifted" else at]


def test_the_chain_is_a_forward_for_each_token(lm: DiffusionLM) -> None:
    for (context, target), found in zip(PAIRS, chain(lm, PAIRS, [0, 1, 2, 3]), strict=True):
        ids, log_p, greedy = context + target, 0.0, True
        for i in range(len(context), len(ids)):
            logits = masked_forward(lm, ids[: i + 1], (i,), 1)[0]
            log_p += logits.log_softmax(-1)[ids[i]].item()
            greedy &= logits.argmax().item() == ids[i]
        assert found.log_p == pytest.approx(log_p, abs=1e-4)
        assert found.standard_error == 0
        assert found.is_greedy is greedy


def test_nan_logits_are_an_error_in_every_measurement(lm: DiffusionLM, subtests: pytest.Subtests) -> None:
    base, tokenizer = random_llama(VOCAB), make_tokenizer()
    for model in (base, lm.model):
        model.model.norm.weight.data[0] = torch.nan
    row = Row(np.arange(4, 10, dtype=np.int32), np.zeros(6, dtype=np.int32), np.ones(6, dtype=bool))
    rows, wanted = Rows.of([row], 6), Settings("Q_MODE", 0.7, 0.5, 4, 4, 8, 0.0, 0)
    measurements: dict[str, Callable[[], object]] = {
        "exact": lambda: chain(lm, PAIRS, [0, 1, 2, 3]),
        "bound": lambda: bound(lm, PAIRS, [0, 1, 2, 3], 2, draws=2, seed=0),
        "bits per byte, bound": lambda: elbo(lm, rows, 2, n_rows=1, batch_rows=1),
        "bits per byte, base": lambda: ar_likelihood(base, rows, 1, 1),
        "quality of a text": lambda: total_log_likelihood(base, [5], [6, 7]),
        "infilling": lambda: infill(lm, [5, 6, 7, 8, 9], range(2, 4), wanted),
        "greedy completion": lambda: ar_complete(base, tokenizer, [5, 6], 4),
        "sampled completion": lambda: ar_complete_batch(base, tokenizer, [[5, 6], [7]], 4, temperature=1.0),
    }
    for name, measure in measurements.items():
        with subtests.test(name), pytest.raises(NonFiniteLogitsError, match="logits are NaN or infinite"):
            measure()


def test_the_most_likely_continuation_is_greedy(lm: DiffusionLM) -> None:
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(masked_forward(lm, [*ids, 0], (len(ids),), 1)[0].argmax()))
    changed = [*ids[:-1], ids[-1] - 1 if ids[-1] else 1]
    best, other = chain(lm, [(ids[:3], ids[3:]), (ids[:3], changed[3:])], [0, 1])
    assert (best.is_greedy, other.is_greedy) == (True, False)


@pytest.mark.parametrize("lm", ["shifted"], indirect=True)
def test_shifted_blocks_of_one_are_the_ar_model(lm: DiffusionLM) -> None:
    """Whatever an AR base gives a text through its own forward, the chain gives without any conversion."""
    for (context, target), found in zip(PAIRS, chain(lm, PAIRS, [0, 1, 2, 3]), strict=True):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
        logits[:, MASK] = -torch.inf
        expected = -F.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
        assert found.log_p == pytest.approx(expected, abs=1e-4)


def enumerated(lm: DiffusionLM, context: list[int], target: list[int], size: int) -> float:
    """The bound without chance: for each block the mean over m and over every subset of m continuation tokens."""
    ids, nats = context + target, 0.0
    for start in range(0, len(ids), size):
        block = ids[: start + size]
        counted = [i for i in range(start, len(block)) if i >= len(context)]
        n = len(counted)
        for m in range(1, n + 1):
            for masked in combinations(counted, m):
                logits = masked_forward(lm, block, masked, size)
                ce = F.cross_entropy(logits, torch.tensor([ids[i] for i in masked]), reduction="sum").item()
                nats += ce / m / comb(n, m)
    return nats


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_bound_is_the_mean_over_every_mask(lm: DiffusionLM, size: int) -> None:
    found = bound(lm, PAIRS, [0, 1, 2, 3], size, draws=150, seed=0)
    for (context, target), one in zip(PAIRS, found, strict=True):
        exact = enumerated(lm, context, target, size)
        assert one.is_greedy is None
        assert abs(-one.log_p - exact) < 4 * one.standard_error + 1e-4


def test_blocks_of_one_bound_exactly(lm: DiffusionLM) -> None:
    exact, bounds = chain(lm, PAIRS, [0, 1, 2, 3]), bound(lm, PAIRS, [0, 1, 2, 3], 1, draws=2, seed=0)
    assert [one.log_p for one in bounds] == pytest.approx([one.log_p for one in exact], abs=1e-4)
    assert max(one.standard_error for one in bounds) < 1e-4


@pytest.mark.parametrize("block_size", [None, 3])
def test_figures_do_not_depend_on_the_batch(lm: DiffusionLM, block_size: int | None, monkeypatch) -> None:
    together = score(lm, PAIRS, "t", block_size=block_size, draws=3, seed=7)
    monkeypatch.setattr("hildanext.evaluate.likelihood.TOKENS_PER_FORWARD", 1)
    alone = score(lm, PAIRS, "t", block_size=block_size, draws=3, seed=7)
    assert sum(len(c) + len(t) for c, t in PAIRS) < TOKENS_PER_FORWARD
    assert [s.log_p for s in alone] == pytest.approx([s.log_p for s in together], abs=1e-4)
    other = score(lm, PAIRS, "t", block_size=block_size, draws=3, seed=8)
    assert ([s.log_p for s in other] == pytest.approx([s.log_p for s in together], abs=1e-4)) is (block_size is None)


def test_the_standard_error_is_the_spread_over_seeds(lm: DiffusionLM) -> None:
    runs = [bound(lm, PAIRS[:1], [0], 8, draws=8, seed=seed)[0] for seed in range(60)]
    spread = torch.tensor([run.log_p for run in runs]).std().item()
    mean = sum(run.standard_error for run in runs) / len(runs)
    assert spread == pytest.approx(mean, rel=0.3)  # 60 runs: 9 % each way
