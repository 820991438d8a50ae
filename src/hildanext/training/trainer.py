"""One training loop for conversion (`convert-wsd`), instruction tuning (`sft`) and preferences (`dpo`), on accelerate.

A step: fetch rows, count tokens over all processes, forward and backward, clip, check finite, optimizer, log. What a
micro-batch does between rows and gradients is its task's: `denoising.DenoisingTask`, `preference.PreferenceTask`.
Data order and noise are functions of (seed, global sample index), so the step number is all the state of a run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hildanext.config import Config
from hildanext.data.rows import RowSource
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.errors import CheckpointError, NonFiniteLossError
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.loading import weights_of
from hildanext.model.policy import Policy, is_out_of_memory
from hildanext.plots import draw_curves
from hildanext.progress import progress, say, stop_on_signals
from hildanext.training.attention_choice import choose_attention
from hildanext.training.checkpoint import (
    load_tensors,
    optimizer_tensors,
    prune,
    restore_optimizer,
    rewind_checkpoints,
    save_checkpoint,
)
from hildanext.training.memory import (
    AllShortError,
    MemoryShortError,
    checkpoint_activations,
    clear_cache,
    peak_memory_mb,
)
from hildanext.training.optimizer import make_optimizer
from hildanext.training.parallel import average_gradients, gathered, spread, whole, whole_weights
from hildanext.training.run_folder import RunFolder
from hildanext.training.trackers import Track


class TrainingJob(NamedTuple):
    """Title and schedule of a training. Each training command builds one."""

    title: str
    steps: int
    point: Callable[[int], SchedulePoint]  # block size, phase and learning rate of a step
    eval_block: int  # block size of the held-out evaluation and of decoding


class TrainingStep(NamedTuple):
    """An optimizer step, as a task sees it."""

    number: int  # from 0
    point: SchedulePoint
    n_items: int  # tokens or pairs by which the loss is divided, over all micro-batches and processes


class Sums(dict[str, Tensor]):
    """Figures for the log, added up over turns and micro-batches: fp32 scalars without gradient."""

    def add(self, name: str, value: Tensor) -> None:
        self[name] = self[name] + value.detach() if name in self else value.detach().float()


class Task(Protocol):
    """Turns rows into gradients. The `Trainer` does the rest of a step."""

    module: nn.Module  # forward and loss in one call; the trainer wraps it (DDP, FSDP2)
    rows: RowSource

    def fetch(self, samples: list[int]) -> Batch: ...

    def counts(self, batches: Sequence[Batch], block_size: int) -> tuple[int, int]:
        """Tokens, pairs or group rows by which the loss is divided, and tokens other than padding."""
        ...

    def backward(self, batch: Batch, step: TrainingStep, sums: Sums, sync: bool) -> None:
        """Forward and backward of a micro-batch: adds to the parameters' gradients and to `sums`.

        sync: exchange gradients with other processes, at the micro-batch's last backward. Raises NonFiniteLossError.
        """
        ...

    def metrics(self, total: dict[str, float]) -> dict[str, float]:
        """What the log keeps of a step, from its sums."""
        ...

    def line(self, row: dict[str, Any]) -> str:
        """The metrics in a few words, for the progress line."""
        ...

    def evaluate(self, step: int, batch_rows: int) -> dict[str, float]:
        """Held-out figures after `step` steps, `eval_loss` among them; empty without held-out rows."""
        ...


def backward(accelerator: Accelerator, loss: Tensor, step: TrainingStep, rows: str, turn: str) -> None:
    """Backward of one loss. Raises NonFiniteLossError that names the step, the rows and the turn."""
    if not torch.isfinite(loss):
        raise not_finite("loss", loss, step, f"{rows}, turn '{turn}'")
    # DDP and FSDP average gradients over processes; the loss is already divided by the global count.
    accelerator.backward(loss * accelerator.num_processes)


def not_finite(what: str, value: Tensor, step: TrainingStep, rows: str) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"step {step.number + 1}: the {what} is {value.item()} (block size {step.point.block_size}, {rows}); "
        "lower the learning rate or check the rows"
    )


class State(NamedTuple):
    """What a resume restores beside weights and optimizer."""

    step: int = 0  # steps done
    tokens_seen: int = 0
    eval_losses: Mapping[int, float] = MappingProxyType({})


# Steps in which several processes agree on a micro-batch that fits all of them. The first has no optimizer state yet.
TRIALS = 2


class Trainer:
    """Model, optimizer and processes of a run."""

    def __init__(
        self,
        config: Config,
        lm: DiffusionLM,
        policy: Policy,
        accelerator: Accelerator,
        job: TrainingJob,
        task: Task,
        run: RunFolder,
    ):
        self.config, self.lm, self.job, self.rows, self.run = config, lm, job, task.rows, run
        self.accelerator, self.is_main = accelerator, accelerator.is_main_process
        torch.manual_seed(config.train.seed)
        with policy.autocast():
            self.attention = choose_attention(lm, config.train.attention, policy)
        if config.train.gradient_checkpointing:
            checkpoint_activations(lm.model)
        layers = lm.model._no_split_modules or []
        self.task = task
        task.module = spread(accelerator, task.module, list(layers), config.train.sharding)
        self.optimizer: torch.optim.Optimizer = accelerator.prepare(
            make_optimizer(lm.model, config.train, policy.fused)
        )
        self.micro_batch = config.train.micro_batch  # halved when memory is short
        self.trials = TRIALS if isinstance(task.module, DistributedDataParallel) else 0
        self.names = {id(p): name for name, p in lm.model.named_parameters()}
        lm.model.train()

    def samples_of(self, step: int) -> list[list[int]]:
        """Global sample indices of this process's micro-batches: a function of the step alone."""
        rows, micro = self.config.train.rows_per_step, self.micro_batch
        starts = range(step * rows, (step + 1) * rows, micro)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [list(range(start, start + micro)) for start in starts[rank::world]]

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics. If forward or backward runs out of memory, repeat it in smaller micro-batches.

        With several processes all must do so together, because they wait for each other's gradients: they agree on it in
        the first steps only. Raises NonFiniteLossError naming step and rows, and MemoryShortError if a single row or the
        optimizer does not fit.
        """
        while True:
            try:
                found = self.one_step(step)
                self.trials = max(self.trials - 1, 0)
                return found
            except RuntimeError as error:
                together = isinstance(error, AllShortError)
                if not together and not is_out_of_memory(error):
                    raise
                line = str(error).splitlines()[0]
            # Outside the handler: the error holds the frames and these hold the memory.
            if self.accelerator.num_processes > 1 and not together:
                raise self.memory_short(step, line)
            self.make_room(step, line)

    @contextlib.contextmanager
    def only_once(self, step: int) -> Iterator[None]:
        """Within the block, running out of memory ends the run: half an optimizer step cannot be repeated."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise self.memory_short(step, reason, in_optimizer=True) from None

    def memory_short(self, step: int, reason: str, in_optimizer: bool = False) -> MemoryShortError:
        processes = self.accelerator.num_processes
        return MemoryShortError(self.config, self.micro_batch, step + 1, reason, processes, in_optimizer)

    def make_room(self, step: int, reason: str) -> None:
        """Lower the micro-batch and keep the effective batch. Raises MemoryShortError if no smaller one divides it."""
        self.optimizer.zero_grad(set_to_none=True)
        clear_cache(self.lm.device)
        rows, world = self.config.train.rows_per_step, self.accelerator.num_processes
        smaller = next((size for size in range(self.micro_batch // 2, 0, -1) if rows % (size * world) == 0), None)
        if smaller is None:
            raise self.memory_short(step, reason)
        say(
            f"step {step + 1}: out of memory; train.micro_batch {self.micro_batch} -> {smaller}, "
            f"{rows // smaller} forwards a step, the same {rows} rows"
        )
        self.micro_batch = smaller
        self.trials = TRIALS if world > 1 else 0

    def one_step(self, step: int) -> dict[str, Any]:
        """One try of an optimizer step."""
        accelerator, task, point = self.accelerator, self.task, self.job.point(step)
        # 1. fetch
        batches = [task.fetch(samples) for samples in self.samples_of(step)]
        # 2. count over all processes, so that every token (or pair) has the same weight however rows are split
        counts = torch.tensor(task.counts(batches, point.block_size), device=self.lm.device)
        count, tokens = accelerator.reduce(counts).tolist()
        # 3. noise, forward, backward
        this = TrainingStep(step, point, max(count, 1))
        sums = self.try_gradients(this, batches) if self.trials else self.gradients(this, batches)
        with self.only_once(step):
            # 4. clip, 5. optimizer
            grad_norm = whole(accelerator.clip_grad_norm_(self.lm.model.parameters(), self.config.train.clip_norm))
            # fp16's loss scaler skips a step with a non-finite gradient by itself
            if accelerator.scaler is None and not torch.isfinite(grad_norm):
                samples = [sample for batch in batches for sample in batch.samples]
                raise not_finite("gradient", grad_norm, this, self.rows.describe(samples))
            for group in self.optimizer.param_groups:
                group["lr"] = point.lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            # 6. log
            totals = accelerator.reduce(torch.stack(list(sums.values()))).tolist()
        norm = float(grad_norm) if torch.isfinite(grad_norm) else None  # None: the scaler skipped the step
        point_log = {"block_size": point.block_size, "phase": point.phase, "lr": point.lr}
        return {**task.metrics(dict(zip(sums, totals, strict=True))), **point_log, "grad_norm": norm, "tokens": tokens}

    def gradients(self, step: TrainingStep, batches: list[Batch], sync: bool = True) -> Sums:
        """Forward and backward of all micro-batches; returns the sums for the log. sync: exchange gradients."""
        sums = Sums()
        for batch in batches:
            self.task.backward(batch, step, sums, sync and batch is batches[-1])
        return sums

    def try_gradients(self, step: TrainingStep, batches: list[Batch]) -> Sums:
        """Like `gradients`, but processes exchange gradients only after all of them report that their own are complete.

        Raises AllShortError in every process if one is out of memory. Slower, since nothing is sent during backward.
        """
        reason, sums = None, Sums()
        try:
            sums = self.gradients(step, batches, sync=False)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside the handler, as in train_step.
        if self.agreed(reason):
            raise AllShortError(reason or "another process is")
        average_gradients(self.accelerator, self.lm.model)
        return sums

    def agreed(self, reason: str | None) -> bool:
        """Whether any process has a reason to stop. All processes get the same answer."""
        if self.accelerator.num_processes == 1:
            return reason is not None
        flag = torch.tensor(float(reason is not None), device=self.lm.device)
        return bool(self.accelerator.reduce(flag) > 0)

    def save(self, state: State) -> None:
        """Checkpoint weights, optimizer, random generators, loss scaler and data position; then prune.

        Every process must call it; the main one writes.
        """
        train = self.config.train
        self.lm.block_size = self.job.eval_block
        lm, keep = self.lm, self.is_main
        weights = whole_weights(lm.model, keep) if lm.adapter is None else gathered(weights_of(lm), keep)
        tensors = optimizer_tensors(self.optimizer, self.names, keep)
        if not self.is_main:
            return
        tensors["rng|cpu"] = torch.get_rng_state()
        if self.lm.device.type == "cuda":
            tensors["rng|cuda"] = torch.cuda.get_rng_state(self.lm.device)
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        record = {
            "tokens_seen": state.tokens_seen,
            "next_sample": state.step * train.rows_per_step,
            "rows": self.rows.state(state.step * train.rows_per_step),
            "eval_losses": dict(state.eval_losses),
            "scaler": scaler,
        }
        save_checkpoint(self.run.checkpoints, state.step, self.lm, record, tensors, weights)
        prune(self.run.checkpoints, train.keep_last, train.keep_best, state.eval_losses)

    def restore(self, path: Any, record: dict[str, Any]) -> State:
        """Restore what `save` wrote, with any number of processes. The weights were loaded with the model."""
        tensors = load_tensors(path)
        torch.set_rng_state(tensors.pop("rng|cpu"))
        if (cuda := tensors.pop("rng|cuda", None)) is not None and self.lm.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.lm.device)
        restore_optimizer(self.optimizer, tensors, self.names)
        if record["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(record["scaler"])
        if record["next_sample"] != record["step"] * self.config.train.rows_per_step:
            raise CheckpointError(f"{path}: saved with another train.rows_per_step; set it back to resume")
        self.rows.restore(record["rows"])
        return State(record["step"], record["tokens_seen"], {int(k): v for k, v in record["eval_losses"].items()})


def train(trainer: Trainer, state: State, track: Track) -> dict[str, Any]:
    """Run the job from `state` to its end or to a signal. Metrics, curves and checkpoints go to the run's folder.

    track: called with every line of the metrics. Returns a summary: run, checkpoint, steps, finished, tokens_seen and
    the last held-out figures.
    """
    job, run, train_config = trainer.job, trainer.run, trainer.config.train
    if trainer.is_main:
        run.rewind_metrics(state.step)
        for path in rewind_checkpoints(run.checkpoints, state.step):
            say(f"{path}: removed, because the run continues from step {state.step}")
    tokens_before = trainer.lm.record["tokens_trained"] - state.tokens_seen
    history = run.read_metrics()
    stopped: str | None = None
    with progress(job.title, job.steps, "steps", state.step) as advance, stop_on_signals() as signalled:
        while state.step < job.steps and not stopped:
            began = time.perf_counter()
            metrics = trainer.train_step(state.step)
            step, tokens = state.step + 1, int(metrics.pop("tokens"))
            seconds = time.perf_counter() - began
            state = state._replace(step=step, tokens_seen=state.tokens_seen + tokens)
            trainer.lm.record["tokens_trained"] = tokens_before + state.tokens_seen
            heard = signalled()
            stopped = (heard or "another process") if trainer.agreed(heard) else None
            saves = step % train_config.save_every == 0 or step == job.steps or stopped is not None
            row: dict[str, Any] = {"step": step, **metrics, "tokens_seen": state.tokens_seen}
            row |= {"tokens_per_second": tokens / seconds, "peak_memory_mb": peak_memory_mb(trainer.lm.device)}
            if (
                step == job.steps
                or step % train_config.save_every == 0
                or (train_config.eval_every and step % train_config.eval_every == 0)
            ):
                row |= trainer.task.evaluate(step, trainer.micro_batch)
            if "eval_loss" in row:
                state = state._replace(eval_losses={**state.eval_losses, step: row["eval_loss"]})
            history.append(row)
            if trainer.is_main:
                run.log(row)
                track(row)
            if saves:
                trainer.save(state)
                if trainer.is_main:
                    draw_curves(history, run.curves, f"{job.title}: {trainer.lm.name}")
            advance(
                step,
                f"{trainer.task.line(row)} block {row['block_size']} lr {row['lr']:.1e}",
            )
    if stopped:
        say(f"{stopped}: saved step {state.step} of {job.steps} in {run.path}; continue with --resume")
    last = history[-1] if history else {}
    return {
        "run": str(run.path),
        "checkpoint": str(run.checkpoints / f"step-{state.step}"),
        "steps": state.step,
        "finished": state.step == job.steps,
        "tokens_seen": state.tokens_seen,
        **{key: last[key] for key in ("eval_loss", "eval_accuracy") if key in last},
    }
