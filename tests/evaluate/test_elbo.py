"""The likelihood bound against the enumeration of every mask, each run through transformers' own forward."""

from __future__ import annotations

from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hildanext.config import Convention
from hildanext.data.packing import Row
from hildanext.data.rows import Rows
from hildanext.evaluate.ar_likelihood import ar_likelihood
from hildanext.evaluate.elbo import elbo, mask_pair
from hildanext.model.diffusion_lm import DiffusionLM
from support.models import random_lm

VOCAB, MASK = 40, 39
CONVENTIONS: list[Convention] = ["in_place", "shifted"]
# Documents of each row by length; what is left of the row is padding. One is a single token: nothing of it counts.
LENGTHS = [[5, 4, 1], [6], [3, 3, 3]]
LENGTH = 10


def held_out(part: float = 1.0) -> Rows:
    """Rows of random tokens, a share `part` of them supervised."""
    generator = np.random.default_rng(0)
    doc_ids = np.full((len(LENGTHS), LENGTH), -1, dtype=np.int32)
    for row, lengths in enumerate(LENGTHS):
        doc_ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    input_ids = generator.integers(4, MASK, doc_ids.shape).astype(np.int32)
    loss_mask = (doc_ids >= 0) & (generator.random(doc_ids.shape) < part)
    return Rows.of(map(Row, input_ids, doc_ids, loss_mask), LENGTH)


@pytest.fixture(params=CONVENTIONS)
def lm(request: pytest.FixtureRequest) -> DiffusionLM:
    """The vocabulary's last id is the mask token."""
    return random_lm(request.param, VOCAB, MASK)


@torch.no_grad()
def masked_loss(lm: DiffusionLM, ids: Tensor, size: int, b: int, masked: tuple[int, ...]) -> float:
    """Sum of the cross-entropies of the masked tokens of block b, behind the clean blocks of its document [n]."""
    seen = ids[: (b + 1) * size].clone()
    place, at = torch.arange(len(seen)), torch.tensor(masked)
    seen[at] = MASK
    hidden = place[:, None] // size < place[None, :] // size
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    logits = lm.model(input_ids=seen[None], attention_mask=mask[None, None], position_ids=place[None]).logits[0]
    logits[:, MASK] = -torch.inf
    logits = logits[at - 1] if lm.convention == "shifted" else logits[at]
    return F.cross_entropy(logits, ids[at], reduction="sum").item()


