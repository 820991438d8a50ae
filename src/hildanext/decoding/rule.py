"""Threshold-edit decoding (LLaDA2.1 eq. 1-3): settings, the pure rule, and what a pass reports. No model in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hildanext.config import DecodeConfig, Mode
from hildanext.errors import ContextError, ModelError, UsageError


class Preset(NamedTuple):
    """What a mode stands for."""

    tau_mask: float
    tau_edit: float | None
    max_post_steps: int = 16
    block_size: int | None = None  # None: the checkpoint's
    edit_blocks: int = 0


# Until calibrated: the thresholds that SGLang and diffusers document.
PRESETS: dict[Mode, Preset] = {"S_MODE": Preset(0.5, 0.0), "Q_MODE": Preset(0.7, 0.5)}


def read_presets(modes: dict[str, Any]) -> dict[Mode, Preset]:
    """The modes that `calibrate` wrote into a checkpoint. Raises ModelError for broken ones."""
    try:
        return {mode: Preset(**modes[mode]) for mode in PRESETS if mode in modes}
    except TypeError as error:
        raise ModelError(f"generation_config.json: 'hilda' does not hold modes: {error}; calibrate again") from None


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
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    edit_blocks: int = 0  # finished blocks before the current one that stay editable; see editable_blocks
    stop: tuple[str, ...] = ()

    @property
    def editable_blocks(self) -> int:
        """`edit_blocks` where anything is edited, else 0."""
        return 0 if self.tau_edit is None else self.edit_blocks


class Step(NamedTuple):
    """One denoising pass. Positions count from `start`, the text position of the first token shown."""

    block: int  # the block that is drafted
    step: int
    tokens: list[int]  # the block after the pass, the editable blocks before it included
    drafted: list[int]
    edited: list[int]
    confidence: list[float | None]  # of the proposal at each position; None where the pass could change nothing
    mask_ratio: float  # masked share of the block before the pass
    start: int


class Finished(NamedTuple):
    """A block became final. `new_tokens`: what it adds to the completion; `text`: what can be shown of it now."""

    block: int
    new_tokens: list[int]
    text: str


def resolve(config: DecodeConfig, trained_block: int, presets: dict[Mode, Preset] | None = None) -> Settings:
    """Fill in what the mode stands for (`presets`: a checkpoint's own, calibrated) and the checkpoint's block size."""
    preset = (PRESETS | (presets or {}))[config.mode]
    tau_edit = preset.tau_edit if config.tau_edit == "preset" else config.tau_edit
    return Settings(
        mode=config.mode,
        tau_mask=float(preset.tau_mask if config.tau_mask == "preset" else config.tau_mask),
        tau_edit=None if tau_edit is None else float(tau_edit),
        max_post_steps=preset.max_post_steps if config.max_post_steps == "preset" else config.max_post_steps,
        block_size=config.block_size or preset.block_size or trained_block,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        edit_blocks=preset.edit_blocks if config.edit_blocks == "preset" else config.edit_blocks,
        stop=tuple(config.stop),
    )


def propose(
    logits: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    settings: Settings | None = None,
    noise: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """v_i and c_i: a token for each position and its probability. The mask token is impossible.

    logits [n, V] any float dtype -> ids [n] int64, confidence [n] float32. Ids from `vocab_size` on are padding rows and
    impossible too. Greedy without `settings`. With a temperature v_i = argmax(log p_i / T + noise_i), which draws from
    the softmax when `noise` [n, vocab_size] is Gumbel noise (Gumbel 1954); the same noise at every pass keeps a settled
    token settled. c_i stays the model's own probability at temperature 1, so that thresholds mean the same at every T.
    `seen` [n, vocab_size] bool: tokens that the repetition penalty falls on (Keskar et al. 2019, section 4.1).
    """
    scores = logits[:, :vocab_size].to(torch.float32, copy=True)
    scores[:, mask_token_id : mask_token_id + 1] = -torch.inf
    if settings is not None and seen is not None:
        penalized = torch.where(scores > 0, scores / settings.repetition_penalty, scores * settings.repetition_penalty)
        scores = torch.where(seen, penalized, scores)
    if settings is None or noise is None:
        confidence, ids = scores.softmax(-1).max(-1)
        return ids, confidence
    warm = keep_likely(scores / settings.temperature, settings.top_k, settings.top_p)
    ids = (warm + noise).argmax(-1)
    return ids, scores.softmax(-1).gather(1, ids[:, None])[:, 0]


def keep_likely(scores: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Scores [n, V] with all but the k best, then all but the smallest set of probability top_p, at -inf.

    The best token always stays (Fan et al. 2018; Holtzman et al. 2020).
    """
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = scores.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of the tokens ahead of each
        outside = before >= top_p
        outside[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return scores


def edit_step(
    tokens: list[int],
    ids: list[int],
    confidence: list[float],
    editable: list[bool],
    *,
    mask_token_id: int,
    tau_mask: float,
    tau_edit: float | None,
    settled: int | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """The threshold-edit rule over n positions: (new tokens, drafted positions, edited positions).

    tokens, ids, confidence, editable (False: prompt): n values each. Gamma = masked positions with c_i > tau_mask, or the
    most confident masked one if there is none; Delta = observed editable positions whose proposal differs with
    c_i > tau_edit (None: empty). Both updates apply at once (LLaDA2.1 eq. 1-3). A masked position `settled` joins Gamma
    whatever its confidence: its proposal cannot change, so nothing is gained by waiting (ours).

    Plain lists: a pass looks at a few dozen positions, which is less work than one small tensor operation.
    """
    masked = [i for i, token in enumerate(tokens) if token == mask_token_id]
    drafted = [i for i in masked if confidence[i] > tau_mask or i == settled]
    if masked and not drafted:
        drafted = [max(masked, key=confidence.__getitem__)]
    edited = []
    if tau_edit is not None:
        edited = [
            i
            for i, token in enumerate(tokens)
            if ids[i] != token and token != mask_token_id and editable[i] and confidence[i] > tau_edit
        ]
    new = list(tokens)
    for i in (*drafted, *edited):
        new[i] = ids[i]
    return new, drafted, edited


def tokens_needed(n_prompt: int, settings: Settings) -> int:
    """Context that a prompt of so many tokens takes with its budget, in whole blocks."""
    return -(-(n_prompt + settings.max_new_tokens) // settings.block_size) * settings.block_size


def check_request(prompt_ids: list[int], settings: Settings, context_length: int | None) -> None:
    """Raise UsageError for an empty prompt, ContextError for one that does not fit the context with its budget."""
    if not prompt_ids:
        raise UsageError("the prompt is empty; give at least one token")
    needed = tokens_needed(len(prompt_ids), settings)
    if context_length is not None and needed > context_length:
        raise ContextError(
            f"prompt ({len(prompt_ids)} tokens) plus max_new_tokens ({settings.max_new_tokens}), in whole blocks {needed}, "
            f"exceed the model's context of {context_length}; shorten one of them"
        )
