"""docs/benchmarks/train.md from the numbers of train.py: every bar with what was measured, then each part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hildanext.files import atomic_open

HEAD = """# Training

Made by `make bench-train` (`benchmarks/train.py`) from [train.json](train.json). The plain way, which
it is compared with (`benchmarks/plain.py`): a dense [2L, 2L] mask for transformers' own attention,
logits of all 2L positions in fp32, the same optimizer.
"""
CARD = 8e9


class Bar(NamedTuple):
    """A line of the first table."""

    what: str
    bar: str
    measured: str
    met: bool | None  # None: not measured


def write_page(results: dict[str, Any], path: Path) -> None:
    """The page, at once or not at all."""
    words = {True: "met", False: "**NOT met**", None: "not measured"}
    lines = [HEAD, "| what | bar | measured | |", "|---|---|---|---|"]
    lines += [f"| {one.what} | {one.bar} | {one.measured} | {words[one.met]} |" for one in bars(results)]
    for name, section in SECTIONS.items():
        title, body = section
        lines += ["", f"## {title}", ""]
        if name in results:
            lines += [*body(results[name]), "", where(results[name]["machine"])]
        else:
            lines += [f'Not measured yet: `make bench-train ARGS="--only {name}"`.']
    with atomic_open(path) as file:
        file.write("\n".join(lines) + "\n")


def bars(results: dict[str, Any]) -> list[Bar]:
    return [
        *_speed_bars(results.get("speed")),
        *_memory_bars(results.get("memory")),
        *_card_bars(results.get("budget"), results.get("gpu")),
        *_gpu_bars(results.get("gpu")),
        _scaling_bar(results.get("scaling")),
        _kills_bar(results.get("kills")),
    ]


def _speed_bars(found: dict[str, Any] | None) -> list[Bar]:
    what, bar = "tokens/s, SmolLM2-135M, rows of 1,024, block 32, against the plain way, bf16 on a CPU", "1.8 times"
    if found is None:
        return [Bar(what, bar, "", None)]
    how = "bf16" if found["dtype"] == "bfloat16" else "fp32"
    if not found["machine"]["bf16"]:
        how += ", this CPU has no bf16 instructions"
    if found["row"] != 1024:
        how += f", rows of {found['row']}"
    return [
        Bar(f"{what}: {name}", bar, f"{one['ratio']:.2f} times ({how})", one["ratio"] >= 1.8)
        for name, one in found["kinds"].items()
    ]


def _memory_bars(found: dict[str, Any] | None) -> list[Bar]:
    what, bar = "peak memory of a step, Qwen3-0.6B shape, row 1,024, batch 1", "half of the plain way's"
    exact = "`preflight`'s prediction of each of those peaks"
    if found is None:
        return [Bar(what, bar, "", None), Bar(exact, "within 15 %", "", None)]
    sides = found["sides"]
    plain = sides["plain"]["peak"] or sides["plain"]["more_than"]
    at_most = "" if sides["plain"]["peak"] else "at most "
    rows = []
    for name in ("ours", "ours, checkpointing", "ours, checkpointing and 8-bit AdamW"):
        peak = sides[name]["peak"]
        measured = f"{at_most}{peak / plain:.2f} of it ({gb(sides[name])} GB)" if peak else "did not fit"
        rows.append(Bar(f"{what}: {name}", bar, measured, peak is not None and peak <= plain / 2))
    off = [abs(one["predicted"] / one["peak"] - 1) for one in sides.values() if one["predicted"]]
    worst = max(off, default=None)
    said = "" if worst is None else f"off by {worst:.0%} at most"
    return [*rows, Bar(exact, "within 15 %", said, None if worst is None else worst <= 0.15)]


def _card_bars(budget: dict[str, Any] | None, gpu: dict[str, Any] | None) -> list[Bar]:
    """A measurement with a cap where there is one, else the prediction."""
    whats = {
        "qwen3-0.6b-gtx1080": "8 GB card: Qwen3-0.6B, a step of all weights, row 1,024",
        "qwen3-1.7b-lora-8gb": "8 GB card: Qwen3-1.7B, a LoRA step, row 1,024",
    }
    rows = []
    for preset, what in whats.items():
        if gpu is not None:
            one = gpu["budget"][preset]
            rows.append(Bar(what, "fits", f"{one['peak'] / 1e9:.2f} GB, memory capped at 8 GB", one["fits"]))
        elif budget is not None:
            totals = {name: one["total"] for name, one in budget["cards"].items() if name.startswith(preset)}
            said = ", ".join(f"{name.rpartition(' ')[2]} {total / 1e9:.2f} GB" for name, total in totals.items())
            rows.append(Bar(what, "fits", f"predicted: {said}", max(totals.values()) <= CARD))
        else:
            rows.append(Bar(what, "fits", "", None))
    return rows


def _gpu_bars(found: dict[str, Any] | None) -> list[Bar]:
    use = "model FLOPs utilisation, Qwen3-0.6B shape, bf16, H100"
    flex = "FlexAttention against the dense mask, rows of 4,096"
    if found is None:
        return [Bar(use, "40 %", "", None), Bar(flex, "2 times", "", None)]
    ratio, mfu = found["flex_over_dense"], found["mfu"]
    said = "" if mfu is None else f"{mfu:.0%} ({found['device']})"
    return [
        Bar(use, "40 %", said, None if mfu is None else mfu >= 0.4),
        Bar(flex, "2 times", f"{ratio:.2f} times", ratio >= 2),
    ]


def _scaling_bar(found: dict[str, Any] | None) -> Bar:
    what, bar = "2 gloo processes on 2 cores against one on one core", "1.6 times"
    return Bar(what, bar, f"{found['ratio']:.2f} times", found["ratio"] >= 1.6) if found else Bar(what, bar, "", None)


def _kills_bar(found: dict[str, Any] | None) -> Bar:
    what = "kill -9 at random moments of prepare, tokenize, convert, sft, merge"
    bar = "20 kills, identical weights"
    if found is None:
        return Bar(what, bar, "", None)
    same = "identical" if found["identical"] else "NOT identical"
    return Bar(what, bar, f"{found['kills']} kills, {same}", found["identical"] and found["kills"] >= 20)


def where(machine: dict[str, Any]) -> str:
    """The machine of a part, in a line."""
    names = ("python", "torch", "transformers", "accelerate")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in names)
    gpu = "" if machine["gpu"] is None else f" and one {machine['gpu']}"
    bf16 = "" if machine["bf16"] else ", no bf16 instructions"
    busy = f" Other work ran beside it (load {machine['load_before']:.1f})." if machine["load_before"] > 0.7 else ""
    return (
        f"*Measured {machine['date']} on {machine['cpu']} ({machine['capability']}{bf16}), {machine['cores']} cores, "
        f"{machine['memory'] / 1e9:.0f} GB{gpu}, {machine['threads']} threads; {versions}.{busy}*"
    )


def gb(one: dict[str, Any]) -> str:
    return f"more than {one['more_than'] / 1e9:.1f} (killed)" if one["peak"] is None else f"{one['peak'] / 1e9:.2f}"


def _speed(found: dict[str, Any]) -> list[str]:
    rows = []
    for one in found["kinds"].values():
        text = "TinyStories" if one["real"] else "synthetic stories"
        what = f"packed, documents of {one['tokens']:.0f} tokens ({text})" if one["packed"] else "one document a row"
        low, high = min(one["ratios"]), max(one["ratios"])
        rows.append(
            f"| {what} | {one['ours_tokens_per_second']:.0f} | {one['plain_tokens_per_second']:.0f} | **{one['ratio']:.2f}** "
            f"| {low:.2f} to {high:.2f} | {one['first_losses'][0]:.4f}, {one['first_losses'][1]:.4f} |"
        )
    return [
        f"SmolLM2-135M, rows of {found['row']}, block 32, AdamW, one row a step, computed in {found['dtype']} ({found['reason']}).",
        f"Whole steps of both sides in turn in one process; medians of {found['rounds']} pairs after one that is not counted.",
        "",
        "| rows | tokens/s | plain | times faster | of single pairs | loss of the first step, ours and plain |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _memory(found: dict[str, Any]) -> list[str]:
    sides = found["sides"]
    plain = sides["plain"]["peak"] or sides["plain"]["more_than"]
    most = "" if sides["plain"]["peak"] else "< "
    rows = []
    for name, one in sides.items():
        share = "" if one["peak"] is None else f"{most}{one['peak'] / plain:.2f}"
        predicted = "" if one["predicted"] is None else f"{one['predicted'] / 1e9:.2f}"
        off = "" if not predicted else f"{one['predicted'] / one['peak'] - 1:+.0%}"
        rows.append(f"| {name} | {gb(one)} | {'' if name == 'plain' else share} | {predicted} | {off} |")
    return [
        f"The Qwen3-0.6B shape with random weights, one row of {found['row']}, block 32, computed in {found['dtype']}, weights in",
        "fp32, AdamW unless said otherwise. Peak resident memory of a fresh process over three steps, libraries, weights and",
        "optimizer included, in GB.",
        "",
        "| | peak | share of plain | predicted | off by |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _budget(found: dict[str, Any]) -> list[str]:
    parts = ("process", "weights", "gradients", "optimizer", "activations", "allocator", "total")
    rows = [
        f"| {name} | " + " | ".join(f"{one[part] / 1e9:.2f}" for part in parts) + " |"
        for name, one in found["cards"].items()
    ]
    return [
        "What `preflight` predicts for a step at row 1,024, in GB. The kernels of a card may need other temporaries than those of a",
        "CPU, on which the prediction was checked.",
        "",
        "| preset | " + " | ".join(parts) + " |",
        "|---|" + "---|" * len(parts),
        *rows,
    ]


def _scaling(found: dict[str, Any]) -> list[str]:
    return [
        "A Llama of 15 million weights, rows of 512, fp32: one process pinned to one core, and two gloo processes under torchrun, in",
        f"turn, {found['turns']} times; medians.",
        "",
        "| one process, tokens/s | two | times | largest difference of a step's loss |",
        "|---|---|---|---|",
        f"| {found['one']:.0f} | {found['two']:.0f} | **{found['ratio']:.2f}** | {found['loss_difference']:.1e} |",
    ]


def _kills(found: dict[str, Any]) -> list[str]:
    counts = Counter(one["command"] for one in found["struck"])
    phases = Counter(one["phase"] for one in found["struck"])
    left: dict[str, list[str]] = {}
    for one in found["struck"]:
        left.setdefault(one["command"], []).append(f"{one['after']:.1f} s, {one['phase']}: {one['left']}")
    return [
        f"A tiny model through the whole way, {found['kills']} times struck by SIGKILL at random moments of its commands, each begun",
        f"again (trainings with `--resume`): {phases['starting']} times while it started, {phases['working']} while it worked, "
        f"{phases['saving']} while something was half",
        "written. Rows, texts and merged weights of the run that was never disturbed: "
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
    mfu = "unknown peak" if found["mfu"] is None else f"{found['mfu']:.0%} of the dense-equivalent FLOPs"
    return [
        f"{found['device']}, Qwen3-0.6B shape, bf16, rows of 1,024, 8 a step: {found['tokens_per_second']:.0f} tokens/s, {mfu}. At",
        f"rows of 4,096 FlexAttention's step is {found['flex_over_dense']:.2f} times as fast as the dense mask's. Steps of the presets",
        "in 8 GB, the rest of the card's memory out of reach:",
        "",
        "| preset | as on | computed in | attention | fits | peak, GB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {one['as_on']} | {one['dtype']} | {one['attention']} | {'yes' if one['fits'] else 'no'} "
            f"| {one['peak'] / 1e9:.2f} |"
            for name, one in found["budget"].items()
        ),
    ]


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "speed": ("Tokens per second", _speed),
    "memory": ("Peak memory, and what `preflight` says of it", _memory),
    "budget": ("8 GB cards", _budget),
    "scaling": ("Two processes", _scaling),
    "kills": ("kill -9", _kills),
    "gpu": ("On a GPU", _gpu),
}
