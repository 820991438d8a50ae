"""A micro-batch of `convert-wsd` and `sft` with a gated adapter, from clean rows x_0 to gradients.

Read `GatedTask.backward` first. x_0 runs once through the base; groups of denoised rows behind many anchors share its
keys and values (`diffusion.groups`). A group of k rows is the block of the schedule: its size goes 1, 2, ... k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hildanext.config import Config, NoiseConfig
from hildanext.data.rows import Rows, RowSource
from hildanext.diffusion.groups import Groups, draw_anchors, draw_sizes, edit_groups, place_groups, without_draft_head
from hildanext.diffusion.noise import sample_generator
from hildanext.diffusion.objective import Counts, Loss, Predicted, Soft, Target, Weights, denoising_loss, predict
from hildanext.errors import NonFiniteLossError
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch
from hildanext.model.draft_head import CANDIDATES
from hildanext.model.gate import clean_forward, draft_states, group_forward
from hildanext.training.denoising import log_line, logged
from hildanext.training.held_out import EVAL_SEED
from hildanext.training.parallel import sync_gradients
from hildanext.training.trainer import Sums, TrainingStep, backward

EVAL_CHUNK = 128  # group rows whose logits an evaluation holds at once


class GroupRecipe(NamedTuple):
    """How groups are drawn: keys of the section `noise`, and the noise levels, in which the two commands differ."""

    noise: NoiseConfig
    t_min: float
    t_max: float
    causal: bool


class Drafted(NamedTuple):
    """Result of a forward. Only `loss.total` carries a gradient."""

    loss: Loss
    counts: Counts
    predicted: Predicted  # at the wanted group rows
    base: Tensor  # [S] int64: the base's own choice for each label
    drafts: Tensor  # [S] int64: the draft that decoding would make; the labels in training, where nobody asks


def draw_groups(lm: DiffusionLM, batch: Batch, k: int, recipe: GroupRecipe, seed: int) -> Groups:
    """The groups of a micro-batch, [B, anchors * k]: each row's come from the generator of its sample."""
    noise, columns = recipe.noise, (batch.input_ids, batch.doc_ids, batch.position_ids, batch.allowed)
    drawn = []
    for sample, (input_ids, doc_ids, position_ids, allowed) in zip(
        batch.samples, zip(*(x.cpu() for x in columns), strict=True), strict=True
    ):
        generator = sample_generator(seed, sample, "groups")
        anchors = draw_anchors(doc_ids, allowed, noise.anchors, generator)
        sizes = draw_sizes(len(anchors), k, noise.offset_keep, generator)
        groups = place_groups(
            *(input_ids, doc_ids, position_ids, allowed, anchors, sizes), noise.anchors * k, lm.mask_token_id
        )
        groups = without_draft_head(groups, noise.plain_share, generator)
        if torch.rand((), generator=generator) < noise.edit_share:
            levels = recipe.t_min + (recipe.t_max - recipe.t_min) * torch.rand(len(anchors), generator=generator)
            groups = edit_groups(
                groups,
                input_ids,
                doc_ids,
                levels,
                mask_token_id=lm.mask_token_id,
                ordinary_ids=lm.ordinary_ids,
                corrupt_rate=noise.corrupt_rate,
                generator=generator,
            )
        drawn.append(groups)
    return Groups(*(torch.stack(field).to(lm.device) for field in zip(*drawn, strict=True)))


