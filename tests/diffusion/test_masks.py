"""Masks against loops written from the equations (LLaDA2.0 eq. 3 and 4)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.diffusion.masks import additive, block_causal_mask, document_mask, training_mask


@st.composite
def rows(draw):
    """doc_ids, position_ids of one row: documents of random lengths, then padding."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    padding = draw(st.integers(0, 4))
    docs = [d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    positions = [p for n in lengths for p in range(n)] + list(range(padding))
    return torch.tensor([docs]), torch.tensor([positions]), draw(st.integers(1, 9))


@given(rows())
@settings(max_examples=60, deadline=None)
def test_training_mask_is_equation_3(row):
    docs, positions, size = row
    blocks = positions // size
    length = docs.shape[1]
    mask = training_mask(docs, blocks)[0]
    for i in range(2 * length):
        for j in range(2 * length):
            qi, kj = i % length, j % length
            query_noisy, key_noisy = i < length, j < length
            b_i, b_j = int(blocks[0, qi]), int(blocks[0, kj])
            if query_noisy and key_noisy:
                allowed = b_i == b_j
            elif query_noisy:
                allowed = b_i > b_j
            elif key_noisy:
                allowed = False
            else:
                allowed = b_i >= b_j
            same = docs[0, qi] == docs[0, kj] and docs[0, qi] >= 0
            pad_itself = docs[0, qi] < 0 and i == j
            assert bool(mask[i, j]) == bool((same and allowed) or pad_itself)
    assert mask.any(dim=1).all()


@given(rows())
@settings(max_examples=40, deadline=None)
def test_document_and_block_causal_masks(row):
    docs, positions, size = row
    blocks = positions // size
    full, causal = document_mask(docs)[0], block_causal_mask(docs, blocks)[0]
    length = docs.shape[1]
    for i in range(length):
        for j in range(length):
            same = (docs[0, i] == docs[0, j] and docs[0, i] >= 0) or i == j
            assert bool(full[i, j]) == bool(same)
            assert bool(causal[i, j]) == bool(same and blocks[0, i] >= blocks[0, j])
    assert torch.equal(causal, training_mask(docs, blocks)[0, length:, length:])


def test_block_size_one_is_causal_and_the_row_is_full():
    docs, positions = torch.zeros(1, 6, dtype=torch.long), torch.arange(6)[None]
    assert torch.equal(block_causal_mask(docs, positions)[0], torch.ones(6, 6, dtype=torch.bool).tril())
    assert block_causal_mask(docs, positions // 6).all()


def test_additive_is_zero_or_the_minimum():
    mask = torch.tensor([[[True, False], [True, True]]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        made = additive(mask, dtype)
        assert made.shape == (1, 1, 2, 2)
        assert made.dtype == dtype
        assert made[0, 0, 0].tolist() == [0.0, torch.finfo(dtype).min]
