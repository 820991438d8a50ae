"""Noisy streams that share x_0 against a forward of [x_t ; x_0] for each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hildanext.config import Convention
from hildanext.diffusion.masks import streams_mask, training_mask
from hildanext.diffusion.noise import block_ids
from hildanext.evaluate.noisy_streams import denoise
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from support.models import random_lm

VOCAB, MASK = 40, 39


@pytest.fixture(scope="module")
def lms() -> dict[str, DiffusionLM]:
    return {convention: random_lm(convention, VOCAB, MASK) for convention in ("in_place", "shifted")}


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, list[Tensor], int]:
    """Rows of documents and padding, masks of some of their tokens (of none, of all), a block size."""
    length, n_rows = draw(st.integers(4, 14)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    docs, positions = torch.full((n_rows, length), -1), torch.arange(length).repeat(n_rows, 1)
    for row in range(n_rows):
        start = 0
        for document in range(draw(st.integers(1, 3))):
            end = draw(st.integers(start, length))
            docs[row, start:end] = document
            positions[row, start:end] = torch.arange(end - start)
            start = end
    ids = torch.randint(4, MASK, (n_rows, length), generator=generator)
    share = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    first = draw(st.integers(0, length))  # nothing is masked before it: a context
    allowed = (docs >= 0) & (positions > 0) & (torch.arange(length) >= first)
    masked = [
        allowed & (torch.rand(n_rows, length, generator=generator) < share) for _ in range(draw(st.integers(1, 5)))
    ]
    return Batch(list(range(n_rows)), ids, docs, positions, allowed), masked, draw(st.integers(1, 16))


@given(drawn=batches(), convention=st.sampled_from(["in_place", "shifted"]))
@settings(max_examples=150, deadline=None)
@torch.no_grad()
def test_each_stream_is_as_if_alone(
    lms: dict[str, DiffusionLM], drawn: tuple[Batch, list[Tensor], int], convention: str
) -> None:
    lm, (batch, masked, size) = lms[convention], drawn
    found = list(denoise(lm, batch, masked, size))
    assert len(found) == len(masked)
    for one, hidden in zip(masked, found, strict=True):
        noisy_ids = batch.input_ids.masked_fill(one, MASK)
        alone = lm(batch, noisy_ids, one, size)
        torch.testing.assert_close(hidden, alone, atol=2e-5, rtol=1e-4)


@given(batches())
@settings(max_examples=30, deadline=None)
def test_one_stream_of_the_whole_row_is_equation_3(drawn: tuple[Batch, list[Tensor], int]) -> None:
    batch, _, size = drawn
    blocks = block_ids(batch.position_ids, size)
    streams = torch.arange(2).repeat_interleave(blocks.shape[1])
    mask = streams_mask(batch.doc_ids.repeat(1, 2), blocks.repeat(1, 2), streams, 1)
    expected = training_mask(batch.doc_ids, blocks)
    padding = (batch.doc_ids < 0).repeat(1, 2)  # sees itself only, in either
    assert torch.equal(mask[~padding], expected[~padding])
    assert torch.equal(mask[padding].sum(1), torch.ones(int(padding.sum()), dtype=torch.long))


@pytest.mark.parametrize("convention", ["in_place", "shifted"])
def test_the_context_is_run_once(lms: dict[str, DiffusionLM], convention: Convention) -> None:
    """Four draws of 3 tokens behind 30: one forward, of the row and four times the blocks that hold them."""
    widths: list[int] = []
    lm = lms[convention]
    hook = lm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    masked = torch.zeros(1, 33, dtype=torch.bool)
    masked[0, 30:] = True
    row = torch.arange(33)[None]
    batch = Batch([0], row % 30 + 4, torch.zeros_like(row), row, masked)
    with torch.no_grad():
        list(denoise(lm, batch, [masked] * 4, 4))
    hook.remove()
    assert widths == [33 + 4 * 5]  # blocks 28 to 31 and 32
