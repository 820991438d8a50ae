"""What conversion and instruction tuning optimize: the denoising loss of noised rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hildanext.config import Config
from hildanext.data.rows import Rows, RowSource
from hildanext.diffusion.objective import Predicted, Soft
from hildanext.errors import NonFiniteLossError
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch
from hildanext.training.denoiser import Denoised, Denoiser, embedding_noise
from hildanext.training.held_out import evaluate_denoising
from hildanext.training.parallel import sync_gradients
from hildanext.training.passes import Pass, Piece, Recipe, drafted_pass, first_passes
from hildanext.training.teacher import Teacher


class Denoise:
    """A `train.Task`."""

    def __init__(
        self,
        config: Config,
        lm: DiffusionLM,
        accelerator: Accelerator,
        recipe: Recipe,
        rows: RowSource,
        eval_rows: Rows | None,
        eval_block: int,
        parent: Teacher | None = None,
    ) -> None:
        """parent: the teacher of `loss.distill`."""
        self.config, self.lm, self.accelerator, self.recipe = config, lm, accelerator, recipe
        self.rows, self.eval_rows, self.eval_block, self.parent = rows, eval_rows, eval_block, parent
        self.module: nn.Module = Denoiser(lm, config.loss, recipe.cap_weight)

    def fetch(self, samples: list[int]) -> Batch:
        return make_batch(self.lm, samples, self.rows.batch(samples))

    def counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """Allowed tokens, which the loss is divided by, and tokens that are no padding."""
        return (
            sum(int(batch.allowed.sum()) for batch in batches),
            sum(int((batch.doc_ids >= 0).sum()) for batch in batches),
        )

    def losses(self, batch: Batch, step: int, block_size: int, n_tokens: int, final: bool) -> Iterator[Piece]:
        """Each pass of a micro-batch. A caller runs backward before asking for the next.

        Gradients meet those of other processes at the last pass of the step's final micro-batch only.
        """
        noise, recipe, seed = self.config.noise, self.recipe, self.config.train.seed
        std = noise.embed_std * max(0.0, 1 - step / noise.embed_steps) if noise.embed_steps else 0.0
        firsts = first_passes(self.lm, batch, block_size, recipe, noise, seed)
        n_passes = len(firsts) + (recipe.turns - 1)
        n_tokens *= n_passes
        hidden_size = self.lm.model.config.get_text_config().hidden_size
        todo = [(one, number, std) for number, one in enumerate(firsts)]
        taught = self.taught(batch, block_size)
        done = 0
        while todo:
            one, turn, std = todo.pop(0)
            done += 1
            drawn = embedding_noise(hidden_size, batch, one.masked, std, seed)
            wanted = self.wanted(batch, one)
            with sync_gradients(self.accelerator, self.module, final and done == n_passes):
                soft = taught and taught(one, wanted)
                found = self.one_pass(batch, one, wanted, block_size, n_tokens, drawn, soft)
                # Accuracy on masks: turn 0, comparable across recipes.
                logged = (found.loss._asdict() | found.counts._asdict()).items()
                sums = {name: value for name, value in logged if turn == 0 or not name.startswith("masked")}
                yield Piece(found.loss.total, sums, f"turn {turn}")
            if recipe.turns == 2 and done == 1:
                drafts = batch.input_ids.clone()
                drafts[wanted] = found.predicted.best
                todo.insert(0, (drafted_pass(batch, one, drafts, noise.draft_share, seed, recipe.t_min), 1, 0.0))

    def taught(self, batch: Batch, block_size: int) -> Callable[[Pass, Tensor], Soft] | None:
        """What the parent says of a pass at the wanted positions; it reads a micro-batch once for all passes."""
        parent = self.parent
        if parent is None:
            return None
        with self.accelerator.autocast():
            states = parent.states(batch)
        return lambda one, wanted: parent.soft(states, batch, one, wanted, block_size)

    def wanted(self, batch: Batch, one: Pass) -> Tensor:
        """The positions that have a loss, [B, L] bool."""
        loss = self.config.loss
        return batch.allowed if loss.w_t2t > 0 and loss.keep > 0 else one.masked | one.wrong

    def one_pass(
        self,
        batch: Batch,
        one: Pass,
        wanted: Tensor,
        block_size: int,
        n_tokens: int,
        noise: Tensor | None,
        soft: Soft | None = None,
    ) -> Denoised:
        with self.accelerator.autocast():
            result: Denoised = self.module(batch, one, wanted, block_size, n_tokens, noise, soft)
        return result

    def metrics(self, total: dict[str, float]) -> dict[str, float]:
        """What the log keeps of a step. total: its `Loss` and `Counts`, summed over everything."""
        return {
            "loss": total["total"],
            "m2t": total["m2t"],
            "t2t": total["t2t"],
            "m2t_ce": total["masked_ce"] / max(total["masked"], 1),
            "masked_accuracy": total["masked_correct"] / max(total["masked"], 1),
            "edit_accuracy": total["corrupted_correct"] / max(total["corrupted"], 1),
        }

    def line(self, row: dict[str, float]) -> str:
        return f"loss {row['m2t_ce']:.3f} acc {row['masked_accuracy']:.3f}"

    def evaluate(self, step: int, batch_rows: int) -> dict[str, float]:
        """Held-out loss and accuracy after `step` steps at the decoding block; empty without held-out rows."""
        if self.eval_rows is None:
            return {}

        def model(batch: Batch, noisy_ids: Tensor, masked: Tensor) -> Predicted:
            one = Pass(noisy_ids, masked, torch.zeros_like(masked), torch.ones(masked.shape, device=masked.device))
            return self.one_pass(batch, one, masked, self.eval_block, 1, None).predicted

        n_rows = self.config.train.eval_rows
        result = evaluate_denoising(self.lm, self.eval_rows, self.eval_block, n_rows, batch_rows, model=model)
        if not math.isfinite(result.loss):
            raise NonFiniteLossError(f"step {step}: the held-out loss is {result.loss}; lower the learning rate")
        return {"eval_loss": result.loss, "eval_accuracy": result.accuracy}
