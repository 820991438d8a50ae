"""Data speed and memory: prepare-data and tokenize on generated text, against the bare tokenizer on the same text.

    python benchmarks/data.py [--tokenizer FOLDER] [--megabytes 100] [--workers 1] [--text FILE]

Prints MB/s of the bare tokenizer's encode_batch, of tokenize_data, their ratio, and the peak resident memory of this
process and of its workers. The bare run takes the same documents in batches of a chunk, which is its fastest way.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from hildanext.chunks import CHUNK_BYTES
from hildanext.config import parse_config
from hildanext.documents import read_documents
from hildanext.prepare import prepare_data
from hildanext.tiny import story_tokenizer
from hildanext.tokenization import tokenize_data

WORDS = ["the", "little", "red", "cat", "dog", "river", "walked", "saw", "and", "because", "happily", "1984"]


def paragraphs(text: str | None) -> list[str]:
    """Documents to repeat: paragraphs of a file, or random sentences."""
    if text is not None:
        found = [part for part in Path(text).read_text(encoding="utf-8").split("\n") if len(part) > 100]
        return ["\n".join(found[i : i + 4]) for i in range(0, len(found), 4)]
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(50, 400))) + "." for _ in range(2000)]


def write_text(path: Path, megabytes: float, text: str | None) -> None:
    """A Dolma file of about this size; every document differs from the others."""
    documents = paragraphs(text)
    size = number = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            line = json.dumps({"id": str(number), "text": f"{number} {documents[number % len(documents)]}"})
            file.write(line + "\n")
            size += len(line)
            number += 1


def batches(path: Path) -> Iterator[list[str]]:
    """The texts of a processed file in batches of about a chunk."""
    batch: list[str] = []
    size = 0
    for document in read_documents(path):
        batch.append(document.text or "")
        size += len(batch[-1])
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def peak_mb(who: int) -> float:
    """Peak resident memory in MB (Linux counts in KiB)."""
    return resource.getrusage(who).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: a small one trained on synthetic stories")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--text")
    args = parser.parse_args()
    tokenizer = story_tokenizer() if args.tokenizer is None else AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder, "text.jsonl"), args.megabytes, args.text)
        source = {"kind": "dolma", "path": f"{folder}/text.jsonl"}
        data = {"sources": [source], "workers": args.workers, "seq_len": args.seq_len}
        config = parse_config({"paths": {"data": f"{folder}/data"}, "data": data})
        began = time.perf_counter()
        prepare_data(config)
        prepared = time.perf_counter() - began
        processed = Path(folder, "data/processed/train.jsonl")
        megabytes = sum(len(text.encode()) for batch in batches(processed) for text in batch) / 1e6
        began = time.perf_counter()
        tokenize_data(config, tokenizer)
        ours = time.perf_counter() - began
        peak = peak_mb(resource.RUSAGE_SELF)
        bare = 0.0
        for batch in batches(processed):
            began = time.perf_counter()
            tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False)
            bare += time.perf_counter() - began
    print(f"text                {megabytes:8.1f} MB")
    print(f"prepare_data        {megabytes / prepared:8.2f} MB/s")
    print(f"bare encode_batch   {megabytes / bare:8.2f} MB/s")
    print(f"tokenize_data       {megabytes / ours:8.2f} MB/s")
    print(f"ratio               {bare / ours:8.2f}")
    print(f"peak memory         {peak:8.0f} MB")
    print(f"peak of a worker    {peak_mb(resource.RUSAGE_CHILDREN):8.0f} MB")


if __name__ == "__main__":
    main()
