"""Decoding settings: the presets of the modes, the resolved settings of a request, and the check that it fits."""

from __future__ import annotations

import secrets
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from hildanext.config import MOST_POST_STEPS, DecodeConfig, Mode
from hildanext.errors import ContextError, ModelError, UsageError


class Preset(NamedTuple):
    """The settings of a mode."""

    tau_mask: float
    tau_edit: float | None
    max_post_steps: int = 16
    block_size: int | None = None  # None: the checkpoint's block size
    edit_blocks: int = 0
    tau_accept: float | None = None  # None: blocks are edited, drafts are not verified
    rows: int = 8  # of a pass that verifies drafts


# What a model can do: "blocks" denoises and edits blocks, "gated" also verifies drafts with its base, "base" is not
# converted and can only verify drafts.
Kind = Literal["blocks", "gated", "base"]
MODES_OF: dict[Kind, tuple[Mode, ...]] = {  # the first is the default
    "blocks": ("Q_MODE", "S_MODE"),
    "gated": ("EXACT", "Q_MODE", "S_MODE"),
    "base": ("EXACT",),
}

# Defaults for checkpoints without calibration: the thresholds that SGLang and diffusers document.
PRESETS: dict[Mode, Preset] = {"S_MODE": Preset(0.5, 0.0), "Q_MODE": Preset(0.7, 0.5)}
VERIFYING: dict[Mode, Preset] = {
    "EXACT": Preset(0.7, 0.5, tau_accept=1.0),
    "Q_MODE": Preset(0.7, 0.5, tau_accept=0.5),
    "S_MODE": Preset(0.5, 0.0, tau_accept=0.2),
}

# The chance that the draft of row 1 ... k of a new group is right, until a checkpoint's own are measured.
FRESH = [0.6, 0.5, 0.4] + [0.35] * 13


