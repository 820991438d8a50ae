"""A low-rank change of a linear layer, and its product computed as one matrix: (W + s B A) x instead of W x + s B (A x).

Both give the same sum. With one matrix, the forward needs no second output as wide as the layer's, and the backward no
gradient of it. For n tokens, adding s B A costs r / n of the layer's own product. The backward computes the matrix
again instead of keeping it. In bf16 and fp16 it is rounded like the weights of a base that an adapter was added to for
decoding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hildanext.model.policy import compute_dtype


class LowRank(nn.Module):
    """The change scaling * B A of a matrix [n_out, n_in]. It is initialised to zero."""

    def __init__(self, rank: int, n_in: int, n_out: int, scaling: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, n_in)), nn.Parameter(torch.zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling = scaling


def low_rank_product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """(W + scaling * B A) x + bias, in the compute dtype: [..., n_in] -> [..., n_out]. W and its bias are frozen."""
    result: Tensor = _OneMatrix.apply(x, weight, bias, a, b, scaling)
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
