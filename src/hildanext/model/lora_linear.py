"""peft's adapted linear layer, computed as one matrix (see `low_rank`)."""

from __future__ import annotations

from typing import Any

import peft
from torch import Tensor, nn

from hildanext.model.low_rank import low_rank_product


class OneMatrix(peft.tuners.lora.Linear):
    """peft's adapted `nn.Linear`, with its names and factors, for training without quantization and dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n_in] -> [..., n_out] in the compute dtype."""
        base, (name,) = self.base_layer, self.active_adapters
        a, b = self.lora_A[name], self.lora_B[name]
        assert isinstance(base, nn.Linear)
        assert isinstance(a, nn.Linear)
        assert isinstance(b, nn.Linear)
        return low_rank_product(x, base.weight, base.bias, a.weight, b.weight, self.scaling[name])
