"""A linear layer with a low-rank change, computed as one matrix: (W + s B A) x instead of W x + s B (A x).

Both are the same sum. One matrix spares a forward the change's own outputs, as wide as the layer's, and a backward their gradients.
Adding B A costs r / n of the layer's product over n tokens. The matrix is made anew in the backward, so that nothing more is
kept; in bf16 and fp16 it is rounded as it will be where the adapter is added to its base for decoding.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hildanext.model.policy import compute_dtype


class OneMatrix(peft.tuners.lora.Linear):
    """peft's adapted `nn.Linear`, with its names and its factors, for a base that is not quantized and no dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n_in] -> [..., n_out] in the compute type."""
        base, (name,) = self.base_layer, self.active_adapters
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        result: Tensor = _OneMatrix.apply(x, base.weight, base.bias, *factors, self.scaling[name])
        return result


class _OneMatrix(torch.autograd.Function):
    """Gradients for x and the two factors; W and its bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        x = x.to(compute_dtype(x))
        ctx.scaling = scaling
        ctx.save_for_backward(x, weight, a, b)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _added(weight, a, b, scaling, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        at_x = slope @ _added(weight, a, b, ctx.scaling, x.dtype) if ctx.needs_input_grad[0] else None
        rows, slopes = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        at_a = ctx.scaling * ((slopes @ low_b).T @ rows).to(a.dtype)
        at_b = ctx.scaling * (slopes.T @ (rows @ low_a.T)).to(b.dtype)
        return at_x, None, None, at_a, at_b, None


def _added(weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return torch.addmm(weight.to(b.dtype), b, a, alpha=scaling).to(dtype)
