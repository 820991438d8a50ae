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