def enumerated(lm: DiffusionLM, rows: Rows, size: int) -> tuple[float, int]:
    """The exact bound: E over m ~ U{1..n} and over every subset of m tokens of n/m * sum CE, summed over blocks."""
    nats, tokens = 0.0, 0
    for row, lengths in enumerate(LENGTHS):
        batch = {key: value[0] for key, value in rows.batch([row]).items()}
        for doc, length in enumerate(lengths):
            place = batch["doc_ids"] == doc
            ids, supervised = batch["input_ids"][place], batch["loss_mask"][place]
            for b in range(-(-length // size)):
                block = range(b * size, min((b + 1) * size, length))
                counted = [i for i in block if i > 0 and supervised[i]]
                n = len(counted)
                tokens += n
                for m in range(1, n + 1):
                    sums = [masked_loss(lm, ids, size, b, subset) for subset in combinations(counted, m)]
                    nats += (1 / n) * (n / m) * sum(sums) / comb(n, m)
    return nats, tokens


@pytest.mark.parametrize("size", [1, 2, 3, LENGTH])
@pytest.mark.parametrize("part", [1.0, 0.7], ids=["all supervised", "some supervised"])
def test_the_bound_is_the_mean_over_every_mask(lm: DiffusionLM, size: int, part: float) -> None:
    rows = held_out(part)
    exact, tokens = enumerated(lm, rows, size)
    result = elbo(lm, rows, size, n_rows=3, batch_rows=2, pairs=150)
    assert result.tokens == tokens
    if size == 1:
        assert result.nats == pytest.approx(exact, rel=1e-5)
        assert result.standard_error < 1e-4 * exact
    else:
        assert 0 < result.standard_error < 0.02 * exact
        assert abs(result.nats - exact) < 4 * result.standard_error


def test_first_tokens_padding_and_prompts_do_not_count(lm: DiffusionLM) -> None:
    rows = held_out()
    assert elbo(lm, rows, 2, n_rows=3, batch_rows=3).tokens == sum(n - 1 for row in LENGTHS for n in row)
    assert elbo(lm, rows, 2, n_rows=1, batch_rows=3).tokens == sum(n - 1 for n in LENGTHS[0])
    assert elbo(lm, rows, 2, n_rows=99, batch_rows=3).tokens == ar_likelihood(lm.model, rows, 99, 3).tokens
    some = held_out(0.5)
    batch = some.batch([0, 1, 2])
    assert elbo(lm, some, 2, n_rows=3, batch_rows=3).tokens == (batch["loss_mask"] & (batch["position_ids"] > 0)).sum()


def test_the_draws_belong_to_the_row_and_the_seed(lm: DiffusionLM) -> None:
    rows = held_out()
    alone = elbo(lm, rows, 3, n_rows=3, batch_rows=1, seed=5)
    assert elbo(lm, rows, 3, n_rows=3, batch_rows=3, seed=5).nats == pytest.approx(alone.nats, rel=1e-6)
    assert elbo(lm, rows, 3, n_rows=3, batch_rows=1, seed=6).nats != pytest.approx(alone.nats, rel=1e-6)


@pytest.mark.parametrize("lm", ["shifted"], indirect=True)
def test_the_standard_error_is_the_spread_of_the_mean(lm: DiffusionLM) -> None:
    rows = held_out()
    runs = [elbo(lm, rows, 3, n_rows=3, batch_rows=3, pairs=6, seed=seed) for seed in range(40)]
    spread = np.std([run.nats for run in runs], ddof=1)
    assert spread == pytest.approx(np.mean([run.standard_error for run in runs]), rel=0.35)  # 40 runs: 11 % each way


# --- the draw -------------------------------------------------------------------------------------------------------


@st.composite
def rows_of_blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """doc_ids, blocks, allowed of one row; padding is document -1 and never allowed."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    padding, size = draw(st.integers(0, 3)), draw(st.integers(1, 12))
    doc_ids = [d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    positions = [p for n in [*lengths, padding] for p in range(n)]
    allowed = [draw(st.booleans()) and doc >= 0 for doc in doc_ids]
    return torch.tensor(doc_ids), torch.tensor(positions) // size, torch.tensor(allowed)


@given(row=rows_of_blocks(), seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_each_block_masks_one_to_all_of_its_allowed_tokens(row: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    doc_ids, blocks, allowed = row
    pair = mask_pair(doc_ids, blocks, allowed, torch.Generator().manual_seed(seed))
    for masked, weight in pair:
        assert not (masked & ~allowed).any()
        for doc, block in {*zip(doc_ids.tolist(), blocks.tolist(), strict=True)}:
            here = (doc_ids == doc) & (blocks == block)
            n, m = int((allowed & here).sum()), int((masked & here).sum())
            assert (1 <= m <= n) if n else m == 0
            if n:
                assert torch.allclose(weight[here], torch.tensor(n / m))
    # The second draw is the first turned around: together they mask every token, one in each block twice.
    assert ((pair[0][0] | pair[1][0]) == allowed).all()
    twice = pair[0][0] & pair[1][0]
    assert int(twice.sum()) == len({*zip(doc_ids[allowed].tolist(), blocks[allowed].tolist(), strict=True)})


def test_every_count_and_every_subset_of_a_count_is_as_likely() -> None:
    """20,000 documents of one block of five tokens, the second not allowed: n = 4. In both draws of a pair."""
    n_documents, n = 20_000, 4
    doc_ids = torch.arange(n_documents).repeat_interleave(5)
    allowed = torch.tensor([True, False, True, True, True]).repeat(n_documents)
    for masked, _ in mask_pair(doc_ids, torch.zeros_like(doc_ids), allowed, torch.Generator().manual_seed(0)):
        drawn = masked.view(n_documents, 5)[:, [0, 2, 3, 4]].long() @ torch.tensor([1, 2, 4, 8])
        rates = (torch.bincount(drawn, minlength=16) / n_documents).tolist()
        for subset, rate in enumerate(rates):
            m = subset.bit_count()
            expected = 1 / n / comb(n, m) if m else 0.0
            assert abs(rate - expected) <= 4.5 * (expected * (1 - expected) / n_documents) ** 0.5, f"{subset:04b}"


@pytest.mark.parametrize("n", [3, 4, 5])
def test_a_pair_varies_less_than_two_free_draws(lm: DiffusionLM, n: int) -> None:
    """Every pair there is, for blocks of n counted tokens: its mean is the bound, its variance below half that of a draw."""
    generator = torch.Generator().manual_seed(1)
    together = apart = 0.0
    for _ in range(6):
        ids = torch.randint(4, MASK, (n + 1,), generator=generator)
        sums = {
            subset: n / m * masked_loss(lm, ids, n + 1, 0, subset)
            for m in range(1, n + 1)
            for subset in combinations(range(1, n + 1), m)
        }
        drawn = [
            (sums[tuple(sorted(order[:m]))], sums[tuple(sorted(order[m - 1 :]))])
            for order in permutations(range(1, n + 1))
            for m in range(1, n + 1)
        ]
        halves = np.array(drawn)
        assert halves[:, 0].mean() == pytest.approx(halves[:, 1].mean(), rel=1e-9)
        together += halves.mean(1).var()
        apart += halves[:, 0].var() / 2
    assert together < 0.9 * apart
