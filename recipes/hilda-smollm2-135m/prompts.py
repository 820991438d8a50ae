"""Prompts for short stories and simple instructions, made from the word lists of small worlds; one per line, seeded.

python prompts.py 1344 > prompts.txt                      # the first world, used by the first part of the training
python prompts.py 48 --skip 5000 > heldout.txt            # later prompts: none occurs twice, but every subject has been seen
python prompts.py 2400 --world wide > wide.txt            # a wider world; half of its prompts are instructions
python prompts.py 800 --world work > work.txt             # arithmetic and code
python prompts.py 48 --unseen story > unseen.txt          # words that neither world has
python prompts.py 48 --unseen instruction > unseen.txt

The first world has only 290 instructions, so its later prompts are all stories.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice, product, zip_longest
from pathlib import Path

WORLDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
STORIES = {"first": 0.6, "wide": 0.5, "work": 0.4}  # share of stories in each world; in "work" of arithmetic
SECOND = {"who2": "who", "thing2": "thing", "name2": "name"}  # slots for a second, different word of the same list


def prompts(world: str, seed: int = 0) -> Iterator[str]:
    """An endless stream of distinct prompts."""
    forms, lists = WORLDS[world]["forms"], WORLDS[world]["words"]
    rng, seen = random.Random(seed), set[str]()
    while True:
        form = rng.choice(forms["story"] if rng.random() < STORIES[world] else forms["instruction"])
        chosen = {name: rng.choice(words) for name, words in lists.items()}
        if world != "first":
            second = {name: of for name, of in SECOND.items() if of in lists}
            chosen |= {name: rng.choice([w for w in lists[of] if w != chosen[of]]) for name, of in second.items()}
        text = form.format(**chosen)
        if text not in seen:
            seen.add(text)
            yield text


def take(world: str, count: int, skip: int = 0, seed: int = 0) -> list[str]:
    """`count` prompts of a world, after the first `skip`."""
    return list(islice(prompts(world, seed), skip, skip + count))


def unseen(kind: str, seed: int = 0) -> list[str]:
    """All prompts of one kind about subjects that no world names; forms alternate, words come in random order."""
    rng, by_form = random.Random(seed), []
    lists = WORLDS["unseen"]["words"]
    for form in WORLDS["first"]["forms"][kind]:
        names = [name for name in lists if f"{{{name}}}" in form]
        combinations = product(*(lists[name] for name in names))
        texts = [form.format(**dict(zip(names, words, strict=True))) for words in combinations]
        by_form.append(rng.sample(texts, len(texts)))
    return [text for texts in zip_longest(*by_form) for text in texts if text is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--skip", type=int, default=0, help="number of prompts to skip at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=sorted(STORIES), default="first")
    parser.add_argument("--unseen", choices=("story", "instruction"), help="prompts of this kind with unseen words")
    args = parser.parse_args()
    source = unseen(args.unseen, args.seed) if args.unseen else prompts(args.world, args.seed)
    print("\n".join(islice(source, args.skip, args.skip + args.count)))
