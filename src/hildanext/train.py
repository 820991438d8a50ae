"""One training loop for conversion (`convert-wsd`) and fine-tuning (`sft`), on accelerate.

A step: fetch rows, count tokens over all processes, noise, forward and backward, clip, check finite, optimizer, log.
The state of a run is its step: data order and noise are functions of (seed, global sample index).
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from hildanext.checkpoint import load_tensors, optimizer_tensors, prune, restore_optimizer, save_checkpoint
from hildanext.config import Config
from hildanext.errors import CheckpointError, NonFiniteLossError
from hildanext.evaluate.denoising import evaluate_denoising
from hildanext.model import DiffusionLM
from hildanext.noise import sample_generator
from hildanext.objective import Counts, Loss, denoising_loss
from hildanext.passes import Batch, Pass, Recipe, drafted_pass, first_passes, make_batch
from hildanext.plots import draw_curves
from hildanext.policy import Policy
from hildanext.progress import progress, say
from hildanext.rows import RowOrder, Rows
from hildanext.runs import RunFolder
from hildanext.schedule import Point
from hildanext.signals import stop_on_signals


class Job(NamedTuple):
    """What is to be trained: the two commands build one each."""

    title: str
    steps: int
    point: Callable[[int], Point]
    recipe: Recipe
    eval_block: int  # block size of the held-out evaluation: the one decoded with


class State(NamedTuple):
    """What a resume restores besides weights and optimizer."""

    step: int = 0  # steps done
    tokens_seen: int = 0
    eval_losses: Mapping[int, float] = MappingProxyType({})


def make_optimizer(lm: DiffusionLM, config: Config) -> torch.optim.Optimizer:
    """AdamW (or Adafactor, whose state is negligible: the 8 GB card's choice); weight decay on matrices only."""
    train = config.train
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=train.lr)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=lm.device.type in ("cpu", "cuda"))


def embedding_noise(lm: DiffusionLM, batch: Batch, first: Pass, std: float, seed: int) -> Tensor | None:
    """Gaussian noise [B, L, H] on the mask token's embeddings, `std` times the embeddings' own (LLaDA2.0 section 4.1)."""
    if std == 0:
        return None
    weight = lm.embedding.weight
    shape = (first.masked.shape[1], weight.shape[1])
    draws = torch.stack([torch.randn(shape, generator=sample_generator(seed, s, "embed")) for s in batch.samples])
    return draws.to(lm.device) * first.masked[..., None] * (std * weight.detach().std())


