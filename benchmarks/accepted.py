"""Draws how many drafts the base accepts against the mask rows that the shipped model was trained on.

    python benchmarks/accepted.py                    # docs/accepted.png, from the record of its training

The accepted run is the mean number of a group's drafts before the first wrong one, on held-out answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hildanext.config import SHIPPED_MODEL
from hildanext.files import atomic_open
from hildanext.model.pretrained import MODELS


def points(record: Path) -> list[tuple[int, float]]:
    """(mask rows trained, accepted run) of every evaluation, over all parts of the training."""
    found, before = [], 0
    for run in json.loads(record.read_text(encoding="utf-8"))["runs"]:
        found += [(before + point["group_rows"], point["eval_run"]) for point in run["curve"]]
        before += run["group_rows"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=MODELS / SHIPPED_MODEL / "training.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "accepted.png")
    args = parser.parse_args()
    rows, accepted = zip(*points(args.record), strict=True)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([n / 1e6 for n in rows], accepted, marker="o", markersize=3)
    axis.set(xlabel="mask rows trained, millions", ylabel="accepted drafts of 4", title=f"{SHIPPED_MODEL}, held out")
    axis.grid(alpha=0.3)
    with atomic_open(args.out, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
    for n, run in zip(rows, accepted, strict=True):
        print(f"{n:>10,}  {run:.3f}")


if __name__ == "__main__":
    main()
