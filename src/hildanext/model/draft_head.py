"""The draft head of a gated adapter: it tells each draft which token comes before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A row's likeliest tokens without the draft head, which it ranks again: the head's product with these costs next to nothing.
CANDIDATES = 128


class DraftHead(nn.Module):
    """Conditions each draft on the tokens before it. Row j of a group has the state s_j and predicts with h_j + U s_j:

        s_j = silu(D [h_j ; e_j] + R s_(j-1)),    s_0 = 0

    e_j is the base's embedding of the token before the label; h and e are scaled to unit mean square. Rows of a group do
    not know each other's choice, nor the base's own next word; this recurrence tells them (a recurrent drafter as in arXiv
    2403.09919, beside rows that see the text). U and R begin at zero.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(2 * hidden, width, bias=False), nn.Linear(width, hidden, bias=False)
        self.recur = nn.Linear(width, width, bias=False)
        for zero in (self.up, self.recur):
            nn.init.zeros_(zero.weight)

    def read(self, hidden: Tensor, before: Tensor) -> Tensor:
        """D [h ; e]: hidden [..., H] of group rows; before [..., H]: embeddings of the tokens before their labels."""
        return self.read_hidden(hidden) + self.read_before(before)

    def read_hidden(self, hidden: Tensor) -> Tensor:
        """The part of D [h ; e] that h makes."""
        weight = self.down.weight[:, : hidden.shape[-1]]
        return F.linear(F.rms_norm(hidden, hidden.shape[-1:]).to(weight.dtype), weight)

    def read_before(self, before: Tensor) -> Tensor:
        """The part of D [h ; e] that e makes."""
        weight = self.down.weight[:, before.shape[-1] :]
        return F.linear(F.rms_norm(before, before.shape[-1:]).to(weight.dtype), weight)

    def states(self, read: Tensor, offsets: Tensor, k: int) -> Tensor:
        """The states s [B, Q, W] of all rows, group after group, row after row. read [B, Q, W]; offsets [B, Q], from 1 to k."""
        state = F.silu(read)
        for j in range(2, k + 1):
            before = F.pad(state, (0, 0, 1, 0))[:, :-1]  # of the row before, which has offset j - 1
            state = torch.where((offsets == j)[..., None], F.silu(read + self.recur(before)), state)
        return state

    def step(self, read: Tensor, state: Tensor | None) -> Tensor:
        """The state [W] of one row that read D [h ; e], after the state of the row before."""
        return F.silu(read if state is None else read + self.recur(state))

    def changed(self, hidden: Tensor, state: Tensor) -> Tensor:
        """h + U s."""
        change: Tensor = self.up(state)
        return hidden + change.to(hidden.dtype)


def find_draft_head(model: nn.Module) -> DraftHead | None:
    """The draft head of a model with a gated adapter; None if it was trained without one."""
    return next((module for module in model.children() if isinstance(module, DraftHead)), None)
