"""`evaluate`: every task on a tiny converted model, its figures worked out again here, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hildanext.cli import main
from hildanext.config import Config, parse_config
from hildanext.data.synthetic import synthetic_stories
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.rule import edit_step, propose
from hildanext.decoding.settings import Settings
from hildanext.errors import ConfigError, DataError, UsageError
from hildanext.evaluate import command, gsm8k, humaneval, infilling, stories
from hildanext.evaluate.infilling import _spans, infill
from hildanext.evaluate.judge import mean_log_likelihood
from hildanext.evaluate.records import read_records, token_pieces
from hildanext.evaluate.sandbox import Limits, Verdict
from hildanext.evaluate.ways import Models, Question, Way, complete, cost, sampling_seed, ways
from hildanext.model import loading
from hildanext.model.ar_generate import ar_complete, ar_complete_batch
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm

PROBLEMS = Path(__file__).parents[2] / "src" / "hildanext" / "data" / "sources" / "humaneval_dummy.jsonl"


def changed(config: Config, **sections: Any) -> Config:
    """The configuration with some keys of some sections changed."""
    raw = config.model_dump(mode="json")
    return parse_config(raw | {name: raw[name] | keys for name, keys in sections.items()})


@pytest.fixture(scope="module")
def small(converted: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The tiny converted model, small budgets, and documents to continue."""
    folder = tmp_path_factory.mktemp("texts")
    documents = (json.dumps({"text": text}) + "\n" for text in synthetic_stories(12, seed=5))
    (folder / "stories.jsonl").write_text("".join(documents), encoding="utf-8")
    questions = [
        {"question": f"What is {a} plus 4?", "answer": f"{a}+4=<<{a}+4={a + 4}>>{a + 4}\n#### {a + 4}"}
        for a in range(5)
    ]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    data = {name: str(folder / "stories.jsonl") for name in ("stories", "infilling")} | {
        "gsm8k": str(folder / "gsm8k.jsonl")
    }
    budgets = {
        "prompt_tokens": 12,
        "story_tokens": 10,
        "infill_tokens": 16,
        "span": 4,
        "answer_tokens": 8,
        "code_tokens": 8,
    }
    return changed(
        converted, evaluate={"data": data, "limit": 3, "resamples": 100, **budgets}, engine={"slots": 2, "context": 64}
    )


@pytest.fixture(scope="module")
def models(small: Config) -> Models:
    return command.open_models(small, None)[0]


# --- completing ---------------------------------------------------------------------------------------------------


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


def test_a_revision_is_the_converted_models_own(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = loading.load_causal_lm
    monkeypatch.setattr(loading, "load_causal_lm", lambda model, *args: asked.append(model) or real(model, *args))
    command.open_models(changed(small, model={"revision": "v2"}), None)
    assert [model.revision for model in asked] == ["v2", None]  # the checkpoint, then its base


def test_sampling_seeds_differ() -> None:
    assert len({sampling_seed(seed, item, sample) for seed in (0, 1) for item in range(5) for sample in range(5)}) == 50


# --- HumanEval ------------------------------------------------------------------------------------------------------


def test_every_canonical_solution_of_humaneval_passes() -> None:
    """The published problems through the sandbox: what is right passes, and an empty body passes none of some."""
    try:
        path = humaneval.find(Config())
    except UsageError as error:
        pytest.skip(str(error))
    problems = read_records(path, humaneval.FIELDS, None)
    assert len(problems) == 164
    limits = Limits(cpu_s=20, wall_s=120)
    right = humaneval.run_tests(problems, [one["canonical_solution"] for one in problems], limits)
    assert right == [Verdict(True, "passed")] * 164
    some = problems[::16]
    wrong = humaneval.run_tests(some, ["    pass\n"] * len(some), limits)
    assert not any(verdict.passed for verdict in wrong)


def test_pass_at_k_counts_each_problems_own_samples(small: Config) -> None:
    """Verdicts come sample by sample, problem by problem within."""
    config = changed(small, evaluate={"samples": 3, "k": [1, 2], "temperature": 1.0})
    right = [[True, False, False], [True, True, False], [False, False, False]]  # problem, sample
    verdicts = [Verdict(right[item][sample], "") for sample in range(3) for item in range(3)]
    figures = humaneval._figures(config, verdicts, 3)
    assert figures["pass@1"].value == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert figures["pass@2"].value == pytest.approx((2 / 3 + 1 + 0) / 3)  # of the 3 pairs: 2, 3, 0 hold a right one


# --- GSM8K ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "exact", "loose"),
    [
        ("2+2=4\n#### 4", "4", "4"),
        ("so it is $1,000.", None, "1000"),
        ("#### 1,234 apples, not 5", "1234", "5"),
        ("#### -3", "-3", "-3"),
        ("#### 18.00", "18", "18"),
        ("The answer is 7.", None, "7"),
        ("no number", None, None),
        ("", None, None),
        ("#### .", None, None),
    ],
)
def test_the_number_in_an_answer(text: str, exact: str | None, loose: str | None) -> None:
    assert gsm8k.strict(text) == (None if exact is None else gsm8k.number(exact))
    assert gsm8k.flexible(text) == (None if loose is None else gsm8k.number(loose))


