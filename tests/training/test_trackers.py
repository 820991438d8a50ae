"""Trackers get what metrics.jsonl gets, also after a resume; what a tracker cannot do costs a message, not the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hildanext.config import Config, parse_config
from hildanext.errors import ConfigError
from hildanext.training import trackers
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.dpo import dpo
from hildanext.training.preflight import preflight
from hildanext.training.run_folder import RunFolder
from hildanext.training.trackers import public_settings
from hildanext.training.trainer import Trainer
from support.training import material, write_pairs

Numbers = dict[str, dict[int, float]]  # name -> step -> value


@pytest.fixture
def make(tmp_path: Path, tiny_base: Path) -> Callable[..., Config]:
    def config(*names: str, **sections: Any) -> Config:
        sections["train"] = {"trackers": list(names)} | sections.get("train", {})
        return material(tmp_path, tiny_base, **sections)

    return config


def written(run: Path) -> Numbers:
    """The numbers of metrics.jsonl."""
    found: Numbers = {}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                found.setdefault(name, {})[row["step"]] = value
    return found


def events(run: Path) -> Numbers:
    """What TensorBoard itself shows of a run; a point that is doubled fails."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found: Numbers = {}
    for name in read.Tags()["scalars"]:
        points = [(event.step, event.value) for event in read.Scalars(name)]
        assert len({step for step, _ in points}) == len(points), name
        found[name] = dict(points)
    return found


def assert_equal(found: Numbers, expected: Numbers) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert found[name] == pytest.approx(points, rel=1e-6), name  # TensorBoard keeps float32


class ToolRun:
    """A run of a tool: its points in the order in which they came."""

    def __init__(self, name: str) -> None:
        self.name = self.id = name
        self.points: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] | None = None

    @property
    def info(self) -> ToolRun:
        return self

    @property
    def run_id(self) -> str:
        return self.id

    def numbers(self) -> Numbers:
        found: Numbers = {}
        steps = [step for step, _ in self.points]
        assert len(set(steps)) == len(steps), f"doubled: {steps}"
        for step, values in self.points:
            for name, value in values.items():
                found.setdefault(name, {})[step] = value
        return found


class Tool(accelerate_tracking.GeneralTracker):
    """In place of accelerate's tracker of a tool on a server."""

    name = "fake"
    requires_logging_directory = False
    runs: dict[str, ToolRun]
    fails: Callable[[str, int], None]

    def __init__(self, project: str, run_id: str | None = None, **options: Any) -> None:
        super().__init__()
        self.known = run_id
        self.finished = False

    @property
    def tracker(self) -> ToolRun:
        return self.run

    def start(self) -> None:
        print("a tool that prints")
        type(self).fails("start", 0)
        self.run = self.runs[self.known] if self.known else ToolRun(f"run-{len(self.runs)}")
        self.runs[self.run.id] = self.run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.run.settings = values

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        assert step is not None
        type(self).fails("log", step)
        self.run.points.append((step, values))

    def finish(self) -> None:
        type(self).fails("finish", 0)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Tool]]:
    """MLflow, which continues runs, and comet_ml, which does not, as a fake that is installed."""
    fake: type[Tool] = type("Fake", (Tool,), {"runs": {}, "fails": staticmethod(lambda what, step: None)})
    for name in ("mlflow", "comet_ml"):
        monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, name, fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: json.__spec__)
    return fake


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run ends with an error in the step after `step`."""

    def train_step(self: Trainer, number: int) -> dict[str, Any]:
        if number == step:
            raise RuntimeError("the power is gone")
        return original(self, number)

    original = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_tensorboard_shows_metrics_jsonl(make: Callable[..., Config]) -> None:
    result = convert_wsd(make("tensorboard"))
    run = Path(result["run"])
    found = events(run)
    assert_equal(found, written(run))
    assert set(found["loss"]) == {1, 2, 3, 4, 5, 6}
    assert set(found["eval_loss"]) == {2, 4, 6}
    settings = next((run / "tensorboard").glob("*/hparams.yml")).read_text()
    assert "train.lr: 0.003" in settings
    assert "server" not in settings


def test_tensorboard_after_a_resume(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends at step 5, its last checkpoint is of step 4: the points of step 5 come again."""
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(RuntimeError):
            convert_wsd(make("tensorboard"))
    run = Path(make().paths.runs) / "convert"
    assert max(events(run)["loss"]) == 5
    # Event files are read in the order of their names, which begin with the second; a resume takes longer than one.
    (first,) = (run / "tensorboard").glob("events.*")
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0", 1)))
    convert_wsd(make("tensorboard"), resume=True)
    assert_equal(events(run), written(run))
    assert set(events(run)["loss"]) == {1, 2, 3, 4, 5, 6}