class GatedModule(nn.Module):
    """Both forwards, head and loss in one call: DDP and FSDP2 prepare parameters when the module they wrap is called."""

    def __init__(self, lm: DiffusionLM, weights: Weights, distill: float, causal: bool) -> None:
        super().__init__()
        self.lm, self.weights, self.distill, self.causal = lm, weights, distill, causal

    def forward(self, batch: Batch, groups: Groups, k: int, n_rows: int) -> Drafted:
        """The loss over the wanted rows of groups of at most k. n_rows: wanted rows of the whole effective batch."""
        wanted, mask_id = groups.wanted, self.lm.mask_token_id
        # 1. clean rows through the base, without gradient
        clean = clean_forward(self.lm.model, batch)
        # 2. mask, 3. forward of the groups
        plain = group_forward(self.lm.model, batch, groups, clean, self.causal)
        hidden = draft_states(self.lm.model, batch, groups, k, plain)[wanted]
        # 4. loss: the clean row before a label holds the base's distribution of it
        row, _ = wanted.nonzero(as_tuple=True)
        base_hidden = clean.hidden[row, groups.labels_at[wanted] - 1]
        labels = groups.labels[wanted]
        soft = None
        if self.distill:
            soft = Soft(base_hidden, self.base_logits, torch.full(labels.shape, self.distill, device=labels.device))
        target = Target(labels, groups.t[wanted], groups.masked[wanted], groups.corrupted[wanted])
        found = denoising_loss(hidden, self.lm.head, target, n_rows, self.weights, mask_token_id=mask_id, soft=soft)
        if self.training:
            return Drafted(*found, labels, labels)
        base = predict(base_hidden, self.lm.head, labels, mask_id).best
        return Drafted(*found, base, self.drafts(plain[wanted], hidden))

    @torch.no_grad()
    def drafts(self, plain: Tensor, hidden: Tensor) -> Tensor:
        """The best ids [S] as decoding finds them: of each row's likeliest candidates without the draft head."""
        best = []
        for own, headed in zip(plain.split(EVAL_CHUNK), hidden.split(EVAL_CHUNK), strict=True):
            scores = self.lm.decodable_logits(own)
            candidates = scores.topk(min(CANDIDATES, scores.shape[1]), dim=-1).indices
            ranked = self.lm.decodable_logits(headed).gather(1, candidates)
            best.append(candidates.gather(1, ranked.argmax(-1, keepdim=True))[:, 0])
        return torch.cat(best)

    @torch.no_grad()
    def base_logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32, -inf at ids that are never decoded."""
        return self.lm.decodable_logits(hidden)


class GatedTask:
    """The `Task` of a trainer with a gated adapter. Its groups depend on (seed, global sample index) alone."""

    def __init__(
        self,
        config: Config,
        lm: DiffusionLM,
        accelerator: Accelerator,
        recipe: GroupRecipe,
        rows: RowSource,
        eval_rows: Rows | None,
        eval_group: int,
    ) -> None:
        self.config, self.lm, self.accelerator, self.recipe = config, lm, accelerator, recipe
        self.rows, self.eval_rows, self.eval_group = rows, eval_rows, eval_group
        loss = config.loss
        weights = Weights(loss.weighting, loss.w_m2t, loss.w_t2t, loss.keep)
        self.module: nn.Module = GatedModule(lm, weights, loss.distill, recipe.causal)

    def fetch(self, samples: list[int]) -> Batch:
        return make_batch(self.lm, samples, self.rows.batch(samples))

    def draw(self, batch: Batch, k: int) -> Groups:
        return draw_groups(self.lm, batch, k, self.recipe, self.config.train.seed)

    def counts(self, batches: Sequence[Batch], block_size: int) -> tuple[int, int]:
        """Supervised group rows, by which the loss is divided, and clean tokens other than padding."""
        return (
            sum(int(self.draw(batch, block_size).wanted.sum()) for batch in batches),
            sum(int((batch.doc_ids >= 0).sum()) for batch in batches),
        )

    def backward(self, batch: Batch, step: TrainingStep, sums: Sums, sync: bool) -> None:
        """Forward and backward of a micro-batch: gradients and `sums` (for the log) add up. Raises NonFiniteLossError."""
        groups = self.draw(batch, step.point.block_size)
        with sync_gradients(self.accelerator, self.module, sync):
            with self.accelerator.autocast():
                found: Drafted = self.module(batch, groups, step.point.block_size, step.n_items)
            backward(self.accelerator, found.loss.total, step, self.rows.describe(batch.samples), "groups")
        for name, value in (found.loss._asdict() | found.counts._asdict()).items():
            sums.add(name, value)

    def metrics(self, total: dict[str, float]) -> dict[str, float]:
        """What the log keeps of a step: that of `convert-wsd` without a gate, and the number of supervised rows."""
        return logged(total) | {"group_rows": total["masked"] + total["corrupted"]}

    def line(self, row: dict[str, float]) -> str:
        return log_line(row)

    def evaluate(self, step: int, batch_rows: int) -> dict[str, float]:
        """Held-out loss, accuracy and accepted run after `step` steps; empty without held-out rows."""
        if self.eval_rows is None:
            return {}
        with self.accelerator.autocast():
            found = evaluate_drafts(
                self.lm,
                self.module,
                self.eval_rows,
                self.eval_group,
                self.config.train.eval_rows,
                batch_rows,
                self.recipe,
            )
        if not math.isfinite(found.loss):
            raise NonFiniteLossError(f"step {step}: the held-out loss is {found.loss}; lower the learning rate")
        self.lm.record["gate"]["fresh"] = [round(chance, 4) for chance in found.chances]  # decoding plans with it
        by_offset = {f"eval_accuracy_{j}": value for j, value in enumerate(found.by_offset, start=1)}
        return {"eval_loss": found.loss, "eval_accuracy": found.accuracy, "eval_run": found.run, **by_offset}


class DraftQuality(NamedTuple):
    """Held-out result of mask groups, the text before each draft given."""

    loss: float  # mean cross-entropy in nats
    accuracy: float  # share of rows whose best id is the base's own choice
    by_offset: list[float]  # the same for row 1 ... k
    chances: list[float]  # of row 1 ... k to be right if all before it in the group are
    run: float  # mean number of rows before the first that differs: tokens a pass would gain
    n_rows: int


@torch.no_grad()
def evaluate_drafts(
    lm: DiffusionLM, module: nn.Module, rows: Rows, k: int, n_rows: int, batch_rows: int, recipe: GroupRecipe
) -> DraftQuality:
    """Mask groups of k rows in the first `n_rows` rows. Anchors are fixed, so that models are comparable."""
    was_training = lm.model.training
    lm.model.eval()
    module.eval()
    fixed = recipe._replace(
        noise=recipe.noise.model_copy(update={"offset_keep": 1.0, "edit_share": 0.0, "plain_share": 0.0})
    )
    ce, hits, seen, reached, n_groups = 0.0, torch.zeros(k), torch.zeros(k), torch.zeros(k), 0
    n_rows = min(n_rows, len(rows))
    for start in range(0, n_rows, batch_rows):
        indices = list(range(start, min(start + batch_rows, n_rows)))
        batch = make_batch(lm, indices, rows.batch(indices))
        groups = draw_groups(lm, batch, k, fixed, EVAL_SEED)
        found: Drafted = module(batch, groups, k, 1)
        right = torch.zeros_like(groups.wanted)
        right[groups.wanted] = found.drafts == found.base
        ce += float(found.predicted.ce.sum())
        offset = groups.offsets[groups.wanted] - 1
        hits.index_add_(0, offset.cpu(), right[groups.wanted].float().cpu())
        seen.index_add_(0, offset.cpu(), torch.ones(len(offset)))
        # Every group of k rows whose labels all stand in the text
        whole = groups.wanted.view(len(indices), -1, k).all(-1)
        reached += right.view(len(indices), -1, k).long().cumprod(-1)[whole].sum(0).cpu()
        n_groups += int(whole.sum())
    lm.model.train(was_training)
    module.train(was_training)
    total = float(seen.sum())
    accuracy = float(hits.sum()) / max(total, 1)
    by_offset = (hits / seen.clamp_min(1)).tolist()
    before = torch.cat([torch.tensor([float(n_groups)]), reached[:-1]])
    chances = (reached / before.clamp_min(1)).tolist()
    return DraftQuality(
        ce / max(total, 1), accuracy, by_offset, chances, float(reached.sum()) / max(n_groups, 1), int(total)
    )