def test_every_answer_of_gsm8k_is_right_to_itself(shared: Callable[[str], Path], small: Config) -> None:
    path = shared("gsm8k/test.jsonl")
    problems = gsm8k.Problems(changed(small, evaluate={"data": {"gsm8k": str(path)}, "limit": None}))
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(problems.right) == len(records) == 1319
    for record, right in zip(records, problems.right, strict=True):
        assert gsm8k.strict(record["answer"]) == gsm8k.flexible(record["answer"]) == right
        assert float(record["answer"].split("####")[1].replace(",", "")) == float(right)


def test_prompts_of_gsm8k(small: Config, tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text(
        '{"question": "1+1?", "answer": "2 #### 2"}\n{"question": "never", "answer": "#### 0"}\n', encoding="utf-8"
    )
    data = small.evaluate.data | {"gsm8k_shots": str(shots)}
    chat = gsm8k.Problems(changed(small, evaluate={"shots": 1, "data": data}))
    assert chat.prompt("2+2?") == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2 #### 2"},
        {"role": "user", "content": "2+2?"},
    ]
    plain = gsm8k.Problems(changed(small, evaluate={"shots": 1, "chat": False, "data": data}))
    assert plain.prompt("2+2?") == "Question: 1+1?\nAnswer: 2 #### 2\n\nQuestion: 2+2?\nAnswer:"


# --- infilling --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decided(models: Models) -> DiffusionLM:
    """The tiny model with larger weights: what it says depends on what it sees."""
    lm = copy.deepcopy(models.lm)
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight.mul_(4)
    return lm


@torch.no_grad()
def filled_slowly(lm: DiffusionLM, text: list[int], span: range, settings: Settings) -> tuple[list[int], int]:
    """The same from transformers' own forward with a mask of zeros, a token at a time."""
    text = list(text)
    for i in span:
        text[i] = lm.mask_token_id
    passes = post = 0
    while True:
        passes += 1
        ids, n = torch.tensor([text]), len(text)
        logits = lm.model(
            input_ids=ids, attention_mask=torch.zeros(1, 1, n, n), position_ids=torch.arange(n)[None]
        ).logits[0]
        clean, after, changed_one = lm.mask_token_id not in text, list(text), False
        found = {}
        for i in span:
            where = i - 1 if lm.convention == "shifted" else i
            token, sure = propose(logits[where][None], mask_token_id=lm.mask_token_id, vocab_size=lm.vocab_size)
            found[i] = (int(token), float(sure))
        masked = [i for i in span if text[i] == lm.mask_token_id]
        chosen = [i for i in masked if found[i][1] > settings.tau_mask]
        if masked and not chosen:
            chosen = [max(masked, key=lambda i: found[i][1])]
        for i in chosen:
            after[i] = found[i][0]
        for i in set(span) - set(masked):
            if settings.tau_edit is not None and found[i][0] != text[i] and found[i][1] > settings.tau_edit:
                after[i], changed_one = found[i][0], True
        text = after
        post += clean
        if lm.mask_token_id not in text and (
            settings.tau_edit is None or post >= settings.max_post_steps or (clean and not changed_one)
        ):
            return text[span.start : span.stop], passes


