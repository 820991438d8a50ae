"""Threshold-edit decoding (LLaDA2.1 eq. 1-3): the pure rule, and the block loop around any model.

The rule knows no model; the loop knows a model only as a `Context` that scores a block and stores it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hildanext.config import DecodeConfig, Mode
from hildanext.errors import UsageError
from hildanext.noise import sample_generator

# (tau_mask, tau_edit) until calibrated: the values that SGLang and diffusers document.
PRESETS: dict[Mode, tuple[float, float]] = {"S_MODE": (0.5, 0.0), "Q_MODE": (0.7, 0.5)}


class Settings(NamedTuple):
    """Decoding parameters with every preset resolved."""

    mode: Mode
    tau_mask: float
    tau_edit: float | None  # None: editing off
    max_post_steps: int
    block_size: int
    max_new_tokens: int
    temperature: float
    seed: int


class Step(NamedTuple):
    """One denoising pass over the current block."""

    block: int
    step: int
    tokens: list[int]  # the block after the pass
    drafted: list[int]  # positions within the block
    edited: list[int]
    confidence: list[float]  # of the proposal at each position
    mask_ratio: float  # masked share of the block before the pass


class Finished(NamedTuple):
    """A block came to rest. `new_tokens`: what it adds to the completion."""

    block: int
    new_tokens: list[int]


class Context(Protocol):
    """A model with the finished blocks behind it. `shifted`: they alone predict a block's first token."""

    forwards: int
    shifted: bool

    def score(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] that predict each position of the block `tokens` [n], given the stored blocks."""
        ...

    def store(self, tokens: Tensor) -> None:
        """The block is finished: make it visible to the next ones."""
        ...


def resolve(config: DecodeConfig, trained_block: int) -> Settings:
    """Fill presets and the checkpoint's block size in."""
    tau_mask, tau_edit = PRESETS[config.mode]
    return Settings(
        mode=config.mode,
        tau_mask=tau_mask if config.tau_mask == "preset" else float(config.tau_mask),
        tau_edit=tau_edit
        if config.tau_edit == "preset"
        else config.tau_edit
        if config.tau_edit is None
        else float(config.tau_edit),
        max_post_steps=config.max_post_steps,
        block_size=config.block_size or trained_block,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )


