"""Noise, loss, schedule and optimizer of the training commands."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hildanext.config.section import Section


class NoiseConfig(Section):
    """Noise that turns clean tokens into masked and wrong tokens."""

    t_min: float = Field(
        0.05,
        gt=0.0,
        le=1.0,
        description="Lowest noise level (share of masked tokens). It also limits the loss weight 1/t to 1/t_min.",
    )
    t_max: float = Field(1.0, gt=0.0, le=1.0, description="Highest noise level (share of masked tokens).")
    corrupt_rate: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="Probability that an unmasked token is replaced by a random wrong one, so that the model learns "
        "to edit. 0 disables it.",
    )
    edits: Literal["substitution", "levenshtein"] = Field(
        "substitution",
        description="What the model learns to do to wrong drafts: 'substitution' replaces tokens, 'levenshtein' also inserts "
        "and deletes. 'levenshtein' changes the second turn of convert-wsd and sft, and adds two tokens to the vocabulary. "
        "Does not apply to gated adapters and dpo.",
    )
    deletion_rate: float = Field(
        0.05,
        ge=0.0,
        lt=1.0,
        description="Probability that at a token of the second turn one or a few tokens are dropped, so that the model learns "
        "to insert. Applies to edits 'levenshtein'.",
    )
    insertion_rate: float = Field(
        0.05,
        ge=0.0,
        lt=1.0,
        description="Probability that before a token of the second turn another one is added, or the last ones once more, so "
        "that the model learns to delete. Applies to edits 'levenshtein'.",
    )
    turns: Literal[1, 2] = Field(
        1,
        description="Forward passes per sample in convert-wsd. 2 adds a second one in which some masks hold the "
        "model's own predictions: it learns to keep right ones and edit wrong ones (sft has its own key).",
    )
    draft_share: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="Share of the masked tokens that are replaced by the model's predictions in the second turn.",
    )
    complementary: bool = Field(
        False,
        description="Train each sample also with the inverse mask in the same step. Applies to convert-wsd (sft has "
        "its own key).",
    )
    anchors: int = Field(
        32, ge=1, description="Number of groups in a row, each behind its own anchor. Applies to gated adapters."
    )
    offset_keep: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Probability that a group continues after each of its rows; below 1, far offsets are trained less. "
        "Applies to gated adapters.",
    )
    plain_share: float = Field(
        0.25,
        ge=0.0,
        le=1.0,
        description="Share of the groups that predict without the draft head. Decoding takes its candidates from such "
        "predictions. Applies to gated adapters with lora.draft_head.",
    )
    edit_share: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the samples whose groups hold kept, wrong and masked tokens, so that S_MODE and Q_MODE can "
        "edit blocks. Applies to gated adapters.",
    )
    embed_std: float = Field(
        0.0,
        ge=0.0,
        description="Gaussian noise added to the mask token's embedding early in training, in standard deviations of "
        "the embeddings. 0 disables it. Needs embed_steps.",
    )
    embed_steps: int = Field(
        0, ge=0, description="Number of steps over which embed_std falls linearly to zero. Needs embed_std."
    )

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.t_min > self.t_max:
            raise ValueError(f"'t_min': {self.t_min:g} exceeds t_max ({self.t_max:g}); lower it or raise t_max")
        if (self.embed_std > 0) != (self.embed_steps > 0):
            idle, needed = ("embed_std", "embed_steps") if self.embed_std > 0 else ("embed_steps", "embed_std")
            raise ValueError(f"'{idle}': has no effect while {needed} is 0; set noise.{needed} as well")
        return self


class LossConfig(Section):
    """Weights of the training loss: filling masks (M2T) and editing tokens (T2T)."""

    weighting: Literal["elbo", "uniform"] = Field(
        "elbo",
        description="Weight of a masked token's loss: 'elbo' uses 1/t (t is the noise level), 'uniform' uses 1.",
    )
    w_m2t: float = Field(1.0, ge=0.0, description="Weight of the mask-to-token loss. 0 disables it.")
    w_t2t: float = Field(1.0, ge=0.0, description="Weight of the token-to-token loss. 0 disables it.")
    keep: float = Field(
        1.0,
        ge=0.0,
        description="Weight of correct unmasked tokens within the token-to-token loss. With 0 the model sees wrong "
        "tokens only and learns to edit everything.",
    )
    cap_weight: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the confidence loss (CAP) on correctly predicted tokens; 0 disables it. Applies to "
        "convert-wsd (sft has its own key).",
    )
    distill: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the AR base's next-token distribution in the training target, for masked tokens with a "
        "fully visible left context. 0 disables distillation.",
    )


class WsdConfig(Section):
    """Block-size schedule of convert-wsd: warm-up, stable phase, decay."""

    shape: Literal["linear", "ladder"] = Field(
        "linear",
        description="How the block size changes: 'linear' interpolates, 'ladder' goes through warmup_ladder and "
        "decay_ladder.",
    )
    warmup_steps: int = Field(
        100, ge=0, description="Number of steps in which the block size rises from start_block to peak_block."
    )
    stable_steps: int = Field(100, ge=0, description="Number of steps at peak_block.")
    decay_steps: int = Field(100, ge=0, description="Number of steps in which the block size falls to final_block.")
    start_block: int = Field(1, ge=1, description="Block size of the first step, in tokens. Applies to shape 'linear'.")
    peak_block: int | None = Field(
        None,
        ge=1,
        description="Block size of the stable phase, in tokens. null uses the full row (full-sequence diffusion).",
    )
    final_block: int = Field(
        32, ge=1, description="Block size of the last step, in tokens. The checkpoint decodes with it by default."
    )
    warmup_ladder: list[int] = Field(
        default_factory=lambda: [1, 4, 32, 64],
        description="Block sizes of the warm-up, in tokens, each used equally long. Applies to shape 'ladder'.",
    )
    decay_ladder: list[int] = Field(
        default_factory=lambda: [128, 64, 32],
        description="Block sizes of the decay, in tokens; the last must be final_block. Applies to shape 'ladder'.",
    )

    @model_validator(mode="after")
    def _possible(self) -> WsdConfig:
        if self.warmup_steps + self.stable_steps + self.decay_steps < 1:
            raise ValueError("'stable_steps': the schedule has no steps; set warmup_steps, stable_steps or decay_steps")
        if self.decay_steps == 0 and self.peak_block != self.final_block:
            raise ValueError(
                "'decay_steps': 0 needs peak_block equal to final_block; raise decay_steps or set peak_block"
            )
        if self.shape == "ladder":
            for name, ladder in (("warmup_ladder", self.warmup_ladder), ("decay_ladder", self.decay_ladder)):
                if not ladder or min(ladder) < 1:
                    raise ValueError(f"'{name}': needs one or more block sizes of at least 1, got {ladder}")
            if self.decay_ladder[-1] != self.final_block:
                raise ValueError(
                    f"'decay_ladder': ends at {self.decay_ladder[-1]}, but final_block is {self.final_block}; make "
                    "them equal"
                )
        return self


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]


class TrainConfig(Section):
    """Batch, optimizer, memory, evaluations, checkpoints and trackers of all training commands."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the row order, the noise and newly created weights.")
    rows_per_step: int = Field(
        8, ge=1, description="Number of rows in an optimizer step (effective batch size), over all processes."
    )
    micro_batch: int = Field(
        4,
        ge=1,
        description="Number of rows in a forward pass; must divide rows_per_step. Lower it to save memory: the result "
        "is the same except for rounding.",
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        "adamw",
        description="Optimizer. 'adamw' needs 8 bytes of memory per weight, 'adamw8bit' 2 (requires bitsandbytes: "
        "extra 'quant'), and 'adafactor' almost none.",
    )
    lr: float = Field(3e-4, gt=0.0, description="Peak learning rate of convert-wsd (sft and dpo have their own).")
    lr_warmup_steps: int = Field(
        10,
        ge=0,
        description="Number of steps in which the learning rate rises linearly to its peak. 0 starts at the peak.",
    )
    lr_final_ratio: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="Learning rate of the last step as a share of the peak, in all training commands.",
    )
    weight_decay: float = Field(
        0.01, ge=0.0, description="Weight decay of matrices; vectors such as biases and norms have none. 0 disables it."
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.95),
        description="Decay rates of AdamW's first and second moment, each at least 0 and below 1.",
        strict=False,
    )
    clip_norm: float = Field(
        1.0, gt=0.0, description="Maximum norm of the gradient. Larger gradients are scaled down to it."
    )
    attention: Literal["auto", "dense", "pieces", "flex"] = Field(
        "auto",
        description="Training attention: 'dense' computes all scores, 'pieces' and 'flex' (FlexAttention) skip masked "
        "ones. 'auto' selects 'flex' on GPUs of compute capability 8.0 or higher with Triton, else 'pieces'.",
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="Memory layout with several processes: 'none' keeps a full copy in each (DDP), 'fsdp2' divides "
        "parameters, gradients and optimizer state among them.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass instead of storing them. Saves memory for about a "
        "third more compute.",
    )
    eval_every: int = Field(
        50,
        ge=0,
        description="Number of steps between evaluations on held-out rows; every checkpoint is evaluated too. 0 "
        "evaluates at checkpoints only.",
    )
    eval_rows: int = Field(32, ge=1, description="Maximum number of held-out rows in an evaluation.")
    save_every: int = Field(50, ge=1, description="Number of steps between checkpoints. The last step is always saved.")
    keep_last: int = Field(2, ge=1, description="Number of most recent checkpoints to keep.")
    keep_best: int = Field(
        3, ge=0, description="Number of checkpoints with the lowest evaluation loss to keep in addition to keep_last."
    )
    trackers: list[Tracker] = Field(
        [],
        description="Tools that get the numbers of metrics.jsonl while the run trains, each of which needs its package. "
        "'tensorboard' (extra 'track') writes into the run's folder; some of the others send to a server.",
    )

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.rows_per_step % self.micro_batch:
            raise ValueError(
                f"'micro_batch': {self.micro_batch} does not divide rows_per_step ({self.rows_per_step}); choose a "
                "divisor"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"'betas': both must be at least 0 and below 1, got {list(self.betas)}")
        return self


