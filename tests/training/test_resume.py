"""A run that dies, is stopped, runs out of disk or finds a damaged checkpoint ends as one that was never disturbed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hildanext import cli
from hildanext.config import Config
from hildanext.errors import CheckpointError, UsageError
from hildanext.training import checkpoint
from hildanext.training.checkpoint import list_checkpoints, newest_good
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.dpo import dpo
from hildanext.training.merge import best_checkpoints
from hildanext.training.run_folder import READ_BY, RunFolder
from support import forked
from support.resume import KILLS, assert_undisturbed, outcome, signal_in_step
from support.training import material, write_pairs

MakeRun = Callable[..., tuple[Config, Path]]


@pytest.fixture
def make_run(tmp_path: Path, tiny_base: Path) -> MakeRun:
    """A configuration with every kind of state, and the file that holds it."""
    return partial(make_config, tmp_path, tiny_base)


def make_config(folder: Path, base: Path, **sections: Any) -> tuple[Config, Path]:
    """Warm-up, drafts, embedding noise."""
    sections["noise"] = {"turns": 2, "embed_std": 0.3, "embed_steps": 4}
    sections["train"] = {"keep_last": 1, "keep_best": 1} | sections.get("train", {})
    config = material(folder, base, **sections)
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    return config, file


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The run of `make_run()` that nothing disturbed."""
    config, _ = make_config(tmp_path_factory.mktemp("reference"), tiny_base)
    convert_wsd(config, name="reference")
    return Path(config.paths.runs) / "reference"


def kill(moment: str, config: Config, file: Path, command: str = "convert-wsd") -> Path:
    """Start a run and kill it at that moment: its folder."""
    killed = forked.run([command, "--config", file], file.parent, KILLS[moment])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    return Path(config.paths.runs) / ("convert" if command == "convert-wsd" else command)


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_resumes_bit_for_bit(make_run: MakeRun, reference: Path, moment: str):
    config, file = make_run()
    run = kill(moment, config, file)
    for _, path in list_checkpoints(run / "checkpoints"):
        checkpoint.verify(path)  # what has a checkpoint's name is whole
    assert cli.main(["convert-wsd", "--config", str(file), "--resume"]) == 0
    assert_undisturbed(run, reference)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_optimizer_and_format_resumes(make_run: MakeRun, optimizer: str, dtype: str):
    config, file = make_run(train={"optimizer": optimizer, "weight_decay": 0.1}, model={"dtype": dtype})
    run = kill("in a step", config, file)
    convert_wsd(config, resume=True)
    convert_wsd(config, name="reference")
    assert_undisturbed(run, run.with_name("reference"))


def test_a_killed_tuning_resumes(make_run: MakeRun):
    converted = convert_wsd(make_run()[0])
    sections = {
        "model": {"base": converted["checkpoint"]},
        "sft": {"steps": 6, "complementary": True, "cap_weight": 0.3},
    }
    config, file = make_run(**sections)
    run = kill("in a step", config, file, "sft")
    sft(config, resume=True)
    sft(config, name="reference")
    assert_undisturbed(run, run.with_name("reference"))


