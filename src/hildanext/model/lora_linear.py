"""A linear layer with a low-rank change, computed as one matrix: (W + s B A) x instead of W x + s B (A x).

Both give the same sum. With one matrix, the forward needs no second output as wide as the layer's, and the backward no
gradient of it. For n tokens, adding s B A costs r / n of the layer's own product. The backward computes the matrix
again instead of keeping it. In bf16 and fp16 it is rounded like the weights of a base that an adapter was added to for
decoding.
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
    """peft's adapted `nn.Linear`, with its names and factors, for training without quantization and dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., n_in] -> [..., n_out] in the compute dtype."""
        base, (name,) = self.base_layer, self.active_adapters
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        result: Tensor = _OneMatrix.apply(x, base.weight, base.bias, *factors, self.scaling[name])
        return result


class _OneMatrix(torch.autograd.Function):
    """Computes gradients of x and the two factors. W and its bias are frozen."""

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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_output @ _added(weight, a, b, ctx.scaling, x.dtype) if ctx.needs_input_grad[0] else None
        rows, grads = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        grad_a = ctx.scaling * ((grads @ low_b).T @ rows).to(a.dtype)
        grad_b = ctx.scaling * (grads.T @ (rows @ low_a.T)).to(b.dtype)
        return grad_x, None, None, grad_a, grad_b, None


def _added(weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W + scaling * B A, [n_out, n_in], computed in the factors' dtype and rounded to `dtype`."""
    return torch.addmm(weight.to(b.dtype), b, a, alpha=scaling).to(dtype)
