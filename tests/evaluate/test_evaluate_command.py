"""`evaluate`: every task on a tiny converted model, its figures worked out again here, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hildanext.cli import main
from hildanext.config import Config, parse_config
from hildanext.errors import ConfigError, DataError, UsageError
from hildanext.evaluate import command, infilling, stories
from hildanext.evaluate.infilling import _spans
from hildanext.evaluate.judge import mean_log_likelihood
from hildanext.evaluate.records import token_pieces
from hildanext.evaluate.ways import Models, Way
from hildanext.model import loading
from hildanext.model.ar_generate import ar_complete
from hildanext.model.loading import load_diffusion_lm
from support.evaluate import changed


def test_a_revision_is_the_converted_models_own(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = loading.load_causal_lm
    monkeypatch.setattr(loading, "load_causal_lm", lambda model, *args: asked.append(model) or real(model, *args))
    command.open_models(changed(small, model={"revision": "v2"}), None)
    assert [model.revision for model in asked] == ["v2", None]  # the checkpoint, then its base


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


def test_an_unconverted_model_is_refused(small: Config, tmp_path: Path) -> None:
    base = str(Path(small.model.base).parent / "base")
    with pytest.raises(UsageError, match="not a converted checkpoint"):
        command.evaluate(changed(small, model={"base": base}), ["stories"], [], None, tmp_path, allow_code=False)


def test_impossible_configurations(subtests: pytest.Subtests) -> None:
    for keys, message in [
        ({"k": [1, 5]}, "'evaluate.k': 5 exceeds samples"),
        ({"samples": 4, "k": [2]}, "raise temperature"),
        ({"span": 63, "infill_tokens": 64}, "'evaluate.span': 63 masked tokens leave no context"),
        ({"data": {"gsm8k": 3}}, "evaluate.data.gsm8k"),
    ]:
        with subtests.test(keys=keys, message=message):
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
