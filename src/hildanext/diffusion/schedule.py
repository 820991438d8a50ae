"""Training schedules: pure functions from the step to phase, block size and learning rate.

Source: LLaDA2.0 section 4.1 (warm-up, stable, decay: block size 1 -> row length -> decoding block size). A block size
of the row length or more is full-sequence diffusion.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hildanext.config import DpoConfig, SftConfig, TrainConfig, WsdConfig

Phase = Literal["warmup", "stable", "decay"]


class SchedulePoint(NamedTuple):
    """The schedule at a step."""

    phase: Phase
    block_size: int  # tokens
    lr: float


def total_steps(wsd: WsdConfig) -> int:
    """Number of optimizer steps of `convert-wsd`."""
    return wsd.warmup_steps + wsd.stable_steps + wsd.decay_steps


def _interpolate(start: float, end: float, done: float) -> float:
    return start + (end - start) * done


def _rung(ladder: list[int], step: int, steps: int) -> int:
    """Block size of a ladder at a step (0-based) of `steps`. Each rung lasts equally long."""
    return ladder[min(step * len(ladder) // steps, len(ladder) - 1)]


def _lr_warmup(step: int, warmup_steps: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / (warmup_steps + 1))


def wsd_point(step: int, wsd: WsdConfig, train: TrainConfig, seq_len: int) -> SchedulePoint:
    """Schedule of `convert-wsd` at a step (0-based). Block sizes are limited to `seq_len` (the full row).

    The learning rate rises linearly in its own warm-up, stays constant, and decays linearly with the block size.
    The last decay step has block size `final_block`.
    """
    peak = min(wsd.peak_block or seq_len, seq_len)
    lr = _lr_warmup(step, train.lr_warmup_steps, train.lr)
    if step < wsd.warmup_steps:
        if wsd.shape == "ladder":
            return SchedulePoint("warmup", min(_rung(wsd.warmup_ladder, step, wsd.warmup_steps), seq_len), lr)
        return SchedulePoint(
            "warmup", round(_interpolate(min(wsd.start_block, peak), peak, step / wsd.warmup_steps)), lr
        )
    if step < wsd.warmup_steps + wsd.stable_steps:
        return SchedulePoint("stable", peak, lr)
    decay_step = step - wsd.warmup_steps - wsd.stable_steps
    done = min((decay_step + 1) / max(wsd.decay_steps, 1), 1.0)
    lr *= _interpolate(1.0, train.lr_final_ratio, done)
    if wsd.shape == "ladder":
        return SchedulePoint("decay", min(_rung(wsd.decay_ladder, decay_step, wsd.decay_steps), seq_len), lr)
    return SchedulePoint("decay", round(_interpolate(peak, min(wsd.final_block, seq_len), done)), lr)


def sft_point(step: int, tune: SftConfig | DpoConfig, lr_final_ratio: float, block_size: int) -> SchedulePoint:
    """Schedule of `sft` and `dpo` at a step (0-based): constant block size, linear warm-up and decay of the rate."""
    lr = _lr_warmup(step, tune.lr_warmup_steps, tune.lr)
    decay_steps = round(tune.steps * tune.lr_decay_share)
    decay_step = step - (tune.steps - decay_steps)
    if decay_step < 0:
        return SchedulePoint("warmup" if step < tune.lr_warmup_steps else "stable", block_size, lr)
    return SchedulePoint("decay", block_size, lr * _interpolate(1.0, lr_final_ratio, (decay_step + 1) / decay_steps))
