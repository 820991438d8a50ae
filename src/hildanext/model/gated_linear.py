"""A linear layer whose low-rank change acts on chosen rows only."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hildanext.model.backbone import weight_matrix
from hildanext.model.low_rank import LowRank, low_rank_product


class Gate:
    """Which rows of the next forward the change acts on; shared by all layers of a model."""

    def __init__(self) -> None:
        self.rows: Tensor | Literal["all"] | None = "all"  # [B, W, 1] of 0 and 1; None: no row, the layer is the base's


class GatedLinear(nn.Module):
    """W x + g * scaling * B A x around the base's own layer, which may be quantized."""

    def __init__(self, base: nn.Module, low_rank: LowRank, gate: Gate, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.low_rank, self.gate, self.dropout = base, low_rank, gate, dropout

    @property
    def weight(self) -> Tensor:
        """The frozen matrix, without the change."""
        return weight_matrix(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """[B, W, n_in] -> [B, W, n_out]."""
        rows, low_rank = self.gate.rows, self.low_rank
        if rows is None:
            return self.base(x)
        if rows == "all" and type(self.base) is nn.Linear and not self.dropout:
            return low_rank_product(x, self.base.weight, self.base.bias, low_rank.A, low_rank.B, low_rank.scaling)
        result: Tensor = self.base(x)
        low = F.linear(F.dropout(x, self.dropout, self.training).to(low_rank.A.dtype), low_rank.A)
        if isinstance(rows, Tensor):
            low = low * rows
        change = F.linear(low, low_rank.B)
        if low_rank.scaling != 1.0:  # decoding has it in B already
            change = low_rank.scaling * change
        return result + change.to(result.dtype)


class BaseHead(nn.Module):
    """The output head of a gated model. It never predicts the mask token, which the base's vocabulary does not have."""

    def __init__(self, base: nn.Module, mask_token_id: int) -> None:
        super().__init__()
        self.base, self.mask_token_id = base, mask_token_id

    @property
    def weight(self) -> Tensor:
        """The matrix [V, H]."""
        return weight_matrix(self.base)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], -inf at the mask token."""
        logits: Tensor = self.base(hidden)
        logits[..., self.mask_token_id] = -torch.inf
        return logits


def find_gate(model: nn.Module) -> Gate | None:
    """The gate that the adapted layers of a model share; None without a gated adapter."""
    return next((module.gate for module in model.modules() if isinstance(module, GatedLinear)), None)
