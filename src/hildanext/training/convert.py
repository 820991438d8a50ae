"""The two training commands: `convert-wsd` (AR base -> dLLM by continued pre-training) and `sft` (instruction tuning)."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.data.corpus import PARTS, Use
from hildanext.data.rows import Rows, open_rows
from hildanext.diffusion.objective import Weights
from hildanext.diffusion.schedule import sft_point, total_steps, wsd_point
from hildanext.errors import UsageError
from hildanext.model.backbone import check_length
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.gate import gate_open
from hildanext.model.loading import load_diffusion_lm
from hildanext.progress import say
from hildanext.training.denoising import DenoisingTask, Recipe
from hildanext.training.gated import GatedModule, GatedTask, GroupRecipe, evaluate_drafts
from hildanext.training.held_out import evaluate_denoising
from hildanext.training.run import Opened, open_row_source, open_run, run_job
from hildanext.training.teacher import Teacher
from hildanext.training.trainer import TrainingJob


def _train(
    config: Config, opened: Opened, job: TrainingJob, recipe: Recipe, use: Use, block_size: int | None = None
) -> dict[str, Any]:
    lm = opened.lm
    check_length(lm.model, config.data.seq_len, "data.seq_len")
    if config.noise.edits == "levenshtein" and recipe.turns == 1:
        key = "noise.turns" if use == "train" else "sft.turns"
        raise UsageError(f"'noise.edits': 'levenshtein' changes the second turn, and there is one; set {key} to 2")
    held_out = PARTS[use][1]
    with closing(open_row_source(config, use, lm, block_size)) as rows:
        eval_rows = open_rows(config, held_out, lm.tokenizer)
        if eval_rows is None:
            say(
                f"no held-out rows in '{held_out}': no evaluation, and no best checkpoints are kept (raise data.eval_share)"
            )
        if config.lora.gate:
            lm.record["gate"]["edits"] = lm.record["gate"]["edits"] or config.noise.edit_share > 0
            groups = GroupRecipe(config.noise, recipe.t_min, recipe.t_max, config.lora.causal_groups)
            gated = GatedTask(config, lm, opened.accelerator, groups, rows, eval_rows, job.eval_block)
            return run_job(config, opened, job, gated)
        teacher = Teacher(lm, config, opened.policy) if config.loss.distill else None
        task = DenoisingTask(config, lm, opened.accelerator, recipe, rows, eval_rows, job.eval_block, teacher)
        return run_job(config, opened, job, task)


def evaluate_checkpoint(config: Config, folder: Path, split: str) -> dict[str, Any]:
    """Held-out loss and accuracy of a checkpoint at its block size; a note instead when there are no rows for it."""
    lm, _ = load_diffusion_lm(config.model.model_copy(update={"base": str(folder), "convention": None}))
    if not (Path(config.paths.data) / "tokenized" / f"{split}.rows").is_dir():
        return {"eval": f"no tokenized rows for '{split}'; not evaluated"}
    rows = open_rows(config, split, lm.tokenizer)
    if rows is None or lm.block_size is None:
        return {"eval": f"the split '{split}' has no rows; not evaluated"}
    if lm.gated:
        return _evaluate_gated(config, lm, rows)
    result = evaluate_denoising(lm, rows, lm.block_size, config.train.eval_rows, config.train.micro_batch)
    return {"eval_loss": result.loss, "eval_accuracy": result.accuracy}


def _evaluate_gated(config: Config, lm: DiffusionLM, rows: Rows) -> dict[str, Any]:
    """Held-out loss, accuracy and accepted run of a gated checkpoint."""
    assert lm.block_size is not None
    causal = lm.record["gate"]["causal"]
    recipe = GroupRecipe(config.noise, config.noise.t_min, config.noise.t_max, causal)
    module = GatedModule(lm, Weights(), 0.0, causal)
    train = config.train
    with gate_open(lm.model):
        found = evaluate_drafts(lm, module, rows, lm.block_size, train.eval_rows, train.micro_batch, recipe)
    return {"eval_loss": found.loss, "eval_accuracy": found.accuracy, "eval_run": found.run}


def convert_wsd(config: Config, name: str = "convert", resume: bool = False) -> dict[str, Any]:
    """Continued pre-training through the WSD block schedule. Returns a summary with the last checkpoint's path."""
    opened = open_run(config, name, "convert-wsd", resume)
    opened.lm.record["schedule"] = config.wsd.model_dump(mode="json")
    noise = config.noise
    job = TrainingJob(
        title="convert-wsd",
        steps=total_steps(config.wsd),
        point=lambda step: wsd_point(step, config.wsd, config.train, config.data.seq_len),
        eval_block=min(config.wsd.final_block, config.data.seq_len),
    )
    recipe = Recipe(noise.turns, noise.complementary, noise.t_min, noise.t_max, config.loss.cap_weight)
    return _train(config, opened, job, recipe, "train")


def sft(config: Config, name: str = "sft", resume: bool = False) -> dict[str, Any]:
    """Instruction tuning of a converted checkpoint: responses only. Raises UsageError for a model that is not converted."""
    opened = open_run(config, name, "sft", resume)
    lm = opened.lm
    block = (
        config.sft.block_size or lm.block_size
    )  # a gated adapter leaves the base as it is: no conversion precedes it
    if block is None or (lm.block_size is None and not config.lora.gate):
        raise UsageError(
            f"model '{lm.name}' is not converted; run 'hildanext convert-wsd' and give its checkpoint as model.base"
        )
    tune = config.sft
    job = TrainingJob(
        title="sft",
        steps=tune.steps,
        point=lambda step: sft_point(step, tune, config.train.lr_final_ratio, block),
        eval_block=block,
    )
    recipe = Recipe(tune.turns, tune.complementary, *tune.mask_band, tune.cap_weight)
    return _train(config, opened, job, recipe, "sft", block)
