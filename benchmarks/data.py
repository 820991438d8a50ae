"""Measures speed, memory and disk use of each data.mode on generated text, against the bare tokenizer on the same text.

    python benchmarks/data.py [--tokenizer FOLDER] [--megabytes 100] [--workers 1] [--text FILE] [--ways copy direct stream]

`copy` runs prepare-data and tokenize, `direct` tokenizes from the sources, and `stream` reads all rows of one pass as a
training would, from .gz files. Each runs in its own process. Printed are speed, peak resident memory, and the size of data/
at the end relative to the text. The baseline is the tokenizer's encode_batch over the same documents in batches of about
1 MB, its fastest way.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hildanext.config import Config, parse_config
from hildanext.data.prepare import prepare_data
from hildanext.data.stream import RowStream
from hildanext.data.tokenize import make_encoding, tokenize_data
from hildanext.data.workers import BATCH_BYTES
from hildanext.model.tiny import story_tokenizer

WORDS = ["the", "little", "red", "cat", "dog", "river", "walked", "saw", "and", "because", "happily", "1984"]


def paragraphs(text: str | None) -> list[str]:
    """Documents to repeat: paragraphs of a file, or random sentences."""
    if text is not None:
        lines = [line for line in Path(text).read_text(encoding="utf-8").split("\n") if len(line) > 100]
        return ["\n".join(lines[i : i + 4]) for i in range(0, len(lines), 4)]
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(50, 400))) + "." for _ in range(2000)]


def write_text(folder: Path, megabytes: float, text: str | None, n_files: int = 10) -> None:
    """Write Dolma files of `megabytes` in total, plain and as .gz. All documents are different."""
    documents = paragraphs(text)
    number = 0
    for part in range(n_files):
        size = 0
        with (
            open(folder / f"{part}.jsonl", "w", encoding="utf-8") as plain,
            gzip.open(folder / f"{part}.jsonl.gz", "wt", compresslevel=1, encoding="utf-8") as packed,
        ):
            while size < megabytes * 1e6 / n_files:
                line = json.dumps({"id": str(number), "text": f"{number} {documents[number % len(documents)]}"}) + "\n"
                plain.write(line)
                packed.write(line)
                size += len(line)
                number += 1


def batches(folder: Path) -> Iterator[list[str]]:
    """The texts in batches of the size that tokenize uses."""
    batch: list[str] = []
    size = 0
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                batch.append(json.loads(line)["text"])
                size += len(batch[-1])
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    yield batch


def peak_mb(who: int) -> float:
    """Peak resident memory in MB (Linux reports KiB)."""
    return resource.getrusage(who).ru_maxrss * 1024 / 1e6


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    return story_tokenizer() if name is None else AutoTokenizer.from_pretrained(name)


def run_way(way: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Process all text with one data.mode. Returns the seconds of each part."""
    began = time.perf_counter()
    prepare_data(config)
    prepared = time.perf_counter()
    if way != "stream":
        tokenize_data(config, tokenizer)
        return {"prepare": prepared - began, "rows": time.perf_counter() - prepared}
    sample, first_batch, seconds = 0, 0.0, 0.0
    with closing(RowStream(config, "train", make_encoding(config, "train", tokenizer))) as stream:
        while stream.window is None or stream.window.start.number == 0:
            stream.batch([sample])
            first_batch = first_batch or time.perf_counter() - prepared
            assert stream.window is not None
            sample += 1
            if stream.window.start.number == 0:  # the stream reads ahead into the next pass
                seconds = time.perf_counter() - prepared
    return {"prepare": prepared - began, "rows": seconds, "first_batch": first_batch}


def child(args: argparse.Namespace) -> dict[str, Any]:
    """The measurements of a child process."""
    folder = Path(args.folder)
    source = {"kind": "dolma", "path": f"{folder}/text/*.jsonl{'.gz' if args.way == 'stream' else ''}"}
    data = {"sources": [source], "workers": args.workers, "seq_len": args.seq_len, "mode": args.way}
    data |= {"json_lines": None if args.way == "copy" else False}  # as for a large corpus
    config = parse_config({"paths": {"data": f"{folder}/{args.way}"}, "data": data})
    seconds = run_way(args.way, config, load_tokenizer(args.tokenizer))
    disk = sum(path.stat().st_size for path in (folder / args.way).rglob("*") if path.is_file())
    return {
        "seconds": seconds,
        "disk_mb": disk / 1e6,
        "peak_mb": peak_mb(resource.RUSAGE_SELF),
        "worker_peak_mb": peak_mb(resource.RUSAGE_CHILDREN),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: a small one trained on synthetic stories")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--text")
    parser.add_argument("--ways", nargs="+", choices=["copy", "direct", "stream"], default=["copy", "direct", "stream"])
    parser.add_argument("--no-bare", action="store_true", help="skip the baseline")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(child(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text")
        text.mkdir()
        write_text(text, args.megabytes, args.text)
        megabytes = sum(path.stat().st_size for path in text.glob("*.jsonl")) / 1e6
        bare = 0.0
        tokenizer = load_tokenizer(args.tokenizer)
        for batch in batches(text) if not args.no_bare else []:
            began = time.perf_counter()
            tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False)
            bare += time.perf_counter() - began
        print(f"text {megabytes:.1f} MB" + (f", bare encode_batch {megabytes / bare:.2f} MB/s" if bare else ""))
        for way in args.ways:
            line = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", folder]
            measured = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
            seconds = measured["seconds"]
            print(
                f"{way:7} prepare {megabytes / seconds['prepare']:7.1f} MB/s  rows {megabytes / seconds['rows']:6.2f} MB/s"
                + (f" ({bare / seconds['rows']:.2f} of bare)" if bare else "")
                + (f"  first batch {seconds['first_batch']:.1f} s" if way == "stream" else "")
                + f"  peak {measured['peak_mb']:.0f} MB (a worker {measured['worker_peak_mb']:.0f})"
                + f"  disk {measured['disk_mb'] / megabytes:.2f} of the text"
            )


if __name__ == "__main__":
    main()
