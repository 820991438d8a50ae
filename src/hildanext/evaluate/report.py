"""Reports of `evaluate`: report.json for programs, report.md and a plot for people; reading them back for --resume."""

from __future__ import annotations

import json
import math
import platform
import re
from pathlib import Path
from typing import Any

import torch

from hildanext.errors import UsageError
from hildanext.evaluate import gsm8k, humaneval, infilling, stories
from hildanext.evaluate.intervals import Figure
from hildanext.evaluate.ways import Outcome
from hildanext.files import atomic_open, write_json
from hildanext.plots import draw_quality
from hildanext.progress import say

OURS = (humaneval.NAME, gsm8k.NAME, stories.NAME, infilling.NAME)  # all other tasks come from lm-eval
SCORES = ("acc_norm", "acc", "exact_match")  # a task's score is its first metric of these
INTERVALS = (
    "Brackets hold 95 % confidence intervals: the Wilson score for shares, a seeded percentile bootstrap over items "
    "for other figures. Figures without brackets have no interval."
)


def hardware(device: torch.device) -> str:
    """The device's name for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def as_json(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Figures as JSON objects; nan becomes null."""
    return {
        name: figure._asdict()
        | {"value": _number(figure.value), "low": _number(figure.low), "high": _number(figure.high)}
        for name, figure in outcome.figures.items()
    }


def _score(figures: dict[str, Figure]) -> float | None:
    """An lm-eval task's score for the average: its first metric in SCORES, by its first filter."""
    named = ((metric, name) for metric in SCORES for name in figures if name.partition(" (")[0] == metric)
    return next((figures[name].value for _, name in named), None)


def averages(tasks: dict[str, list[Outcome]]) -> dict[str, dict[str, Any]]:
    """For each way: its mean score over lm-eval's tasks, the AR base's over the same tasks, and their ratio."""
    scores: dict[str, dict[str, float]] = {}
    for task, outcomes in tasks.items():
        for outcome in outcomes if task not in OURS else []:
            value = _score(outcome.figures)
            if value is not None and not math.isnan(value):
                scores.setdefault(outcome.way, {})[task] = value
    found = {}
    for way, by_task in scores.items():
        base_scores = [scores["ar"][task] for task in by_task if task in scores.get("ar", {})]
        average = sum(by_task.values()) / len(by_task)
        base_average = sum(base_scores) / len(base_scores) if len(base_scores) == len(by_task) else None
        ratio = average / base_average if base_average else None
        found[way] = {"tasks": list(by_task), "average": average, "ar": base_average, "ratio": ratio}
    return found


def _average_table(tasks: dict[str, list[Outcome]]) -> list[str]:
    found = averages(tasks)
    if not found:
        return []
    lines = [
        "",
        "## Average over lm-eval's tasks",
        "",
        "| | tasks | average | AR base, same tasks | ratio |",
        "|---" * 5 + "|",
    ]
    for way, row in found.items():
        numbers = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("average", "ar", "ratio")]
        lines.append(f"| {way} | {len(row['tasks'])} | " + " | ".join(numbers) + " |")
    return lines


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if math.isnan(figure.value):
        return "-"
    digits = 0 if figure.value == int(figure.value) and abs(figure.value) > 1 and figure.low is None else 3
    text = f"{figure.value:.{digits}f}"
    return text if figure.low is None or figure.high is None else f"{text} [{figure.low:.3f}, {figure.high:.3f}]"


def _thresholds(settings: dict[str, Any]) -> str:
    names = ("tau_mask", "tau_edit", "edit_blocks", "max_post_steps", "block_size")
    edits = settings["tau_edit"] is not None  # without editing only two of them have an effect
    shown = {name: settings[name] for name in names if edits or name in ("tau_mask", "block_size")}
    return ", ".join(f"{name} {value:g}" for name, value in shown.items())


