"""docs/benchmarks/train.md from the numbers of train.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

HEAD = """# Training

Made by `make bench-train` ([benchmarks/train.py](../../benchmarks/train.py)). The plain way, which it is compared with
([benchmarks/plain.py](../../benchmarks/plain.py)): a dense [2L, 2L] mask for transformers' own attention, logits of all 2L
positions in fp32, the same optimizer.
"""


def write_page(results: dict[str, Any], path: Path) -> None:
    machine = results["machine"]
    names = ("python", "torch", "transformers", "accelerate")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in names)
    lines = [HEAD, f"CPU `{machine['cpu']}`, {machine['cores']} cores; {versions}."]
    for name, section in SECTIONS.items():
        if name in results:
            lines += ["", *section(results[name])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def gb(value: float | None) -> str:
    return "did not fit" if value is None else f"{value / 1e9:.2f}"


def busy(found: dict[str, Any]) -> str:
    about = found["about"]
    other = f" Other work ran beside it (load {about['load_before']:.1f})." if about["load_before"] > 0.7 else ""
    return f"{about['threads']} threads.{other}"


def _speed(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, one in found.items():
        if name == "about":
            continue
        text = "TinyStories" if one["real"] else "synthetic stories"
        what = f"packed, documents of {one['tokens']:.0f} tokens ({text})" if one["packed"] else "one document a row"
        low, high = min(one["ratios"]), max(one["ratios"])
        rows.append(
            f"| {what} | {one['ours_tokens_per_second']:.0f} | {one['plain_tokens_per_second']:.0f} | **{one['ratio']:.2f}** "
            f"| {low:.2f} to {high:.2f} | {one['first_losses'][0]:.4f}, {one['first_losses'][1]:.4f} |"
        )
    rounds = next(one["rounds"] for name, one in found.items() if name != "about")
    return [
        "## Tokens per second",
        "",
        "SmolLM2-135M, rows of 1,024, block 32, bf16 autocast, AdamW, one row a step. Whole steps of both sides in turn in one",
        f"process; medians of {rounds} pairs after one that is not counted. {busy(found)} Bar: 1.8 times.",
        "",
        "| rows | tokens/s | plain | times faster | of single pairs | loss of the first step, ours and plain |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _memory(found: dict[str, Any]) -> list[str]:
    plain = found["plain"]["peak"]
    rows = []
    for name, one in found.items():
        if name == "about":
            continue
        share = "" if one["peak"] is None or plain is None else f"{one['peak'] / plain:.2f}"
        predicted = "" if one["predicted"] is None else gb(one["predicted"])
        off = "" if not predicted or one["peak"] is None else f"{one['predicted'] / one['peak'] - 1:+.0%}"
        rows.append(f"| {name} | {gb(one['peak'])} | {share} | {predicted} | {off} |")
    return [
        "## Peak memory, and what `preflight` says of it",
        "",
        "The Qwen3-0.6B shape with random weights, one row of 1,024, block 32, bf16 autocast over fp32 weights, AdamW unless said",
        "otherwise. Peak resident memory of a fresh process over three steps, libraries, weights and optimizer included, in GB.",
        "Bar: half of the plain way's; `preflight` within 15 %.",
        "",
        "| | peak | share of plain | predicted | off by |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _budget(found: dict[str, Any]) -> list[str]:
    parts = ("process", "weights", "gradients", "optimizer", "activations", "allocator", "total")
    rows = [
        f"| {name} | " + " | ".join(f"{one[part] / 1e9:.2f}" for part in parts) + " |"
        for name, one in found.items()
        if name != "about"
    ]
    return [
        "## 8 GB cards",
        "",
        "No GPU was at hand: this is what `preflight` predicts for a step at row 1,024, in GB. The kernels of a card may need",
        "other temporaries than those of a CPU, on which the prediction was checked.",
        "",
        "| preset | " + " | ".join(parts) + " |",
        "|---|" + "---|" * len(parts),
        *rows,
    ]


def _scaling(found: dict[str, Any]) -> list[str]:
    return [
        "## Two processes",
        "",
        "A Llama of 15 million weights, rows of 512, fp32: one process pinned to one core, and two gloo processes under torchrun, in",
        f"turn, {found['turns']} times; medians. {busy(found)} Bar: 1.6 times.",
        "",
        "| one process, tokens/s | two | times | largest difference of a step's loss |",
        "|---|---|---|---|",
        f"| {found['one']:.0f} | {found['two']:.0f} | **{found['ratio']:.2f}** | {found['loss_difference']:.1e} |",
    ]


def _kills(found: dict[str, Any]) -> list[str]:
    counts = Counter(one["command"] for one in found["struck"])
    left: dict[str, list[str]] = {}
    for one in found["struck"]:
        left.setdefault(one["command"], []).append(f"{one['after']:.1f} s: {one['left']}")
    return [
        "## kill -9",
        "",
        f"A tiny model through the whole way, {found['kills']} times struck by SIGKILL at random moments of its commands, each begun",
        "again (trainings with `--resume`). Rows, texts and merged weights of the run that was never disturbed: "
        + ("**identical to the last bit**." if found["identical"] else "**NOT identical**."),
        "",
        "| command | undisturbed | kills | what each left |",
        "|---|---|---|---|",
        *(
            f"| `{name}` | {found['seconds'][name]:.1f} s | {counts[name]} | {'; '.join(left.get(name, []))} |"
            for name in found["seconds"]
        ),
    ]


def _gpu(found: dict[str, Any]) -> list[str]:
    if "skipped" in found:
        return [
            "## On a GPU",
            "",
            f'Not measured: {found["skipped"]}. `make bench-train ARGS="--only gpu"` measures it.',
        ]
    mfu = "unknown peak" if found["mfu"] is None else f"{found['mfu']:.0%} of the dense-equivalent FLOPs"
    return [
        f"## On a GPU: {found['device']}",
        "",
        f"Qwen3-0.6B shape, bf16, rows of 1,024, 8 a step: {found['tokens_per_second']:.0f} tokens/s, {mfu}. At rows of 4,096",
        f"FlexAttention's step is {found['flex_over_dense']:.2f} times as fast as the dense mask's. With 8 GB: "
        + "; ".join(
            f"{name} {'fits' if one['fits'] else 'does not fit'} ({gb(one['peak'])} GB, {one['dtype']})"
            for name, one in found["budget"].items()
        )
        + ".",
    ]


SECTIONS = {
    "speed": _speed,
    "memory": _memory,
    "budget": _budget,
    "scaling": _scaling,
    "kills": _kills,
    "gpu": _gpu,
}
