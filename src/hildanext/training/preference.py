"""What preference tuning optimizes: DPO on the block-diffusion ELBO (LLaDA2.0, arXiv 2512.15745, eq. 7-8).

    loss = -log sigmoid(beta * [(B(y_w) - B_ref(y_w)) - (B(y_l) - B_ref(y_l))])
    B(y) = -sum over masked i of CE_i / t, of one draw of t (a block's) and masks, or the mean of several

The reference is the same model with the adapter's values of the run's start; for a new adapter, which changes nothing,
that is the model without it. Policy and reference see the same noise, and chosen and rejected answers the same levels and
draws (common random numbers: LLaDA 1.5, arXiv 2505.19223, section 3), so the difference comes from the answers, not the masks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hildanext.config import Config
from hildanext.data.preferences import PreferencePairs
from hildanext.data.rows import RowSource
from hildanext.diffusion.noise import Noisy, block_ids, sample_generator
from hildanext.diffusion.objective import predict, weighted_cross_entropy
from hildanext.errors import NonFiniteLossError
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch
from hildanext.model.loading import set_adapter, weights_of
from hildanext.training.parallel import like, shard_again, sync_gradients
from hildanext.training.trainer import Sums, TrainingStep, backward

EVAL_SEED = 20261


class Preference(NamedTuple):
    """How pairs become a loss."""

    beta: float
    draws: int  # noise draws of each answer
    complementary: bool  # each draw with its inverse
    t_min: float
    t_max: float


class Preferred(NamedTuple):
    """Result for P pairs. Only `loss` carries a gradient."""

    loss: Tensor  # fp32 scalar, the sum over the pairs
    rewards: Tensor  # [P, 2] float32: beta * (B - B_ref) of the chosen and of the rejected answer


class ElboModule(nn.Module):
    """Forward, head and loss in one call: DDP and FSDP2 prepare parameters when the module they wrap is called."""

    def __init__(self, lm: DiffusionLM, beta: float) -> None:
        super().__init__()
        self.lm, self.beta = lm, beta

    def forward(self, batch: Batch, noisy: Noisy, block_size: int, reference: Tensor | None) -> Tensor | Preferred:
        """Without `reference`: the ELBO of every answer [P, 2] float32 in nats. With it: the pairs' loss.

        batch, noisy: rows [R, L], R = draws * P * 2; a draw's rows are chosen, rejected, chosen, ... (`draw_noise`).
        """
        hidden = self.lm(batch, noisy.noisy_ids, noisy.masked, block_size)
        labels, weight = batch.input_ids[noisy.masked], 1.0 / noisy.t[noisy.masked]
        row = noisy.masked.nonzero()[:, 0]
        n_rows, n_pairs = len(batch.input_ids), len(batch.samples)
        draws = n_rows // (2 * n_pairs)
        ce = predict(hidden.detach(), self.lm.head, labels).ce
        elbo = torch.zeros(n_rows, device=ce.device).index_add(0, row, -ce * weight).view(draws, n_pairs, 2).mean(0)
        if reference is None:
            return elbo
        rewards = self.beta * (elbo - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        # The slope of the loss at each answer's ELBO is known now; its gradient is that of a weighted cross-entropy.
        slope = self.beta * torch.sigmoid(-margin)[:, None] * torch.tensor([1.0, -1.0], device=ce.device)
        weight = weight * slope.flatten().repeat(draws)[row] / draws
        carrier = weighted_cross_entropy(hidden, self.lm.head, labels, weight)
        return Preferred(carrier - carrier.detach() + F.softplus(-margin).sum(), rewards)


def draw_noise(
    lm: DiffusionLM, batch: Batch, block_size: int, length: int, recipe: Preference, seed: int, stream: str
) -> tuple[Batch, Noisy]:
    """Noise for the pairs of a batch ([2P, L], chosen and rejected in turn): clean rows and x_t, [draws * 2P, L].

    Each block of a pair draws one t ~ U[t_min, t_max] and each position one uniform number. Both answers use the same
    draws: they are aligned because they share the prompt. length: of the longest row. The draws of a pair do not depend
    on its batch.
    """
    levels, uniform = [], []
    for k in range(recipe.draws):
        for sample in batch.samples:
            generator = sample_generator(seed, sample * recipe.draws + k, stream)
            t = recipe.t_min + (recipe.t_max - recipe.t_min) * torch.rand(-(-length // block_size), generator=generator)
            levels += [t, t]
            uniform += [torch.rand(length, generator=generator)] * 2
    ids, docs, positions, allowed = (
        tensor.repeat(recipe.draws, 1) for tensor in (batch.input_ids, batch.doc_ids, batch.position_ids, batch.allowed)
    )
    t = torch.stack(levels).to(ids.device).gather(1, block_ids(positions, block_size))
    masked = (torch.stack(uniform).to(ids.device)[:, : ids.shape[1]] < t) & allowed
    if recipe.complementary:  # the complement of a mask drawn at level t is a mask drawn at level 1 - t
        ids, docs, positions, allowed = (tensor.repeat(2, 1) for tensor in (ids, docs, positions, allowed))
        masked, t = torch.cat([masked, allowed[: len(masked)] & ~masked]), torch.cat([t, 1.0 - t])
    noisy = Noisy(ids.masked_fill(masked, lm.mask_token_id), masked, torch.zeros_like(masked), t, ids)
    return Batch(batch.samples, ids, docs, positions, allowed), noisy


class PreferenceTask:
    """The `Task` of a trainer whose rows are pairs of answers."""

    def __init__(
        self,
        config: Config,
        lm: DiffusionLM,
        accelerator: Accelerator,
        recipe: Preference,
        rows: PreferencePairs,
        eval_rows: PreferencePairs | None,
        eval_block: int,
        reference: dict[str, Tensor],
    ) -> None:
        """reference: the adapter's values at the start of the run, by the names of `weights_of`."""
        self.config, self.lm, self.accelerator, self.recipe = config, lm, accelerator, recipe
        self.eval_rows, self.eval_block = eval_rows, eval_block
        self.rows: RowSource = rows
        self.reference = reference
        self.module: nn.Module = ElboModule(lm, recipe.beta)

    def fetch(self, samples: list[int]) -> Batch:
        return make_batch(self.lm, samples, self.rows.batch(samples))

    def counts(self, batches: Sequence[Batch], block_size: int) -> tuple[int, int]:
        """Pairs, by which the loss is divided, and tokens other than padding."""
        return sum(len(batch.samples) for batch in batches), sum(int((b.doc_ids >= 0).sum()) for b in batches)

    def backward(self, batch: Batch, step: TrainingStep, sums: Sums, sync: bool) -> None:
        """Forward and backward of a micro-batch: gradients and `sums` (for the log) add up. Raises NonFiniteLossError."""
        with sync_gradients(self.accelerator, self.module, sync):
            found = self.preferred(batch, step.point.block_size, self.config.train.seed, "dpo")
            backward(self.accelerator, found.loss / step.n_items, step, self.rows.describe(batch.samples), "policy")
        for name, value in self.sums(found).items():
            sums.add(name, value)

    def preferred(self, batch: Batch, block_size: int, seed: int, stream: str) -> Preferred:
        """The loss of pairs: policy and reference on the same noise."""
        rows, noisy = draw_noise(self.lm, batch, block_size, self.config.data.seq_len, self.recipe, seed, stream)
        with self.accelerator.autocast():
            with self.as_reference(), torch.no_grad():
                reference = self.module(rows, noisy, block_size, None)
            found: Preferred = self.module(rows, noisy, block_size, reference)
        return found

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the block the adapter has its values of the run's start, and dropout is off."""
        shard_again(self.module)
        weights = weights_of(self.lm)
        now = {name: parameter.detach().clone() for name, parameter in weights.items()}
        self.reference = {name: like(value, weights[name]) for name, value in self.reference.items()}
        was_training = self.lm.model.training
        set_adapter(self.lm, self.reference)
        self.lm.model.eval()
        try:
            yield
        finally:
            shard_again(self.module)  # into the shards, from which the next forward gathers again
            set_adapter(self.lm, now)
            self.lm.model.train(was_training)

    @staticmethod
    def sums(found: Preferred) -> dict[str, Tensor]:
        margin = found.rewards[:, 0] - found.rewards[:, 1]
        return {
            "loss": found.loss,
            "chosen": found.rewards[:, 0].sum(),
            "rejected": found.rewards[:, 1].sum(),
            "right": (margin > 0).sum() + 0.5 * (margin == 0).sum(),
            "pairs": torch.tensor(float(len(margin)), device=margin.device),
        }

    def metrics(self, total: dict[str, float]) -> dict[str, float]:
        """Means over a step's pairs. Rewards are beta * (B - B_ref), in nats; accuracy: share of pairs whose chosen answer's is higher."""
        n = total["pairs"]
        return {
            "loss": total["loss"] / n,
            "reward_chosen": total["chosen"] / n,
            "reward_rejected": total["rejected"] / n,
            "reward_margin": (total["chosen"] - total["rejected"]) / n,
            "reward_accuracy": total["right"] / n,
        }

    def line(self, row: dict[str, float]) -> str:
        return f"loss {row['loss']:.3f} margin {row['reward_margin']:.3f} acc {row['reward_accuracy']:.3f}"

    @torch.no_grad()
    def evaluate(self, step: int, batch_rows: int) -> dict[str, float]:
        """Loss, margin and accuracy on held-out pairs, with fixed noise; empty without held-out pairs."""
        if self.eval_rows is None:
            return {}
        was_training = self.lm.model.training
        self.lm.model.eval()
        n, totals = min(self.config.train.eval_rows, len(self.eval_rows)), dict[str, float]()
        for start in range(0, n, batch_rows):
            pairs = list(range(start, min(start + batch_rows, n)))
            batch = make_batch(self.lm, pairs, self.eval_rows.of(pairs))
            for name, value in self.sums(self.preferred(batch, self.eval_block, EVAL_SEED, "eval")).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        self.lm.model.train(was_training)
        found = self.metrics(totals)
        if not math.isfinite(found["loss"]):
            raise NonFiniteLossError(f"step {step}: the held-out loss is {found['loss']}; lower the learning rate")
        return {
            "eval_loss": found["loss"],
            "eval_margin": found["reward_margin"],
            "eval_accuracy": found["reward_accuracy"],
        }
