"""Makes questions for the task `local_multiple_choice` from stories: which of four sentences ends this story?

    python benchmarks/story_endings.py path/to/stories.jsonl > endings.jsonl
    hildanext evaluate --tasks local_multiple_choice --data local_multiple_choice=endings.jsonl --limit 200

Input lines are {"text"}, output lines {"question", "choices", "answer"}. The question is a story without its last
sentence; the choices are that sentence and the last sentences of three other stories. The output depends only on the
file and the seed.
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
MIN_SENTENCES = 4  # shorter stories give too little context


def questions(texts: list[str], choices: int, seed: int) -> Iterator[dict[str, Any]]:
    """A question for each story that is long enough. Raises ValueError for fewer distinct endings than choices."""
    stories = [parts for text in texts if len(parts := SENTENCE.split(text.strip())) >= MIN_SENTENCES]
    endings = sorted({parts[-1] for parts in stories})
    if len(endings) < choices:
        raise ValueError(f"only {len(endings)} distinct endings for {choices} choices; give more stories")
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