def markdown(about: dict[str, Any], tasks: dict[str, list[Outcome]]) -> str:
    """The report as Markdown: one table per task, with a row for each way and a column for each figure."""
    lines = [
        f"# Evaluation of {about['model']}",
        "",
        f"AR base: {about['base']}. Convention {about['convention']}, block size {about['block_size']}, "
        f"{about['dtype']}, runtime {about['runtime']}, {about['slots']} requests at a time, on {about['hardware']}. "
        f"Seed {about['seed']}. "
        f"Versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}.",
        "",
        *[f"- {name}: {_thresholds(settings)}" for name, settings in about["ways"].items() if settings],
        "",
        INTERVALS,
    ]
    for task, outcomes in tasks.items():
        columns = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
        n = max(figure.n for figure in outcomes[0].figures.values())
        lines += [
            "",
            f"## {task} ({n} items)",
            "",
            "| | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for outcome in outcomes:
            cells = [_cell(outcome.figures.get(name)) for name in columns]
            lines.append(f"| {outcome.way} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_average_table(tasks)]) + "\n"


def _samples_file(out: Path, task: str) -> Path:
    return out / "samples" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', task)}.jsonl"


def write_report(about: dict[str, Any], tasks: dict[str, list[Outcome]], out: Path) -> dict[str, Any]:
    """Write report.json, report.md and samples/TASK.jsonl into `out`. Returns the content of report.json."""
    report = about | {
        "tasks": {task: {outcome.way: as_json(outcome) for outcome in outcomes} for task, outcomes in tasks.items()},
        "lm_eval_average": averages(tasks),
    }
    for task, outcomes in tasks.items():
        with atomic_open(_samples_file(out, task)) as file:
            for outcome in outcomes:
                for sample in outcome.samples:
                    file.write(json.dumps({"way": outcome.way} | sample, ensure_ascii=False, default=str) + "\n")
    write_json(out / "report.json", report)
    with atomic_open(out / "report.md") as file:
        file.write(markdown(about, tasks))
    return report


def read_results(about: dict[str, Any], out: Path) -> dict[str, list[Outcome]]:
    """Results of an earlier evaluation in `out`, by task; adds the data files of its other tasks to `about["data"]`.

    Raises UsageError, naming the difference, if the models, settings or data files differ.
    """
    path = out / "report.json"
    if not path.is_file():
        say(f"{out}: no earlier report; starting from the beginning")
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    tasks = stored.pop("tasks")
    current = json.loads(json.dumps(about))  # tuples become lists, as in the stored report
    differs = [key for key in current if key not in ("git", "data") and stored.get(key) != current[key]]
    data = stored.get("data", {})
    differs += [f"data file of {name}" for name, given in current["data"].items() if data.get(name, given) != given]
    if differs:
        raise UsageError(f"{path}: made with another {', '.join(differs)}; leave out --resume, or give another --out")
    about["data"] = data | about["data"]
    found: dict[str, list[Outcome]] = {}
    for task, by_way in tasks.items():
        records = [json.loads(line) for line in _samples_file(out, task).read_text(encoding="utf-8").splitlines()]
        for way, figures in by_way.items():
            restored = {
                name: Figure(**figure | {"value": math.nan if figure["value"] is None else figure["value"]})
                for name, figure in figures.items()
            }
            samples = [{k: v for k, v in record.items() if k != "way"} for record in records if record["way"] == way]
            found.setdefault(task, []).append(Outcome(way, restored, samples))
    say(f"{path}: {sum(map(len, found.values()))} earlier results kept")
    return found


def draw(tasks: dict[str, list[Outcome]], path: Path) -> None:
    """Plot quality against speed for the tasks that measure speed; without such a task no file is written."""
    drawn = {
        task: [(outcome.way, outcome.figures) for outcome in outcomes]
        for task, outcomes in tasks.items()
        if all("tokens_per_second" in outcome.figures for outcome in outcomes)
    }
    if drawn:
        draw_quality(drawn, path)
