"""Pictures of a run: loss, accuracy, block size and learning rate over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hildanext.files import atomic_open


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw metrics rows (see `train`) as a four-panel PNG, written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [row["step"] for row in rows]
    evals = [(row["step"], row) for row in rows if "eval_loss" in row]
    loss, accuracy, block, rate = figure.subplots(2, 2).flat
    for key, label in (("m2t_ce", "masked tokens (M2T)"), ("t2t", "T2T")):
        loss.plot(steps, [row[key] for row in rows], label=label, linewidth=1)
    loss.plot([s for s, _ in evals], [row["eval_loss"] for _, row in evals], "o-", label="held out", markersize=3)
    loss.set(title="loss (nats)", yscale="log")
    accuracy.plot(steps, [row["masked_accuracy"] for row in rows], label="masked", linewidth=1)
    accuracy.plot(steps, [row["edit_accuracy"] for row in rows], label="edits", linewidth=1)
    accuracy.plot(
        [s for s, _ in evals], [row["eval_accuracy"] for _, row in evals], "o-", label="held out", markersize=3
    )
    accuracy.set(title="accuracy", ylim=(0, 1))
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
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)


def draw_calibration(points: list[dict[str, Any]], chosen: dict[Any, dict[str, Any]], path: Path) -> None:
    """Quality against tokens per forward and against tokens per second, a dot a setting, the chosen modes named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    edits = sorted({point["preset"].tau_edit for point in points}, key=lambda value: (value is not None, value))
    for axis, speed in zip(panels, ("tokens_per_forward", "tokens_per_second"), strict=True):
        for edit in edits:
            mine = [point for point in points if point["preset"].tau_edit == edit]
            label = "editing off" if edit is None else f"tau_edit {edit:g}"
            axis.plot([p[speed] for p in mine], [p["quality"] for p in mine], "o", markersize=5, alpha=0.7, label=label)
        for place in {(point[speed], point["quality"]) for point in chosen.values()}:
            here = [mode for mode, point in chosen.items() if (point[speed], point["quality"]) == place]
            axis.plot(*place, "*", color="black", markersize=13)
            axis.annotate(", ".join(here), place, textcoords="offset points", xytext=(8, -14))
        axis.set(xlabel=speed.replace("_", " "))
        axis.grid(alpha=0.3)
    panels[0].set(ylabel="quality: log-likelihood under the AR base (nats a token)")
    panels[1].legend(fontsize="small")
    with atomic_open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
