"""Synthetic stories, and a checker that accepts a story only if its sentences are consistent.

Each story follows a small grammar in which later sentences depend on earlier sentences: the pronoun on the name, the
landmark on the place, the feeling, the rescue and the ending on the mishap. Parallel decoding breaks such dependencies
first, so the share of accepted stories measures its quality.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

GIRLS = ("Lily", "Mia", "Anna", "Sara", "Lucy", "Emma", "Zoe", "Ruby")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Tim", "Jack", "Finn")
THINGS = (
    "ball",
    "kite",
    "doll",
    "boat",
    "drum",
    "hat",
    "book",
    "car",
    "bear",
    "cup",
    "bell",
    "robot",
    "train",
    "spoon",
    "ring",
    "lamp",
)
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange")
LANDMARKS = {"park": "bench", "beach": "rock", "forest": "log", "garden": "fence", "farm": "barn", "lake": "bridge"}


class Mishap(NamedTuple):
    """What goes wrong in a story, and the phrases that depend on it."""

    event: str
    feeling: str
    rescue: str
    outcome: str


MISHAPS = {
    "lost": Mishap(
        "Then {name} lost the {thing}.", "sad", "{friend} found the {thing} behind the {landmark}.", "was found"
    ),
    "broke": Mishap(
        "Then the {thing} fell down and broke.", "upset", "{friend} fixed the {thing} with glue.", "was fixed"
    ),
    "mud": Mishap("Then the {thing} fell in the mud.", "angry", "{friend} washed the {thing} with soap.", "was clean"),
    "tree": Mishap(
        "Then the {thing} got stuck in a tree.", "worried", "{friend} climbed up and took the {thing} down.", "was safe"
    ),
    "rain": Mishap(
        "Then it rained and the {thing} got wet.", "cold", "{friend} dried the {thing} with a towel.", "was dry"
    ),
    "dog": Mishap(
        "Then a dog ran away with the {thing}.",
        "scared",
        "{friend} called the dog and got the {thing} back.",
        "was home",
    ),
}

# The wordings of each sentence of a story. The first is HABIT times as likely as the second: with equal odds, a model's
# confidence stays near the draft threshold and its choice changes with every pass.
HABIT = 3
OPENING = ("Once upon a time there was a {child} named {name}.", "There was once a little {child} named {name}.")
HAVING = ("{Pronoun} had a {colour} {thing}.",)
GOING = (
    "One day {name} took the {colour} {thing} to the {place}.",
    "One morning {pronoun} went to the {place} with the {colour} {thing}.",
)
FEELING = ("{name} was very {feeling}.", "{Pronoun} felt {feeling}.")
FRIEND = ("{Pronoun} asked {friend} for help.", "{Possessive} friend {friend} came to help.")
ENDING = (
    "Now the {colour} {thing} {outcome} and {name} was happy.",
    "{name} was happy because the {colour} {thing} {outcome}.",
)
THANKS = ("{name} said thank you to {friend}.",)
CLOSING = ("The end.",)


class Slots(NamedTuple):
    """The choices that define a story."""

    name: str
    friend: str
    thing: str
    colour: str
    place: str
    mishap: str

    def words(self) -> dict[str, str]:
        """All words that the sentences insert, including those that follow from the choices."""
        girl = self.name in GIRLS
        mishap = MISHAPS[self.mishap]
        return self._asdict() | {
            "child": "girl" if girl else "boy",
            "pronoun": "she" if girl else "he",
            "Pronoun": "She" if girl else "He",
            "Possessive": "Her" if girl else "His",
            "landmark": LANDMARKS[self.place],
            "feeling": mishap.feeling,
            "outcome": mishap.outcome,
        }


def outline(mishap: Mishap) -> tuple[tuple[str, ...], ...]:
    """The possible wordings of each sentence of a story, in order."""
    return (OPENING, HAVING, GOING, (mishap.event,), FEELING, FRIEND, (mishap.rescue,), ENDING, THANKS, CLOSING)


def draw_slots(rng: random.Random) -> Slots:
    """Random consistent choices. Girls ask boys for help and boys ask girls, so the two names always differ."""
    name = rng.choice(GIRLS + BOYS)
    return Slots(
        name=name,
        friend=rng.choice(BOYS if name in GIRLS else GIRLS),
        thing=rng.choice(THINGS),
        colour=rng.choice(COLOURS),
        place=rng.choice(list(LANDMARKS)),
        mishap=rng.choice(list(MISHAPS)),
    )


def tell(slots: Slots, rng: random.Random) -> str:
    """The story of `slots` in random wordings."""
    words = slots.words()
    sentences = (rng.choices(wordings, (HABIT, 1)[: len(wordings)])[0] for wordings in outline(MISHAPS[slots.mishap]))
    return " ".join(sentence.format(**words) for sentence in sentences)


def synthetic_stories(count: int, seed: int) -> Iterator[str]:
    """Yield `count` stories, which depend only on the seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield tell(draw_slots(rng), rng)


