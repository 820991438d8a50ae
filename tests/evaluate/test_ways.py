"""The ways of answering: batches of completions, budgets, seeds."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from hildanext.config import Config
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.evaluate.ways import Models, Question, Way, complete, cost, sampling_seed, ways
from hildanext.model.ar_generate import ar_complete, ar_complete_batch
from support.evaluate import changed


def test_the_ways_are_ar_and_both_modes_with_and_without_editing(small: Config, models: Models) -> None:
    found = {way.name: way.settings for way in ways(small, models)}
    assert list(found) == ["ar", "q_mode", "q_mode_no_edit", "s_mode", "s_mode_no_edit"]
    assert found["ar"] is None
    for name, settings in found.items():
        if settings is not None:
            assert (settings.tau_edit is None) == name.endswith("no_edit")
            assert settings.mode == name[:6].upper()
            assert settings.block_size == 4
    sizes = changed(small, evaluate={"block_sizes": [2, 8]})
    assert [way.settings.block_size for way in ways(sizes, models) if way.settings] == [2] * 4 + [8] * 4


def test_a_batch_of_ar_completions_is_each_alone(models: Models) -> None:
    """Padded on the left, with prompts of different lengths: the same greedy tokens."""
    tokenizer = models.lm.tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "Mia", "There was a red kite and a dog")]
    together = ar_complete_batch(models.base, tokenizer, prompts, 10)
    assert [one.token_ids for one in together] == [
        ar_complete(models.base, tokenizer, prompt, 10).token_ids for prompt in prompts
    ]
    # Stop strings that this text is known to have, and one that only begins in the prompt.
    whole = together[0].text
    for stop in (whole[3:6], whole[:1], "time" + whole[:2]):
        cut = ar_complete_batch(models.base, tokenizer, prompts[:1], 10, stop=(stop,))[0]
        assert cut.text == (whole[: whole.index(stop)] if stop in whole else whole)
        assert cut.ended is (stop in whole)
    drawn = [
        ar_complete_batch(models.base, tokenizer, prompts[:1], 10, temperature=2.0, seed=s)[0].text for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["ar", "q_mode", "s_mode_no_edit"])
def test_answers_are_those_of_the_request_alone_and_their_seconds_add_up(
    small: Config, models: Models, name: str
) -> None:
    way = next(way for way in ways(small, models) if way.name == name)
    prompts = [models.lm.tokenizer(text)["input_ids"] for text in ("Once upon a time", "Mia", "There was a red kite")]
    together = complete(models, way, [Question(prompt, 9) for prompt in prompts], "t")
    alone = [complete(models, way, [Question(prompt, 9)], "t")[0] for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.forwards for one in together] == [one.forwards for one in alone]
    assert all(one.seconds > 0 for one in together)
    speed = cost(together, 100, 0)
    tokens, seconds = sum(len(one.token_ids) for one in together), sum(one.seconds for one in together)
    assert speed["tokens_per_second"].value == pytest.approx(tokens / seconds)
    assert speed["tokens_per_forward"].value == pytest.approx(tokens / sum(one.forwards for one in together))
    if name == "ar":
        assert speed["tokens_per_forward"].value == 1


def test_tokens_per_forward_are_those_of_every_completion(small: Config, models: Models) -> None:
    """A prompt stored in chunks: `Stats` counts those apart, and so does the report."""
    config = changed(small, engine={"slots": 2, "context": 64, "prefill_chunk": 4})
    engine = TransformersEngine(config, {}, models.lm)
    way, prompt = ways(small, models)[1], models.lm.tokenizer("Once upon a time there was a red kite")["input_ids"]
    assert way.settings is not None
    stats = engine.generate(Request(prompt, way.settings._replace(max_new_tokens=9))).stats
    assert stats.prefill_forwards > 0
    (one,) = complete(models._replace(engine=engine), way, [Question(prompt, 9)], "t")
    assert len(one.token_ids) / one.forwards == stats.tokens_per_forward


def test_ar_answers_of_different_budgets(models: Models) -> None:
    prompts = [models.lm.tokenizer(text)["input_ids"] for text in ("Once upon", "Mia", "Leo")]
    found = complete(models, Way("ar", None), [Question(p, n) for p, n in zip(prompts, (5, 5, 2), strict=True)], "t")
    assert [one.token_ids for one in found] == [
        ar_complete(models.base, models.lm.tokenizer, p, n).token_ids for p, n in zip(prompts, (5, 5, 2), strict=True)
    ]


def test_a_measurement_without_a_seed_repeats(small: Config, models: Models) -> None:
    warm = changed(small, decode={"temperature": 1.0}, evaluate={"seed": 5})
    assert {way.settings.seed for way in ways(warm, models) if way.settings} == {5}
    seeded = changed(warm, decode={"seed": 9})
    assert {way.settings.seed for way in ways(seeded, models) if way.settings} == {9}


def test_the_base_stops_at_any_end_of_text(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = models.lm.tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "Mia")]
    before = [one.token_ids for one in ar_complete_batch(models.base, tokenizer, prompts, 10)]
    listed = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, before[0][3]])
    monkeypatch.setattr(models.base, "generation_config", listed)
    found = ar_complete_batch(models.base, tokenizer, prompts, 10)
    for one, whole in zip(found, before, strict=True):
        length = whole.index(before[0][3]) + 1 if before[0][3] in whole else len(whole)
        assert one.token_ids == whole[:length]
        assert one.ended is (before[0][3] in whole)


def test_sampling_seeds_differ() -> None:
    assert len({sampling_seed(seed, item, sample) for seed in (0, 1) for item in range(5) for sample in range(5)}) == 50
