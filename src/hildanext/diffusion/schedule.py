"""Warm-up, stable, decay: a pure function from the step to (phase, block size, learning rate).

Source: LLaDA2.0 section 4.1 (block size 1 -> row -> decoding block). A block size of the row or more is full diffusion.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hildanext.config import DpoConfig, SftConfig, TrainConfig, WsdConfig

Phase = Literal["warmup", "stable", "decay"]


class SchedulePoint(NamedTuple):
    """Where a step stands."""

    phase: Phase
    block_size: int
    lr: float


def total_steps(wsd: WsdConfig) -> int:
    """Optimizer steps of a conversion."""
    return wsd.warmup_steps + wsd.stable_steps + wsd.decay_steps


def _between(start: float, end: float, done: float) -> float:
    return start + (end - start) * done


def _rung(ladder: list[int], place: int, steps: int) -> int:
    """Rung at step `place` of `steps`, every rung held equally long."""
    return ladder[min(place * len(ladder) // steps, len(ladder) - 1)]


def _lr_warmup(step: int, warmup_steps: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / (warmup_steps + 1))


def wsd_point(step: int, wsd: WsdConfig, train: TrainConfig, seq_len: int) -> SchedulePoint:
    """Schedule of `convert-wsd` at a step (0-based). Sizes are clipped to `seq_len` (the full row).

    The learning rate warms up linearly, is constant while stable and decays linearly with the block. The block after
    the last decay step is `final_block` exactly.
    """
    peak = min(wsd.peak_block or seq_len, seq_len)
    lr = _lr_warmup(step, train.lr_warmup_steps, train.lr)
    if step < wsd.warmup_steps:
        if wsd.shape == "ladder":
            return SchedulePoint("warmup", min(_rung(wsd.warmup_ladder, step, wsd.warmup_steps), seq_len), lr)
        return SchedulePoint("warmup", round(_between(min(wsd.start_block, peak), peak, step / wsd.warmup_steps)), lr)
    if step < wsd.warmup_steps + wsd.stable_steps:
        return SchedulePoint("stable", peak, lr)
    place = step - wsd.warmup_steps - wsd.stable_steps
    done = min((place + 1) / max(wsd.decay_steps, 1), 1.0)
    lr *= _between(1.0, train.lr_final_ratio, done)
    if wsd.shape == "ladder":
        return SchedulePoint("decay", min(_rung(wsd.decay_ladder, place, wsd.decay_steps), seq_len), lr)
    return SchedulePoint("decay", round(_between(peak, min(wsd.final_block, seq_len), done)), lr)


def sft_point(step: int, tune: SftConfig | DpoConfig, lr_final_ratio: float, block_size: int) -> SchedulePoint:
    """Schedule of `sft` and `dpo` at a step (0-based): one block size, learning rate warm-up, plateau and linear decay."""
    lr = _lr_warmup(step, tune.lr_warmup_steps, tune.lr)
    decay_steps = round(tune.steps * tune.lr_decay_share)
    place = step - (tune.steps - decay_steps)
    if place < 0:
        return SchedulePoint("warmup" if step < tune.lr_warmup_steps else "stable", block_size, lr)
    return SchedulePoint("decay", block_size, lr * _between(1.0, lr_final_ratio, (place + 1) / decay_steps))
