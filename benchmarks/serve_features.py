"""What each feature of OpenAI's API costs: time to first token and tokens/s of a served model, with it and without it.

    make bench-serve
    python benchmarks/serve_features.py --model hilda-smollm2-135m --rounds 5

Every run of a feature is between two runs without it, so that ratios compare runs close in time. Without --model it serves
the tiny model of serve.py. Writes docs/benchmarks/serve_features.md and its data, runs/bench-serve-features.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from serve import PROMPTS, Server, converted, serving

from hildanext.data.synthetic import synthetic_stories
from hildanext.errors import HildaError
from hildanext.provenance import versions

# What a request asks for, beside its prompt and length. Greedy features are compared with greedy text.
FEATURES: dict[str, dict[str, Any]] = {
    "`logprobs: 5`": {"logprobs": 5},
    "`presence_penalty`, `frequency_penalty`": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "`logit_bias` of 100 tokens": {"logit_bias": {str(token): -1.0 for token in range(100)}},
    "`temperature: 0.8`": {"temperature": 0.8, "seed": 1},
    "`temperature: 0.8`, `top_p: 0.9`": {"temperature": 0.8, "seed": 1, "top_p": 0.9},
    "`temperature: 0.8`, `min_p: 0.1`": {"temperature": 0.8, "seed": 1, "min_p": 0.1},
    "`echo`": {"echo": True},
    "`n: 4`": {"n": 4},
    "4 prompts": {"prompts": 4},
}
HEAD = """# What features of the API cost

Made by `make bench-serve` (`benchmarks/serve_features.py`): streamed requests to `/v1/completions`, one at a time. Each run
with a feature is between two without it, and the ratio of tokens/s is to the mean of those two. All values are medians of
the rounds. A feature may change the text, and with it the number of tokens per forward; time per forward does not depend on
that.
"""


class Run(NamedTuple):
    """Medians over the requests of a run."""

    first_ms: float  # until the first token
    rate: float  # tokens/s
    forward_ms: float


def ask(server: Server, model: str, prompts: list[str], args: argparse.Namespace, asked: dict[str, Any]) -> Run:
    """Send a streamed request and read it to its end."""
    wanted = {"model": model, "prompt": prompts, "max_tokens": args.tokens, "stream": True}
    wanted |= {"stream_options": {"include_usage": True}} | asked
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/v1/completions", json.dumps(wanted).encode())
    request.add_header("Content-Type", "application/json")
    began, first, tokens, forwards = time.perf_counter(), None, 0, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
            forwards = max([forwards, *(item["stats"]["forwards"] for item in chunk.get("hildanext", []))])
            if first is None and any(choice["text"] for choice in chunk["choices"]):
                first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    return Run((first or seconds) * 1e3, tokens / seconds, seconds / max(forwards, 1) * 1e3)


def run(server: Server, model: str, args: argparse.Namespace, asked: dict[str, Any]) -> Run:
    """Ask for each prompt once."""
    stories = [" ".join(story.split()[:20]) for story in synthetic_stories(PROMPTS + 4, seed=3)]
    settings = {name: value for name, value in asked.items() if name != "prompts"}
    n = asked.get("prompts", 1)
    runs = [ask(server, model, stories[i : i + n], args, settings) for i in range(args.requests)]
    return Run(*(statistics.median(values) for values in zip(*runs, strict=True)))


def measure(server: Server, model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table: for each feature, its runs and the runs around them."""
    rows, plain = [], [run(server, model, args, {})]
    for name, asked in FEATURES.items():
        with_it, ratios = [], []
        for _ in range(args.rounds):
            with_it.append(run(server, model, args, asked))
            plain.append(run(server, model, args, {}))
            ratios.append(with_it[-1].rate / statistics.mean(item.rate for item in plain[-2:]))
        print(f"{name}: {statistics.median(ratios):.2f} of the tokens/s", file=sys.stderr, flush=True)
        rows.append({"feature": name, "ratio": statistics.median(ratios), "ratios": ratios, **medians(with_it)})
    return [{"feature": "none", "ratio": 1.0, "ratios": [], **medians(plain)}, *rows]


def medians(runs: list[Run]) -> dict[str, float]:
    return Run(*(statistics.median(values) for values in zip(*runs, strict=True)))._asdict()


def write_page(results: dict[str, Any], path: Path) -> None:
    lines = [HEAD]
    for name, found in results.items():
        arguments = found["arguments"]
        lines += [
            f"## {name}",
            "",
            f"{arguments['tokens']} tokens per answer, {arguments['requests']} requests per run, {arguments['rounds']} rounds, "
            f"{arguments['runtime']}, {arguments['dtype']}, {arguments['threads']} threads; torch {found['versions']['torch']}.",
            "",
            "| feature | first token, ms | tokens/s | ratio | one forward, ms |",
            "|---|---|---|---|---|",
            *[
                f"| {row['feature']} | {row['first_ms']:.1f} | {row['rate']:.0f} | {row['ratio']:.2f} | {row['forward_ms']:.2f} |"
                for row in found["rows"]
            ],
            "",
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to serve (default: a tiny model)")
    parser.add_argument("--requests", type=int, default=8, help="requests per run (default: 8)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per answer (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each feature (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server (default: 1)")
    parser.add_argument("--runtime", default="eager", help="engine.runtime (default: eager)")
    parser.add_argument("--dtype", default="float32", help="model.dtype (default: float32)")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/bench-serve-features.json"), help="file for the results"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/serve_features.md"), help="page to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="bench-serve-features-") as place:
        folder = Path(place)
        with serving(converted(args.model, folder), args, folder) as server:
            model = json.loads(server.get("/v1/models"))["data"][0]["id"]
            rows = measure(server, model, args)
    arguments = {name: value for name, value in vars(args).items() if name not in ("results", "page")}
    results["tiny" if args.model is None else model] = {"rows": rows, "versions": versions(), "arguments": arguments}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_page(results, args.page)
    print(f"written: {args.page}")


if __name__ == "__main__":
    try:
        main()
    except HildaError as error:
        sys.exit(str(error))
