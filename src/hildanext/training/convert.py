"""The two training commands: `convert-wsd` (AR base -> dLLM by continued pre-training) and `sft` (instruction tuning)."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from hildanext.config import Config
from hildanext.data.corpus import PARTS, Use
from hildanext.data.documents import fingerprint
from hildanext.data.rows import Rows, RowSource, ShuffledRows
from hildanext.data.stream import RowStream
from hildanext.data.tokenize import make_job
from hildanext.diffusion.schedule import sft_point, total_steps, wsd_point
from hildanext.errors import DataError, UsageError
from hildanext.model.diffusion_lm import DiffusionLM, load_diffusion_lm, weights_of
from hildanext.model.policy import Policy, choose_policy
from hildanext.model.probe import check_length
from hildanext.progress import say
from hildanext.training.checkpoint import newest_good
from hildanext.training.denoising import Denoise
from hildanext.training.held_out import evaluate_denoising
from hildanext.training.parallel import start
from hildanext.training.passes import Recipe
from hildanext.training.run_folder import RunFolder
from hildanext.training.teacher import Parent
from hildanext.training.trainer import Job, State, Task, Trainer, train


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


def open_row_source(config: Config, use: Use, lm: DiffusionLM, block_size: int | None) -> RowSource:
    """What a training reads: tokenized rows shuffled, or with data.mode 'stream' the sources themselves.

    `block_size`: responses are filled to whole blocks of it (SFT). Raises DataError when there is nothing to read.
    """
    split = PARTS[use][0]
    if config.data.mode == "stream":
        return RowStream(config, use, replace(make_job(config, split, lm.tokenizer), block_size=block_size))
    rows = open_rows(config, split, lm)
    if rows is None:
        raise DataError(f"the split '{split}' has no rows; add documents to data.sources and tokenize again")
    if block_size is not None and rows.meta["block_size"] % block_size:
        raise DataError(
            f"{split} was tokenized for blocks of {rows.meta['block_size']}, which {block_size} does not divide; set "
            f"sft.block_size to {block_size} and tokenize again"
        )
    return ShuffledRows(rows, config.train.seed)


class Opened(NamedTuple):
    """A run before its first step."""

    run: RunFolder
    lm: DiffusionLM
    policy: Policy
    accelerator: Accelerator
    saved: dict[str, Any] | None  # the state of the newest whole checkpoint, when resuming


def open_run(config: Config, name: str, command: str, resume: bool) -> Opened:
    """Join the other processes, then the run's folder and the model: the newest whole checkpoint when resuming."""
    accelerator = start(choose_policy(config.model.device, config.model.dtype), config.train)
    run = RunFolder.open(config, name, command, resume)
    found = newest_good(run.checkpoints) if resume else None
    # Everybody has looked before anybody writes.
    accelerator.wait_for_everyone()
    if found is None:
        if resume:
            say(f"{run.path}: no checkpoint yet; starting over")
        lm, policy = load_diffusion_lm(config.model, training=True, seed=config.train.seed, lora=config.lora)
        return Opened(run, lm, policy, accelerator, None)
    path, saved, problems = found
    for problem in problems:
        say(f"{problem}; using {path.name} instead")
    source = config.model.model_copy(update={"base": str(path), "convention": None})
    lm, policy = load_diffusion_lm(source, training=True, lora=config.lora)
    return Opened(run, lm, policy, accelerator, saved)


def _train(config: Config, opened: Opened, job: Job, use: Use, block_size: int | None = None) -> dict[str, Any]:
    lm = opened.lm
    assert isinstance(job.recipe, Recipe)
    check_length(lm.model, config.data.seq_len, "data.seq_len")
    held_out = PARTS[use][1]
    with closing(open_row_source(config, use, lm, block_size)) as rows:
        eval_rows = open_rows(config, held_out, lm)
        if eval_rows is None:
            say(
                f"no held-out rows in '{held_out}': no evaluation, and no best checkpoints are kept (raise data.eval_share)"
            )
        parent = Parent(lm, config, opened.policy) if config.loss.distill else None
        task = Denoise(config, lm, opened.accelerator, job.recipe, rows, eval_rows, job.eval_block, parent)
        return run_job(config, opened, job, task)


def run_job(config: Config, opened: Opened, job: Job, task: Task) -> dict[str, Any]:
    """Train from the run's beginning, or from where it was saved. Returns the run's summary."""
    run, lm, policy, accelerator, saved = opened
    say(
        f"{job.title}: {lm.name} on {policy.device}, {policy.compute} ({policy.reason}), convention {lm.convention}, "
        f"{task.rows.describe()}{described(lm)}"
    )
    trainer = Trainer(config, lm, policy, accelerator, job, task, run)
    say(trainer.attention)
    if saved is None and accelerator.is_main_process:
        run.begin(config, job.title)
    state = State() if saved is None else trainer.restore(run.checkpoints / f"step-{saved['step']}", saved)
    return train(trainer, state)


def described(lm: DiffusionLM) -> str:
    """The adapter that is trained, for people; empty where all weights are."""
    if lm.adapter is None:
        return ""
    trained = sum(parameter.numel() for parameter in weights_of(lm).values())
    return f", adapter of rank {lm.adapter.config.rank} ({trained / 1e6:.1f} M parameters)"


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
    opened = open_run(config, name, "convert-wsd", resume)
    opened.lm.record["schedule"] = config.wsd.model_dump(mode="json")
    noise = config.noise
    job = Job(
        title="convert-wsd",
        steps=total_steps(config.wsd),
        point=lambda step: wsd_point(step, config.wsd, config.train, config.data.seq_len),
        recipe=Recipe(noise.turns, noise.complementary, noise.t_min, noise.t_max, config.loss.cap_weight),
        eval_block=min(config.wsd.final_block, config.data.seq_len),
    )
    return _train(config, opened, job, "train")


def sft(config: Config, name: str = "sft", resume: bool = False) -> dict[str, Any]:
    """Instruction tuning of a converted checkpoint: responses only. Raises UsageError for a model that is not converted."""
    opened = open_run(config, name, "sft", resume)
    lm = opened.lm
    block = config.sft.block_size or lm.block_size
    if block is None:
        raise UsageError(
            f"model '{lm.name}' is not converted; run 'hildanext convert-wsd' and give its checkpoint as model.base"
        )
    tune = config.sft
    job = Job(
        title="sft",
        steps=tune.steps,
        point=lambda step: sft_point(step, tune, config.train.lr_final_ratio, block),
        recipe=Recipe(tune.turns, tune.complementary, *tune.mask_band, tune.cap_weight),
        eval_block=block,
    )
    return _train(config, opened, job, "sft", block)
