"""The demo's way on a budget of seconds: every number in its report is measured, and the verdicts follow from them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hildanext import cli, demo, demo_repair
from hildanext.data.synthetic import Faulty, draw_slots, faulty_stories, tell
from hildanext.decoding.events import Step

SMALL = [  # one checkpoint of the conversion: fewer than the demo merges
    *("wsd.warmup_steps=1", "wsd.stable_steps=1", "wsd.decay_steps=1"),
    *("train.rows_per_step=2", "train.micro_batch=2", "train.save_every=3", "train.eval_every=3", "train.eval_rows=2"),
    *("decode.max_new_tokens=40", "train.lr_warmup_steps=1"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    for name, value in {"N_INSTRUCTIONS": 60, "AR_STEPS": 3, "N_PROMPTS": 3}.items():
        monkeypatch.setattr(demo, name, value)
    ready = json.loads(demo_repair.READY.read_text())
    ready["wsd"] |= {"warmup_steps": 0, "decay_steps": 2}
    ready["sft"] |= {"steps": 2, "lr_warmup_steps": 1}
    ready["train"] |= {"lr_warmup_steps": 1, "rows_per_step": 2, "micro_batch": 2}
    small_repair = tmp_path_factory.mktemp("configs") / "repair.json"
    small_repair.write_text(json.dumps(ready))
    monkeypatch.setattr(demo_repair, "READY", small_repair)
    monkeypatch.setattr(demo_repair, "N_FAULTY", 3)
    monkeypatch.chdir(tmp_path)  # nothing is written but under paths.runs
    overrides = [f"paths.runs={tmp_path / 'out'}", *SMALL]
    return [argument for item in overrides for argument in ("--set", item)]


def test_the_report_is_complete(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", *small]) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for mode in demo.MODES:
        row = report[mode]
        assert 0 <= row["accept_rate"] <= 1
        assert 0 <= row["same_text"] <= 1
        assert row["tokens_per_second"] > 0
        assert mode in printed.out
    assert report["ar"]["tokens_per_forward"] == 1.0
    assert report["exact"]["same_text"] == 1.0  # whatever was drafted
    assert report["s_mode"]["tokens_per_forward"] >= report["exact"]["tokens_per_forward"] >= 1.0
    for curves in report["curves"]:
        assert Path(curves).read_bytes().startswith(b"\x89PNG")
        assert curves in printed.out
    assert (Path(report["checkpoint"]) / "adapter_model.safetensors").is_file()
    repair = report["repair"]
    assert (repair["stories"], repair["repaired"]) == (3, repair["dropped"] + repair["doubled"])
    assert f"{repair['repaired']} of 3 stories" in printed.out
    assert "pass 2:" in printed.out.split("pass by pass")[1].split("One story of each")[0]
    assert report["verdicts"] == demo.verdicts(report)
    assert len(report["verdicts"]) == 3
    assert printed.out.count("wanted") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # The story that is shown is the model's own: a model after six steps tells none that is right.
    assert {report[mode]["accept_rate"] for mode in demo.MODES} == {0.0}

    # A second demo replaces the first, with the same numbers but those that measure the machine.
    assert cli.main(["demo", *small, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["repair"] == repair
    for mode in demo.MODES:
        assert {k: v for k, v in again[mode].items() if k != "tokens_per_second"} == {
            k: v for k, v in report[mode].items() if k != "tokens_per_second"
        }


def test_a_folder_that_is_no_demos_is_left_alone(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert cli.main(["demo", *small]) == 2
    assert "choose another paths.runs" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def measured(same: float, tpf: float, s_tpf: float) -> dict[str, Any]:
    rows = zip(demo.MODES, (1.0, same, 0.5), (1.0, tpf, s_tpf), strict=True)
    return {m: {"accept_rate": 0.9, "same_text": equal, "tokens_per_forward": t} for m, equal, t in rows}


def test_the_verdicts_follow_the_numbers():
    for report, ok in [
        (measured(1.0, 3.0, 3.1), [True, True, True]),
        (measured(0.99, 3.0, 3.1), [False, True, True]),
        (measured(1.0, 2.99, 3.1), [True, False, True]),
        (measured(1.0, 4.0, 4.0), [True, True, False]),
    ]:
        assert [verdict["ok"] for verdict in demo.verdicts(report).values()] == ok, report


def test_stories_are_judged_by_the_checker(monkeypatch: pytest.MonkeyPatch):
    """Right stories count, wrong ones do not."""
    asked = demo.prompts(seed=5)[:4]
    texts = [tell(slots, random.Random(0)) for slots in asked]
    texts[2] = texts[2].replace(asked[2].colour, "grey", 1)
    answers = iter(texts)

    class Stats:
        forwards, seconds = 5, 0.5

    class Engine:
        def encode(self, prompt: list[dict[str, str]]) -> list[int]:
            return [1]

        def generate(self, request: Any) -> Any:
            done = type("Completion", (), {})()
            done.text, done.token_ids, done.stats = next(answers), [1] * 20, Stats()
            return done

    engine: Any = Engine()
    told = demo.tell(engine, asked, lambda ids: demo.drafted_story(engine, None, ids))  # type: ignore[arg-type]
    assert (told.accepted, told.tokens) == (3, 80)
    assert [(story.text, story.forwards, story.seconds) for story in told.stories] == [(text, 5, 0.5) for text in texts]


def test_prompts_are_fixed():
    assert demo.prompts(seed=99) == demo.prompts(seed=99)
    rng = random.Random(99)
    assert demo.prompts(seed=99)[0] == draw_slots(rng)


class Repairing:
    """An engine that drops every word that stands twice and leaves other faults alone, in two passes."""

    eos_token_ids, mask_token_id, slots = (0,), 1, 8

    def __init__(self) -> None:
        self.words = ["<end>", "<mask>"]

    def tokenizer(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        self.words += [word for word in text.split() if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer(messages[0]["content"], add_special_tokens=False)["input_ids"]

    def decode_tokens(self, ids: list[int]) -> str:
        return "".join(f" {self.words[token]}" for token in ids if token)

    def answer(self, request: Any) -> tuple[list[int], list[tuple[int, int]]]:
        draft = request.draft
        gone = [i for i in range(len(draft) - 1) if draft[i] == draft[i + 1] != 0]
        kept = [token for i, token in enumerate(draft) if i not in gone]
        return kept + [0] * len(gone), [(len(request.prompt_ids) + i, draft[i]) for i in gone]

    def stream(self, request: Any) -> Any:
        tokens, deleted = self.answer(request)
        whole = request.prompt_ids + tokens
        yield Step(0, 0, whole, [], [], [None] * len(whole), 0.0, 0, [], deleted)
        yield Step(0, 1, whole, [], [], [None] * len(whole), 0.0, 0)

    def generate_batch(self, requests: list[Any]) -> list[Any]:
        stats = type("Stats", (), {"insertions": 0})
        return [type("Done", (), {"text": self.decode_tokens(self.answer(one)[0]), "stats": stats}) for one in requests]


def test_repairs_are_counted_and_the_passes_that_change_something_are_shown():
    engine: Any = Repairing()
    settings: Any = type("Settings", (), {"block_size": 96, "max_new_tokens": 128, "tau_accept": None})
    report, text = demo_repair.measure_repairs(engine, settings)
    stories = faulty_stories(demo_repair.N_FAULTY, seed=7)
    half = demo_repair.N_FAULTY // 2
    assert {name: report[name] for name in ("stories", "repaired", "dropped", "doubled")} == {
        "stories": 2 * half,
        "repaired": half,
        "dropped": 0,
        "doubled": half,
    }
    shown = next(faulty for faulty in stories if faulty.kind == "doubled")
    assert f"before:  {shown.faulty}" in text
    assert f"after:   {shown.story}" in text
    lines = [line for line in text.split("\n") if line.startswith("  pass")]
    words = shown.faulty.split()
    at = next(i for i in range(len(words)) if words[i] == words[i + 1])
    marked = " ".join([*words[max(0, at - demo_repair.AROUND) : at], f"-{words[at]}-", words[at + 1]])
    assert [line.partition(":  ... ")[0] for line in lines] == ["  pass 1"]
    assert marked in lines[0]


def test_a_draft_fills_whole_blocks():
    engine: Any = Repairing()
    settings: Any = type("Settings", (), {"block_size": 16})
    faulty: Faulty = faulty_stories(1, seed=0)[0]
    request = demo_repair.repair_request(engine, settings, faulty)
    assert (len(request.prompt_ids) + len(request.draft or [])) % 16 == 0
    assert engine.decode_tokens(request.draft).split() == faulty.faulty.split()
