"""`calibrate`: find S_MODE and Q_MODE for a checkpoint on the user's own prompts, and write them into it.

Quality is the mean log-likelihood that the AR base gives the text, speed is tokens per forward: both are the same at every
run, unlike seconds. Thresholds are swept together; then, for the two settings chosen, correction passes, block size and how many
finished blocks stay editable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hildanext.config import CalibrateConfig, Config, Mode
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.rule import Preset, Settings, resolve
from hildanext.errors import UsageError
from hildanext.evaluate.benchmark import held_out_prompts
from hildanext.evaluate.judge import distinct_2, parent_log_likelihood
from hildanext.files import write_json
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import base_of, load_causal_lm
from hildanext.model.prompts import read_prompts
from hildanext.plots import draw_calibration
from hildanext.progress import progress
from hildanext.provenance import git_revision, versions


class FrontierPoint(NamedTuple):
    """A setting and what it gave."""

    preset: Preset
    quality: float  # mean log-likelihood under the AR base, nats a token
    tokens_per_forward: float
    tokens_per_second: float
    distinct_2: float
    edits: int


def measure(
    engine: TransformersEngine, base: PreTrainedModel, prompts: list[list[int]], settings: Settings
) -> FrontierPoint:
    """Complete the prompts and judge the text."""
    engine.scheduler.forget()  # no setting finds the prompts of the one before
    done = engine.generate_batch([Request(prompt, settings) for prompt in prompts])
    n_tokens = sum(len(one.token_ids) for one in done)
    if n_tokens == 0:
        raise UsageError("every answer is empty: a string of 'decode.stop' stands at its beginning; leave it out")
    scores = [parent_log_likelihood(base, prompt, one.token_ids) for prompt, one in zip(prompts, done, strict=True)]
    return FrontierPoint(
        Preset(*(getattr(settings, name) for name in Preset._fields)),
        sum(score * len(one.token_ids) for score, one in zip(scores, done, strict=True) if one.token_ids) / n_tokens,
        n_tokens / sum(one.stats.forwards for one in done),
        n_tokens / max(one.stats.seconds for one in done),
        distinct_2([one.token_ids for one in done]),
        sum(one.stats.edits for one in done),
    )


def choose(points: list[FrontierPoint], loss: float, least_variety: float) -> FrontierPoint:
    """The fastest point within `loss` of the best quality. What repeats itself is likely and worthless, so it is out."""
    careful = max(points, key=lambda point: (point.preset.tau_mask, -point.tokens_per_forward))
    varied = [point for point in points if point.distinct_2 >= least_variety * careful.distinct_2]
    best = max(point.quality for point in varied)
    return max(
        (point for point in varied if point.quality >= best - loss),
        key=lambda point: (point.tokens_per_forward, point.quality),
    )


def sweep(
    engine: TransformersEngine, base: PreTrainedModel, prompts: list[list[int]], start: Settings, how: CalibrateConfig
) -> tuple[list[FrontierPoint], dict[Mode, FrontierPoint]]:
    """All points, and the one chosen for each mode."""
    block = engine.trained_block
    assert block is not None
    sizes = how.block_sizes or sorted({max(1, block // 2), block, 2 * block})
    grid = [(mask, edit) for mask in how.tau_mask for edit in how.tau_edit]
    loss: dict[Mode, float] = {"Q_MODE": how.q_loss, "S_MODE": how.s_loss}
    points: dict[Preset, FrontierPoint] = {}
    others: dict[str, list[int]] = {
        "max_post_steps": how.max_post_steps,
        "block_size": sizes,
        "edit_blocks": how.edit_blocks,
    }
    n_settings = len(grid) + len(loss) * sum(map(len, others.values()))
    with progress("calibrate", n_settings, "settings") as advance:
        done = 0

        def try_out(preset: Preset) -> None:
            nonlocal done
            if preset.tau_edit is None:  # no block is edited, however many could be
                preset = preset._replace(edit_blocks=0)
            if preset not in points:
                points[preset] = measure(engine, base, prompts, start._replace(**preset._asdict()))
            done += 1
            advance(done, f"best {max(point.quality for point in points.values()):.2f} nats a token")

        for mask, edit in grid:
            try_out(Preset(mask, edit, max(how.max_post_steps), block, max(how.edit_blocks)))
        for name in loss:
            # One after the other, each from where the choice stands by then.
            for key, values in others.items():
                for value in values:
                    now = choose([*points.values()], loss[name], how.least_variety).preset
                    try_out(now._replace(**{key: value}))
    everything = list(points.values())
    return everything, {mode: choose(everything, loss[mode], how.least_variety) for mode in loss}


def calibrate(config: Config, prompts_file: str | None, base_name: str | None, out: Path) -> dict[str, Any]:
    """Sweep, draw, and write the modes into the checkpoint's generation_config.json. Returns the report."""
    folder = Path(config.model.base)
    if not (folder / "config.json").is_file():
        raise UsageError(f"'{config.model.base}' is not a local checkpoint folder, where the modes could be written")
    lm, policy = load_diffusion_lm(config.model)
    if lm.block_size is None:
        raise UsageError(f"'{config.model.base}' is not a converted checkpoint; run 'hildanext convert-wsd' first")
    base_config = base_of(config.model, lm.record, base_name)
    base = load_causal_lm(base_config, policy, policy.compute)[0].eval()
    engine = TransformersEngine(config, {}, lm)
    try:
        prompts = (
            read_prompts(Path(prompts_file), lm.tokenizer) if prompts_file else held_out_prompts(config, lm.tokenizer)
        )
        prompts = prompts[: config.calibrate.prompts]
        start = resolve(config.decode, lm.block_size)
        points, chosen = sweep(engine, base, prompts, start, config.calibrate)
    finally:
        engine.close()
    path = folder / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, stored | {"hilda": {mode: point.preset._asdict() for mode, point in chosen.items()}})
    draw_calibration(
        [point._asdict() for point in points], {m: p._asdict() for m, p in chosen.items()}, out / "calibration.png"
    )
    report = {
        "model": config.model.base,
        "base": base_config.base,
        "runtime": engine.runtime.name,
        "prompts": len(prompts),
        "max_new_tokens": start.max_new_tokens,
        "modes": {mode: _flat(point) for mode, point in chosen.items()},
        "points": [_flat(point) for point in points],
        "versions": versions(),
        "git": git_revision(),
    }
    write_json(out / "calibration.json", report)
    files = {"report": str(out / "calibration.json"), "plot": str(out / "calibration.png"), "written": str(path)}
    return report | files | {"stdout": summary(chosen, files)}


def _flat(point: FrontierPoint) -> dict[str, Any]:
    return point.preset._asdict() | {key: value for key, value in point._asdict().items() if key != "preset"}


def summary(chosen: dict[Mode, FrontierPoint], files: dict[str, str]) -> str:
    """The modes as a table, and where everything went."""
    lines = [
        f"{'':8}{'tau_mask':>10}{'tau_edit':>10}{'post':>6}{'block':>7}{'behind':>8}{'nats/token':>12}{'TPF':>7}{'tokens/s':>10}"
    ]
    for mode, point in chosen.items():
        preset = point.preset
        edit = "off" if preset.tau_edit is None else f"{preset.tau_edit:g}"
        lines.append(
            f"{mode:8}{preset.tau_mask:10g}{edit:>10}{preset.max_post_steps:6d}{preset.block_size or 0:7d}{preset.edit_blocks:8d}"
            f"{point.quality:12.3f}{point.tokens_per_forward:7.2f}{point.tokens_per_second:10.1f}"
        )
    return "\n".join([*lines, f"written to {files['written']}; {files['plot']}"])