def read_presets(modes: dict[str, Any]) -> dict[Mode, Preset]:
    """The presets that `calibrate` wrote into a checkpoint. Raises ModelError for unknown fields and invalid values."""
    try:
        found = {mode: Preset(**modes[mode]) for mode in VERIFYING if mode in modes}
        for preset in found.values():
            DecodeConfig.model_validate(preset._asdict())
    except (TypeError, ValidationError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = "".join(f"'{key}': " for key in first["loc"][:1]) + first["msg"].removeprefix("Value error, ")
        raise ModelError(f"generation_config.json: 'hilda' has invalid modes: {reason}; run calibrate again") from None
    return found


class Settings(NamedTuple):
    """Decoding parameters of a request, all presets resolved."""

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
    edit_blocks: int = 0  # finished blocks before the current one that remain editable; see editable_blocks
    stop: tuple[str, ...] = ()
    tau_accept: float | None = None  # see Preset
    rows: int = 8
    lookup: int | None = None  # shortest n-gram whose earlier continuation is a draft; None: none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    logprobs: int | None = None  # most likely tokens to report beside each token's log-probability; None: no report
    min_indel_confidence: float | None = None  # of insertions and deletions; None: there are none

    @property
    def editable_blocks(self) -> int:
        """`edit_blocks`, or 0 if editing is off."""
        return 0 if self.tau_edit is None else self.edit_blocks

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty depends on how often a token occurs in the completion."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def changes_scores(self) -> bool:
        """Whether anything is added to the model's scores: a penalty or a bias."""
        return self.repetition_penalty != 1.0 or self.counts_tokens or bool(self.logit_bias)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON, in the forms of the configuration."""
        bias = {str(token): value for token, value in self.logit_bias}
        return self._asdict() | {"stop": list(self.stop), "logit_bias": bias}

    @property
    def used_seed(self) -> int | None:
        """The seed if it decides the text; None in greedy decoding."""
        return self.seed if self.temperature > 0 else None


def most_passes(n_positions: int, settings: Settings) -> int:
    """The most passes over `n_positions` masked positions: one for each, and the correction passes.

    A pass drafts at least one mask, so more are never needed without insertions and deletions; with them, the last pass
    fills all masks. No setting lifts this limit.
    """
    extra = 1 if settings.min_indel_confidence is None else 2
    return n_positions + min(settings.max_post_steps, MOST_POST_STEPS) + extra


def resolve(
    config: DecodeConfig,
    trained_block: int,
    presets: dict[Mode, Preset] | None = None,
    kind: Kind = "blocks",
    has_indels: bool = False,
) -> Settings:
    """Settings of a configuration. A key comes from the configuration, else from the mode's preset in `presets`
    (calibrated for the checkpoint), else from PRESETS; the block size may also be `trained_block`, the checkpoint's.

    If the configuration samples without a seed, every call draws a new one, below 2**32. has_indels: the model has DELETE
    and INSERT. Raises UsageError for settings that the model cannot follow.
    """
    mode: Mode = config.mode or MODES_OF[kind][0]
    known = (PRESETS if kind == "blocks" else VERIFYING) | (presets or {})
    if mode not in known:
        raise UsageError(
            f"'decode.mode': '{mode}' verifies drafts with the base, which needs a gated adapter; convert with lora.gate, or "
            "use 'Q_MODE'"
        )
    preset = known[mode]
    tau_accept = preset.tau_accept if config.tau_accept == "preset" else config.tau_accept
    if kind == "base" and (mode != "EXACT" or tau_accept is None):
        raise UsageError(
            f"'decode.mode': a model that is not converted has no '{mode}' drafts; use 'EXACT', or run 'hildanext convert-wsd'"
        )
    if kind == "blocks" and tau_accept is not None:
        raise UsageError(
            "'decode.tau_accept': verifies drafts with the base, which needs a gated adapter; set it to null"
        )
    tau_edit = preset.tau_edit if config.tau_edit == "preset" else config.tau_edit
    seed = config.seed
    if seed is None:
        seed = secrets.randbits(32) if config.temperature > 0 else 0  # JavaScript's numbers hold it exactly
    max_post_steps = preset.max_post_steps if config.max_post_steps == "preset" else config.max_post_steps
    edits = tau_edit is not None and tau_accept is None
    return Settings(
        mode=mode,
        tau_mask=float(preset.tau_mask if config.tau_mask == "preset" else config.tau_mask),
        tau_edit=None if tau_edit is None else float(tau_edit),
        max_post_steps=max_post_steps,
        block_size=config.block_size or preset.block_size or trained_block,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        edit_blocks=preset.edit_blocks if config.edit_blocks == "preset" else config.edit_blocks,
        stop=tuple(config.stop),
        tau_accept=tau_accept if tau_accept is None else float(tau_accept),
        rows=preset.rows if config.rows == "preset" else config.rows,
        lookup=config.lookup,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        min_p=config.min_p,
        logit_bias=tuple((int(token), bias) for token, bias in config.logit_bias.items()),
        logprobs=config.logprobs,
        min_indel_confidence=_min_indel_confidence(config, has_indels, max_post_steps if edits else None),
    )


def _min_indel_confidence(config: DecodeConfig, has_indels: bool, max_post_steps: int | None) -> float | None:
    """`Settings.min_indel_confidence`. max_post_steps: None without editing. Raises UsageError if it cannot be followed."""
    given = config.min_indel_confidence
    found = (0.0 if has_indels else None) if given == "preset" else given
    if found is not None and not has_indels:
        raise UsageError(
            "'decode.min_indel_confidence': the model has no DELETE and INSERT tokens; train one with noise.edits "
            "'levenshtein', or set it to null"
        )
    if found is not None and max_post_steps == 0:
        raise UsageError(
            "'decode.max_post_steps': 0 leaves no pass for insertions and deletions; raise it, or set "
            "decode.min_indel_confidence to null"
        )
    return None if found is None or max_post_steps is None else float(found)


def tokens_needed(n_prompt: int, settings: Settings) -> int:
    """Context length of a prompt of `n_prompt` tokens plus `max_new_tokens`, rounded up to whole blocks."""
    if settings.tau_accept is not None:
        return n_prompt + settings.max_new_tokens
    return -(-(n_prompt + settings.max_new_tokens) // settings.block_size) * settings.block_size


def fill_context(n_prompt: int, settings: Settings, context_length: int | None) -> Settings:
    """Settings whose `max_new_tokens` is what a prompt leaves of the context, in whole blocks; at least 1.

    An engine without a limit keeps the settings.
    """
    if context_length is None:
        return settings
    size = 1 if settings.tau_accept is not None else settings.block_size
    return settings._replace(max_new_tokens=max(1, context_length // size * size - n_prompt))


def check_request(prompt_ids: list[int], settings: Settings, context_length: int | None) -> None:
    """Raise UsageError for an empty prompt, ContextError if prompt and budget exceed the context."""
    if not prompt_ids:
        raise UsageError("the prompt is empty; give at least one token")
    needed = tokens_needed(len(prompt_ids), settings)
    if context_length is not None and needed > context_length:
        raise ContextError(
            f"prompt ({len(prompt_ids)} tokens) plus max_new_tokens ({settings.max_new_tokens}), rounded up to whole "
            f"blocks {needed}, exceed the model's context of {context_length}; shorten one of them"
        )


def check_draft(settings: Settings, has_grammar: bool) -> None:
    """Raise UsageError if the settings of a request leave nothing that could repair its draft."""
    if settings.tau_edit is None or settings.tau_accept is not None or has_grammar:
        raise UsageError("'draft': only editing repairs a draft; set tau_edit, tau_accept to null, and no grammar")
    if settings.logprobs is not None:
        raise UsageError("'draft': its own tokens have no log-probabilities; leave out logprobs")


def check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    """Raise UsageError, which names the field, for an id that is not in the vocabulary."""
    unknown = next((token for token in ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise UsageError(f"'{name}': the vocabulary has no token {unknown}; use ids from 0 to {vocab_size - 1}")
