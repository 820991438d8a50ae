"""Benchmark of the HTTP server: `hildanext serve` on loopback under load from client.py, each in its own process.

    make bench-serve
    make bench-serve ARGS="--only soak --soak 600"
    make bench-serve ARGS="--model smollm2-135m --threads 2 --tokens 16 --clients 8"

Without --model it serves a tiny random Llama of the demo's size, converted without training: only the cost is measured.
Every run of N clients is between two runs of one client, so that ratios compare runs close in time. Writes
docs/benchmarks/serve.md and its data, runs/bench-serve.json, to which later runs of single parts are added.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from serve_page import draw_soak, write_page

from hildanext.config import parse_config
from hildanext.data.synthetic import synthetic_stories
from hildanext.errors import HildaError
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.model.pretrained import read_record
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.provenance import versions

Row = dict[str, Any]
BLOCK = 8
PROMPTS = 16
WARMUP_SHARE = 0.1  # share of a soak before memory growth is measured
FOREVER = 10**9
START = 600.0  # seconds for a server to load its model
HEALTH_S = 0.02  # between two looks at /health/live
LONG_PROMPT = 48_000  # characters


class Server(NamedTuple):
    """A `hildanext serve` process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            body: bytes = answer.read()
        return body

    def counters(self) -> Counter[str]:
        """Return the counts of POST /generate in /metrics: answers by status, and tokens."""
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.get("/metrics").decode()):
            for name, labels, value, *_ in family.samples:
                if name == "hildanext_requests_total" and labels["path"] == "/generate":
                    found[labels["status"]] += int(value)
                elif name == "hildanext_tokens_total":
                    found["tokens"] += int(value)
        return found

    def logged(self) -> Counter[str]:
        """Return how often the server's log says that each request id was answered with 200."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.startswith('{"time"')]
        return Counter(r["id"] for r in records if r.get("path") == "/generate" and r["status"] == 200)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def size(self) -> tuple[float, int]:
        """Return the resident memory in MB and the number of open file descriptors."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{self.process.pid}/fd"))


def converted(model: str | None, folder: Path) -> str:
    """Return a servable checkpoint: the given one, or a base saved as converted without training."""
    if model is None:
        tokenizer = story_tokenizer()
        tiny_llama(tokenizer, hidden=128, layers=3, context=512, seed=0).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        model = str(folder / "base")
    config = parse_config({"model": {"base": model, "dtype": "float32"}}).model
    if read_record(config) is not None:
        return model
    lm, _ = load_diffusion_lm(config)
    lm.block_size = BLOCK
    save_diffusion_lm(lm, folder / "model")
    return str(folder / "model")


@contextlib.contextmanager
def serving(model: str, args: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """Yield a ready `hildanext serve` with the given runtime and dtype and default settings; SIGTERM at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    raw = {
        "paths": {"runs": str(folder / "runs")},
        "model": {"base": model, "dtype": args.dtype},
        "engine": {"runtime": args.runtime},
        "server": {"port": port},
    }
    (folder / "serve.json").write_text(json.dumps(raw), encoding="utf-8")
    command = [sys.executable, "-m", "hildanext.cli", "serve", "--json", "--config", str(folder / "serve.json")]
    log = folder / f"log-{port}.txt"
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=environment)
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + START
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
            with contextlib.suppress(OSError):
                server.get("/health/ready")
                break
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def plan(server: Server, args: argparse.Namespace, name: str, clients: int, **limits: Any) -> dict[str, Any]:
    prompts = [" ".join(story.split()[:20]) for story in synthetic_stories(PROMPTS, seed=3)]
    settings = {"max_new_tokens": args.tokens}
    wanted = {"requests": FOREVER, "seconds": FOREVER, "stream_every": 1} | limits
    return {"port": server.port, "name": name, "clients": clients, "prompts": prompts, "settings": settings} | wanted


@contextlib.contextmanager
def clients(server: Server, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the clients in a process beside the block; the yielded dictionary holds their results after it."""
    found: dict[str, Any] = {}
    source, target = (server.log.with_name(f"{wanted['name']}.{part}.json") for part in ("plan", "out"))
    source.write_text(json.dumps(wanted), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("client.py")), str(source), str(target)]
    before, cpu = server.counters(), server.cpu_s()
    process = subprocess.Popen(command)
    try:
        yield found
        if process.wait() != 0:
            sys.exit("the clients failed")
    finally:
        process.kill()
    found |= json.loads(target.read_text(encoding="utf-8"))
    found |= {"counted": dict(server.counters() - before), "cpu_s": server.cpu_s() - cpu}


