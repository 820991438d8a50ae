"""DeepSpeed's ZeRO under accelerate: the numbers of one plain process, checkpoints from either to the other, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file

from hildanext import parallel, policy, zero
from hildanext.config import Config, TrainConfig
from hildanext.convert import convert_wsd
from hildanext.dpo import dpo
from hildanext.errors import UsageError
from test_dpo import preferring
from test_parallel import answer, assert_the_same, free_port
from training import material

# Importing DeepSpeed takes seconds: a process does several runs. `many.py JOBS`; refusals and partition sizes go to stdout.
MANY = """
import json, os, sys
from pathlib import Path
from hildanext import zero
from hildanext.config import load_config
from hildanext.convert import convert_wsd
from hildanext.dpo import dpo
from hildanext.errors import HildaError

rank, step, backward = os.environ["RANK"], zero.Zero.step, zero.Zero.backward
seen = {}

def stepped(self):
    step(self)
    state = self.base.state.values()
    seen["share"] = sum(s["exp_avg"].numel() for s in state) / sum(p.numel() for p in self.parameters)
    seen["steps"] = seen.get("steps", 0) + 1

def poisoned(self, loss, sync_gradients=True):
    spoil = seen.get("poison") and rank == "1" and seen.get("steps") == 2
    backward(self, loss * float("nan") if spoil else loss, sync_gradients)

zero.Zero.step, zero.Zero.backward = stepped, poisoned
for job in json.loads(Path(sys.argv[1]).read_text()):
    seen = {"poison": job["poison"]}
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(job["stage"])
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = job["offload"]
    try:
        {"convert": convert_wsd, "dpo": dpo}[job["command"]](load_config(job["file"]), job["run"], job["resume"])
    except HildaError as error:
        seen["error"] = str(error)
    if rank == "0":
        Path(job["out"]).write_text(json.dumps(seen))
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--dynamo_backend=no"]
needs_deepspeed = pytest.mark.skipif(
    not is_deepspeed_available(), reason="deepspeed is not installed; see make test-deepspeed"
)


