"""Plots as PNG files: a training run's curves, the settings that `calibrate` tried, and the results of `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.files import atomic_open

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metrics in the two upper panels, with their labels.
DENOISING = (
    {"m2t_ce": "masked tokens (M2T)", "t2t": "T2T", "eval_loss": "held out"},
    {"masked_accuracy": "masked", "edit_accuracy": "edits", "eval_accuracy": "held out"},
)
PREFERENCES = (
    {"loss": "DPO", "eval_loss": "held out"},
    {
        "reward_chosen": "chosen",
        "reward_rejected": "rejected",
        "reward_margin": "margin",
        "eval_margin": "held-out margin",
    },
)


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` in inches, written to `path` as a PNG file when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot a run's metrics over its steps: loss, accuracy or rewards, block size, and learning rate.

    rows: records of metrics.jsonl.
    """
    with _figure(path, (10, 6.5)) as figure:
        steps = [row["step"] for row in rows]
        evals = [row for row in rows if "eval_loss" in row]
        loss, accuracy, block, rate = figure.subplots(2, 2).flat
        preferences = bool(rows) and "reward_margin" in rows[0]
        lines = PREFERENCES if preferences else DENOISING
        for axis, shown in zip((loss, accuracy), lines, strict=True):
            for key, label in shown.items():
                part = evals if key.startswith("eval") else rows
                form = {"marker": "o", "markersize": 3} if key.startswith("eval") else {}
                axis.plot([row["step"] for row in part], [row[key] for row in part], label=label, linewidth=1, **form)
        loss.set(title="loss (nats)", yscale="linear" if preferences else "log")
        accuracy.set(**({"title": "rewards (nats)"} if preferences else {"title": "accuracy", "ylim": (0, 1)}))
        block.step(steps, [row["block_size"] for row in rows], where="post")
        block.set_yscale("log", base=2)
        block.yaxis.set_major_formatter("{x:g}")
        block.set(title="block size", xlabel="step")
        rate.plot(steps, [row["lr"] for row in rows])
        rate.set(title="learning rate", xlabel="step")
        for axis in (loss, accuracy):
            axis.legend(fontsize="small")
        for axis in (loss, accuracy, block, rate):
            axis.grid(alpha=0.3)
        figure.suptitle(title)


def calibration_label(preset: Any) -> str:
    """The group of a measured setting in the plot of a calibration."""
    if preset.tau_accept is not None:
        return "drafts verified"
    return "editing off" if preset.tau_edit is None else f"tau_edit {preset.tau_edit:g}"


def draw_calibration(points: list[dict[str, Any]], chosen: dict[Any, dict[str, Any]], path: Path) -> None:
    """Plot quality against tokens per forward and tokens per second.

    points: measured settings, a dot each. chosen: mode -> its point, drawn as a star with the mode's name.
    """
    with _figure(path, (11, 5)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        labels = [calibration_label(point["preset"]) for point in points]
        for axis, speed in zip(panels, ("tokens_per_forward", "tokens_per_second"), strict=True):
            for label in sorted(set(labels)):
                matching = [point for point, own in zip(points, labels, strict=True) if own == label]
                axis.plot(
                    [p[speed] for p in matching],
                    [p["quality"] for p in matching],
                    "o",
                    markersize=5,
                    alpha=0.7,
                    label=label,
                )
            for place in {(point[speed], point["quality"]) for point in chosen.values()}:
                here = [mode for mode, point in chosen.items() if (point[speed], point["quality"]) == place]
                axis.plot(*place, "*", color="black", markersize=13)
                axis.annotate(", ".join(here), place, textcoords="offset points", xytext=(8, -14))
            axis.set(xlabel=speed.replace("_", " "))
            axis.grid(alpha=0.3)
        panels[0].set(ylabel="quality: log-likelihood under the AR base (nats a token)")
        panels[1].legend(fontsize="small")


def draw_quality(tasks: dict[str, list[tuple[str, dict[str, Any]]]], path: Path) -> None:
    """Plot each task's first figure against tokens per second and tokens per forward, a row of panels for each task.

    tasks: name -> [(way, figures by name)]. Figures have value, low and high; the interval is drawn as error bars.
    """
    with _figure(path, (11, 4 * len(tasks))) as figure:
        panels = figure.subplots(len(tasks), 2, squeeze=False)
        for (task, ways), row in zip(tasks.items(), panels, strict=True):
            for axis, speed in zip(row, ("tokens_per_second", "tokens_per_forward"), strict=True):
                for way, figures in ways:
                    quality = next(iter(figures.values()))
                    x, y = figures[speed], quality
                    axis.errorbar(
                        x.value, y.value, yerr=_reach(y), xerr=_reach(x), fmt="o", capsize=3, markersize=6, label=way
                    )
                axis.set(xlabel=speed.replace("_", " "))
                axis.grid(alpha=0.3)
            row[0].set(ylabel=f"{task}: {next(iter(ways[0][1])).replace('_', ' ')}")
            row[1].legend(fontsize="small")


def _reach(figure: Any) -> list[list[float]] | None:
    """Error bars for matplotlib: the distances from the value to both ends of its interval."""
    if figure.low is None or figure.high is None:
        return None
    return [[max(figure.value - figure.low, 0.0)], [max(figure.high - figure.value, 0.0)]]
