"""Groups of denoised rows behind anchors in a clean row: the training layout of gated adapters.

x_0 runs once through the base, causal. Behind an anchor, the column a of a clean token, stands a group of k rows at the
positions a+1 ... a+k. Its row j (from 1) sees the clean keys up to a and its own group, and predicts the token a+j+1:
the clean row a predicts a+1 already. In a *mask group* all rows hold the mask token. In an *edit group* they hold kept,
wrong and masked tokens, as in a block of LLaDA2.1 (arXiv 2602.08676, section 3).

Sources: gated LoRA for multi-token prediction (arXiv 2507.11851); dropping of far offsets, PARD (arXiv 2504.18583).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.diffusion.noise import add_noise


class Groups(NamedTuple):
    """The rows of all groups behind anchors of a micro-batch. All tensors are [B, Q]; unused rows have group -1."""

    noisy_ids: Tensor  # int64: the mask token, or in edit groups any token
    position_ids: Tensor  # int64
    anchors: Tensor  # int64: column of the anchor in its clean row
    offsets: Tensor  # int64: j, from 1
    group: Tensor  # int64: the group's number in its row, -1 for unused rows
    labels: Tensor  # int64: x_0 at column anchor + offset + 1
    wanted: Tensor  # bool: the label is allowed and in the anchor's document
    masked: Tensor  # bool: the group hides the label's token (M2T)
    corrupted: Tensor  # bool: the group holds a wrong token in its place (T2T)
    plain: Tensor  # bool: the row predicts without the draft head: in edit groups, and in a share of the mask groups
    t: Tensor  # float32: noise level of the group; 1 in mask groups

    @property
    def labels_at(self) -> Tensor:
        """Columns of the labels, [B, Q] int64. For wanted rows only."""
        return self.anchors + self.offsets + 1


def draw_anchors(doc_ids: Tensor, allowed: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """At most n different columns a of a row, sorted, whose first group row has an allowed label a+2 in a's document.

    doc_ids [L] int64, allowed [L] bool.
    """
    eligible = (allowed[2:] & (doc_ids[2:] == doc_ids[:-2])).nonzero()[:, 0]
    return eligible[torch.randperm(len(eligible), generator=generator)[:n]].sort().values


def draw_sizes(n: int, k: int, keep: float, generator: torch.Generator) -> Tensor:
    """Sizes of n groups, [n] int64 from 1 to k: row j+1 is kept with probability `keep` if row j is (PARD)."""
    kept = torch.rand(n, k - 1, generator=generator) < keep
    return 1 + kept.long().cumprod(1).sum(1)


def place_groups(
    input_ids: Tensor,
    doc_ids: Tensor,
    position_ids: Tensor,
    allowed: Tensor,
    anchors: Tensor,
    sizes: Tensor,
    width: int,
    mask_token_id: int,
) -> Groups:
    """Mask groups of `sizes` [n] behind `anchors` [n] of one row [L]. Returns tensors [width]; width >= sum(sizes)."""
    length, n_rows = len(input_ids), int(sizes.sum())
    number = torch.arange(len(anchors)).repeat_interleave(sizes)
    firsts = sizes.cumsum(0) - sizes
    offset = torch.arange(n_rows) - firsts[number] + 1
    anchor = anchors[number]
    label = anchor + offset + 1
    inside = label < length
    label = label.clamp(max=length - 1)
    wanted = inside & allowed[label] & (doc_ids[label] == doc_ids[anchor])

    def padded(values: Tensor, fill: int | float | bool) -> Tensor:
        return torch.cat([values, values.new_full((width - n_rows,), fill)])

    return Groups(
        noisy_ids=torch.full((width,), mask_token_id),
        # Behind the end of a full row there are no positions; rows there have no label.
        position_ids=padded((position_ids[anchor] + offset).clamp(max=length - 1), 0),
        anchors=padded(anchor, 0),
        offsets=padded(offset, 1),
        group=padded(number, -1),
        labels=padded(input_ids[label], 0),
        wanted=padded(wanted, False),
        masked=padded(torch.ones_like(wanted), True),
        corrupted=torch.zeros(width, dtype=torch.bool),
        plain=torch.zeros(width, dtype=torch.bool),
        t=torch.ones(width),
    )


def without_draft_head(groups: Groups, share: float, generator: torch.Generator) -> Groups:
    """Let a share of one row's groups predict without the draft head.

    Decoding takes a row's candidates from these predictions, and only ranks them with the draft head.
    """
    n = int(groups.group.max()) + 1 if len(groups.group) else 0
    chosen = torch.rand(n, generator=generator) < share
    used = groups.group >= 0
    plain = groups.plain.clone()
    plain[used] |= chosen[groups.group[used]]
    return groups._replace(plain=plain)


def edit_groups(
    groups: Groups,
    input_ids: Tensor,
    doc_ids: Tensor,
    levels: Tensor,
    *,
    mask_token_id: int,
    ordinary_ids: Tensor,
    corrupt_rate: float,
    generator: torch.Generator,
) -> Groups:
    """Turn the mask groups of one row into edit groups: each token is masked with probability t, else kept or replaced.

    levels [n] float32: the noise level t of each group. The last row's label stands behind the group and stays hidden.
    """
    length, used = len(input_ids), groups.group >= 0
    own = (groups.anchors + groups.offsets).clamp(max=length - 1)
    inside = used & (groups.anchors + groups.offsets < length) & (doc_ids[own] == doc_ids[groups.anchors])
    t = torch.ones_like(groups.t)
    t[used] = levels[groups.group[used]]
    noisy = add_noise(
        input_ids[own],
        inside,
        t,
        mask_token_id=mask_token_id,
        ordinary_ids=ordinary_ids,
        corrupt_rate=corrupt_rate,
        generator=generator,
    )
    follows = torch.zeros_like(used)  # whether the next row holds this row's label
    follows[:-1] = used[1:] & (groups.group[1:] == groups.group[:-1])
    return groups._replace(
        noisy_ids=torch.where(inside, noisy.noisy_ids, mask_token_id),
        masked=~follows | noisy.masked.roll(-1),
        corrupted=follows & noisy.corrupted.roll(-1),
        plain=used,
        t=t,
    )


def group_mask(doc_ids: Tensor, groups: Groups, causal: bool) -> Tensor:
    """What the rows of groups see: [B, Q, L + Q] bool over the keys of [x_0 ; groups], no empty row.

    doc_ids [B, L] int64. causal: a row sees the rows before it in its group, else the whole group.
    """
    columns = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    used = (groups.group >= 0)[:, :, None]
    clean = (doc_ids[:, None, :] == doc_ids.gather(1, groups.anchors)[:, :, None]) & used
    clean &= columns <= groups.anchors[:, :, None]
    own = (groups.group[:, :, None] == groups.group[:, None, :]) & used
    if causal:
        own &= groups.offsets[:, None, :] <= groups.offsets[:, :, None]
    own |= torch.eye(groups.group.shape[1], dtype=torch.bool, device=doc_ids.device)
    return torch.cat([clean, own], dim=2)
