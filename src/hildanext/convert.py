"""The two training commands: `convert-wsd` (AR base -> dLLM by continued pre-training) and `sft` (instruction tuning)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hildanext.checkpoint import newest_good
from hildanext.config import Config
from hildanext.documents import fingerprint
from hildanext.errors import DataError, UsageError
from hildanext.evaluate.denoising import evaluate_denoising
from hildanext.model import DiffusionLM, load_diffusion_lm
from hildanext.passes import Recipe
from hildanext.policy import Policy
from hildanext.probe import check_length
from hildanext.progress import say
from hildanext.rows import Rows
from hildanext.runs import RunFolder
from hildanext.schedule import sft_point, total_steps, wsd_point
from hildanext.train import Job, State, Trainer, train


def open_rows(config: Config, split: str, lm: DiffusionLM) -> Rows | None:
    """Tokenized rows of a split, checked against this run; None when the split has no rows.

    Raises DataError when they are missing, of another row length, or from another tokenizer.
    """
    folder = Path(config.paths.data) / "tokenized" / f"{split}.rows"
    if not folder.is_dir():
        raise DataError(f"{folder}: no tokenized rows; run 'hildanext tokenize' first")
    rows = Rows.open(folder)
    if len(rows) == 0:
        return None
    if rows.seq_len != config.data.seq_len:
        raise DataError(
            f"{folder}: rows of {rows.seq_len} tokens, but data.seq_len is {config.data.seq_len}; tokenize again"
        )
    if rows.meta["tokenizer"] != fingerprint(lm.tokenizer):
        raise DataError(f"{folder}: written with another tokenizer than '{lm.name}' has; tokenize again")
    return rows


def _open_run(
    config: Config, name: str, command: str, resume: bool
) -> tuple[RunFolder, DiffusionLM, Policy, dict[str, Any] | None]:
    """Run folder, model (the newest whole checkpoint when resuming) and its saved state."""
    run = RunFolder.open(config, name, command, resume)
    found = newest_good(run.checkpoints) if resume else None
    if found is None:
        if resume:
            say(f"{run.path}: no checkpoint yet; starting over")
        lm, policy = load_diffusion_lm(config.model, training=True, seed=config.train.seed)
        return run, lm, policy, None
    path, saved, problems = found
    for problem in problems:
        say(f"{problem}; using {path.name} instead")
    source = config.model.model_copy(update={"base": str(path), "convention": None})
    lm, policy = load_diffusion_lm(source, training=True)
    return run, lm, policy, saved


def _train(
    config: Config, lm: DiffusionLM, policy: Policy, run: RunFolder, saved: dict[str, Any] | None, job: Job, prefix: str
) -> dict[str, Any]:
    check_length(lm.model, config.data.seq_len, "data.seq_len")
    rows = open_rows(config, f"{prefix}train", lm)
    if rows is None:
        raise DataError(f"the split '{prefix}train' has no rows; add documents to data.sources and tokenize again")
    eval_rows = open_rows(config, f"{prefix}eval", lm)
    if eval_rows is None:
        say(
            f"no held-out rows in '{prefix}eval': no evaluation, and no best checkpoints are kept (raise data.eval_share)"
        )
    say(
        f"{job.title}: {lm.name} on {policy.device}, {policy.compute} ({policy.reason}), convention {lm.convention}, {len(rows)} rows"
    )
    trainer = Trainer(config, lm, policy, job, rows, eval_rows, run)
    if saved is None:
        run.begin(config, job.title)
    state = State() if saved is None else trainer.restore(run.checkpoints / f"step-{saved['step']}", saved)
    return train(trainer, state)


def evaluate_checkpoint(config: Config, folder: Path, split: str) -> dict[str, Any]:
    """Held-out loss and accuracy of a checkpoint at its block size; a note instead when there are no rows for it."""
    lm, _ = load_diffusion_lm(config.model.model_copy(update={"base": str(folder), "convention": None}))
    if not (Path(config.paths.data) / "tokenized" / f"{split}.rows").is_dir():
        return {"eval": f"no tokenized rows for '{split}'; not evaluated"}
    rows = open_rows(config, split, lm)
    if rows is None or lm.block_size is None:
        return {"eval": f"the split '{split}' has no rows; not evaluated"}
    result = evaluate_denoising(lm, rows, lm.block_size, config.train.eval_rows, config.train.micro_batch)
    return {"eval_loss": result.loss, "eval_accuracy": result.accuracy}


def convert_wsd(config: Config, name: str = "convert", resume: bool = False) -> dict[str, Any]:
    """Continued pre-training through the WSD block schedule. Returns a summary with the last checkpoint's path."""
    run, lm, policy, saved = _open_run(config, name, "convert-wsd", resume)
    lm.record["schedule"] = config.wsd.model_dump(mode="json")
    noise = config.noise
    job = Job(
        title="convert-wsd",
        steps=total_steps(config.wsd),
        point=lambda step: wsd_point(step, config.wsd, config.train, config.data.seq_len),
        recipe=Recipe(noise.turns, False, noise.t_min, noise.t_max, 0.0),
        eval_block=min(config.wsd.final_block, config.data.seq_len),
    )
    return _train(config, lm, policy, run, saved, job, "")


def sft(config: Config, name: str = "sft", resume: bool = False) -> dict[str, Any]:
    """Instruction tuning of a converted checkpoint: responses only. Raises UsageError for a model that is not converted."""
    run, lm, policy, saved = _open_run(config, name, "sft", resume)
    block = config.sft.block_size or lm.block_size
    if block is None:
        raise UsageError(
            f"model '{lm.name}' is not converted; run 'hildanext convert-wsd' and give its checkpoint as model.base"
        )
    rows = open_rows(config, "sft_train", lm)
    if rows is not None and rows.meta["block_size"] % block:
        raise DataError(
            f"sft_train was tokenized for blocks of {rows.meta['block_size']}, which {block} does not divide; set "
            f"sft.block_size to {block} and tokenize again"
        )
    tune = config.sft
    job = Job(
        title="sft",
        steps=tune.steps,
        point=lambda step: sft_point(step, tune, config.train.lr_final_ratio, block),
        recipe=Recipe(tune.turns, tune.complementary, *tune.mask_band, tune.cap_weight),
        eval_block=block,
    )
    return _train(config, lm, policy, run, saved, job, "sft_")
