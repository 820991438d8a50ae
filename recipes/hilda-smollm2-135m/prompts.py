"""Prompts of a small world, short stories and simple instructions: the same for the same seed, a line each.

python prompts.py 1344 > prompts.txt                      # what the model was trained on
python prompts.py 48 --skip 5000 > heldout.txt            # later ones: no prompt comes twice, but every subject has been seen
python prompts.py 48 --unseen story > unseen.txt          # of words that no other prompt has
python prompts.py 48 --unseen instruction > unseen.txt

There are 290 instructions, so that late prompts are stories only.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice, product, zip_longest

FORMS: dict[str, list[str]] = {
    "story": [
        "Tell me a short story about {who} {what}.",
        "Write a short story about {who} {what} {where}.",
        "Tell me a bedtime story about {who} {what}.",
        "Write a very short story set {where} about {who}.",
        "Once there was {who} {what}. What happened next?",
        "Write a story for children about {who} {what}.",
    ],
    "instruction": [
        "Explain in simple words what {thing} is.",
        "Why is {thing} important?",
        "Write two sentences about {thing}.",
        "Describe {thing} to a child.",
        "What would the world be like without {thing}?",
        "Give me three tips to {do}.",
        "How can I {do}?",
        "Write a short letter to a friend who wants to {do}.",
        "List five {kind}.",
        "Name three {kind} and describe each in one sentence.",
    ],
}
WORDS: dict[str, list[str]] = {
    "who": [
        "a shy fox",
        "a brave mouse",
        "an old sailor",
        "a little girl named Ella",
        "a boy named Sam",
        "a clumsy robot",
        "a lonely dragon",
        "a clever crow",
        "a tiny snail",
        "a kind baker",
        "a lost puppy",
        "a young wizard",
        "a curious kitten",
        "a sleepy bear",
        "a proud peacock",
        "a farmer named Tom",
        "a princess named Lily",
        "a lazy frog",
        "a friendly ghost",
        "a wise owl",
        "a small turtle",
        "two best friends",
        "a painter named Rosa",
        "a boy named Leo",
        "a girl named Mia",
        "a hungry rabbit",
        "a cheerful postman",
        "a blind king",
        "a singing whale",
        "a grumpy goat",
    ],
    "what": [
        "who finds a golden key",
        "who is afraid of the dark",
        "who wants to fly",
        "who learns to share",
        "who gets lost in the forest",
        "who makes a new friend",
        "who builds a boat",
        "who loses a red balloon",
        "who helps a stranger",
        "who plants a magic seed",
        "who wins a race",
        "who tells a lie",
        "who visits the moon",
        "who finds an old map",
        "who bakes a cake",
        "who saves the village",
        "who cannot sleep",
        "who discovers a secret garden",
        "who learns to swim",
        "who misses home",
        "who finds a talking stone",
        "who wants to be king",
        "who paints the sky",
        "who meets a giant",
        "who hears a strange song",
    ],
    "where": [
        "in a small village",
        "by the sea",
        "in a deep forest",
        "on a high mountain",
        "in a busy city",
        "on a farm",
        "in an old castle",
        "on a tiny island",
        "in the desert",
        "under the sea",
    ],
    "thing": [
        "the sun",
        "rain",
        "a volcano",
        "the moon",
        "a rainbow",
        "bread",
        "honey",
        "a bicycle",
        "the ocean",
        "a river",
        "snow",
        "a tree",
        "a library",
        "music",
        "friendship",
        "a clock",
        "paper",
        "glass",
        "an island",
        "the wind",
        "a bridge",
        "a whale",
        "a bee",
        "sleep",
        "a computer",
        "electricity",
        "salt",
        "a mountain",
        "a farm",
        "coffee",
        "a train",
        "a garden",
        "soil",
        "water",
        "a star",
        "a desert",
        "a lighthouse",
        "money",
        "language",
        "a map",
    ],
    "do": [
        "learn a new language",
        "save money",
        "sleep better",
        "make a new friend",
        "plant a garden",
        "bake bread",
        "stay healthy",
        "study for an exam",
        "clean a kitchen",
        "train a dog",
        "write a letter",
        "plan a trip",
        "read more books",
        "save water",
        "cook rice",
        "paint a room",
        "fix a bicycle",
        "give a speech",
        "take good photos",
        "stay calm",
    ],
    "kind": [
        "fruits",
        "animals that live in the sea",
        "colors of the rainbow",
        "countries in Europe",
        "musical instruments",
        "sports",
        "vegetables",
        "things found in a kitchen",
        "jobs",
        "flowers",
        "planets",
        "tools",
        "wild animals",
        "kinds of weather",
        "types of fish",
    ],
}
UNSEEN: dict[str, list[str]] = {
    "who": [
        "a nervous penguin",
        "a retired clown",
        "a girl named Nora",
        "a forgetful squirrel",
        "a boy named Otto",
        "a stubborn donkey",
        "a young astronaut",
        "a gentle elephant",
        "a tailor named Hugo",
        "a noisy parrot",
        "a paper boat",
        "a hedgehog named Pim",
    ],
    "what": [
        "who opens a tiny restaurant",
        "who loses a shoe in the snow",
        "who writes a letter to the rain",
        "who learns to play the drums",
        "who must cross a wide river",
        "who breaks a precious vase",
        "who adopts a stray cloud",
        "who is late for a wedding",
        "who teaches a snowman to dance",
        "who finds a broken radio",
    ],
    "where": [
        "in a train station",
        "behind a waterfall",
        "at the market",
        "in a lighthouse",
        "in an empty theater",
        "on a frozen lake",
    ],
    "thing": [
        "a mirror",
        "fire",
        "a spider",
        "cheese",
        "an airplane",
        "a school",
        "a doctor",
        "lightning",
        "a camera",
        "kindness",
        "a candle",
        "a calendar",
    ],
    "do": [
        "grow tomatoes",
        "find a job",
        "wake up early",
        "make tea",
        "wash a car",
        "learn to draw",
        "choose a gift",
        "stop being late",
    ],
    "kind": [
        "insects",
        "desserts",
        "capital cities",
        "board games",
        "pieces of furniture",
        "things to take to the beach",
    ],
}
STORIES = 0.6  # their share


def prompts(seed: int = 0) -> Iterator[str]:
    """Prompts without end, each once."""
    rng, seen = random.Random(seed), set[str]()
    while True:
        form = rng.choice(FORMS["story"] if rng.random() < STORIES else FORMS["instruction"])
        text = form.format(**{name: rng.choice(words) for name, words in WORDS.items()})
        if text not in seen:
            seen.add(text)
            yield text


def unseen(kind: str, seed: int = 0) -> list[str]:
    """All prompts of one kind about what the others never name: the forms in turn, their words in a random order."""
    rng, by_form = random.Random(seed), []
    for form in FORMS[kind]:
        names = [name for name in UNSEEN if f"{{{name}}}" in form]
        every = product(*(UNSEEN[name] for name in names))
        texts = [form.format(**dict(zip(names, words, strict=True))) for words in every]
        by_form.append(rng.sample(texts, len(texts)))
    return [text for texts in zip_longest(*by_form) for text in texts if text is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unseen", choices=sorted(FORMS), help="of this kind, about what no other prompt names")
    args = parser.parse_args()
    source = unseen(args.unseen, args.seed) if args.unseen else prompts(args.seed)
    print("\n".join(islice(source, args.skip, args.skip + args.count)))
