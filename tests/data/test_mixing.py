"""Readers and mixes, against lists: order, shares, epochs, and going on from any place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hildanext.data.documents import Document, Rejects
from hildanext.data.mixing import DocumentPlace, Mix, Reader

# A file is a list of lines: text, or None for one that cannot be used.
Files = dict[str, list[str | None]]
FILES = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.lists(st.none() | st.text("xyz", min_size=1, max_size=9), max_size=6),
    max_size=4,
)


def reader(files: Files, epochs: int = 1, limit: int | None = None) -> Reader:
    def read(path: str, rejects: Rejects) -> Iterator[tuple[int, Document]]:
        for number, text in enumerate(files[path], start=1):
            if text is None:
                rejects.add("bad", path, number)
            else:
                yield number, Document(f"{path}:{number}", "test", text=text)

    return Reader(read, list(files), epochs=epochs, limit=limit)


def by_hand(files: Files, epochs: int, limit: int | None) -> list[tuple[DocumentPlace, str]]:
    epoch = [
        (DocumentPlace(name, number), text)
        for name, lines in files.items()
        for number, text in enumerate(lines, start=1)
        if text is not None
    ]
    return epoch[:limit] * epochs


def drain(one: Reader) -> list[tuple[DocumentPlace, str]]:
    return [(place, str(doc.text)) for _, place, doc in Mix([one], None)]


@given(FILES, st.integers(1, 3), st.none() | st.integers(1, 5))
def test_a_reader_gives_each_document_of_each_epoch_once(files: Files, epochs: int, limit: int | None) -> None:
    one = reader(files, epochs, limit)
    expected = by_hand(files, epochs, limit)
    assert drain(one) == expected
    assert one.done
    assert (one.documents, one.size) == (len(expected), sum(len(text) for _, text in expected))
    assert one.next() is None


@given(FILES, st.integers(1, 3), st.none() | st.integers(1, 5))
def test_a_reader_goes_on_from_every_place(files: Files, epochs: int, limit: int | None) -> None:
    whole = reader(files, epochs, limit)
    states = [whole.state()]
    while whole.next() is not None:
        states.append(whole.state())
    expected = by_hand(files, epochs, limit)
    for given_before, state in enumerate(states):
        resumed = reader(files, epochs, limit)
        resumed.restore(json.loads(json.dumps(state)))
        assert drain(resumed) == expected[given_before:]
        assert resumed.state() == whole.state()


TEXTS = st.lists(st.text("x", min_size=1, max_size=40), min_size=1, max_size=30)


@given(st.lists(st.tuples(TEXTS, st.floats(0.1, 10.0)), min_size=1, max_size=4))
def test_shares_are_right_to_within_a_document_all_along(sources: list[tuple[list[str], float]]) -> None:
    readers = [reader({f"{i}": list(texts)}, epochs=3) for i, (texts, _) in enumerate(sources)]
    weights = [weight for _, weight in sources]
    longest = max(len(text) for texts, _ in sources for text in texts)
    seen: Counter[DocumentPlace] = Counter()
    for _, place, _ in Mix(readers, weights):
        seen[place] += 1
        total = sum(one.size for one in readers)
        for one, weight in zip(readers, weights, strict=True):
            assert one.size - total * weight / sum(weights) <= longest
            assert total * weight / sum(weights) - one.size <= longest * len(readers)
    assert any(one.done for one in readers)
    # Within an epoch nothing is lost or doubled: no document is an epoch ahead of another of its source.
    for index, (texts, _) in enumerate(sources):
        counts = [seen[DocumentPlace(str(index), number)] for number in range(1, len(texts) + 1)]
        assert max(counts) - min(counts) <= 1
        assert max(counts) <= 3
        assert sum(counts) == readers[index].documents


@given(st.lists(st.tuples(TEXTS, st.floats(0.1, 10.0)), min_size=1, max_size=4), st.data())
def test_a_mix_goes_on_from_any_place(sources: list[tuple[list[str], float]], data: st.DataObject) -> None:
    def make() -> Mix:
        readers = [reader({f"{i}": list(texts)}, epochs=2) for i, (texts, _) in enumerate(sources)]
        return Mix(readers, weights, to_the_end)

    weights = data.draw(st.sampled_from([None, [weight for _, weight in sources]]))
    to_the_end = data.draw(st.booleans())
    whole = make()
    states, places = [whole.state()], []
    for _, place, _ in whole:
        places.append(place)
        states.append(whole.state())
    at = data.draw(st.integers(0, len(places)))
    resumed = make()
    resumed.restore(json.loads(json.dumps(states[at])))
    assert [place for _, place, _ in resumed] == places[at:]
    if weights is None or to_the_end:
        assert len(places) == 2 * sum(len(texts) for texts, _ in sources)


def test_a_mix_ends_where_a_source_is_dry() -> None:
    small, large = reader({"small": ["aa"] * 5}, epochs=2), reader({"large": ["bb"] * 100})
    names = [place.file for _, place, _ in Mix([small, large], [1.0, 3.0])]
    assert Counter(names) == {"small": 10, "large": 30}
    assert (small.epochs_read, large.epochs_read) == (2, 1)


@pytest.mark.parametrize("to_the_end", [False, True])
def test_empty_readers_end_at_once(to_the_end: bool) -> None:
    assert list(Mix([], None)) == []
    assert list(Mix([], [], to_the_end)) == []
    places = list(Mix([reader({}), reader({"a": ["x"]})], [1.0, 1.0], to_the_end))
    assert len(places) == to_the_end
