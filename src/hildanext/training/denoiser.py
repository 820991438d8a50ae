"""The module that training wraps: one noised forward of a micro-batch, from x_t to the loss."""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hildanext.config import LossConfig
from hildanext.diffusion.noise import sample_generator
from hildanext.diffusion.objective import Counts, Loss, Predicted, Soft, denoising_loss
from hildanext.errors import ConfigError, ModelError
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.policy import Policy
from hildanext.model.training_attention import Kind, use_training_attention
from hildanext.training.passes import Pass

# How far hidden states may be off, relative to their spread: in fp32, and where the weights themselves are rounded. A
# wrong mask at one position of the row that is tried is off by 0.06.
EXACT, ROUNDED = 1e-3, 0.3


class Denoised(NamedTuple):
    """Of one pass. Only `loss.total` carries a gradient."""

    loss: Loss
    counts: Counts
    predicted: Predicted  # at the wanted positions


class Denoiser(nn.Module):
    """Forward, head and loss in one call, so that whatever gathers or shards parameters has them at hand."""

    def __init__(self, lm: DiffusionLM, config: LossConfig, cap_weight: float) -> None:
        super().__init__()
        self.lm, self.config, self.cap_weight = lm, config, cap_weight

    def forward(
        self,
        batch: Batch,
        one: Pass,
        wanted: Tensor,
        block_size: int,
        n_tokens: int,
        embed_noise: Tensor | None,
        soft: Soft | None = None,
    ) -> Denoised:
        """Loss over the wanted positions [B, L] bool. n_tokens: allowed tokens of the whole effective batch.

        embed_noise [B, L, H]: added to the embeddings of x_t in units of their standard deviation.
        """
        if embed_noise is not None:
            embed_noise = embed_noise * self.lm.embedding_std()
        hidden = self.lm(
            one.noisy_ids, batch.input_ids, batch.doc_ids, batch.position_ids, wanted, block_size, embed_noise
        )
        config = self.config
        return Denoised(
            *denoising_loss(
                hidden,
                self.lm.head,
                batch.input_ids[wanted],
                one.t[wanted],
                one.masked[wanted],
                one.wrong[wanted],
                n_tokens,
                mask_token_id=self.lm.mask_token_id,
                weighting=config.weighting,
                w_m2t=config.w_m2t,
                w_t2t=config.w_t2t,
                keep=config.keep,
                cap_weight=self.cap_weight,
                soft=soft,
            )
        )


def embedding_noise(hidden_size: int, batch: Batch, masked: Tensor, std: float, seed: int) -> Tensor | None:
    """Gaussian noise [B, L, H] of `std` at masked positions, the same for a sample in any batch (LLaDA2.0 section 4.1)."""
    if std == 0:
        return None
    shape = (masked.shape[1], hidden_size)
    draws = torch.stack([torch.randn(shape, generator=sample_generator(seed, s, "embed")) for s in batch.samples])
    return draws.to(masked.device) * masked[..., None] * std


def choose_attention(lm: DiffusionLM, asked: Literal["auto", "dense", "pieces", "flex"], policy: Policy) -> str:
    """Set how the model's training attention is computed; returns the choice and its reason, for people.

    Every choice but the dense mask is tried on a packed row first. 'auto' takes the dense mask where an architecture
    has another attention; a kind that was asked for by name and does not give the same is a ConfigError.
    """
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
    """What is wrong with `kind` on a row of three documents and padding; None if it gives what the dense mask gives.

    A trained model turns the rounding of bf16 into errors of a tenth of the hidden states' spread and, at single
    positions, of many times that. So pieces are compared in fp32, and flex, which is for short formats, may be off from
    fp32 by twice what the dense mask is off in the same format.
    """
    lengths = (100, 60, 90, 6)
    docs = torch.cat([torch.full((n,), i if i < 3 else -1) for i, n in enumerate(lengths)])[None].to(lm.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(lm.device)
    ids = (torch.arange(docs.shape[1], device=lm.device) * 7919 % lm.vocab_size)[None]
    noisy = ids.masked_fill(ids % 2 == 0, lm.mask_token_id)
    wanted = (docs >= 0) & (positions > 0)
    implementation, was_training = lm.model.config._attn_implementation, lm.model.training

    def states(how: Kind, block_size: int, exact: bool = True) -> Tensor:
        lm.attention = how
        if how != "dense":
            use_training_attention(lm.model)
        try:
            with torch.autocast(lm.device.type, enabled=False) if exact else contextlib.nullcontext():
                return lm(noisy, ids, docs, positions, wanted, block_size).float()
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
    """Root mean square of the difference, relative to the spread."""
    return ((found - expected).square().mean().sqrt() / expected.std()).item()