@pytest.mark.parametrize("name", ["q_mode", "s_mode", "s_mode_no_edit"])
@pytest.mark.parametrize("tau_mask", [0.01, 0.9])
def test_infilling_is_the_rule_over_the_whole_text(
    small: Config, models: Models, decided: DiffusionLM, name: str, tau_mask: float
) -> None:
    settings = next(way.settings for way in ways(small, models) if way.name == name)
    assert settings is not None
    settings = settings._replace(tau_mask=tau_mask, max_post_steps=3)
    texts = token_pieces(Path(small.evaluate.data["infilling"]), models.lm.tokenizer, 16, 3)
    for text, span in zip(texts, _spans(texts, 5, 0), strict=True):
        ids, forwards, _ = infill(decided, text, span, settings)
        assert (ids, forwards) == filled_slowly(decided, text, span, settings)
        assert decided.mask_token_id not in ids


def test_infilling_looks_to_the_right(small: Config, models: Models, decided: DiffusionLM) -> None:
    settings = next(way.settings for way in ways(small, models) if way.name == "q_mode_no_edit")
    assert settings is not None
    text = token_pieces(Path(small.evaluate.data["infilling"]), models.lm.tokenizer, 16, 1)[0]
    found = {
        tuple(infill(decided, [*text[:10], *other], range(5, 9), settings)[0])
        for other in (text[10:], [7] * 6, [300] * 6, [50, 60, 70, 80, 90, 100])
    }
    assert len(found) > 1


def test_spans_have_text_on_both_sides() -> None:
    spans = _spans([[0] * 12] * 200, 10, 0)
    assert {span.start for span in spans} == {1}
    spans = _spans([[0] * 12] * 200, 4, 0)
    assert {span.start for span in spans} == set(range(1, 8))
    assert all(len(span) == 4 for span in spans)
    assert spans[:50] == _spans([[0] * 12] * 50, 4, 0)


