"""The stories' grammar and the checker that judges models by it."""

from __future__ import annotations

import random
import re

from hildanext.data.synthetic import (
    BOYS,
    COLOURS,
    GIRLS,
    LANDMARKS,
    MISHAPS,
    THINGS,
    check,
    draw_slots,
    faulty_stories,
    instruction,
    synthetic_instructions,
    synthetic_stories,
    tell,
)

# Words of one kind: put in place of another they make a story that contradicts itself.
KINDS: tuple[tuple[str, ...], ...] = (
    GIRLS + BOYS,
    THINGS,
    COLOURS,
    tuple(LANDMARKS),
    tuple(LANDMARKS.values()),
    tuple(mishap.feeling for mishap in MISHAPS.values()),
    tuple(mishap.outcome for mishap in MISHAPS.values()),
    ("girl", "boy"),
    ("she", "he"),
    ("She", "He"),
    ("Her", "His"),
)


def test_every_story_told_is_accepted():
    for seed in range(300):
        rng = random.Random(seed)
        slots = draw_slots(rng)
        assert check(tell(slots, rng), slots.name, slots.thing) == [], seed


def test_every_changed_word_is_noticed():
    for seed in range(60):
        rng = random.Random(seed)
        slots = draw_slots(rng)
        story = tell(slots, rng)
        changed = 0
        for kind in KINDS:
            for found in re.finditer(rf"\b({'|'.join(kind)})\b", story):
                if kind == tuple(LANDMARKS) and slots.mishap != "lost":
                    continue  # nothing later depends on the place: it is another right story
                for other in kind:
                    if other != found[0]:
                        wrong = story[: found.start()] + other + story[found.end() :]
                        assert check(wrong, slots.name, slots.thing), wrong
                        changed += 1
        assert changed > 100, seed


def test_a_story_out_of_order_or_incomplete_is_refused():
    for seed in range(60):
        rng = random.Random(seed)
        slots = draw_slots(rng)
        sentences = re.findall(r"[^.]+\.", tell(slots, rng))
        for i in range(len(sentences)):
            assert check("".join(sentences[:i] + sentences[i + 1 :]), slots.name, slots.thing), seed
            assert check("".join([*sentences[: i + 1], *sentences[i:]]), slots.name, slots.thing), seed
            if i:
                swapped = [*sentences[: i - 1], sentences[i], sentences[i - 1], *sentences[i + 1 :]]
                assert check("".join(swapped), slots.name, slots.thing), seed
        assert check("".join(sentences)[:-1], slots.name, slots.thing), seed
        assert check("", slots.name, slots.thing), seed


def test_a_story_must_be_the_one_asked_for():
    rng = random.Random(1)
    slots = draw_slots(rng)
    story = tell(slots, rng)
    assert check(story, "Tom" if slots.name != "Tom" else "Ben", slots.thing)
    assert check(story, slots.name, "kite" if slots.thing != "kite" else "ball")


def test_the_seed_makes_the_stories():
    assert list(synthetic_stories(20, 4)) == list(synthetic_stories(20, 4))
    assert list(synthetic_stories(20, 4)) != list(synthetic_stories(20, 5))
    for one in synthetic_instructions(20, 4):
        asked, told = (message["content"] for message in one["messages"])
        name, thing = re.fullmatch(r"Tell a story about (\w+) with a (\w+)\.", asked).groups()  # type: ignore[union-attr]
        assert check(told, name, thing) == []


def test_the_instruction_names_the_hero_and_the_thing():
    slots = draw_slots(random.Random(0))
    assert instruction(slots) == f"Tell a story about {slots.name} with a {slots.thing}."


def test_a_faulty_story_has_one_word_too_few_or_too_many():
    stories = faulty_stories(200, seed=1)
    assert stories == faulty_stories(200, seed=1)
    for number, found in enumerate(stories):
        right, wrong = found.story.split(), found.faulty.split()
        assert not check(found.story, found.slots.name, found.slots.thing)
        assert found.kind == ("doubled", "dropped")[number % 2]
        longer, shorter = (wrong, right) if found.kind == "doubled" else (right, wrong)
        without = [i for i in range(len(longer)) if longer[:i] + longer[i + 1 :] == shorter]
        assert without
        if found.kind == "doubled":
            assert len(without) >= 2  # either of two equal neighbours may go
    assert len({found.faulty.split()[0] for found in stories}) > 2  # the first word can be the one