def test_every_command_tracks(make: Callable[..., Config], tool: type[Tool], tmp_path: Path, capsys: Any) -> None:
    start = convert_wsd(make("mlflow"))["checkpoint"]
    tuned = make("mlflow", model={"base": start}, sft={"steps": 2})
    sft(tuned)
    pairs = str(write_pairs(tmp_path / "pairs.jsonl"))
    preferring = make(
        "mlflow",
        model={"base": start},
        lora={"rank": 2},
        data={"seq_len": 56, "eval_share": 0.2},
        dpo={"pairs": pairs, "steps": 2},
    )
    dpo(preferring)
    for name, run in zip(("convert", "sft", "dpo"), tool.runs.values(), strict=True):
        assert_equal(run.numbers(), written(Path(preferring.paths.runs) / name))
    assert tool.runs["run-2"].settings == public_settings(preferring, "dpo")
    assert "a tool that prints" not in capsys.readouterr().out  # stdout is the command's result


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_continues_the_tools_run(
    make: Callable[..., Config], tool: type[Tool], monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(RuntimeError):
            convert_wsd(make("mlflow", "comet_ml"))
    run = Path(make().paths.runs) / "convert"
    first, second = tool.runs.values()
    assert [step for step, _ in first.points] == [1, 2, 3, 4, 5]
    if killed:  # then nobody wrote how far the tool is
        record = json.loads((run / "trackers.json").read_text())
        record["mlflow"]["step"] = None
        (run / "trackers.json").write_text(json.dumps(record))
    convert_wsd(make("mlflow", "comet_ml"), resume=True)
    *_, third = tool.runs.values()
    assert len(tool.runs) == 3
    assert [step for step, _ in first.points] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in second.points] == [1, 2, 3, 4, 5]
    assert_equal(third.numbers(), written(run))  # a tool that cannot continue gets the whole run again
    measured = {"tokens_per_second", "peak_memory_mb"}
    assert_equal(
        *({k: v for k, v in numbers.items() if k not in measured} for numbers in (first.numbers(), written(run)))
    )


def test_a_tracker_may_come_later(
    make: Callable[..., Config], tool: type[Tool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(RuntimeError):
            convert_wsd(make())
    result = convert_wsd(make("mlflow"), resume=True)
    assert_equal(tool.runs["run-0"].numbers(), written(Path(result["run"])))


def failing(what: str, step: int) -> Callable[[str, int], None]:
    def fail(now: str, at: int) -> None:
        if (now, at) == (what, step):
            raise ConnectionError("the server is gone\nand more lines")

    return fail


def test_a_failing_tracker_does_not_end_the_run(
    make: Callable[..., Config], tool: type[Tool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.fails = staticmethod(failing("log", 3))
    result = convert_wsd(make("mlflow", train={"save_every": 4}))
    assert result["finished"]
    told = [line for line in capsys.readouterr().err.splitlines() if "train.trackers" in line]
    assert told == [
        "train.trackers: 'mlflow' failed after step 2 (ConnectionError: the server is gone); the run goes on without it, "
        "and --resume sends it the rest"
    ]
    (run,) = tool.runs.values()
    assert [step for step, _ in run.points] == [1, 2]
    tool.fails = staticmethod(failing("finish", 0))
    convert_wsd(make("mlflow", train={"save_every": 4}), resume=True)
    assert_equal(run.numbers(), written(Path(result["run"])))
    assert "failed after step 6 (ConnectionError: the server is gone)" in capsys.readouterr().err


def test_a_tracker_that_cannot_start_is_named_before_the_run(make: Callable[..., Config], tool: type[Tool]) -> None:
    tool.fails = staticmethod(failing("start", 0))
    line = (
        r"'train\.trackers': 'mlflow' cannot start \(ConnectionError: the server is gone\); set it up, or leave it out"
    )
    with pytest.raises(ConfigError, match=f"^{line}$"):
        convert_wsd(make("mlflow"))
    assert not (Path(make().paths.runs) / "convert" / "config.json").exists()
    convert_wsd(make())


def test_a_missing_package_is_named_before_anything(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = make("comet_ml", lora={"rank": 2}, dpo={"pairs": "pairs.jsonl"})
    line = r"^'train\.trackers': 'comet_ml' needs the package comet-ml, which is not installed: pip install comet-ml$"
    for call in (convert_wsd, sft, dpo, partial(preflight, command="sft", card=None, memory_gb=None, measured=False)):
        with pytest.raises(ConfigError, match=line):
            call(config)
    assert not Path(config.paths.runs).exists()


def test_unknown_trackers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'train\.trackers\.0': must be 'tensorboard', 'wandb'"):
        parse_config({"train": {"trackers": ["excel"]}})


def test_settings_hold_no_secrets() -> None:
    paths = {
        "https://user:word@host/a.jsonl?signature=secret#x": "https://host/a.jsonl",
        "s3://bucket/**/*.parquet": "s3://bucket/**/*.parquet",
        "local/a?.jsonl": "local/a?.jsonl",
    }
    config = parse_config(
        {
            "data": {"sources": [{"kind": "instruct", "path": path} for path in paths]},
            "dpo": {"pairs": "https://host/pairs.jsonl?token=secret"},
            "jobs": {"database": "postgresql+psycopg://user:word@host/db"},
        }
    )
    settings = public_settings(config, "dpo")
    assert [source["path"] for source in json.loads(str(settings["data.sources"]))] == list(paths.values())
    assert settings["dpo.pairs"] == "https://host/pairs.jsonl"
    assert settings["train.trackers"] == "[]"
    assert settings["lora.rank"] == "null"
    assert not [value for value in settings.values() if "secret" in str(value) or "word" in str(value)]


def test_a_run_without_trackers_has_no_files_of_them(make: Callable[..., Config]) -> None:
    run = RunFolder(Path(convert_wsd(make())["run"]))
    assert not run.trackers.exists()
    assert not (run.path / "tensorboard").exists()
