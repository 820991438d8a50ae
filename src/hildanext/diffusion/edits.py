"""Edits that insert and delete: labels of a draft by its alignment with the target, and what a label does to a block.

A draft x of a block is one token too long or too short somewhere; substitution would have to rewrite all behind the
fault. Two tokens of the vocabulary are predictions that no text holds (LLaDA2.2):

    DELETE at i   the token x_i is dropped, and what stands behind it moves left
    INSERT at i   a mask is put before x_i, and what stands from i on moves right

Then the block is cut to its size, or filled with masks. Related: Levenshtein Transformer (arXiv 1905.11006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.diffusion.noise import Noisy, block_starts, wrong_tokens

RUN_ON = 0.3  # probability that a run of tokens, dropped or doubled in training, has one token more


class EditTokens(NamedTuple):
    """The ids that edits need."""

    mask: int
    delete: int
    insert: int


class Edited(NamedTuple):
    """A block after its edits."""

    tokens: list[int]  # as many as before
    places: list[int | None]  # where each token went; None: deleted; an index beyond the block: cut off
    rest: list[int]  # the tokens that were cut off, and what the block did not take of the tokens behind it


Script = list[tuple[int | None, int | None]]


def align(x: Sequence[int], y: Sequence[int], mask: int) -> Script:
    """The best script from a draft x to a target y: steps (i, j) in order, i None for a missing and j None for a surplus token.

    It has the most matches: equal tokens, or a mask, which matches any target token (so it is a longest common
    subsequence); among these the most pairs, that is the fewest insertions and deletions; among these the most equal
    tokens. Of the scripts that remain, the first step is a pair if it can be, else a deletion; and so on for each step.
    """
    n, m = len(x), len(y)
    unit = min(n, m) + 1
    equal, filled = unit * unit + unit + 1, unit * unit + unit
    best = [[0] * (m + 1) for _ in range(n + 1)]  # score of the best script from x[i:] to y[j:]
    for i in range(n - 1, -1, -1):
        row, below, token = best[i], best[i + 1], x[i]
        other = filled if token == mask else unit
        for j in range(m - 1, -1, -1):
            pair = below[j + 1] + (equal if token == y[j] else other)
            row[j] = max(pair, below[j], row[j + 1])
    script: Script = []
    i = j = 0
    while i < n and j < m:
        worth = equal if x[i] == y[j] else filled if x[i] == mask else unit
        if best[i][j] == best[i + 1][j + 1] + worth:
            script.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            script.append((i, None))
            i += 1
        else:
            script.append((None, j))
            j += 1
    return script + [(k, None) for k in range(i, n)] + [(None, k) for k in range(j, m)]


def edit_labels(x: Sequence[int], y: Sequence[int], tokens: EditTokens) -> list[int]:
    """What a model should predict at each token of a draft x of the target y: len(x) labels.

    Its target token if it has one, which keeps, replaces or fills it; DELETE if it is surplus; INSERT, in place of
    keeping it, if target tokens are missing before it: one mask in each gap and round. Missing tokens behind the last
    kept one need no label, since the block is filled with masks. Surplus tokens at the end that the insertions will push
    out of the block are kept: they belong to the next one.
    """
    script = align(x, y, tokens.mask)
    labels, missing = [tokens.delete] * len(x), False
    for i, j in script:
        if i is None:
            missing = True
        elif j is not None:
            inserts = missing and x[i] == y[j]
            labels[i] = tokens.insert if inserts else y[j]
            missing = missing and not inserts
    pushed_out = sum(i is None for i, _ in script)
    for i, j in reversed(script):
        if i is None or j is not None or not pushed_out:
            break
        if x[i] != tokens.mask:
            labels[i], pushed_out = x[i], pushed_out - 1
    return labels


def apply_edits(x: Sequence[int], labels: Sequence[int], tokens: EditTokens, behind: Sequence[int] = ()) -> Edited:
    """The block x after its edits. Its size stays: what is too long is cut, what is too short takes tokens from `behind`,
    those that follow the block where it is a part of a longer draft, and then masks.
    """
    new: list[int] = []
    places: list[int | None] = []
    for token, label in zip(x, labels, strict=True):
        if label == tokens.insert:
            new.append(tokens.mask)
        places.append(None if label == tokens.delete else len(new))
        if label != tokens.delete:
            new.append(token if label == tokens.insert else label)
    size = len(x)
    new += behind
    return Edited(new[:size] + [tokens.mask] * (size - len(new)), places, new[size:])


def edit_noise(
    input_ids: Tensor,
    allowed: Tensor,
    doc_ids: Tensor,
    block: Tensor,
    pinned: Tensor,
    noisy: Noisy,
    *,
    tokens: EditTokens,
    ordinary_ids: Tensor,
    deletion_rate: float,
    insertion_rate: float,
    corrupt_rate: float,
    generator: torch.Generator,
) -> Noisy:
    """Drop and add tokens of a draft, and label it by its alignment with x_0. All tensors [L], one row, on the CPU.

    A block's draft is, with equal odds, x_t or its clean tokens, each replaced by another ordinary one with probability
    `corrupt_rate`. At each of its tokens a run of observed tokens to drop begins with probability `deletion_rate`; before
    each observed one, another ordinary token or once more the run of clean tokens before it is added with probability
    `insertion_rate`. A run goes on with probability RUN_ON, since a word may have several tokens. The block then takes
    the tokens that follow it in the text, or is cut. The allowed tokens of a block are aligned with its own clean tokens.
    `pinned` [L] bool: positions whose prediction does not depend on the block; they are neither dropped nor shifted.
    """
    draws = torch.rand(6, len(input_ids), generator=generator)
    dropped, added = run_on((draws[0] < deletion_rate).tolist(), draws[5]), (draws[1] < insertion_rate).tolist()
    others = [wrong_tokens(input_ids, ordinary_ids, generator) for _ in range(2)]
    surplus, repeats, length = others[0].tolist(), (draws[2] < 0.5).tolist(), run_lengths(draws[5])
    replaced = torch.where(draws[3] < corrupt_rate, others[1], input_ids).tolist()
    from_clean = (draws[4] < 0.5).tolist()
    x_t, y, fixed = noisy.noisy_ids.tolist(), input_ids.tolist(), pinned.tolist()
    ids, labels = list(x_t), list(y)
    for start, end, run_end in segments(allowed, doc_ids, block):
        x = replaced if from_clean[start] else x_t
        if fixed[start]:
            ids[start] = x[start]
            start += 1
        draft: list[int] = []
        position = start
        while len(draft) < end - start and position < run_end:
            token, is_observed = x[position], x[position] != tokens.mask
            if is_observed and added[position]:
                draft += y[max(0, position - length[position]) : position] if repeats[position] else [surplus[position]]
            if not (is_observed and dropped[position]):
                draft.append(token)
            position += 1
        draft = (draft + [tokens.mask] * (end - start))[: end - start]
        ids[start:end], labels[start:end] = draft, edit_labels(draft, y[start:end], tokens)
    noisy_ids, label_ids = torch.tensor(ids), torch.tensor(labels)
    masked = allowed & (noisy_ids == tokens.mask)
    return Noisy(noisy_ids, masked, allowed & ~masked & (noisy_ids != label_ids), noisy.t, label_ids)


def segments(allowed: Tensor, doc_ids: Tensor, block: Tensor) -> list[tuple[int, int, int]]:
    """The allowed tokens of each block: (start, end, end of the run of allowed tokens in its document). Tensors [L]."""
    opens_run = torch.ones_like(allowed)
    opens_run[1:] = ~allowed[:-1] | (doc_ids[1:] != doc_ids[:-1])
    run, starts = opens_run.cumsum(0).tolist(), (opens_run | block_starts(doc_ids, block)).tolist()
    spans: list[list[int]] = []
    run_ends: dict[int, int] = {}
    for position in allowed.nonzero()[:, 0].tolist():
        if starts[position]:
            spans.append([position, position])
        spans[-1][1] = run_ends[run[position]] = position + 1
    return [(start, end, run_ends[run[start]]) for start, end in spans]


def run_on(begins: list[bool], draws: Tensor) -> list[bool]:
    """Whether each of n tokens belongs to a run. begins: where runs begin; draws [n] in [0, 1): whether they go on."""
    found = list[bool]()
    for begin, goes_on in zip(begins, (draws < RUN_ON).tolist(), strict=True):
        found.append(begin or (goes_on and bool(found) and found[-1]))
    return found


def run_lengths(draws: Tensor) -> list[int]:
    """Lengths of n runs, 1 or more: longer than k with probability RUN_ON ** k. draws [n] in [0, 1)."""
    return (1 + (draws.clamp_min(1e-6).log() / torch.tensor(RUN_ON).log()).long()).tolist()