class Trainer:
    """The pieces that live as long as a run."""

    def __init__(
        self,
        config: Config,
        lm: DiffusionLM,
        policy: Policy,
        job: Job,
        rows: Rows,
        eval_rows: Rows | None,
        run: RunFolder,
    ):
        self.config, self.lm, self.job, self.rows, self.eval_rows, self.run = config, lm, job, rows, eval_rows, run
        torch.manual_seed(config.train.seed)
        AcceleratorState._reset_state()  # accelerate keeps one precision a process; this training may use another
        self.accelerator = Accelerator(mixed_precision=policy.mixed_precision, cpu=policy.device.type == "cpu")
        if config.train.gradient_checkpointing:
            if hasattr(lm.model, "activation_checkpointing_enable"):
                lm.model.activation_checkpointing_enable()
            else:  # its old name, in the last transformers for Python 3.10
                lm.model.gradient_checkpointing_enable()
        self.optimizer = make_optimizer(lm, config)
        self.forward, self.prepared = self.accelerator.prepare(lm, self.optimizer)
        self.order = RowOrder(len(rows), config.train.seed)
        self.names = {id(p): name for name, p in lm.model.named_parameters()}
        lm.model.train()

    def samples_of(self, step: int) -> list[list[int]]:
        """Global sample indices of this process's micro-batches: a function of the step alone."""
        train, world, rank = self.config.train, self.accelerator.num_processes, self.accelerator.process_index
        first = step * train.rows_per_step
        micro = [
            list(range(first + i, first + i + train.micro_batch))
            for i in range(0, train.rows_per_step, train.micro_batch)
        ]
        return micro[rank::world]

    def micro_losses(
        self, batch: Batch, step: int, block_size: int, n_tokens: int
    ) -> Iterator[tuple[Loss, Counts, int]]:
        """Each pass of a micro-batch: (loss, counts, turn). A caller runs backward before asking for the next."""
        config, recipe, seed = self.config, self.job.recipe, self.config.train.seed
        decayed = max(0.0, 1 - step / config.noise.embed_steps) if config.noise.embed_steps else 0.0
        firsts = first_passes(self.lm, batch, block_size, recipe, config.noise, seed)
        n_passes = len(firsts) + (recipe.turns - 1)
        for number, one in enumerate(firsts):
            noise = embedding_noise(self.lm, batch, one, config.noise.embed_std * decayed, seed)
            loss, counts, drafts = self.one_pass(batch, one, block_size, n_tokens * n_passes, noise, recipe.turns == 2)
            yield loss, counts, number
            if number == 0 and drafts is not None:
                second = drafted_pass(batch, one, drafts, config.noise.draft_share, seed)
                loss, counts, _ = self.one_pass(batch, second, block_size, n_tokens * n_passes, None, False)
                yield loss, counts, 1

    def one_pass(
        self, batch: Batch, one: Pass, block_size: int, n_tokens: int, noise: Tensor | None, drafting: bool
    ) -> tuple[Loss, Counts, Tensor | None]:
        """Forward and loss; when drafting also the predicted ids [B, L] at supervised positions, clean ids elsewhere."""
        config = self.config.loss
        wanted = batch.allowed if config.w_t2t > 0 and config.keep > 0 else one.masked | one.wrong
        logits = self.forward(
            one.noisy_ids, batch.input_ids, batch.doc_ids, batch.position_ids, wanted, block_size, noise
        )
        loss, counts = denoising_loss(
            logits,
            batch.input_ids[wanted],
            one.t[wanted],
            one.masked[wanted],
            one.wrong[wanted],
            n_tokens,
            weighting=config.weighting,
            w_m2t=config.w_m2t,
            w_t2t=config.w_t2t,
            keep=config.keep,
            cap_weight=self.job.recipe.cap_weight,
        )
        if not drafting:
            return loss, counts, None
        # A draft is never the mask token: where it wins, the second best is taken.
        best = logits.detach().topk(2, dim=-1).indices
        drafts = batch.input_ids.clone()
        drafts[wanted] = torch.where(best[:, 0] == self.lm.mask_token_id, best[:, 1], best[:, 0])
        return loss, counts, drafts

    def not_finite(
        self, what: str, value: Tensor, step: int, samples: list[int], turn: int | None = None
    ) -> NonFiniteLossError:
        """The error of a loss or gradient that is no number: which step, rows and pass it was."""
        rows = sorted(self.order.row(sample) for sample in samples)
        where = f"block size {self.job.point(step).block_size}, rows {rows}" + (
            "" if turn is None else f", turn {turn}"
        )
        return NonFiniteLossError(
            f"step {step + 1}: the {what} is {value.item()} ({where}); lower the learning rate or check the rows"
        )

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics. Raises NonFiniteLossError naming step and rows."""
        point = self.job.point(step)
        accelerator = self.accelerator
        # 1. fetch
        batches = [
            make_batch(self.lm, samples, self.rows.batch([self.order.row(s) for s in samples]))
            for samples in self.samples_of(step)
        ]
        # 2. count tokens globally, so that every token weighs the same however rows are split
        n_local = sum(int(batch.allowed.sum()) for batch in batches)
        seen_local = sum(int((batch.doc_ids >= 0).sum()) for batch in batches)
        n_tokens, seen = (
            int(x) for x in accelerator.reduce(torch.tensor([n_local, seen_local], device=self.lm.device))
        )
        # 3. noise, forward, backward
        sums: dict[str, Tensor] = dict.fromkeys(
            (*Loss._fields, *Counts._fields), torch.zeros((), device=self.lm.device)
        )
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.forward):
                for loss, counts, turn in self.micro_losses(batch, step, point.block_size, max(n_tokens, 1)):
                    if not torch.isfinite(loss.total):
                        raise self.not_finite("loss", loss.total, step, batch.samples, turn)
                    # DDP averages gradients over processes; the loss is already divided by the global count.
                    accelerator.backward(loss.total * accelerator.num_processes)
                    for name, value in (loss._asdict() | counts._asdict()).items():
                        if turn == 0 or not name.startswith(
                            "masked"
                        ):  # accuracy on masks: turn 0, comparable across recipes
                            sums[name] = sums[name] + value.detach()
        # 4. clip, 5. optimizer
        grad_norm = accelerator.clip_grad_norm_(self.lm.model.parameters(), self.config.train.clip_norm)
        if accelerator.scaler is None and not torch.isfinite(grad_norm):  # fp16's scaler skips such a step by itself
            raise self.not_finite("gradient", grad_norm, step, [s for batch in batches for s in batch.samples])
        for group in self.optimizer.param_groups:
            group["lr"] = point.lr
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        # 6. log
        total = {name: accelerator.reduce(value).item() for name, value in sums.items()}
        return {
            "loss": total["total"],
            "m2t": total["m2t"],
            "t2t": total["t2t"],
            "m2t_ce": total["masked_ce"] / max(total["masked"], 1),
            "masked_accuracy": total["masked_correct"] / max(total["masked"], 1),
            "edit_accuracy": total["corrupted_correct"] / max(total["corrupted"], 1),
            "block_size": point.block_size,
            "phase": point.phase,
            "lr": point.lr,
            "grad_norm": float(grad_norm) if torch.isfinite(grad_norm) else None,  # None: the scaler skipped the step
            "tokens": seen,
        }

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out loss and accuracy after `step` steps at the decoding block; empty without held-out rows."""
        if self.eval_rows is None:
            return {}
        with self.accelerator.autocast():
            result = evaluate_denoising(
                self.lm, self.eval_rows, self.job.eval_block, self.config.train.eval_rows, self.config.train.micro_batch
            )
        if not math.isfinite(result.loss):
            raise NonFiniteLossError(f"step {step}: the held-out loss is {result.loss}; lower the learning rate")
        return {"eval_loss": result.loss, "eval_accuracy": result.accuracy}

    def save(self, state: State) -> None:
        """Checkpoint weights, optimizer, generators, loss scaler and cursor; then prune."""
        train = self.config.train
        self.lm.block_size = self.job.eval_block
        tensors = optimizer_tensors(self.optimizer, self.names)
        tensors["rng|cpu"] = torch.get_rng_state()
        if self.lm.device.type == "cuda":
            tensors["rng|cuda"] = torch.cuda.get_rng_state(self.lm.device)
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        record = {
            "tokens_seen": state.tokens_seen,
            "next_sample": state.step * train.rows_per_step,
            "eval_losses": dict(state.eval_losses),
            "scaler": scaler,
        }
        save_checkpoint(self.run.checkpoints, state.step, self.lm, record, tensors)
        prune(self.run.checkpoints, train.keep_last, train.keep_best, state.eval_losses)

    def restore(self, path: Any, record: dict[str, Any]) -> State:
        """Put back what `save` wrote; the weights were loaded with the model."""
        tensors = load_tensors(path)
        torch.set_rng_state(tensors.pop("rng|cpu"))
        if (cuda := tensors.pop("rng|cuda", None)) is not None and self.lm.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.lm.device)
        restore_optimizer(self.optimizer, tensors, self.names)
        if record["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(record["scaler"])
        if record["next_sample"] != record["step"] * self.config.train.rows_per_step:
            raise CheckpointError(f"{path}: saved with another train.rows_per_step; restore it to resume")
        return State(record["step"], record["tokens_seen"], {int(k): v for k, v in record["eval_losses"].items()})


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB: the GPU's allocations, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def train(trainer: Trainer, state: State) -> dict[str, Any]:
    """Run the job from `state` to its end, or to a signal. Returns a summary; metrics, curves and checkpoints are in the run's folder."""
    job, run, train_config = trainer.job, trainer.run, trainer.config.train
    trainer.run.rewind_metrics(state.step)
    tokens_before = trainer.lm.record["tokens_trained"] - state.tokens_seen
    history = run.read_metrics()
    stopped = None
    with progress(job.title, job.steps, "steps", state.step) as advance, stop_on_signals() as signalled:
        while state.step < job.steps and not stopped:
            began = time.perf_counter()
            metrics = trainer.train_step(state.step)
            step, tokens = state.step + 1, int(metrics.pop("tokens"))
            seconds = time.perf_counter() - began
            state = state._replace(step=step, tokens_seen=state.tokens_seen + tokens)
            trainer.lm.record["tokens_trained"] = tokens_before + state.tokens_seen
            stopped = signalled()
            saves = step % train_config.save_every == 0 or step == job.steps or stopped is not None
            row: dict[str, Any] = {"step": step, **metrics, "tokens_seen": state.tokens_seen}
            row |= {"tokens_per_second": tokens / seconds, "peak_memory_mb": peak_memory_mb(trainer.lm.device)}
            if (
                step == job.steps
                or step % train_config.save_every == 0
                or (train_config.eval_every and step % train_config.eval_every == 0)
            ):
                row |= trainer.evaluate(step)
            if "eval_loss" in row:
                state = state._replace(eval_losses={**state.eval_losses, step: row["eval_loss"]})
            run.log(row)
            history.append(row)
            if saves:
                trainer.save(state)
                draw_curves(history, run.curves, f"{job.title}: {trainer.lm.name}")
            advance(
                step,
                f"loss {row['m2t_ce']:.3f} acc {row['masked_accuracy']:.3f} block {row['block_size']} lr {row['lr']:.1e}",
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
