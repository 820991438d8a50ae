"""A micro-batch of `convert-wsd` and `sft`, from clean rows x_0 to gradients. Read `DenoisingTask.backward` first.

A micro-batch takes one to three *turns*, each a noised forward and a backward:

    noised      x_t, drawn at the noise level t of each block
    drafts      x_t where some masks hold the model's own predictions (multi-turn forward, LLaDA2.1 section 3); with
                `noise.edits` "levenshtein", tokens are also dropped and added
    complement  x_0 under the complementary mask (LLaDA2.0 section 5.1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hildanext.config import Config
from hildanext.data.rows import Rows, RowSource
from hildanext.diffusion.edits import edit_noise
from hildanext.diffusion.noise import (
    Noisy,
    add_noise,
    block_ids,
    complement,
    noise_levels,
    put_drafts,
    sample_generator,
)
from hildanext.diffusion.objective import Counts, Loss, Predicted, Soft, Target, Weights, denoising_loss
from hildanext.errors import NonFiniteLossError
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch
from hildanext.training.held_out import evaluate_denoising
from hildanext.training.parallel import sync_gradients
from hildanext.training.teacher import Teacher
from hildanext.training.trainer import Sums, TrainingStep, backward

Turn = Literal["noised", "drafts", "complement"]


class Recipe(NamedTuple):
    """How rows are noised: the part that differs between `convert-wsd` and `sft`."""

    turns: int  # 2 adds the turn "drafts"
    complementary: bool  # adds the turn "complement"
    t_min: float
    t_max: float
    cap_weight: float

    def order(self) -> list[Turn]:
        """The turns of a micro-batch."""
        turns: list[Turn] = ["noised"]
        if self.turns == 2:
            turns.append("drafts")
        if self.complementary:
            turns.append("complement")
        return turns


class Denoised(NamedTuple):
    """Result of one turn. Only `loss.total` carries a gradient."""

    loss: Loss
    counts: Counts
    predicted: Predicted  # at the wanted positions


class DenoisingModule(nn.Module):
    """Mask, forward, head and loss in one call: DDP and FSDP2 prepare parameters when the module they wrap is called."""

    def __init__(self, lm: DiffusionLM, weights: Weights) -> None:
        super().__init__()
        self.lm, self.weights = lm, weights

    def forward(
        self,
        batch: Batch,
        noisy: Noisy,
        wanted: Tensor,
        block_size: int,
        n_tokens: int,
        embed_noise: Tensor | None = None,
        soft: Soft | None = None,
    ) -> Denoised:
        """The loss over the wanted positions [B, L] bool.

        n_tokens: allowed tokens of the whole effective batch, over all turns. embed_noise [B, L, H] is added to the
        embeddings of x_t, in units of the embeddings' standard deviation. soft: a teacher's targets at the wanted positions.
        """
        if embed_noise is not None:
            embed_noise = embed_noise * self.lm.embedding_std()
        hidden = self.lm(batch, noisy.noisy_ids, wanted, block_size, embed_noise)
        target = Target(noisy.labels[wanted], noisy.t[wanted], noisy.masked[wanted], noisy.corrupted[wanted])
        mask_id, head = self.lm.mask_token_id, self.lm.head
        return Denoised(*denoising_loss(hidden, head, target, n_tokens, self.weights, mask_token_id=mask_id, soft=soft))


def noise_rows(lm: DiffusionLM, batch: Batch, block_size: int, recipe: Recipe, corrupt_rate: float, seed: int) -> Noisy:
    """x_t of the first turn, [B, L]: each row's noise comes from the generator of its sample."""
    rows = zip(*(x.cpu() for x in (batch.input_ids, batch.doc_ids, batch.position_ids, batch.allowed)), strict=True)
    noised = []
    for sample, (input_ids, doc_ids, position_ids, allowed) in zip(batch.samples, rows, strict=True):
        generator = sample_generator(seed, sample)
        t = noise_levels(doc_ids, block_ids(position_ids, block_size), recipe.t_min, recipe.t_max, generator)
        noised.append(
            add_noise(
                input_ids,
                allowed,
                t,
                mask_token_id=lm.mask_token_id,
                ordinary_ids=lm.ordinary_ids,
                corrupt_rate=corrupt_rate,
                generator=generator,
            )
        )
    return Noisy(*(torch.stack(field).to(lm.device) for field in zip(*noised, strict=True)))


