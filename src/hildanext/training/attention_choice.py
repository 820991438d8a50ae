"""The choice of the training attention, and the check that its hidden states equal those of the dense mask."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor

from hildanext.errors import ConfigError, ModelError
from hildanext.model.decoding_attention import use_grouped_attention
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.policy import Policy
from hildanext.model.training_attention import Kind, use_training_attention

# Largest accepted difference of hidden states, relative to their standard deviation: with fp32 weights, and with rounded
# ones. One wrong position in the mask of the test row gives 0.06.
EXACT, ROUNDED = 1e-3, 0.3


def choose_attention(lm: DiffusionLM, asked: Literal["auto", "dense", "pieces", "flex"], policy: Policy) -> str:
    """Set how the model computes attention in training. Returns the choice and its reason, to be shown.

    Every choice except the dense mask is first compared with the dense mask on a packed row. 'auto' falls back to the
    dense mask if they differ. Raises ConfigError if a kind asked for by name differs.
    """
    if lm.gated:
        use_grouped_attention(lm.model)
        return "attention by the masks of groups"
    if asked == "dense" or lm.model.config._attn_implementation != "sdpa":
        return "attention by the dense mask" + (" (model.attention is not sdpa)" if asked != "dense" else "")
    kind: Kind = policy.attention if asked == "auto" else asked
    problem = "has no backward on a CPU" if kind == "flex" and lm.device.type == "cpu" else _difference(lm, kind)
    if problem is None:
        use_training_attention(lm.model)
        lm.attention = kind
        return f"attention in {kind}" if kind == "pieces" else f"{kind} attention"
    if asked != "auto":
        raise ConfigError(f"'train.attention': '{asked}' cannot run on this model: {problem}; use 'dense'")
    return f"attention by the dense mask ({kind}: {problem})"


@torch.no_grad()
def _difference(lm: DiffusionLM, kind: Kind) -> str | None:
    """How `kind` differs from the dense mask on a row of three documents and padding; None if it gives the same states.

    In a trained model the rounding of bf16 changes hidden states by a tenth of their spread, and by many times that at
    single positions. Pieces are therefore compared in fp32. Flex runs in bf16 and fp16 only: it may differ from fp32 by
    twice as much as the dense mask in the same format does.
    """
    lengths = (100, 60, 90, 6)
    docs = torch.cat([torch.full((n,), i if i < 3 else -1) for i, n in enumerate(lengths)])[None].to(lm.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(lm.device)
    ids = (torch.arange(docs.shape[1], device=lm.device) * 7919 % lm.vocab_size)[None]
    noisy = ids.masked_fill(ids % 2 == 0, lm.mask_token_id)
    wanted = (docs >= 0) & (positions > 0)
    batch = Batch([0], ids, docs, positions, wanted)
    implementation, was_training = lm.model.config._attn_implementation, lm.model.training

    def states(how: Kind, block_size: int, exact: bool = True) -> Tensor:
        lm.attention = how
        if how != "dense":
            use_training_attention(lm.model)
        try:
            with torch.autocast(lm.device.type, enabled=False) if exact else contextlib.nullcontext():
                return lm(batch, noisy, wanted, block_size).float()
        finally:
            lm.attention = "dense"
            lm.model.set_attn_implementation(implementation)

    lm.model.eval()
    try:
        for block_size in (8, docs.shape[1]):
            expected = states("dense", block_size)
            tolerance = EXACT if lm.model.dtype == torch.float32 else ROUNDED
            if kind == "flex":
                tolerance = max(tolerance, 2 * _off(states("dense", block_size, exact=False), expected))
            off = _off(states(kind, block_size, exact=kind != "flex"), expected)
            if not off <= tolerance:
                return f"hidden states differ from the dense mask's by {off:.1g} of their spread"
    except (ModelError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        lm.model.train(was_training)
    return None


def _off(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to the standard deviation of `expected`."""
    return ((found - expected).square().mean().sqrt() / expected.std()).item()
