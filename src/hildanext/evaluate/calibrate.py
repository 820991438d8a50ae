"""`calibrate`: choose the settings of each mode on the user's prompts and write them into the checkpoint.

Quality is the text's mean log-likelihood under the AR base, speed is tokens per forward. Unlike seconds, both are
reproducible. The two thresholds are swept on a grid. Then, for each mode's best setting so far, the sweep varies
correction passes, block size and the number of finished blocks that stay editable, one after the other.

A gated adapter verifies its drafts: the rows of a pass and `tau_accept` are swept on a grid, and tokens per second
decide, since the cost of a row depends on the machine. If the adapter learned to edit, blocks by thresholds are tried as
well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hildanext.config import CalibrateConfig, Config, Mode
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.settings import Preset, Settings, resolve
from hildanext.errors import UsageError
from hildanext.evaluate.benchmark import held_out_prompts
from hildanext.evaluate.judge import distinct_2, total_log_likelihood
from hildanext.evaluate.ways import seeded
from hildanext.files import write_json
from hildanext.model.loading import load_with_base
from hildanext.model.prompts import read_prompts
from hildanext.plots import draw_calibration
from hildanext.progress import progress
from hildanext.provenance import git_revision, versions


class FrontierPoint(NamedTuple):
    """A preset and its measured quality and speed."""

    preset: Preset
    quality: float  # mean log-likelihood under the AR base, nats per token
    tokens_per_forward: float
    tokens_per_second: float
    distinct_2: float
    edits: int


def measure(
    engine: TransformersEngine, base: PreTrainedModel, prompts: list[list[int]], settings: Settings
) -> FrontierPoint:
    """Complete the prompts and score the text. Raises UsageError if every answer is empty."""
    engine.scheduler.reset_prefix_cache()  # no setting may reuse the prompt cache of the setting before
    done = engine.generate_batch([Request(prompt, settings) for prompt in prompts])
    n_tokens = sum(len(completion.token_ids) for completion in done)
    if n_tokens == 0:
        raise UsageError("every answer is empty because it begins with a string of 'decode.stop'; remove that string")
    log_p = [
        total_log_likelihood(base, prompt, completion.token_ids)
        for prompt, completion in zip(prompts, done, strict=True)
    ]
    return FrontierPoint(
        Preset(*(getattr(settings, name) for name in Preset._fields)),
        sum(log_p) / n_tokens,
        n_tokens / sum(completion.stats.forwards for completion in done),
        n_tokens / max(completion.stats.seconds for completion in done),
        distinct_2([completion.token_ids for completion in done]),
        sum(completion.stats.edits for completion in done),
    )


def choose(points: list[FrontierPoint], loss: float, least_variety: float) -> FrontierPoint:
    """The fastest point within `loss` nats per token of the best quality.

    Repetitive text has a high likelihood, so only points with at least `least_variety` times the distinct-2 of the most
    careful setting (highest tau_mask) are considered.
    """
    careful = max(points, key=lambda point: (point.preset.tau_mask, -point.tokens_per_forward))
    varied = [point for point in points if point.distinct_2 >= least_variety * careful.distinct_2]
    best = max(point.quality for point in varied)
    return max(
        (point for point in varied if point.quality >= best - loss),
        key=lambda point: (point.tokens_per_forward, point.quality),
    )


def sweep(
    engine: TransformersEngine,
    base: PreTrainedModel,
    prompts: list[list[int]],
    start: Settings,
    options: CalibrateConfig,
) -> tuple[list[FrontierPoint], dict[Mode, FrontierPoint]]:
    """All measured points, and the point chosen for each mode."""
    block = engine.trained_block
    assert block is not None
    sizes = options.block_sizes or sorted({max(1, block // 2), block, 2 * block})
    grid = [(mask, edit) for mask in options.tau_mask for edit in options.tau_edit]
    loss: dict[Mode, float] = {"Q_MODE": options.q_loss, "S_MODE": options.s_loss}
    points: dict[Preset, FrontierPoint] = {}
    varied: dict[str, list[int]] = {
        "max_post_steps": options.max_post_steps,
        "block_size": sizes,
        "edit_blocks": options.edit_blocks,
    }
    n_settings = len(grid) + len(loss) * sum(map(len, varied.values()))
    with progress("calibrate", n_settings, "settings") as advance:
        done = 0

        def try_preset(preset: Preset) -> None:
            nonlocal done
            if preset.tau_edit is None:  # editing is off, so edit_blocks has no effect
                preset = preset._replace(edit_blocks=0)
            if preset not in points:
                points[preset] = measure(engine, base, prompts, start._replace(**preset._asdict()))
            done += 1
            advance(done, f"best {max(point.quality for point in points.values()):.2f} nats per token")

        for mask, edit in grid:
            try_preset(Preset(mask, edit, max(options.max_post_steps), block, max(options.edit_blocks)))
        for mode in loss:
            for key, values in varied.items():
                for value in values:  # always start from the best preset so far
                    best = choose([*points.values()], loss[mode], options.least_variety).preset
                    try_preset(best._replace(**{key: value}))
    measured = list(points.values())
    return measured, {mode: choose(measured, loss[mode], options.least_variety) for mode in loss}


def sweep_gated(
    engine: TransformersEngine,
    base: PreTrainedModel,
    prompts: list[list[int]],
    start: Settings,
    options: CalibrateConfig,
    edits: bool,
) -> tuple[list[FrontierPoint], dict[Mode, FrontierPoint]]:
    """All measured points of a gated adapter, and the point chosen for each mode. edits: it learned to edit blocks."""
    points: list[FrontierPoint] = []
    blocks = [(mask, edit) for mask in options.tau_mask for edit in options.tau_edit] if edits else []
    total = len(options.rows) * (1 + len(options.tau_accept)) + len(blocks)
    with progress("calibrate", total, "settings") as advance:

        def point(**changes: Any) -> FrontierPoint:
            points.append(measure(engine, base, prompts, start._replace(**changes)))
            advance(len(points), f"{points[-1].tokens_per_second:.0f} tokens/s")
            return points[-1]

        exact = max((point(rows=rows, tau_accept=1.0) for rows in options.rows), key=lambda p: p.tokens_per_second)
        for tau_accept in options.tau_accept:
            for rows in options.rows:
                point(rows=rows, tau_accept=tau_accept)
        for mask, edit in blocks:
            point(tau_accept=None, tau_mask=mask, tau_edit=edit, block_size=engine.trained_block)
    chosen: dict[Mode, FrontierPoint] = {"EXACT": exact}
    losses: dict[Mode, float] = {"Q_MODE": options.q_loss, "S_MODE": options.s_loss}
    for mode, loss in losses.items():
        # The base's own text is the measure of quality and of variety.
        good = [
            p
            for p in points
            if p.quality >= exact.quality - loss and p.distinct_2 >= options.least_variety * exact.distinct_2
        ]
        chosen[mode] = max(good, key=lambda p: (p.tokens_per_second, p.quality))
    return points, chosen


def calibrate(config: Config, prompts_file: str | None, base_name: str | None, out: Path) -> dict[str, Any]:
    """Sweep the settings, plot them, write both modes into the checkpoint's generation_config.json; return the report.

    Without a prompts file the beginnings of held-out documents serve as prompts. Raises UsageError for a model that is
    not a local converted checkpoint.
    """
    folder = Path(config.model.base)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"'{config.model.base}' is not a local checkpoint folder; calibrate writes the modes into that folder"
        )
    loaded = load_with_base(config.model, base_name)
    engine = TransformersEngine(config, {}, loaded.lm)
    try:
        tokenizer = loaded.lm.tokenizer
        prompts = read_prompts(Path(prompts_file), tokenizer) if prompts_file else held_out_prompts(config, tokenizer)
        prompts = prompts[: config.calibrate.prompts]
        start = resolve(seeded(config), loaded.block_size, kind=engine.kind)
        if loaded.lm.gated:
            edits = loaded.lm.record["gate"].get("edits", False)
            points, chosen = sweep_gated(engine, loaded.base, prompts, start, config.calibrate, edits)
        else:
            points, chosen = sweep(engine, loaded.base, prompts, start, config.calibrate)
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
        "base": loaded.base_config.base,
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
    """A table of the two modes and the paths of the files written."""
    lines = [
        f"{'':8}{'tau_accept':>12}{'rows':>6}{'tau_mask':>10}{'tau_edit':>10}{'post':>6}{'block':>7}{'editable':>10}"
        f"{'nats/token':>12}{'TPF':>7}{'tokens/s':>10}"
    ]
    for mode, point in chosen.items():
        preset = point.preset
        edit = "off" if preset.tau_edit is None else f"{preset.tau_edit:g}"
        accept = ("-", "-") if preset.tau_accept is None else (f"{preset.tau_accept:g}", f"{preset.rows}")
        lines.append(
            f"{mode:8}{accept[0]:>12}{accept[1]:>6}{preset.tau_mask:10g}{edit:>10}{preset.max_post_steps:6d}{preset.block_size or 0:7d}"
            f"{preset.edit_blocks:10d}"
            f"{point.quality:12.3f}{point.tokens_per_forward:7.2f}{point.tokens_per_second:10.1f}"
        )
    return "\n".join([*lines, f"modes written to {files['written']}, plot to {files['plot']}"])