def _check_band(low: float, high: float) -> None:
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"'mask_band': must satisfy 0 < lowest <= highest <= 1, got {[low, high]}")


class SftConfig(Section):
    """Instruction tuning (sft)."""

    steps: int = Field(200, ge=1, description="Number of optimizer steps.")
    lr: float = Field(1e-4, gt=0.0, description="Peak learning rate.")
    lr_warmup_steps: int = Field(
        10,
        ge=0,
        description="Number of steps in which the learning rate rises linearly to its peak. 0 starts at the peak.",
    )
    lr_decay_share: float = Field(
        0.3,
        ge=0.0,
        le=1.0,
        description="Share of the steps, at the end, in which the learning rate decays. 0 keeps it constant.",
    )
    block_size: int | None = Field(
        None, ge=1, description="Block size in tokens. null uses the checkpoint's block size."
    )
    turns: Literal[1, 2] = Field(
        2,
        description="Forward passes per sample. 2 adds a second one in which some masks hold the model's own "
        "predictions.",
    )
    complementary: bool = Field(
        False,
        description="Train each sample also with the inverse mask in the same step, so that every token is supervised.",
    )
    mask_band: tuple[float, float] = Field(
        (0.05, 1.0), description="Lowest and highest noise level (share of masked response tokens).", strict=False
    )
    cap_weight: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the confidence loss (CAP) on correctly predicted tokens; 0 disables it. A more "
        "confident model decodes in fewer passes.",
    )

    @model_validator(mode="after")
    def _band(self) -> SftConfig:
        _check_band(*self.mask_band)
        return self


