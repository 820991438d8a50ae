"""Opening, running and resuming a training run: its folder, model, rows and processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from accelerate import Accelerator

from hildanext.config import Config
from hildanext.data.corpus import PARTS, Use
from hildanext.data.rows import RowSource, ShuffledRows, open_rows
from hildanext.data.stream import RowStream
from hildanext.data.tokenize import make_encoding
from hildanext.errors import DataError
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import check_loadable, load_diffusion_lm, weights_of
from hildanext.model.policy import Policy, choose_policy
from hildanext.progress import say
from hildanext.training.checkpoint import newest_good
from hildanext.training.parallel import start
from hildanext.training.run_folder import RunFolder
from hildanext.training.trackers import check_trackers, tracking
from hildanext.training.trainer import State, Task, Trainer, TrainingJob, train


def open_row_source(config: Config, use: Use, lm: DiffusionLM, block_size: int | None) -> RowSource:
    """The rows to train on: shuffled tokenized rows, or rows made from the sources if data.mode is 'stream'.

    block_size: responses are filled up to complete blocks of this size (sft only). Raises DataError if there are no
    rows or they were tokenized for another block size.
    """
    split = PARTS[use][0]
    if config.data.mode == "stream":
        return RowStream(config, use, replace(make_encoding(config, split, lm.tokenizer), block_size=block_size))
    rows = open_rows(config, split, lm.tokenizer)
    if rows is None:
        raise DataError(f"split '{split}': no rows; add documents to data.sources and tokenize again")
    if block_size is not None and rows.meta["block_size"] % block_size:
        raise DataError(
            f"split '{split}': tokenized for blocks of {rows.meta['block_size']}, which {block_size} does not divide; "
            f"set sft.block_size to {block_size} and tokenize again"
        )
    return ShuffledRows(rows, config.train.seed)


class Opened(NamedTuple):
    """A run before its first step, or before it continues."""

    run: RunFolder
    lm: DiffusionLM
    policy: Policy
    accelerator: Accelerator
    saved: dict[str, Any] | None  # state of the newest complete checkpoint when resuming, else None


def open_run(config: Config, name: str, command: str, resume: bool) -> Opened:
    """Connect the processes, open the run's folder and load the model, or the newest complete checkpoint to resume.

    Raises ModelError for a model whose checkpoints could not be loaded, ConfigError for a tracker without its package.
    """
    check_trackers(config.train)
    accelerator = start(choose_policy(config.model.device, config.model.dtype), config.train)
    run = RunFolder.open(config, name, command, resume)
    found = newest_good(run.checkpoints) if resume else None
    # No process may write before all have looked for checkpoints.
    accelerator.wait_for_everyone()
    if found is None:
        if resume:
            say(f"{run.path}: no checkpoint yet; starting from the beginning")
        edits = command != "dpo" and config.noise.edits == "levenshtein"
        lm, policy = load_diffusion_lm(
            config.model, training=True, seed=config.train.seed, lora=config.lora, edits=edits
        )
        if accelerator.is_main_process:  # the only one that writes; if it fails, the launcher ends the others
            check_loadable(lm, config.model, run.path.parent)
        return Opened(run, lm, policy, accelerator, None)
    path, saved, problems = found
    for problem in problems:
        say(f"{problem}; using {path.name} instead")
    source = config.model.model_copy(update={"base": str(path), "convention": None})
    lm, policy = load_diffusion_lm(source, training=True, lora=config.lora)
    return Opened(run, lm, policy, accelerator, saved)


def run_job(config: Config, opened: Opened, job: TrainingJob, task: Task) -> dict[str, Any]:
    """Train from the beginning or from the saved state. Returns the run's summary."""
    run, lm, policy, accelerator, saved = opened
    adapter = ""
    if lm.adapter is not None:
        trained = sum(parameter.numel() for parameter in weights_of(lm).values())
        adapter = f", adapter of rank {lm.adapter.config.rank} ({trained / 1e6:.1f} M parameters)"
    say(
        f"{job.title}: {lm.name} on {policy.device}, {policy.compute} ({policy.reason}), convention {lm.convention}, "
        f"{task.rows.describe()}{adapter}"
    )
    trainer = Trainer(config, lm, policy, accelerator, job, task, run)
    say(trainer.attention)
    names = list(config.train.trackers) if accelerator.is_main_process else []
    with tracking(names, config, job.title, run, 0 if saved is None else saved["step"]) as track:
        if saved is None and accelerator.is_main_process:
            run.begin(config, job.title)
        state = State() if saved is None else trainer.restore(run.checkpoints / f"step-{saved['step']}", saved)
        return train(trainer, state, track)
