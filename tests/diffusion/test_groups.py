"""Groups behind anchors, against loops that follow the definition token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.diffusion.groups import draw_anchors, draw_sizes, edit_groups, group_mask, place_groups

MASK = 99


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    """input_ids, doc_ids, position_ids, allowed of a row of a few documents and padding."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    padding = draw(st.integers(0, 4))
    docs = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    positions = [p for n in lengths for p in range(n)] + list(range(padding))
    allowed = [draw(st.booleans()) and doc >= 0 for doc in docs]
    ids = torch.arange(len(docs)) + 1
    return ids, torch.tensor(docs), torch.tensor(positions), torch.tensor(allowed)


@given(rows(), st.integers(1, 4), st.integers(1, 12), st.floats(0.1, 1.0), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_a_group_row_predicts_the_allowed_token_after_the_next_of_its_document(row, k, n, keep, seed):
    ids, docs, positions, allowed = row
    generator = torch.Generator().manual_seed(seed)
    anchors = draw_anchors(docs, allowed, n, generator)
    possible = [a for a in range(len(ids) - 2) if allowed[a + 2] and docs[a + 2] == docs[a]]
    assert set(anchors.tolist()) <= set(possible)
    assert len(anchors) == min(n, len(possible))
    sizes = draw_sizes(len(anchors), k, keep, generator)
    assert all(1 <= size <= k for size in sizes.tolist())
    groups = place_groups(ids, docs, positions, allowed, anchors, sizes, n * k, MASK)
    expected = [(a, j) for a, size in zip(anchors.tolist(), sizes.tolist(), strict=True) for j in range(1, size + 1)]
    used = int((groups.group >= 0).sum())
    assert used == len(expected)
    for q, (a, j) in enumerate(expected):
        label = a + j + 1
        inside = label < len(ids) and bool(docs[label] == docs[a]) and bool(allowed[label])
        assert bool(groups.wanted[q]) == inside
        assert groups.noisy_ids[q] == MASK
        if inside:
            assert groups.labels[q] == ids[label]
            assert groups.position_ids[q] == positions[a + j]
            assert groups.labels_at[q] == label
    assert not groups.wanted[used:].any()


@given(rows(), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_a_group_sees_its_anchors_document_up_to_the_anchor_and_itself(row, k, n, causal, seed):
    ids, docs, positions, allowed = row
    generator = torch.Generator().manual_seed(seed)
    anchors = draw_anchors(docs, allowed, n, generator)
    sizes = draw_sizes(len(anchors), k, 0.6, generator)
    groups = place_groups(ids, docs, positions, allowed, anchors, sizes, n * k, MASK)
    seen = group_mask(docs[None], type(groups)(*(x[None] for x in groups)), causal)[0]
    for q in range(n * k):
        a, mine = int(groups.anchors[q]), int(groups.group[q])
        clean = {c for c in range(len(ids)) if mine >= 0 and docs[c] == docs[a] and c <= a}
        own = {
            o
            for o in range(n * k)
            if o == q
            or (mine >= 0 and groups.group[o] == mine and (not causal or groups.offsets[o] <= groups.offsets[q]))
        }
        assert set(seen[q].nonzero()[:, 0].tolist()) == clean | {len(ids) + o for o in own}


@given(rows(), st.integers(2, 5), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_an_edit_group_holds_kept_wrong_and_masked_tokens(row, k, seed):
    ids, docs, positions, allowed = row
    generator = torch.Generator().manual_seed(seed)
    anchors = draw_anchors(docs, allowed, 4, generator)
    sizes = torch.full((len(anchors),), k)
    plain = place_groups(ids, docs, positions, allowed, anchors, sizes, 4 * k, MASK)
    levels = torch.rand(len(anchors), generator=generator)
    groups = edit_groups(
        plain,
        ids,
        docs,
        levels,
        mask_token_id=MASK,
        ordinary_ids=torch.arange(40),
        corrupt_rate=0.5,
        generator=generator,
    )
    for name in ("position_ids", "anchors", "offsets", "group", "labels", "wanted"):
        assert torch.equal(getattr(groups, name), getattr(plain, name))
    for q in range(len(anchors) * k):
        a, j = int(groups.anchors[q]), int(groups.offsets[q])
        assert groups.t[q] == levels[groups.group[q]]
        column = a + j
        if column >= len(ids) or docs[column] != docs[a]:
            assert groups.noisy_ids[q] == MASK
        if j == k:  # nothing in the group shows the last row's label
            assert groups.masked[q]
            assert not groups.corrupted[q]
        elif column + 1 < len(ids) and docs[column + 1] == docs[a]:
            shown = int(groups.noisy_ids[q + 1])
            assert bool(groups.masked[q]) == (shown == MASK)
            assert bool(groups.corrupted[q]) == (shown not in (MASK, int(ids[column + 1])))