class DpoConfig(Section):
    """Preference tuning (dpo)."""

    pairs: str | None = Field(
        None,
        description="JSON, JSONL or parquet file, or a folder of them, with a prompt or conversation and the answers 'chosen' "
        "and 'rejected' in each record. Required by dpo.",
    )
    beta: float = Field(
        0.1,
        gt=0.0,
        description="Strength of the preference loss. Lower values let the model move further from its start.",
    )
    steps: int = Field(100, ge=1, description="Number of optimizer steps. A step uses train.rows_per_step pairs.")
    lr: float = Field(2e-5, gt=0.0, description="Peak learning rate.")
    lr_warmup_steps: int = Field(
        10,
        ge=0,
        description="Number of steps in which the learning rate rises linearly to its peak. 0 starts at the peak.",
    )
    lr_decay_share: float = Field(
        0.3,
        ge=0.0,
        le=1.0,
        description="Share of the steps, at the end, in which the learning rate decays. 0 keeps it constant.",
    )
    block_size: int | None = Field(
        None, ge=1, description="Block size in tokens. null uses the checkpoint's block size."
    )
    draws: int = Field(
        1,
        ge=1,
        description="Number of noise draws per answer. More draws give steadier likelihoods and cost more forward "
        "passes.",
    )
    complementary: bool = Field(
        False, description="Add the inverse mask of each draw. Requires a highest mask_band value below 1."
    )
    mask_band: tuple[float, float] = Field(
        (0.05, 1.0), description="Lowest and highest noise level (share of masked response tokens).", strict=False
    )

    @model_validator(mode="after")
    def _band(self) -> DpoConfig:
        _check_band(*self.mask_band)
        if self.complementary and self.mask_band[1] == 1.0:
            raise ValueError(
                "'complementary': the inverse of a mask at noise level 1 masks nothing; lower mask_band, for example "
                "to [0.05, 0.95]"
            )
        return self