def logged(total: dict[str, float]) -> dict[str, float]:
    """What the log keeps of a step. total: its `Loss` and `Counts`, summed over turns, micro-batches and processes."""
    return {
        "loss": total["total"],
        "m2t": total["m2t"],
        "t2t": total["t2t"],
        "m2t_ce": total["masked_ce"] / max(total["masked"], 1),
        "masked_accuracy": total["masked_correct"] / max(total["masked"], 1),
        "edit_accuracy": total["corrupted_correct"] / max(total["corrupted"], 1),
    }


def log_line(row: dict[str, float]) -> str:
    """The metrics of a step in a few words."""
    return f"loss {row['m2t_ce']:.3f} acc {row['masked_accuracy']:.3f}"


class DenoisingTask:
    """The `Task` of a trainer whose rows are text. Its noise depends on (seed, global sample index) alone."""

    def __init__(
        self,
        config: Config,
        lm: DiffusionLM,
        accelerator: Accelerator,
        recipe: Recipe,
        rows: RowSource,
        eval_rows: Rows | None,
        eval_block: int,
        teacher: Teacher | None = None,
    ) -> None:
        """teacher: of `loss.distill`."""
        self.config, self.lm, self.accelerator, self.recipe = config, lm, accelerator, recipe
        self.rows, self.eval_rows, self.eval_block, self.teacher = rows, eval_rows, eval_block, teacher
        loss = config.loss
        weights = Weights(loss.weighting, loss.w_m2t, loss.w_t2t, loss.keep, recipe.cap_weight)
        self.module: nn.Module = DenoisingModule(lm, weights)

    def fetch(self, samples: list[int]) -> Batch:
        return make_batch(self.lm, samples, self.rows.batch(samples))

    def counts(self, batches: Sequence[Batch], block_size: int) -> tuple[int, int]:
        """Allowed tokens, by which the loss is divided, and tokens other than padding."""
        return (
            sum(int(batch.allowed.sum()) for batch in batches),
            sum(int((batch.doc_ids >= 0).sum()) for batch in batches),
        )

    def backward(self, batch: Batch, step: TrainingStep, sums: Sums, sync: bool) -> None:
        """Forward and backward of every turn of a micro-batch: gradients and `sums` (for the log) add up.

        sync: exchange gradients with other processes, at the last turn. Raises NonFiniteLossError.
        """
        order, block_size = self.recipe.order(), step.point.block_size
        n_tokens = step.n_items * len(order)
        with self.accelerator.autocast():  # read once for all turns
            teacher_states = None if self.teacher is None else self.teacher.states(batch)
        seed, corrupt_rate = self.config.train.seed, self.config.noise.corrupt_rate
        first = noise_rows(self.lm, batch, block_size, self.recipe, corrupt_rate, seed)
        drafts = batch.input_ids.clone()
        for turn in order:
            # 1. noise: x_0 -> x_t
            noisy = self.noise_of(turn, batch, first, drafts, block_size)
            wanted = self.wanted(batch, noisy)
            embed_noise = None if turn == "drafts" else self.embedding_noise(batch, noisy.masked, step.number)
            soft = None
            if self.teacher is not None and teacher_states is not None:
                soft = self.teacher.soft(teacher_states, batch, noisy, wanted, block_size)
            with sync_gradients(self.accelerator, self.module, sync and turn == order[-1]):
                # 2. mask, 3. forward, 4. loss: `DenoisingModule.forward`
                with self.accelerator.autocast():
                    found: Denoised = self.module(batch, noisy, wanted, block_size, n_tokens, embed_noise, soft)
                # 5. backward
                backward(self.accelerator, found.loss.total, step, self.rows.describe(batch.samples), turn)
            if turn == "noised":
                drafts[wanted] = found.predicted.best
            # Accuracy on masks is logged of the first turn only, so that it compares across recipes.
            for name, value in (found.loss._asdict() | found.counts._asdict()).items():
                if turn == "noised" or not name.startswith("masked"):
                    sums.add(name, value)

    def noise_of(self, turn: Turn, batch: Batch, first: Noisy, drafts: Tensor, block_size: int) -> Noisy:
        """x_t of a turn. first: x_t of the first turn; drafts [B, L] int64: the model's predictions at its masks."""
        t_min = self.recipe.t_min
        if turn == "noised":
            return first
        if turn == "complement":
            return complement(batch.input_ids, batch.allowed, first, self.lm.mask_token_id, t_min)
        seed, length = self.config.train.seed, drafts.shape[1]
        uniform = torch.stack([torch.rand(length, generator=sample_generator(seed, s, "draft")) for s in batch.samples])
        no_text = torch.isin(drafts, torch.tensor(self.lm.edit_ids, dtype=drafts.dtype, device=drafts.device))
        uniform = uniform.to(drafts.device).masked_fill(no_text, 1.0)  # these masks stay
        noisy = put_drafts(batch.input_ids, first, drafts, uniform, self.config.noise.draft_share, t_min)
        return self.edited(batch, noisy, block_size) if self.config.noise.edits == "levenshtein" else noisy

    def edited(self, batch: Batch, noisy: Noisy, block_size: int) -> Noisy:
        """Drop and add tokens of a micro-batch's drafts, and label them by their alignment with x_0."""
        lm, noise = self.lm, self.config.noise
        assert lm.edit_tokens is not None
        fields = (batch.input_ids, batch.allowed, batch.doc_ids, batch.position_ids, *noisy)
        rows = []
        for sample, *row in zip(batch.samples, *(x.cpu() for x in fields), strict=True):
            input_ids, allowed, doc_ids, position_ids, *noised = row
            opens_block = position_ids % block_size == 0  # shifted, the clean stream predicts it
            rows.append(
                edit_noise(
                    input_ids,
                    allowed,
                    doc_ids,
                    block_ids(position_ids, block_size),
                    opens_block if lm.convention == "shifted" else torch.zeros_like(allowed),
                    Noisy(*noised),
                    tokens=lm.edit_tokens,
                    ordinary_ids=lm.ordinary_ids,
                    deletion_rate=noise.deletion_rate,
                    insertion_rate=noise.insertion_rate,
                    corrupt_rate=noise.corrupt_rate,
                    generator=sample_generator(self.config.train.seed, sample, "edits"),
                )
            )
        return Noisy(*(torch.stack(field).to(lm.device) for field in zip(*rows, strict=True)))

    def wanted(self, batch: Batch, noisy: Noisy) -> Tensor:
        """The supervised positions, [B, L] bool."""
        loss = self.config.loss
        return batch.allowed if loss.w_t2t > 0 and loss.keep > 0 else noisy.masked | noisy.corrupted

    def embedding_noise(self, batch: Batch, masked: Tensor, step: int) -> Tensor | None:
        """Gaussian noise [B, L, H] at masked positions, decaying linearly to zero (LLaDA2.0 section 4.1); None when off."""
        noise = self.config.noise
        std = noise.embed_std * max(0.0, 1 - step / noise.embed_steps) if noise.embed_steps else 0.0
        if std == 0:
            return None
        shape = (masked.shape[1], self.lm.model.config.get_text_config().hidden_size)
        seed = self.config.train.seed
        draws = torch.stack([torch.randn(shape, generator=sample_generator(seed, s, "embed")) for s in batch.samples])
        return draws.to(masked.device) * masked[..., None] * std

    def metrics(self, total: dict[str, float]) -> dict[str, float]:
        """What the log keeps of a step, see `logged`."""
        return logged(total)

    def line(self, row: dict[str, float]) -> str:
        return log_line(row)

    def evaluate(self, step: int, batch_rows: int) -> dict[str, float]:
        """Held-out loss and accuracy after `step` steps at the decoding block; empty without held-out rows."""
        if self.eval_rows is None:
            return {}

        def predict(batch: Batch, noisy: Noisy) -> Predicted:
            with self.accelerator.autocast():
                found: Denoised = self.module(batch, noisy, noisy.masked, self.eval_block, 1)
            return found.predicted

        n_rows = self.config.train.eval_rows
        result = evaluate_denoising(self.lm, self.eval_rows, self.eval_block, n_rows, batch_rows, model=predict)
        if not math.isfinite(result.loss):
            raise NonFiniteLossError(f"step {step}: the held-out loss is {result.loss}; lower the learning rate")
        return {"eval_loss": result.loss, "eval_accuracy": result.accuracy}