def test_a_killed_adapter_resumes(make_run: MakeRun):
    config, file = make_run(lora={"rank": 4, "dropout": 0.1})
    run = kill("in a step", config, file)
    convert_wsd(config, resume=True)
    convert_wsd(config, name="reference")
    assert_undisturbed(run, run.with_name("reference"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_exits_0(make_run: MakeRun, reference: Path, name: str):
    config, file = make_run()
    stopped = forked.run(["convert-wsd", "--config", file, "--json"], file.parent, signal_in_step(3, name))
    assert stopped.returncode == 0, stopped.stderr
    assert f"{name}: saved step 3 of 6" in stopped.stderr
    assert "--resume" in stopped.stderr
    answer = json.loads(stopped.stdout)
    assert (answer["steps"], answer["finished"]) == (3, False)
    assert cli.main(["convert-wsd", "--config", str(file), "--resume"]) == 0
    assert_undisturbed(Path(config.paths.runs) / "convert", reference)


def test_what_does_not_touch_the_numbers_may_change(make_run: MakeRun, reference: Path):
    run = kill("in a step", *make_run())
    unread = {
        "decode": {"mode": "S_MODE"},
        "sft": {"steps": 7, "block_size": 8},
        "dpo": {"beta": 0.5},
        "evaluate": {"limit": 3},
        "calibrate": {"prompts": 3},
        "engine": {"slots": 2},
    }
    changed, _ = make_run(train={"keep_last": 3, "keep_best": 0, "save_every": 2}, **unread)
    convert_wsd(changed, resume=True)
    assert outcome(run).metrics == outcome(reference).metrics


@pytest.mark.parametrize("command", READ_BY)
def test_the_sections_that_may_not_change_are_those_that_are_read(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
):
    read: set[str] = set()
    look_up = Config.__getattribute__

    def spied(self: Config, name: str) -> Any:
        if name in Config.model_fields:
            read.add(name)
        return look_up(self, name)

    short = {"wsd": {"warmup_steps": 0, "stable_steps": 1, "decay_steps": 1}, "sft": {"steps": 1}}
    config, _ = make_run(**short)
    if command != "convert-wsd":
        short["model"] = {"base": convert_wsd(config)["checkpoint"]}
        config, _ = make_run(**short)
    if command == "dpo":
        tune = {"pairs": str(write_pairs(tmp_path / "pairs.jsonl")), "steps": 1, "lr_warmup_steps": 0}
        config, _ = make_run(**short, dpo=tune, lora={"rank": 2}, data={"seq_len": 56, "eval_share": 0.2})
    monkeypatch.setattr(Config, "__getattribute__", spied)
    {"convert-wsd": convert_wsd, "sft": sft, "dpo": dpo}[command](config, name="spied")
    assert read == READ_BY[command]


def test_what_touches_the_numbers_may_not(make_run: MakeRun):
    config, _ = make_run()
    convert_wsd(config)
    changed, _ = make_run(train={"seed": 5, "lr": 0.1})
    with pytest.raises(UsageError, match=r"differs from the run's in train\.seed, train\.lr; restore the values"):
        convert_wsd(changed, resume=True)
    with pytest.raises(UsageError, match="is a 'convert-wsd' run, not 'sft'"):
        sft(config, name="convert", resume=True)
    with pytest.raises(UsageError, match="already holds a run; continue it with --resume"):
        convert_wsd(config)
    with pytest.raises(UsageError, match="no run in"):
        convert_wsd(config, name="never", resume=True)


def test_a_finished_run_resumes_to_itself(make_run: MakeRun):
    config, _ = make_run()
    first = convert_wsd(config)
    before = {path: path.read_bytes() for path in (Path(first["checkpoint"])).iterdir()}
    again = convert_wsd(config, resume=True)
    assert again == first
    assert {path: path.read_bytes() for path in (Path(first["checkpoint"])).iterdir()} == before


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_damaged_checkpoint_is_passed_over(make_run: MakeRun, reference: Path, capsys: pytest.CaptureFixture[str]):
    config, _ = make_run(train={"keep_last": 3})
    convert_wsd(config)
    runs = Path(config.paths.runs)
    damage(runs / "convert" / "checkpoints" / "step-6" / "model.safetensors")
    (runs / "convert" / "checkpoints" / "step-4" / "trainer.safetensors").unlink()
    capsys.readouterr()
    convert_wsd(config, resume=True)
    said = capsys.readouterr().err
    assert re.search(
        r"step-6/model\.safetensors has \d+ bytes instead of \d+; the checkpoint is damaged; using step-2", said
    )
    assert re.search(r"step-4/trainer\.safetensors is missing", said)
    assert_undisturbed(runs / "convert", reference)


def test_without_a_whole_checkpoint_nothing_is_overwritten(make_run: MakeRun):
    config, file = make_run()
    convert_wsd(config)
    run = RunFolder(Path(config.paths.runs) / "convert")
    for _, path in list_checkpoints(run.checkpoints):
        damage(path / "trainer.json")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="no older checkpoint is complete"):
        convert_wsd(config, resume=True)
    assert cli.main(["convert-wsd", "--config", str(file), "--resume"]) == 1
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


# What of a checkpoint still fits on the disk when the second one is written, by what is written in turn.
FITS = {
    "the weights": ["config.json"],
    "the tokenizer": ["config.json", "model.safetensors"],
    "the optimizer": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
}


@pytest.mark.parametrize("what", FITS)
def test_a_full_disk_keeps_the_last_checkpoint(
    make_run: MakeRun,
    reference: Path,
    make_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
):
    disk = make_disk(4096)
    config, file = make_run(paths={"runs": str(disk)})
    checkpoints, save = disk / "convert" / "checkpoints", checkpoint.save_diffusion_lm

    def almost_full(*arguments: Any) -> None:
        if (first := checkpoints / "step-2").is_dir():
            room = sum((first / name).stat().st_size for name in FITS[what]) + 8192
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room))
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_diffusion_lm", almost_full)
        assert cli.main(["convert-wsd", "--config", str(file)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"hildanext convert-wsd: {checkpoints / 'step-4'}: cannot be written: ")
    assert "No space left on device" in last
    assert os.listdir(checkpoints) == ["step-2"]
    (disk / "filler").unlink()
    convert_wsd(config, resume=True)
    assert_undisturbed(disk / "convert", reference)


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(make_run: MakeRun, capsys: pytest.CaptureFixture[str]):
    """The newest is damaged; the run goes on from the one before and is stopped early: what it saves is kept."""
    config, file = make_run(train={"keep_last": 3})
    convert_wsd(config)
    checkpoints = Path(config.paths.runs) / "convert" / "checkpoints"
    damage(checkpoints / "step-6" / "model.safetensors")
    make_run(train={"keep_last": 1, "keep_best": 0})
    stopped = forked.run(["convert-wsd", "--config", file, "--resume"], file.parent, signal_in_step(1, "SIGTERM"))
    assert "SIGTERM: saved step 5 of 6" in stopped.stderr, stopped.stderr
    assert f"{checkpoints / 'step-6'}: removed, because the run continues from step 4" in stopped.stderr
    assert [step for step, _ in list_checkpoints(checkpoints)] == [5]
    checkpoint.verify(checkpoints / "step-5")


def test_who_reads_a_run_in_training_removes_nothing(make_run: MakeRun):
    """merge-topk while a checkpoint is being written."""
    config, _ = make_run()
    convert_wsd(config)
    run = RunFolder(Path(config.paths.runs) / "convert")
    (run.checkpoints / ".tmp-step-8").mkdir()
    best_checkpoints(run.path, 1)
    newest_good(run.checkpoints)
    assert (run.checkpoints / ".tmp-step-8").is_dir()
    convert_wsd(config, resume=True)
    assert not (run.checkpoints / ".tmp-step-8").exists()


STATES = {
    "a moment": ("exp_avg", torch.zeros(4, 6), {}, "meta"),
    "8 bits": ("state1", torch.zeros(4, 6, dtype=torch.uint8), {}, "meta"),
    "scales of 8 bits": ("absmax1", torch.zeros(1), {}, "meta"),
    "a table of 8 bits": ("qmap1", torch.zeros(256), {}, "meta"),
    "a row's variance": ("row_var", torch.zeros(4, 1), {}, "meta"),
    "a fused step": ("step", torch.zeros(()), {"fused": True}, "meta"),
    "a captured step": ("step", torch.zeros(()), {"fused": None, "capturable": True}, "meta"),
    "a step": ("step", torch.zeros(()), {"fused": None}, "cpu"),
}


def test_optimizer_state_goes_to_the_parameters_device():
    for what in STATES:
        key, value, group, device = STATES[what]
        parameter = torch.nn.Parameter(torch.empty(4, 6, device="meta"))
        optimizer = torch.optim.SGD([{"params": [parameter], **group}], lr=0.1)
        checkpoint.restore_optimizer(optimizer, {f"w|{key}": value}, {id(parameter): "w"})
        found = optimizer.state[parameter][key]
        assert (found.device.type, found.shape, found.dtype) == (device, value.shape, value.dtype), what


def test_a_folder_of_chat_templates_is_saved_and_checked(make_run: MakeRun, tmp_path: Path, tiny_base: Path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    config, _ = make_run(model={"base": str(base)})
    path = Path(convert_wsd(config)["checkpoint"])
    assert "additional_chat_templates/tools.jinja" in checkpoint.verify(path)["files"]
    damage(path / "additional_chat_templates" / "tools.jinja")
    with pytest.raises(CheckpointError, match=r"tools\.jinja has"):
        checkpoint.verify(path)


@pytest.mark.parametrize(("keep_last", "keep_best"), [(1, 0), (1, 2), (3, 1), (2, 3)])
def test_the_newest_and_the_best_are_kept(make_run: MakeRun, keep_last: int, keep_best: int):
    train = {"save_every": 1, "eval_every": 1, "keep_last": keep_last, "keep_best": keep_best, "lr": 0.03}
    config, _ = make_run(train=train, wsd={"stable_steps": 6})
    convert_wsd(config)
    run = RunFolder(Path(config.paths.runs) / "convert")
    losses = {row["step"]: row["eval_loss"] for row in run.read_metrics()}
    # Each save forgets what is neither among the newest nor among the best that are left.
    kept: set[int] = set()
    for step in range(1, 11):
        kept.add(step)
        best = sorted(kept, key=lambda one: (losses[one], one))[:keep_best]
        kept = set(sorted(kept)[-keep_last:]) | set(best)
    assert {step for step, _ in list_checkpoints(run.checkpoints)} == kept
    assert set(sorted(losses, key=lambda one: (losses[one], one))[:keep_best]) <= kept
