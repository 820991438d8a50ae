"""Write docs/benchmarks/decode.md from the results of decode.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def write_page(results: dict[str, Any], path: Path) -> None:
    about = results["about"]
    lines = [
        "# Decoding",
        "",
        "Made by `make bench-decode` (`benchmarks/decode.py`): one process, the two sides of a pair run",
        f"alternately; all values are medians. CPU `{about['cpu']}` with {about['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "hildanext")
        + ".",
        "Model: SmolLM2-135M"
        + (", converted." if about["converted"] else ", not converted: the cost is the same, the text is meaningless."),
    ]
    for name, section in SECTIONS.items():
        if name in results:
            lines += ["", *section(results[name])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _diffusers(found: dict[str, Any]) -> list[str]:
    return [
        "## Against diffusers' LLaDA2Pipeline",
        "",
        "Prompt 256, 512 new tokens, block 32, fp32. diffusers gets the block-causal mask and reads the weights as `in_place`, its only convention.",
        "",
        "| | seconds | times faster | identical tokens | forwards | tokens per forward |",
        "|---|---|---|---|---|---|",
        f"| diffusers | {found['diffusers_s']:.1f} | | | | |",
        f"| HildaNext, eager | {found['ours_s']:.1f} | {found['ratio']:.1f} | {_yes(found['identical'])} | {found['forwards']} | {found['tpf']:.2f} |",
    ]


def _storing(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Caching a block in the forward of the next block",
        "",
        "Editing off, fp32, 128 new tokens: block k is cached in the first pass of block k+1, compared with a separate caching pass.",
        "",
        "| block | seconds | separate | times faster | forwards | separate | identical tokens |",
        "|---|---|---|---|---|---|---|",
        *[
            f"| {r['block']} | {r['first']:.2f} | {r['second']:.2f} | {r['ratio']:.2f} | {r['forwards']} | "
            f"{r['separate_forwards']} | {_yes(r['identical'])} |"
            for r in rows
        ],
    ]


def _bare(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Overhead outside the model",
        "",
        "Time of a whole run (block 8, 128 new tokens) divided by the time of the same number of plain transformers forwards of the same",
        "shapes, each with a `DynamicCache` of the same length and logits at all positions.",
        "",
        "| model | editing | forwards | seconds | bare forwards | ratio |",
        "|---|---|---|---|---|---|",
        *[
            f"| {r['model']} | {'on' if r['editing'] else 'off'} | {r['forwards']} | {r['ours_s']:.3f} | {r['bare_s']:.3f} | {r['ratio']:.2f} |"
            for r in rows
        ],
    ]


def _batch(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## A batch of eight against eight single requests",
        "",
        "Block 8, bf16, prompts of 64 tokens, 64 new tokens each.",
        "",
        "| runtime | batch of 8, tokens/s | one by one, tokens/s | ratio |",
        "|---|---|---|---|",
        *[f"| {r['runtime']} | {r['batch']:.1f} | {r['single']:.1f} | {r['ratio']:.2f} |" for r in rows],
    ]


def _points(points: list[tuple[float, float]]) -> str:
    return ", ".join(f"{tpf:.2f}: {rate:.0f}" for tpf, rate in sorted(points))


def _ar(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Against transformers' AR generate",
        "",
        "Eager, block 8, editing off; tokens per second at each TPF of a sweep of `tau_mask`, without the time of the prompt.",
        "",
        "| dtype | AR tokens/s | ours at TPF 2.5 | ratio | TPF: tokens/s |",
        "|---|---|---|---|---|",
        *[
            f"| {r['dtype']} | {r['ar']:.1f} | {r['at_2.5']:.1f} | {r['at_2.5'] / r['ar']:.2f} | {_points(r['points'])} |"
            for r in rows
        ],
    ]


def _reaches(points: list[tuple[float, float]], wanted: float) -> str:
    """Return the TPF at which a curve reaches a rate, interpolated between the neighbouring points."""
    ordered = sorted(points)
    for (x, y), (x2, y2) in itertools.pairwise(ordered):
        if y < wanted <= y2:
            return f"{x + (x2 - x) * (wanted - y) / (y2 - y):.1f}"
    return "not reached"


def _llama_cpp(found: dict[str, Any]) -> list[str]:
    rate = found["llama_cpp"]
    return [
        "## OpenVINO against llama.cpp",
        "",
        f"llama.cpp (Q4_1 of the same base, AR, same cores): {rate:.0f} tokens/s."
        if rate
        else "llama-cpp-python was not installed.",
        "HildaNext: prompt 64, 128 new tokens. The time of the prompt is excluded for both. The ratio is to the mean of llama.cpp's rate directly before and after.",
        "",
        "| weights | block | editing | at TPF 2.5 | ratio | TPF for equal speed | TPF for 1.2 times | TPF: tokens/s |",
        "|---|---|---|---|---|---|---|---|",
        *[
            f"| {r['weights']} | {r['block']} | {'on' if r['editing'] else 'off'} | {r['at_2.5']:.0f} | "
            + (
                f"{r['ratio']:.2f} | " + " | ".join(_reaches(r["points"], k * rate) for k in (1.0, 1.2))
                if rate
                else " | |"
            )
            + f" | {_points(r['points'])} |"
            for r in found["rows"]
        ],
    ]


def _memory(found: dict[str, Any]) -> list[str]:
    mb = {name: value / 1e6 for name, value in found.items()}
    return [
        "## Memory",
        "",
        f"Eight sequences of 2,048 tokens, bf16: weights {mb['weights']:.0f} MB and cache {mb['cache']:.0f} MB as calculated; measured peak "
        f"{mb['peak'] - mb['before']:.0f} MB above the memory in use before the model is loaded: {found['over']:.2f} times the calculated size.",
    ]


def _context(found: dict[str, Any]) -> list[str]:
    return [
        "## Growth with the context",
        "",
        f"From 256 to 4,096 cached tokens, attention takes {found['attention']:.1f} times as long and a pass {found['pass']:.1f} times. In milliseconds,",
        f"the increase of a pass is {found['milliseconds']:.2f} times the increase of its attention.",
        "",
        "| cached tokens | pass of 8 tokens, ms | attention alone, ms |",
        "|---|---|---|",
        *[f"| {r['context']} | {r['step_ms']:.1f} | {r['attention_ms']:.1f} |" for r in found["rows"]],
        "",
        "![time of a pass by context length](decode_context.png)",
    ]


def _turns(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## The fifth turn of a conversation",
        "",
        "Block 8, editing off, messages of 60 tokens and answers of 64: the fifth turn with the cached tokens of the first four, compared with the",
        "same turn computed from the start. Median ratios of alternating pairs. bf16 rounding depends on shapes, so bf16 texts may differ.",
        "",
        "| runtime | prompt tokens | of these cached | first block, s | without | times faster | whole answer, s | without | times faster | identical tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *[
            f"| {r['runtime']} {r['dtype']} | {r['prompt']} | {r['reused']} | {r['first_block_s'][0]:.2f} | {r['first_block_s'][1]:.2f} | "
            f"{r['first_block_ratio']:.2f} | {r['whole_s'][0]:.2f} | {r['whole_s'][1]:.2f} | {r['whole_ratio']:.2f} | "
            f"{_yes(r['identical']) if r['dtype'] == 'float32' else ''} |"
            for r in rows
        ],
    ]


SECTIONS = {
    "diffusers": _diffusers,
    "storing": _storing,
    "bare": _bare,
    "batch": _batch,
    "ar": _ar,
    "llama_cpp": _llama_cpp,
    "memory": _memory,
    "context": _context,
    "turns": _turns,
}
