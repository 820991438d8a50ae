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


def points(record: Path) -> dict[int, list[tuple[int, float]]]:
    """(mask rows trained, accepted run) of every evaluation, over all parts of the training, by the rows of a group."""
    found: dict[int, list[tuple[int, float]]] = {}
    before = 0
    for run in json.loads(record.read_text(encoding="utf-8"))["runs"]:
        of_size = found.setdefault(run["config"]["sft"]["block_size"], [])
        of_size += [(before + point["group_rows"], point["eval_run"]) for point in run["curve"]]
        before += run["group_rows"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=MODELS / SHIPPED_MODEL / "training.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "accepted.png")
    args = parser.parse_args()
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for k, curve in points(args.record).items():
        rows, accepted = zip(*curve, strict=True)
        axis.plot([n / 1e6 for n in rows], accepted, marker="o", markersize=3, label=f"of {k}")
        print("\n".join(f"{n:>10,}  {run:.3f} of {k}" for n, run in curve))
    axis.set(xlabel="mask rows trained, millions", ylabel="accepted drafts", title=f"{SHIPPED_MODEL}, held out")
    axis.legend()
    axis.grid(alpha=0.3)
    with atomic_open(args.out, "wb") as file:
        figure.savefig(file, format="png", dpi=100)


if __name__ == "__main__":
    main()