def test_edits_touch_the_span_alone() -> None:
    """`edit_step` sees only the span; the prompt on either side is not among what it may write."""
    after, drafted, edited = edit_step(
        [9, 5], [6, 7], [0.9, 0.9], [True, True], mask_token_id=9, tau_mask=0.5, tau_edit=0.5
    )
    assert (after, drafted, edited) == ([6, 7], [0], [1])


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(small: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("report")
    found = command.evaluate(small, ["stories", "gsm8k", "infilling"], [], None, out, allow_code=False)
    return found, out


def test_the_report_has_every_way_on_every_task(report: tuple[dict[str, Any], Path]) -> None:
    found, out = report
    stored = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in found.items() if key not in ("stdout", "out")} == stored
    assert list(stored["tasks"]) == ["stories", "gsm8k", "infilling"]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text == found["stdout"]
    for task, by_way in stored["tasks"].items():
        assert list(by_way) == ["ar", "q_mode", "q_mode_no_edit", "s_mode", "s_mode_no_edit"]
        assert f"## {task} (3 items)" in text
        for name, figures in by_way.items():
            assert figures["tokens_per_second"]["value"] > 0
            if name.endswith("no_edit"):
                assert figures["edits"]["value"] == 0
            for figure in figures.values():
                if figure["interval"] is not None:
                    assert figure["low"] <= figure["value"] <= figure["high"]
        samples = [
            json.loads(line) for line in (out / "samples" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert len(samples) == 3 * 5
    picture = (out / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    for what in ("hardware", "versions", "seed", "evaluate", "base"):
        assert stored[what] is not None
    assert "NaN" not in (out / "report.json").read_text(encoding="utf-8")


def test_figures_of_stories_by_hand(report: tuple[dict[str, Any], Path], models: Models, small: Config) -> None:
    found, out = report
    samples = [
        json.loads(line) for line in (out / "samples" / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for name in ("ar", "q_mode"):
        mine = [one for one in samples if one["way"] == name]
        figures = found["tasks"]["stories"][name]
        assert figures["log_likelihood"]["value"] == pytest.approx(
            sum(one["log_likelihood"] for one in mine) / sum(one["tokens"] for one in mine)
        )
    prompts = token_pieces(Path(small.evaluate.data["stories"]), models.lm.tokenizer, 13, 3)
    prompt = prompts[0][:-1]
    first = ar_complete(models.base, models.lm.tokenizer, prompt, 10)
    assert samples[0]["continuation"] == first.text
    assert samples[0]["log_likelihood"] == pytest.approx(
        mean_log_likelihood(models.base, prompt, first.token_ids) * len(first.token_ids)
    )


def test_infilling_of_ar_continues_the_left(report: tuple[dict[str, Any], Path], models: Models, small: Config) -> None:
    _, out = report
    texts = token_pieces(Path(small.evaluate.data["infilling"]), models.lm.tokenizer, 16, 3)
    spans = _spans(texts, 4, 0)
    samples = [
        json.loads(line) for line in (out / "samples" / "infilling.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for text, span, sample in zip(texts, spans, samples[:3], strict=True):
        assert sample["filled"] == ar_complete(models.base, models.lm.tokenizer, text[: span.start], 4).text
        assert sample["left"] + sample["span"] + sample["right"] == models.engine.decode_tokens(text)


def test_an_interrupted_evaluation_goes_on(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third way of five fails: the first two stand in the report, and are not done again."""
    config = changed(small, evaluate={"limit": 2, "story_tokens": 4})
    real, calls = stories.evaluate, list[str]()

    def fails(config: Config, models: Models, prompts: Any, way: Way) -> Any:
        calls.append(way.name)
        if calls == ["ar", "q_mode", "q_mode_no_edit"]:
            raise KeyboardInterrupt
        return real(config, models, prompts, way)

    monkeypatch.setattr(stories, "evaluate", fails)
    with pytest.raises(KeyboardInterrupt):
        command.evaluate(config, ["stories"], [], None, tmp_path, allow_code=False)
    before = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["tasks"]["stories"]
    assert list(before) == ["ar", "q_mode"]
    other = changed(config, evaluate={"seed": 9})
    with pytest.raises(UsageError, match="made with another seed, evaluate"):
        command.evaluate(other, ["stories"], [], None, tmp_path, allow_code=False, resume=True)
    after = command.evaluate(config, ["stories"], [], None, tmp_path, allow_code=False, resume=True)["tasks"]["stories"]
    assert calls == ["ar", "q_mode", "q_mode_no_edit", "q_mode_no_edit", "s_mode", "s_mode_no_edit"]
    assert {name: after[name] for name in before} == before
    lines = (tmp_path / "samples" / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 * 5
    # A task that needs a file of its own can be added; another file for what is done already cannot.
    bare = changed(config, evaluate={"data": {"stories": config.evaluate.data["stories"]}})
    item = [f"gsm8k={config.evaluate.data['gsm8k']}"]
    calls.clear()
    more = command.evaluate(bare, ["stories", "gsm8k"], item, None, tmp_path, allow_code=False, resume=True)
    assert calls == []
    assert list(more["tasks"]) == ["stories", "gsm8k"]
    # What is not named again stays when what is added is interrupted.
    item = [f"infilling={config.evaluate.data['infilling']}"]
    first = infilling.evaluate

    def gives_one(config: Config, models: Models, texts: Any, way: Way) -> Any:
        if way.name != "ar":
            raise KeyboardInterrupt
        return first(config, models, texts, way)

    monkeypatch.setattr(infilling, "evaluate", gives_one)
    with pytest.raises(KeyboardInterrupt):
        command.evaluate(bare, ["infilling"], item, None, tmp_path, allow_code=False, resume=True)
    left = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(left["tasks"]) == ["stories", "gsm8k", "infilling"]
    assert {name: left["tasks"][name] for name in more["tasks"]} == more["tasks"]
    assert more["data"].items() <= left["data"].items()
    other = changed(config, evaluate={"data": {"stories": str(tmp_path / "other.jsonl")}})
    (tmp_path / "other.jsonl").write_text('{"text": "Once upon a time."}\n' * 3, encoding="utf-8")
    with pytest.raises(UsageError, match="made with another data file of stories;"):
        command.evaluate(other, ["stories"], [], None, tmp_path, allow_code=False, resume=True)


def test_humaneval_runs_what_was_written_only_when_allowed(small: Config, tmp_path: Path) -> None:
    config = changed(
        small, evaluate={"data": {"humaneval": str(PROBLEMS)}, "limit": 2}, engine={"context": 256, "slots": 2}
    )
    with pytest.raises(UsageError, match="--allow-code-execution"):
        command.evaluate(config, ["humaneval"], [], None, tmp_path, allow_code=False)
    assert not list(tmp_path.iterdir())


def test_humaneval_from_the_prompt_to_the_verdict(
    small: Config, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model writes is replaced by right and wrong bodies: prompt and completion are joined, tested and counted."""
    problems = read_records(PROBLEMS, humaneval.FIELDS, 4)
    bodies = ["\n" + one["canonical_solution"] for one in problems[:3]] + ["\n    return None\n"]
    asked: list[str] = []
    monkeypatch.setattr(humaneval, "encode_prompt", lambda tokenizer, prompt: asked.append(prompt) or [5, 6, 7])
    real = humaneval.complete

    def written(*args: Any) -> Any:
        return [one._replace(text=body) for one, body in zip(real(*args), bodies, strict=True)]

    monkeypatch.setattr(humaneval, "complete", written)
    try:
        outcome = humaneval.evaluate(small, models, problems, ways(small, models)[1])
    except UsageError as error:
        pytest.skip(str(error))
    assert [one["passed"] for one in outcome.samples] == [True, True, True, False]
    assert outcome.figures["pass@1"].value == 0.75
    assert outcome.samples[0]["task_id"] == "HildaNext/0"
    assert asked == [one["prompt"].rstrip("\n") for one in problems]  # a line break alone is no token to go on from


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "data", "keys", "message"),
    [
        (["gsm8k"], [], {"data": {}}, "give --data gsm8k=FILE"),
        (["gsm8k"], ["gsm8k=nowhere.jsonl"], {}, "nowhere.jsonl: no such file"),
        (["gsm8k"], ["stories=x"], {}, "no task 'stories' among --tasks gsm8k"),
        (["gsm8k"], ["gsm8k"], {}, "expected TASK=FILE"),
        (["gsm8k"], [], {"shots": 2}, "give --data gsm8k_shots=FILE"),
        (["stories"], ["stories=nowhere.jsonl"], {}, "nowhere.jsonl: no documents"),
        (["infilling"], [], {"data": {}}, "give --data infilling=FILE"),
    ],
)
def test_refusals_before_any_weights_are_read(
    small: Config,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tasks: list[str],
    data: list[str],
    keys: Any,
    message: str,
) -> None:
    monkeypatch.setattr(command, "open_models", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises((UsageError, DataError), match=message) as caught:
        command.evaluate(changed(small, evaluate=keys), tasks, data, None, tmp_path, allow_code=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "1?"}\n', ":1: no text 'answer'"),
        ('{"question": "1?", "answer": "#### 1"}\n{broken\n', ":2: not valid JSON"),
        ("\n", "no records"),
        ('{"question": "1?", "answer": "one"}\n', "record 1 has no number"),
        ("[]\n", ":1: no text 'question'"),
    ],
)
def test_a_broken_file_is_named_with_its_line(small: Config, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        gsm8k.Problems(changed(small, evaluate={"data": {"gsm8k": str(path)}}))


def test_a_model_without_a_chat_template_is_told_so(
    small: Config, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.lm.tokenizer, "chat_template", None)
    problems = gsm8k.Problems(small)
    with pytest.raises(UsageError, match=r"has no chat template; set evaluate\.chat=false"):
        command.runs(small, models, "gsm8k", problems)
    plain = changed(small, evaluate={"chat": False})
    assert len(command.runs(plain, models, "gsm8k", gsm8k.Problems(plain))["gsm8k"]) == 5


def test_an_unconverted_model_is_refused(small: Config, tmp_path: Path) -> None:
    base = str(Path(small.model.base).parent / "base")
    with pytest.raises(UsageError, match="not a converted checkpoint"):
        command.evaluate(changed(small, model={"base": base}), ["stories"], [], None, tmp_path, allow_code=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"k": [1, 5]}, "'evaluate.k': 5 exceeds samples"),
        ({"samples": 4, "k": [2]}, "raise temperature"),
        ({"span": 63, "infill_tokens": 64}, "'evaluate.span': 63 masked tokens leave no context"),
        ({"data": {"gsm8k": 3}}, "evaluate.data.gsm8k"),
    ],
)
def test_impossible_configurations(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"evaluate": keys})


def test_the_command_line(small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps(small.model_dump(mode="json")), encoding="utf-8")
    line = ["evaluate", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "out"), "--json"]
    assert main([*line, "--tasks", "stories", "--limit", "2", "--set", "evaluate.story_tokens=4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tasks"]["stories"]["ar"]["ended"]["n"] == 2
    assert main([*line, "--tasks", " , "]) == 2
    assert main([*line, "--tasks", "stories", "--limit", "0"]) == 2
    assert "evaluate.limit" in capsys.readouterr().err


def test_nothing_to_count_is_no_number() -> None:
    from hildanext.evaluate.intervals import ratio, share

    assert math.isnan(share([]).value)
    assert math.isnan(ratio([0.0], [0.0], 100, 0).value)


def test_the_model_of_the_tests_is_a_converted_one(small: Config) -> None:
    assert load_diffusion_lm(small.model)[0].block_size == 4
