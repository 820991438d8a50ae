"""Noise, loss, schedule and optimizer of the two trainings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hildanext.config.section import Section


class NoiseConfig(Section):
    """How x_t is made of x_0."""

    t_min: float = Field(0.05, gt=0.0, le=1.0, description="Lowest noise level; also clips the ELBO weight 1/t.")
    t_max: float = Field(1.0, gt=0.0, le=1.0, description="Highest noise level.")
    corrupt_rate: float = Field(
        0.1, ge=0.0, lt=1.0, description="T2T: probability r that an observed token is replaced by a wrong one."
    )
    turns: Literal[1, 2] = Field(
        1,
        description="2 adds the multi-turn forward: the model's own drafts become observed tokens, right ones kept, wrong ones edited.",
    )
    draft_share: float = Field(
        0.5, gt=0.0, lt=1.0, description="Multi-turn: share of a row's masked positions that get the model's draft."
    )
    complementary: bool = Field(
        False, description="convert-wsd: train on x_t and on its inverse mask in the same batch (sft has its own)."
    )
    embed_std: float = Field(
        0.0,
        ge=0.0,
        description="Gaussian noise on the mask token's embedding, relative to the embeddings' std; 0 is off.",
    )
    embed_steps: int = Field(0, ge=0, description="Steps over which embed_std decays linearly to zero.")

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.t_min > self.t_max:
            raise ValueError("t_min must not exceed t_max")
        return self


class LossConfig(Section):
    """What is learned at masked and at wrong tokens."""

    weighting: Literal["elbo", "uniform"] = Field(
        "elbo", description="Weight of a masked token's loss: 1/t (ELBO) or 1."
    )
    w_m2t: float = Field(1.0, ge=0.0, description="Weight of the mask-to-token loss.")
    w_t2t: float = Field(1.0, ge=0.0, description="Weight of the token-to-token loss.")
    keep: float = Field(
        1.0,
        ge=0.0,
        description="Weight, inside T2T, of observed tokens that are right. 0 trains on wrong ones only, and then the model edits everything.",
    )
    cap_weight: float = Field(
        0.0,
        ge=0.0,
        description="convert-wsd: weight of the confidence loss on correctly predicted tokens (CAP); 0 is off (sft has its own).",
    )
    distill: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the AR base's next-token distribution in the target of masked tokens whose left context is visible; 0 is off.",
    )


class WsdConfig(Section):
    """The block-size schedule: warm-up, stable, decay."""

    shape: Literal["linear", "ladder"] = Field(
        "linear", description="How the block size moves: evenly, or through the listed rungs."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps that raise the block size from start_block to peak_block.")
    stable_steps: int = Field(100, ge=0, description="Steps at peak_block.")
    decay_steps: int = Field(100, ge=0, description="Steps that bring the block size down to final_block.")
    start_block: int = Field(1, ge=1, description="Block size at the first step (linear).")
    peak_block: int | None = Field(
        None, ge=1, description="Block size of the stable phase; null is the full row (MDLM)."
    )
    final_block: int = Field(32, ge=1, description="Block size at the end, and the one used in decoding.")
    warmup_ladder: list[int] = Field(
        default_factory=lambda: [1, 4, 32, 64], description="Rungs of the warm-up (ladder)."
    )
    decay_ladder: list[int] = Field(
        default_factory=lambda: [128, 64, 32], description="Rungs of the decay (ladder); the last must be final_block."
    )

    @model_validator(mode="after")
    def _possible(self) -> WsdConfig:
        if self.warmup_steps + self.stable_steps + self.decay_steps < 1:
            raise ValueError("warmup_steps + stable_steps + decay_steps must be at least 1")
        if self.decay_steps == 0 and self.peak_block != self.final_block:
            raise ValueError("decay_steps 0 needs peak_block equal to final_block")
        if self.shape == "ladder":
            if not self.warmup_ladder or not self.decay_ladder or min(self.warmup_ladder + self.decay_ladder) < 1:
                raise ValueError("ladder rungs must be positive block sizes")
            if self.decay_ladder[-1] != self.final_block:
                raise ValueError("the last rung of decay_ladder must equal final_block")
        return self


class TrainConfig(Section):
    """Steps, optimizer, evaluations and checkpoints, of both trainings."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seeds the data order, the noise and new weights.")
    rows_per_step: int = Field(8, ge=1, description="Rows in one optimizer step (the effective batch).")
    micro_batch: int = Field(4, ge=1, description="Rows in one forward; must divide rows_per_step.")
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        "adamw",
        description="AdamW keeps 8 bytes of state a weight; adamw8bit 2 (bitsandbytes, the extra 'quant'); Adafactor almost none "
        "(for cards of 8 GB).",
    )
    lr: float = Field(3e-4, gt=0.0, description="Peak learning rate.")
    lr_warmup_steps: int = Field(10, ge=0, description="Steps of linear learning-rate warm-up.")
    lr_final_ratio: float = Field(0.1, ge=0.0, le=1.0, description="Learning rate at the end, as a share of the peak.")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW weight decay (matrices only).")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.", strict=False)
    clip_norm: float = Field(1.0, gt=0.0, description="Gradient norm is clipped to this.")
    attention: Literal["auto", "dense", "pieces", "flex"] = Field(
        "auto",
        description="What skips the scores that the training mask forbids. auto: FlexAttention on GPUs of sm_80 and later with "
        "Triton, else pieces; each is checked against the dense mask when a training starts.",
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="With several processes: 'none' keeps a whole copy in each (DDP), 'fsdp2' spreads parameters, gradients and optimizer.",
    )
    gradient_checkpointing: bool = Field(False, description="Trade compute for activation memory.")
    eval_every: int = Field(
        50, ge=0, description="Steps between evaluations on held-out rows; 0 evaluates at the end only."
    )
    eval_rows: int = Field(32, ge=1, description="Held-out rows used by an evaluation.")
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_best: int = Field(3, ge=0, description="Best checkpoints by evaluation loss kept besides.")

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.rows_per_step % self.micro_batch:
            raise ValueError("micro_batch must divide rows_per_step")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self


