"""Write docs/benchmarks/serve.md and its plot from the results of serve.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "tiny": "A tiny model (a Llama of the demo's size, width 128, 3 layers, random weights)",
    "smollm2-135m": "SmolLM2-135M (not trained after conversion: the cost is the same, the text is meaningless)",
}
HEAD = """# Serving

Made by `make bench-serve` (`benchmarks/serve.py`): `hildanext serve` with the runtime and dtype of
`--runtime` and `--dtype` (default: eager and float32, which give the same text in every batch) and default settings otherwise,
and an asyncio client (`benchmarks/client.py`) in its own process, over loopback, on the same cores.
Each client keeps its connection and sends the next `POST /generate` as soon as it has an answer; after a 429 it waits for
`Retry-After` and retries. Answers are streamed with every denoising step, the most expensive kind of request. Before and after
each run of N clients there is a run of one client, and the ratio is to the mean of those two. All values are medians.

Time to first block and request time count from the accepted attempt, *with retries* from the first attempt. *Same text*: share
of the answers that equal, character by character, the answer to a single client. *Exactly once*: every accepted request has one
answer at its client and one line in the server's log under its id, and the sums agree with `/metrics`.
"""


def write_page(results: dict[str, Any], path: Path) -> None:
    lines = [HEAD]
    for model, parts in results.items():
        lines += [f"## {NAMES.get(model, model)}", ""]
        if "levels" in parts:
            lines += [*_levels(parts["levels"]), ""]
        if "health" in parts:
            lines += [*_health(parts["health"]), ""]
        if "soak" in parts:
            lines += [*_soak(parts["soak"], f"serve_soak_{model}.png"), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _about(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("python", "torch", "transformers"))
    shared = about["load_before"] > 0.5
    return (
        f"CPU `{about['cpu']}`, {about['cores']} cores, {about['arguments']['threads']} for torch; {versions}. "
        + (f"The machine was shared: {about['load_before']:.1f} other processes were running." if shared else "")
    ).strip()


def _ms(values: dict[str, float]) -> str:
    return " / ".join(f"{values[p] * 1e3:.0f}" for p in ("p50", "p95", "p99"))


def _levels(found: dict[str, Any]) -> list[str]:
    given = found["about"]["arguments"]
    slots, queue = found["slots"], found["queue"]
    return [
        _about(found["about"]),
        "",
        f"{given['tokens']} tokens per answer, at least {given['requests']} requests per run and {given['each']} per client, {given['rounds']} "
        f"rounds; {given['runtime']}, {found['dtype']}, {slots} slots and {queue} places in the queue; "
        f"{found['levels'][0]['tokens_per_forward']:.2f} tokens per forward.",
        "",
        "| clients | tokens/s | ratio | server's CPU, µs per token | first block, ms (p50 / p95 / p99) | request, ms | with retries, ms | 429 | errors | same text | exactly once |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *[
            f"| {row['clients']} | {row['rate']:.0f} | {row['ratio']:.2f} | {row['cpu_us']:.0f} | {_ms(row['first_s'])} | "
            f"{_ms(row['request_s'])} | {_ms(row['with_retries_s'])} | {row['refused']} | {len(row['errors'])} | "
            f"{row['same_text']:.4g} | {'yes' if row['exactly_once'] else '**no**'} |"
            for row in found["levels"]
        ],
        "",
        "Ratios of the rounds: "
        + "; ".join(
            f"{row['clients']} clients "
            + (f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}" if row["ratios"] else "1")
            for row in found["levels"][1:]
        )
        + ". In CPU time of the server, which other load affects less, a token costs "
        + ", ".join(
            f"{found['levels'][0]['cpu_us'] / row['cpu_us']:.2f} times less with {row['clients']}"
            for row in found["levels"][1:]
        )
        + "."
        + (
            " In runs with 429, clients still wait for `Retry-After` at the end while slots are empty."
            if any(row["refused"] for row in found["levels"])
            else ""
        ),
    ]


def _health(found: dict[str, Any]) -> list[str]:
    return [
        "### Health while the server is busy",
        "",
        _about(found["about"]),
        "",
        "`GET /health/live` on a new connection each time, asked by a process on the same cores.",
        "",
        "| while | answers | ms (p50 / p95 / p99) | longest, ms |",
        "|---|---|---|---|",
        *[
            f"| {row['while']} | {row['requests']} | {_ms(row)} | {row['most_s'] * 1e3:.0f} |"
            for row in found["health"]
        ],
    ]


def _soak(found: dict[str, Any], picture: str) -> list[str]:
    least, most, left = found["descriptors"]
    return [
        f"### {found['clients']} clients for {found['seconds'] / 60:g} minutes",
        "",
        _about(found["about"]),
        "",
        f"{found['answered']} answers, every second one streamed, {found['rate']:.0f} tokens/s; {found['refused']} times 429, "
        f"{len(found['errors'])} errors; every accepted request answered exactly once: "
        f"{'yes' if found['exactly_once'] else '**no**'}. Resident memory went from {found['mb'][0]:.1f} MB after the first tenth to "
        f"{found['mb'][1]:.1f} MB, by least squares {found['mb_per_10_min']:+.2f} MB in 10 minutes; {least} to {most} open file "
        f"descriptors, {left} after the clients disconnected.",
        "",
        f"![memory and file descriptors over time]({picture})",
    ]


def draw_soak(found: dict[str, Any], path: Path) -> None:
    """Plot resident memory and open file descriptors over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    memory, descriptors = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    minutes = [second / 60 for second, _, _ in found["samples"]]
    memory.plot(minutes, [mb for _, mb, _ in found["samples"]])
    memory.set(ylabel="resident MB")
    descriptors.plot(minutes, [n for _, _, n in found["samples"]], color="tab:orange")
    descriptors.set(xlabel="minutes", ylabel="open descriptors")
    for axis in (memory, descriptors):
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
