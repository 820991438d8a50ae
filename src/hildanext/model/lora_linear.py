"""peft's adapted linear layer, computed as one matrix (see `low_rank`)."""

from __future__ import annotations

from typing import Any

import peft
from torch import Tensor

from hildanext.model.low_rank import low_rank_product


class OneMatrix(peft.tuners.lora.Linear):
    """peft's adapted `nn.Linear`, with its names and factors, for training without quantization and dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n_in] -> [..., n_out] in the compute dtype."""
        base, (name,) = self.base_layer, self.active_adapters
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        return low_rank_product(x, base.weight, base.bias, *factors, self.scaling[name])