class SftConfig(Section):
    """Instruction tuning."""

    steps: int = Field(200, ge=1, description="Optimizer steps.")
    lr: float = Field(1e-4, gt=0.0, description="Peak learning rate.")
    lr_warmup_steps: int = Field(10, ge=0, description="Steps of linear learning-rate warm-up.")
    lr_decay_share: float = Field(
        0.3, ge=0.0, le=1.0, description="Last share of the steps in which the learning rate decays."
    )
    block_size: int | None = Field(None, ge=1, description="Block size; null is the checkpoint's.")
    turns: Literal[1, 2] = Field(2, description="T2T noising passes a step; 2 is the multi-turn forward.")
    complementary: bool = Field(False, description="Train on x_t and on its inverse mask in the same batch.")
    mask_band: tuple[float, float] = Field((0.05, 1.0), description="Lowest and highest mask ratio.", strict=False)
    cap_weight: float = Field(
        0.0, ge=0.0, description="Weight of the confidence loss on correctly predicted tokens (CAP); 0 is off."
    )

    @model_validator(mode="after")
    def _band(self) -> SftConfig:
        low, high = self.mask_band
        if not 0.0 < low <= high <= 1.0:
            raise ValueError("mask_band must satisfy 0 < low <= high <= 1")
        return self


class DpoConfig(Section):
    pairs: str | None = Field(
        None,
        description="Preference pairs: a JSON or JSONL file (or a folder of them) whose records have 'chosen' and 'rejected' "
        "beside a conversation or a prompt.",
    )
    beta: float = Field(0.1, gt=0.0, description="How strongly a preference counts; lower lets the model move further.")
    steps: int = Field(100, ge=1, description="Optimizer steps, of train.rows_per_step pairs each.")
    lr: float = Field(2e-5, gt=0.0, description="Peak learning rate.")
    lr_warmup_steps: int = Field(10, ge=0, description="Steps of linear learning-rate warm-up.")
    lr_decay_share: float = Field(
        0.3, ge=0.0, le=1.0, description="Last share of the steps in which the learning rate decays."
    )
    block_size: int | None = Field(None, ge=1, description="Block size; null is the checkpoint's.")
    draws: int = Field(
        1, ge=1, description="Noise draws of each answer; more make the likelihoods steadier, and cost forwards."
    )
    complementary: bool = Field(False, description="Add the inverse mask of each draw; needs mask_band below 1.")
    mask_band: tuple[float, float] = Field((0.05, 1.0), description="Lowest and highest mask ratio.", strict=False)

    @model_validator(mode="after")
    def _band(self) -> DpoConfig:
        low, high = self.mask_band
        if not 0.0 < low <= high <= 1.0:
            raise ValueError("mask_band must satisfy 0 < low <= high <= 1")
        if self.complementary and high == 1.0:
            raise ValueError(
                "complementary: the inverse of a mask at ratio 1 masks nothing; lower mask_band, for example to [0.05, 0.95]"
            )
        return self