def propose(
    logits: Tensor,
    is_masked: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """v_i and c_i: a token for each position and its probability. The mask token is impossible.

    logits [n, V] any float dtype, is_masked [n] bool -> ids [n] int64, confidence [n] float32. Ids from `vocab_size` on
    are padding rows and impossible too. temperature > 0 samples the masked positions; observed ones always compare
    against the argmax, else every pass would re-roll settled text.
    """
    scores = logits.float().clone()
    scores[:, mask_token_id] = -torch.inf
    scores[:, vocab_size:] = -torch.inf
    probabilities = scores.softmax(-1)
    confidence, ids = probabilities.max(-1)
    if temperature > 0 and is_masked.any():
        warm = (scores[is_masked] / temperature).softmax(-1)
        drawn = torch.multinomial(warm.cpu(), 1, generator=generator).to(ids.device)
        ids[is_masked] = drawn[:, 0]
        confidence[is_masked] = warm.gather(1, drawn)[:, 0]
    return ids, confidence


def edit_step(
    tokens: Tensor,
    ids: Tensor,
    confidence: Tensor,
    editable: Tensor,
    *,
    mask_token_id: int,
    tau_mask: float,
    tau_edit: float | None,
    settled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The threshold-edit rule: (new tokens, drafted, edited), each [n].

    tokens, ids [n] int64; confidence [n] float32; editable [n] bool (False: prompt); settled [n] bool (the proposal cannot
    change, so nothing is gained by waiting; None: nowhere). Gamma = masked positions with c_i > tau_mask or settled, or
    the most confident masked one if there is none; Delta = observed editable positions whose proposal differs with
    c_i > tau_edit (None: empty). Both updates apply at once (LLaDA2.1 eq. 1-3; settled positions are ours).
    """
    masked = tokens == mask_token_id
    drafted = masked & (confidence > tau_mask)
    if settled is not None:
        drafted |= masked & settled
    if masked.any() and not drafted.any():
        best = confidence.masked_fill(~masked, -1.0).argmax()
        drafted[best] = True
    if tau_edit is None:
        edited = torch.zeros_like(masked)
    else:
        edited = ~masked & editable & (ids != tokens) & (confidence > tau_edit)
    return torch.where(drafted | edited, ids, tokens), drafted, edited


def decode_block(
    context: Context,
    tokens: Tensor,
    editable: Tensor,
    block: int,
    settings: Settings,
    mask_token_id: int,
    vocab_size: int,
) -> Iterator[Step]:
    """Denoise one block to rest, a Step a pass; the last Step's tokens are the block.

    Every pass with masks left drafts at least one, and at most `max_post_steps` passes follow, so n + max_post_steps
    passes are a hard cap. The generator is seeded by (seed, block): resuming at a block needs no history.
    """
    generator = sample_generator(settings.seed, block, "decode")
    n, post_steps = len(tokens), 0
    # Shifted, the first token does not see its block. Drafted later, it would contradict what was drafted without it.
    settled = torch.arange(n, device=tokens.device) < int(context.shifted)
    for step in range(n + settings.max_post_steps):
        masked = tokens == mask_token_id
        ids, confidence = propose(
            context.score(tokens),
            masked,
            mask_token_id=mask_token_id,
            vocab_size=vocab_size,
            temperature=settings.temperature,
            generator=generator,
        )
        was_clean = not masked.any()
        tokens, drafted, edited = edit_step(
            tokens,
            ids,
            confidence,
            editable,
            mask_token_id=mask_token_id,
            tau_mask=settings.tau_mask,
            tau_edit=settings.tau_edit,
            settled=settled,
        )
        yield Step(
            block,
            step,
            tokens.tolist(),
            drafted.nonzero()[:, 0].tolist(),
            edited.nonzero()[:, 0].tolist(),
            confidence.tolist(),
            masked.float().mean().item(),
        )
        post_steps += was_clean
        clean = not (tokens == mask_token_id).any()
        if clean and (
            settings.tau_edit is None or post_steps >= settings.max_post_steps or (was_clean and not edited.any())
        ):
            return


def decode(
    context: Context,
    prompt_ids: list[int],
    settings: Settings,
    *,
    mask_token_id: int,
    vocab_size: int,
    eos_token_id: int,
    device: torch.device,
) -> Iterator[Step | Finished]:
    """Block by block until end of text or the token budget. `context` already holds the prompt's whole blocks.

    A prompt that ends inside a block shares that block. The last block always runs whole; what exceeds the budget is cut.
    """
    size, n_prompt = settings.block_size, len(prompt_ids)
    block, produced = n_prompt // size, 0
    head = prompt_ids[block * size :]
    while True:
        tokens = torch.tensor(head + [mask_token_id] * (size - len(head)), device=device)
        editable = torch.arange(size, device=device) >= len(head)
        for step in decode_block(context, tokens, editable, block, settings, mask_token_id, vocab_size):
            yield step
        new = step.tokens[len(head) :][: settings.max_new_tokens - produced]
        if eos_token_id in new:
            new = new[: new.index(eos_token_id) + 1]
        produced += len(new)
        yield Finished(block, new)
        if produced >= settings.max_new_tokens or eos_token_id in new:
            return
        context.store(torch.tensor(step.tokens, device=device))
        head, block = [], block + 1


def check_request(prompt_ids: list[int], settings: Settings, context_length: int | None) -> None:
    """Raise UsageError for an empty prompt or one that does not fit the context with its budget."""
    if not prompt_ids:
        raise UsageError("the prompt is empty; give at least one token")
    needed = -(-(len(prompt_ids) + settings.max_new_tokens) // settings.block_size) * settings.block_size
    if context_length is not None and needed > context_length:
        raise UsageError(
            f"prompt ({len(prompt_ids)} tokens) plus max_new_tokens ({settings.max_new_tokens}), in whole blocks {needed}, "
            f"exceed the model's context of {context_length}; shorten one of them"
        )