def account(rows: list[Row], counted: dict[str, int], logged: Counter[str]) -> dict[str, Any]:
    """Check that every accepted request was answered exactly once: clients' rows against log and /metrics."""
    answered = [row for row in rows if row.get("status") == 200 and "error" not in row]
    tokens = sum(row["tokens"] for row in answered)
    refused = sum(row.get("refused", 0) for row in rows)
    once = all(row["answers"] == 1 for row in answered) and len({row["id"] for row in answered}) == len(answered)
    same_log = all(logged[row["id"]] == 1 for row in answered)
    statuses = {status: n for status, n in counted.items() if status != "tokens"}
    same_counts = {k: v for k, v in {"200": len(answered), "429": refused}.items() if v} == statuses
    return {
        "answered": len(answered),
        "refused": refused,
        "errors": [row["error"] for row in rows if "error" in row],
        "tokens": tokens,
        "exactly_once": once and same_log and same_counts and tokens == counted.get("tokens", 0),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return p50, p95 and p99, in the unit of the values."""
    ordered = sorted(values)
    return {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}


def level(server: Server, args: argparse.Namespace, name: str, n: int, requests: int | None = None) -> dict[str, Any]:
    """Run n clients with a fixed number of requests."""
    requests = requests or max(args.requests, args.each * n)
    with clients(server, plan(server, args, name, n, requests=requests)) as found:
        pass
    books = account(found["rows"], found["counted"], server.logged())
    rates = {"rate": books["tokens"] / found["seconds"], "cpu_us": found["cpu_s"] / max(1, books["tokens"]) * 1e6}
    return books | rates | {"clients": n, "rows": found["rows"]}


def summed(runs: list[dict[str, Any]], texts: dict[int, str]) -> dict[str, Any]:
    """Combine the runs of a level into one row of the table. `texts`: the answers to a single client, by prompt."""
    rows = [row for run in runs for row in run["rows"] if "error" not in row]
    return {
        "clients": runs[0]["clients"],
        "requests": len(rows),
        "rate": statistics.median(run["rate"] for run in runs),
        "cpu_us": statistics.median(run["cpu_us"] for run in runs),
        "first_s": percentiles([row["first_s"] for row in rows if "first_s" in row]),
        "request_s": percentiles([row["s"] for row in rows]),
        "with_retries_s": percentiles([row["with_retries_s"] for row in rows]),
        "refused": sum(run["refused"] for run in runs),
        "errors": [error for run in runs for error in run["errors"]],
        "exactly_once": all(run["exactly_once"] for run in runs),
        "same_text": sum(row["text"] == texts[row["prompt"]] for row in rows) / max(1, len(rows)),
        "tokens_per_forward": sum(row["tokens"] for row in rows) / max(1, sum(row["forwards"] for row in rows)),
    }


def bench_levels(model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run each level between two runs of one client, `--rounds` times."""
    runs: dict[int, list[dict[str, Any]]] = {1: []}
    ratios: dict[int, list[float]] = {n: [] for n in args.clients}

    def run_level(number: int, n: int) -> None:
        name = f"run-{sum(map(len, runs.values()))}-round-{number}-of-{n}"
        runs.setdefault(n, []).append(level(server, args, name, n))
        print(f"{n} clients: {runs[n][-1]['rate']:.0f} tokens/s", file=sys.stderr, flush=True)

    with serving(model, args, folder) as server:
        alone = level(server, args, "alone", 1, PROMPTS)
        texts = {row["prompt"]: row["text"] for row in alone["rows"]}
        run_level(0, 1)
        for number in range(args.rounds):
            for n in args.clients:
                run_level(number, n)
                run_level(number, 1)
                around = statistics.mean(run["rate"] for run in runs[1][-2:])
                ratios[n].append(runs[n][-1]["rate"] / around)
        health = json.loads(server.get("/health"))
    table = [
        summed(found, texts) | {"ratio": statistics.median(ratios[n]) if n in ratios else 1.0, "ratios": ratios.get(n)}
        for n, found in sorted(runs.items())
    ]
    return {"levels": table, "slots": health["slots"], "queue": health["queue_limit"], "dtype": health["dtype"]}


def slope(samples: list[tuple[float, float]]) -> float:
    """Return the least-squares slope, in units per second."""
    return statistics.linear_regression(*zip(*samples, strict=True)).slope


def bench_soak(model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the most clients for `--soak` seconds, every second answer streamed; sample memory each second."""
    n, samples = max(args.clients), []
    with serving(model, args, folder) as server:
        began = time.monotonic()
        with clients(server, plan(server, args, "soak", n, seconds=args.soak, stream_every=2)) as found:
            while (now := time.monotonic() - began) < args.soak:
                samples.append((now, *server.size()))
                time.sleep(1.0)
        books = account(found["rows"], found["counted"], server.logged())
        left = server.size()[1]
    warm = [(second, mb) for second, mb, _ in samples if second >= WARMUP_SHARE * args.soak]
    return books | {
        "clients": n,
        "seconds": args.soak,
        "rate": books["tokens"] / found["seconds"],
        "samples": samples,
        "mb_per_10_min": slope(warm) * 600,
        "mb": (warm[0][1], warm[-1][1]),
        "descriptors": (min(s[2] for s in samples), max(s[2] for s in samples), left),
    }


def polled(server: Server, while_: Callable[[], bool]) -> list[float]:
    """Return the seconds that each GET /health/live took, asked again after HEALTH_S, as long as `while_` returns True."""
    seconds = []
    while while_():
        began = time.perf_counter()
        server.get("/health/live")
        seconds.append(time.perf_counter() - began)
        time.sleep(HEALTH_S)
    return seconds


def bench_health(model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How long /health/live takes while nothing happens, while the most clients wait, and while prompts are tokenized."""
    n, seconds = max(args.clients), args.health
    words = " ".join(synthetic_stories(400, seed=5))[:LONG_PROMPT]
    prompts = {"words": words, "one word": "a" * LONG_PROMPT, "symbols": "{}();\n" * (LONG_PROMPT // 6)}

    def until_over() -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() < end

    found: dict[str, Any] = {}
    with serving(model, args, folder) as server:
        found["idle"] = polled(server, until_over())
        with clients(server, plan(server, args, "health", n, seconds=seconds)):
            found[f"{n} clients"] = polled(server, until_over())
        for name, prompt in prompts.items():
            over = until_over()
            with ThreadPoolExecutor(2) as pool:
                asking = [pool.submit(ask_until, server, prompt, over) for _ in range(2)]
                found[f"{LONG_PROMPT} characters: {name}"] = polled(server, over)
            answered = sum(future.result() for future in asking)
            print(f"{answered} long prompts of {name}", file=sys.stderr, flush=True)
    table = [
        {"while": name, "requests": len(values), "most_s": max(values), **percentiles(values)}
        for name, values in found.items()
    ]
    return {"health": table, "errors": [], "exactly_once": True}


def ask_until(server: Server, prompt: str, while_: Callable[[], bool]) -> int:
    """Send a prompt again and again; return how often. It is too long for the model, so only its tokenization costs."""
    body, n = json.dumps({"prompt": prompt, "max_new_tokens": 1}).encode(), 0
    while while_():
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/generate", body)
        request.add_header("Content-Type", "application/json")
        with contextlib.suppress(urllib.error.HTTPError):  # 400: longer than the context
            urllib.request.urlopen(request, timeout=600).close()
        n += 1
    return n


PARTS = {"levels": bench_levels, "soak": bench_soak, "health": bench_health}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint, or base model to serve as if converted (default: a tiny model)")
    parser.add_argument("--only", choices=list(PARTS), help="run only this part")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[8, 32, 128], help="numbers of clients to compare with one client"
    )
    parser.add_argument("--requests", type=int, default=16, help="minimum requests per run (default: 16)")
    parser.add_argument("--each", type=int, default=2, help="minimum requests per client (default: 2)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per answer (default: 48)")
    parser.add_argument("--rounds", type=int, default=9, help="runs per level (default: 9)")
    parser.add_argument("--soak", type=float, default=60.0, help="length of the soak in seconds (default: 60)")
    parser.add_argument("--health", type=float, default=10.0, help="seconds of each case of health (default: 10)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server (default: 1)")
    parser.add_argument("--runtime", default="eager", help="engine.runtime (default: eager)")
    parser.add_argument(
        "--dtype", default="float32", help="model.dtype (default: float32, which gives the same text in every batch)"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/bench-serve.json"), help="file for the results")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/serve.md"), help="page to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    about = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("results", "page", "only")},
    }
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else {}
    name = "tiny" if args.model is None else Path(args.model).name
    bad = False
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as place:
        model = converted(args.model, Path(place))
        for part in [args.only] if args.only else PARTS:
            found = PARTS[part](model, args, Path(place))
            results.setdefault(name, {})[part] = found | {"about": about}
            lines = found["levels"] if part == "levels" else [found]
            bad |= any(line["errors"] or not line["exactly_once"] for line in lines)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for model_name, parts in results.items():
        if "soak" in parts:
            draw_soak(parts["soak"], args.page.with_name(f"serve_soak_{model_name}.png"))
    write_page(results, args.page)
    print(f"written: {args.page}")
    if bad:
        sys.exit("an answer was lost, duplicated or an error; see the page")


if __name__ == "__main__":
    try:
        main()
    except HildaError as error:
        sys.exit(str(error))
