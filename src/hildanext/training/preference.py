"""What preference tuning optimizes: DPO on the block-diffusion ELBO (LLaDA2.0, arXiv 2512.15745, eq. 7-8).

    loss = -log sigmoid(beta * [(B(y_w) - B_ref(y_w)) - (B(y_l) - B_ref(y_l))])
    B(y) = -sum over masked i of CE_i / t, of one draw of t (a block's) and masks, or the mean of several

The reference is the same model with the adapter as it was at the start; a fresh one changes nothing, so it is then the
model without it. Policy and reference see the same noise, chosen and rejected the same levels and draws (common random
numbers: LLaDA 1.5, arXiv 2505.19223, section 3): what is left in the difference is the answers', not the masks'.
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
from hildanext.diffusion.noise import block_ids, sample_generator
from hildanext.diffusion.objective import predict, weighted_cross_entropy
from hildanext.errors import NonFiniteLossError
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch
from hildanext.model.loading import set_adapter, weights_of
from hildanext.training.parallel import like, shard_again, sync_gradients
from hildanext.training.passes import Pass, Piece

EVAL_SEED = 20261


class Preference(NamedTuple):
    """How pairs become a loss."""

    beta: float
    draws: int  # noise draws of each answer
    complementary: bool  # each draw with its inverse
    t_min: float
    t_max: float


class Preferred(NamedTuple):
    """Of P pairs. Only `loss` carries a gradient."""

    loss: Tensor  # fp32 scalar, the sum over the pairs
    rewards: Tensor  # [P, 2] float32: beta * (B - B_ref) of the chosen and of the rejected answer


class ElboModule(nn.Module):
    """Forward, head and loss in one call, so that whatever gathers or shards parameters has them at hand."""

    def __init__(self, lm: DiffusionLM, beta: float) -> None:
        super().__init__()
        self.lm, self.beta = lm, beta

    def forward(self, batch: Batch, one: Pass, block_size: int, reference: Tensor | None) -> Tensor | Preferred:
        """Without `reference` the ELBO of every answer [P, 2] float32 in nats; with it, what the pairs' loss is.

        batch, one: rows [R, L], R = draws * P * 2; a draw's rows are chosen, rejected, chosen, ... (`draw_noise`).
        """
        hidden = self.lm(one.noisy_ids, batch.input_ids, batch.doc_ids, batch.position_ids, one.masked, block_size)
        labels, weight = batch.input_ids[one.masked], 1.0 / one.t[one.masked]
        row = one.masked.nonzero()[:, 0]
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
) -> tuple[Batch, Pass]:
    """Noise for the pairs of a batch ([2P, L], chosen and rejected in turn): rows [draws * 2P, L], and what was masked.

    One t ~ U[t_min, t_max] for each block of the pair, one uniform number for each position, both the same for the two
    answers: they are aligned, since their prompt is one. length: the longest row there is. The draws of a pair do not
    depend on its batch.
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
    if recipe.complementary:  # an inverse mask is one drawn at level 1 - t
        ids, docs, positions, allowed = (tensor.repeat(2, 1) for tensor in (ids, docs, positions, allowed))
        masked, t = torch.cat([masked, allowed[: len(masked)] & ~masked]), torch.cat([t, 1.0 - t])
    noisy = Pass(ids.masked_fill(masked, lm.mask_token_id), masked, torch.zeros_like(masked), t)
    return Batch(batch.samples, ids, docs, positions, allowed), noisy


class Prefer:
    """A `train.Task`: rows are pairs of answers."""

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
        """reference: the adapter's values at the start, by the names of `model.weights_of`."""
        self.config, self.lm, self.accelerator, self.recipe = config, lm, accelerator, recipe
        self.eval_rows, self.eval_block = eval_rows, eval_block
        self.rows: RowSource = rows
        self.reference = reference
        self.module: nn.Module = ElboModule(lm, recipe.beta)

    def fetch(self, samples: list[int]) -> Batch:
        return make_batch(self.lm, samples, self.rows.batch(samples))

    def counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """Pairs, which the loss is divided by, and tokens that are no padding."""
        return sum(len(batch.samples) for batch in batches), sum(int((b.doc_ids >= 0).sum()) for b in batches)

    def losses(self, batch: Batch, step: int, block_size: int, n_pairs: int, final: bool) -> Iterator[Piece]:
        """One piece: policy and reference on the same noise."""
        with sync_gradients(self.accelerator, self.module, final):
            found = self.preferred(batch, block_size, self.config.train.seed, "dpo")
            yield Piece(found.loss / n_pairs, self.sums(found), "policy")

    def preferred(self, batch: Batch, block_size: int, seed: int, stream: str) -> Preferred:
        rows, noisy = draw_noise(self.lm, batch, block_size, self.config.data.seq_len, self.recipe, seed, stream)
        with self.accelerator.autocast():
            with self.as_reference(), torch.no_grad():
                reference = self.module(rows, noisy, block_size, None)
            found: Preferred = self.module(rows, noisy, block_size, reference)
        return found

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the block the adapter is what it was at the start, without dropout."""
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
        """Means over a step's pairs. Rewards are beta * (B - B_ref), in nats; accuracy: the chosen answer's is higher."""
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
        """The same on held-out pairs, with noise that never changes; empty without any."""
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