class Bench(NamedTuple):
    folder: Path
    base: Path

    def config(self, **sections: Any) -> Config:
        train = {"micro_batch": 1, "keep_last": 3, "keep_best": 0} | sections.pop("train", {})
        noise = {"turns": 2, "embed_std": 0.3, "embed_steps": 4}
        return material(self.folder, self.base, noise=noise, train=train, **sections)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def job(self, run: str, config: Config, **changes: Any) -> dict[str, Any]:
        file = self.folder / f"{run}.json"
        file.write_text(config.model_dump_json())
        job = {"command": "convert", "stage": 2, "offload": "none", "resume": False, "poison": False}
        return job | {"run": run, "file": str(file), "out": str(file.with_suffix(".seen"))} | changes

    def many(self, n: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Runs in n processes, one after the other; what each run saw."""
        script, listed = self.folder / "many.py", self.folder / "jobs.json"
        script.write_text(MANY)
        listed.write_text(json.dumps(jobs))
        done = launch(n, str(script), str(listed))
        assert done.returncode == 0, done.stderr
        return [json.loads(Path(job["out"]).read_text()) for job in jobs]


def launch(n: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, "--use_deepspeed", "--zero_stage=2", f"--num_processes={n}", "--mixed_precision=no"]
    command += [f"--main_process_port={free_port()}", *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("zero"), tiny_base)


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def half_of(bench: Bench, name: str, copy: str) -> None:
    """A run that was killed after step 4 of 6."""
    shutil.copytree(bench.run(name), bench.run(copy))
    shutil.rmtree(bench.run(copy) / "checkpoints" / "step-6")


def figures(run: Path, *names: str) -> list[list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    return [[row[name] for name in names] for row in rows]


@needs_deepspeed
def test_two_processes_give_what_one_plain_process_gives(bench: Bench) -> None:
    """Both stages; a plain run's checkpoint taken up and the other way; bf16, adapters, dpo; a gradient that is no number."""
    plain = bench.config()
    adapter = bench.config(lora={"rank": 4}, model={"dtype": "bfloat16"}, train={"gradient_checkpointing": True})
    converted = Path(convert_wsd(plain, "plain")["checkpoint"])
    prefer = preferring(bench.folder, converted, train={"micro_batch": 1})
    convert_wsd(adapter, "adapter")
    dpo(prefer, "dpo")
    half_of(bench, "plain", "taken-up")
    saw = bench.many(
        2,
        [
            bench.job("first", plain, stage=1),
            bench.job("taken-up", plain, resume=True),
            bench.job("adapter-zero", adapter),
            bench.job("dpo-zero", prefer, command="dpo"),
            bench.job("poisoned", plain, poison=True),
        ],
    )
    assert [one["share"] for one in saw] == [0.5] * 5  # of the optimizer's state, in one of two processes
    assert_the_same(bench.run("first"), bench.run("plain"))
    assert_the_same(bench.run("taken-up"), bench.run("plain"))
    for name, keys in (("adapter", ("loss", "grad_norm")), ("dpo", ("loss", "reward_margin"))):
        found, expected = figures(bench.run(f"{name}-zero"), *keys), figures(bench.run(name), *keys)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert saw[4]["steps"] == 2
    assert "step 3: the gradient is nan" in saw[4]["error"]  # of both processes, before the update
    half_of(bench, "first", "left")
    convert_wsd(plain, "left", resume=True)
    assert_the_same(bench.run("left"), bench.run("plain"))
    one, two = (load_file(bench.run(n) / "checkpoints" / "step-6" / "trainer.safetensors") for n in ("plain", "first"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


@needs_deepspeed
def test_four_processes_by_the_command_line_and_one_that_goes_on(bench: Bench) -> None:
    plain = bench.config()
    if not bench.run("plain").exists():
        convert_wsd(plain, "plain")
    file = bench.folder / "four.json"
    file.write_text(plain.model_dump_json())
    done = launch(4, "-m", "hildanext.cli", "convert-wsd", "--config", str(file), "--run", "four", "--json")
    assert done.returncode == 0, done.stderr
    assert answer(done)["finished"]
    assert_the_same(bench.run("four"), bench.run("plain"))
    half_of(bench, "four", "alone")
    (saw,) = bench.many(1, [bench.job("alone", plain, resume=True)])
    assert saw["share"] == 1.0
    assert_the_same(bench.run("alone"), bench.run("plain"))


@needs_deepspeed
def test_a_plain_command_does_not_let_it_speak_on_stdout(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving imports DeepSpeed where it is installed, and without a GPU that writes a warning to stdout."""
    monkeypatch.delenv("DS_ACCELERATOR")
    file = bench.folder / "spoken.json"
    file.write_text(bench.config().model_dump_json())
    command = [sys.executable, "-m", "hildanext.cli", "convert-wsd", "--config", str(file), "--run", "spoken", "--json"]
    assert answer(subprocess.run(command, capture_output=True, text=True))["finished"]


CPU = policy.choose_policy("cpu", "float32")
FP16 = CPU._replace(compute=torch.float16)


@pytest.mark.parametrize(
    ("train", "chosen", "env", "line"),
    [
        ({"sharding": "fsdp2"}, CPU, {}, "'train.sharding': fsdp2"),
        ({"optimizer": "adafactor"}, CPU, {}, "'train.optimizer': adafactor"),
        ({}, FP16, {}, "'model.dtype': float16"),
        ({}, CPU, {"ACCELERATE_USE_CPU": "true"}, "leave '--cpu' and 'use_cpu' out"),
        ({}, CPU, {"LOCAL_RANK": "-1"}, "outside a launch"),
        ({}, CPU, {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "true"}, "accelerate's FSDP plugin"),
    ],
)
def test_what_cannot_work_is_one_line(
    monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], chosen: policy.Policy, env: dict[str, str], line: str
) -> None:
    monkeypatch.setattr("hildanext.zero.is_deepspeed_available", lambda: True)
    monkeypatch.setattr("hildanext.zero.compare_versions", lambda *words: False)
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=line) as error:
        parallel.start(chosen, TrainConfig.model_validate(train))
    assert "\n" not in str(error.value)


def test_a_launch_without_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hildanext.zero.is_deepspeed_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"not installed; pip install 'hildanext\[deepspeed\]'"):
        parallel.start(CPU, TrainConfig())


@pytest.mark.parametrize(
    ("config", "device", "line"),
    [
        ({"zero_optimization": {"stage": 3}}, "cpu", "zero_stage 3 is not supported"),
        ({"zero_optimization": {"stage": 0}}, "cpu", "zero_stage 0 is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "cpu", "offload_optimizer"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "cpu", "a section 'optimizer'"),
        ({"zero_optimization": {"stage": 2}}, "cuda", "'model.device': 'cpu', but DeepSpeed runs on 'cuda'"),
    ],
)
def test_a_deepspeed_configuration_that_cannot_be_used(config: dict[str, Any], device: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        zero.configure(stand_in(config, device), CPU, TrainConfig())


def test_batch_precision_and_clipping_are_ours() -> None:
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_accumulation_steps": 8}
    zero.configure(stand_in(config, "cpu"), CPU, TrainConfig(rows_per_step=8, micro_batch=2, clip_norm=0.5))
    assert not config["bf16"]["enabled"]
    assert (config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (2, 4)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (1, 0.5)


def stand_in(config: dict[str, Any], device: str) -> Any:
    """As much of an Accelerator as `configure` looks at."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return SimpleNamespace(state=state, device=torch.device(device), num_processes=2, gradient_accumulation_steps=8)
