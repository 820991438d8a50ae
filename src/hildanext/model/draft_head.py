"""The draft head of a gated adapter: it tells each draft which token comes before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A row's likeliest tokens without the draft head, which it ranks again: the head's product with these costs next to nothing.
CANDIDATES = 128


class DraftHead(nn.Module):
    """Conditions each draft on the token before it: h + U silu(D [h ; e]), with rows h and e scaled to unit mean square.

    Rows of a group do not know each other's choice, nor the base's own next word; this map tells them. U begins at zero.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(2 * hidden, width, bias=False), nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """hidden [n, H]: of group rows; before [n, H]: base embeddings of the tokens before their labels -> [n, H]."""
        size = hidden.shape[-1:]
        scaled = torch.cat([F.rms_norm(hidden, size), F.rms_norm(before.to(hidden.dtype), size)], -1)
        change: Tensor = self.up(F.silu(self.down(scaled.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


def find_draft_head(model: nn.Module) -> DraftHead | None:
    """The draft head of a model with a gated adapter; None if it was trained without one."""
    return next((module for module in model.children() if isinstance(module, DraftHead)), None)