class Faulty(NamedTuple):
    """A story, and the same story with a fault."""

    slots: Slots
    story: str
    faulty: str
    kind: str  # what happened to one of its words: "dropped" or "doubled"


def faulty_stories(count: int, seed: int) -> list[Faulty]:
    """`count` stories, every second one with one of its words dropped, the others with one doubled; they depend only on the seed."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        slots = draw_slots(rng)
        story, doubled = tell(slots, rng), i % 2 == 0
        words = story.split(" ")
        at = rng.randrange(len(words))
        faulty = " ".join([*words[: at + doubled], *words[at + (not doubled) :]])
        found.append(Faulty(slots, story, faulty, "doubled" if doubled else "dropped"))
    return found


def instruction(slots: Slots) -> str:
    """The user's request for a story."""
    return f"Tell a story about {slots.name} with a {slots.thing}."


def synthetic_instructions(count: int, seed: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield `count` conversations: an instruction and a story that follows it."""
    rng = random.Random(seed)
    for _ in range(count):
        slots = draw_slots(rng)
        yield {
            "messages": [
                {"role": "user", "content": instruction(slots)},
                {"role": "assistant", "content": tell(slots, rng)},
            ]
        }


_CHOICES = {
    "name": GIRLS + BOYS,
    "friend": GIRLS + BOYS,
    "thing": THINGS,
    "colour": COLOURS,
    "place": tuple(LANDMARKS),
    "child": ("girl", "boy"),
    "pronoun": ("she", "he"),
    "Pronoun": ("She", "He"),
    "Possessive": ("Her", "His"),
    "landmark": tuple(LANDMARKS.values()),
    "feeling": tuple(mishap.feeling for mishap in MISHAPS.values()),
    "outcome": tuple(mishap.outcome for mishap in MISHAPS.values()),
}


def _read(sentence: str, wordings: tuple[str, ...]) -> dict[str, str] | None:
    """The slots of a sentence and their words; None if the sentence matches none of the wordings."""
    for wording in wordings:
        pattern = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
        for slot, words in _CHOICES.items():
            pattern = pattern.replace("{" + slot + "}", f"(?P<{slot}>{'|'.join(words)})")
        if match := re.fullmatch(pattern, sentence):
            return match.groupdict()
    return None


def check(story: str, name: str, thing: str) -> list[str]:
    """The faults of a story that should be about `name` with a `thing`; empty if the story is accepted.

    Every sentence must match the grammar, in order, and every slot must agree with the request and with the earlier
    sentences.
    """
    sentences = re.findall(r"[^.]+\.", story.strip())
    sentences = [sentence.strip() for sentence in sentences]
    if story.strip() and not story.strip().endswith("."):
        return ["the last sentence is not finished"]
    events = [
        key
        for key, mishap in MISHAPS.items()
        if len(sentences) > 3 and _read(sentences[3], (mishap.event,)) is not None
    ]
    if not events:
        return ["no mishap in the fourth sentence"]
    expected = Slots(name, "", thing, "", "park", events[0]).words()
    del expected["friend"], expected["colour"], expected["place"], expected["landmark"]
    plan = outline(MISHAPS[events[0]])
    if len(sentences) != len(plan):
        return [f"{len(sentences)} sentences instead of {len(plan)}"]
    faults = []
    for number, (sentence, wordings) in enumerate(zip(sentences, plan, strict=True), start=1):
        slots = _read(sentence, wordings)
        if slots is None:
            faults.append(f"sentence {number} does not match the grammar: {sentence!r}")
            continue
        for slot, word in slots.items():
            if expected.setdefault(slot, word) != word:
                faults.append(f"sentence {number}: {slot} is '{word}', not '{expected[slot]}'")
        if slots.get("friend") in (GIRLS if name in GIRLS else BOYS):
            faults.append(f"sentence {number}: {name} does not ask {slots['friend']} for help")
        if "place" in slots:
            expected["landmark"] = LANDMARKS[slots["place"]]
    return faults
