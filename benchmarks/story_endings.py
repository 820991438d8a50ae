"""Questions for the task `local_multiple_choice` out of a file of stories: which of four sentences ends this one?

    python benchmarks/story_endings.py path/to/stories.jsonl > endings.jsonl
    hildanext evaluate --tasks local_multiple_choice --data local_multiple_choice=endings.jsonl --limit 200

A line in, {"text"}; a line out, {"question", "choices", "answer"}: all but the last sentence, its own last sentence and those of
three other stories. The same for the same file and seed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SENTENCE = re.compile(r"(?<=[.!?\"])\s+(?=[A-Z\"])")
FEWEST = 4  # sentences: a story of fewer leaves little to go by


def questions(texts: list[str], choices: int, seed: int) -> Iterator[dict[str, Any]]:
    """A question for each story long enough. Raises ValueError when there are fewer stories than choices."""
    stories = [parts for text in texts if len(parts := SENTENCE.split(text.strip())) >= FEWEST]
    endings = sorted({parts[-1] for parts in stories})
    if len(endings) < choices:
        raise ValueError(f"{len(endings)} stories with endings of their own; {choices} choices need as many")
    draw = random.Random(seed)
    for parts in stories:
        others = draw.sample([ending for ending in endings if ending != parts[-1]], choices - 1)
        answer = draw.randrange(choices)
        yield {
            "question": " ".join(parts[:-1]),
            "choices": [*others[:answer], parts[-1], *others[answer:]],
            "answer": answer,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = [json.loads(line)["text"] for line in args.stories.read_text(encoding="utf-8").splitlines()]
    for question in questions(texts, args.choices, args.seed):
        sys.stdout.write(json.dumps(question, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
