"""Several processes give the numbers of one: DDP, FSDP2, two hosts, a signal in between, checkpoints from any to any."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hildanext.config import Config, parse_config
from hildanext.errors import UsageError
from hildanext.model.policy import choose_policy
from hildanext.training import denoising, parallel
from hildanext.training.checkpoint import list_checkpoints, optimizer_tensors
from hildanext.training.convert import convert_wsd
from hildanext.training.dpo import dpo
from hildanext.training.parallel import whole_weights
from support import forked
from support.forked import Fault
from support.training import material, write_pairs

# `launched.py ARGUMENTS` is the command line; rank 0 sends the launcher $SIGNAL before its third step.
LAUNCHED = """
import os, signal, sys
from hildanext import cli
from hildanext.training import trainer

if (name := os.environ.get("SIGNAL")) and os.environ["RANK"] == "0":
    step_of, calls = trainer.Trainer.train_step, []

    def train_step(self, step):
        calls.append(step)
        if len(calls) == 3:
            os.kill(os.getppid(), signal.Signals[name])
        return step_of(self, step)

    trainer.Trainer.train_step = train_step
sys.exit(cli.main(sys.argv[1:]))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]  # its options end with "--": it takes abbreviated ones


class Host(NamedTuple):
    """Where one torchrun agent runs: a network namespace of its own, or loopback."""

    prefix: list[str]
    address: str
    interface: str


class Bench(NamedTuple):
    """A configuration, the file that holds it, and a run of one process that nothing disturbed."""

    config: Config
    file: Path
    script: Path
    name: str = "convert-wsd"  # the command

    def run(self, name: str) -> Path:
        return Path(self.config.paths.runs) / name

    def words(self, run: str, *options: str) -> list[str]:
        return [self.name, "--config", str(self.file), "--run", run, "--json", *options]

    def command(self, launcher: list[str], run: str, *options: str) -> list[str]:
        return [*launcher, str(self.script), *self.words(run, *options)]

    def two(self, run: str, *options: str, fault: Fault | None = None) -> subprocess.CompletedProcess[str]:
        """Two processes, forked: see `forked.run_group`."""
        return forked.run_group(2, self.words(run, *options), self.file.parent, fault)

    def launch(self, launcher: list[str], run: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = self.command(launcher, run, *options)
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)

    def half_of(self, name: str, copy: str) -> None:
        """A run that was killed after step 4 of 6: its folder without the last checkpoint."""
        shutil.copytree(self.run(name), self.run(copy))
        shutil.rmtree(self.run(copy) / "checkpoints" / "step-6")

    def resumed_here(self, name: str) -> Path:
        convert_wsd(self.config, name, resume=True)
        return self.run(name)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Bench:
    folder = tmp_path_factory.mktemp("parallel")
    config = material(
        folder, tiny_base,
        noise={"turns": 2, "embed_std": 0.3, "embed_steps": 4},
        train={"micro_batch": 1, "keep_last": 3, "keep_best": 0},
    )  # fmt: skip
    file, script = folder / "config.json", folder / "launched.py"
    file.write_text(config.model_dump_json())
    script.write_text(LAUNCHED)
    convert_wsd(config, "one")
    return Bench(config, file, script)


def out_of_memory(since: int) -> None:
    """A fault: more than a row is too much for rank 1, in the backward pass, from sample `since` on."""
    if os.environ["RANK"] != "1":
        return
    forward = denoising.DenoisingModule.forward

    def short(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")

    def narrow(self: Any, batch: Any, *rest: Any) -> Any:
        found = forward(self, batch, *rest)
        if torch.is_grad_enabled() and len(batch.samples) > 1 and min(batch.samples) >= since:
            found.loss.total.register_hook(short)
        return found

    denoising.DenoisingModule.forward = narrow  # type: ignore[method-assign]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_the_same(found: Path, expected: Path, steps: int = 6) -> None:
    """Losses within 1e-5, step by step; after the last one the weights too."""
    rows, others = metrics(found), metrics(expected)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row, other in zip(rows, others, strict=False):
        for key in ("loss", "m2t", "t2t", "m2t_ce", "grad_norm", "masked_accuracy", "tokens_seen", "lr", "block_size"):
            assert row[key] == pytest.approx(other[key], abs=1e-5, rel=1e-5), (row["step"], key)
        assert row.get("eval_loss") == pytest.approx(other.get("eval_loss"), abs=1e-5)
    if steps == 6:
        one, two = (load_file(run / "checkpoints" / "step-6" / "model.safetensors") for run in (found, expected))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on stdout, whoever else ran."""
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def torchrun(n: int) -> list[str]:
    return [*TORCHRUN, "--standalone", "--nproc-per-node", str(n), "--"]


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_give_the_losses_of_one(bench: Bench, sharding: str) -> None:
    done = bench.two(f"two-{sharding}", "--set", f"train.sharding={sharding}")
    assert done.returncode == 0, done.stderr
    assert answer(done)["finished"]
    assert_the_same(bench.run(f"two-{sharding}"), bench.run("one"))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_four_processes_give_the_losses_of_one(bench: Bench, sharding: str) -> None:
    done = bench.launch(torchrun(4), f"four-{sharding}", "--set", f"train.sharding={sharding}")
    assert done.returncode == 0, done.stderr
    assert answer(done)["finished"]
    assert_the_same(bench.run(f"four-{sharding}"), bench.run("one"))


def test_all_processes_make_room_for_one(bench: Bench) -> None:
    """One of two is out of memory in the first step's backward: both go on in smaller micro-batches, with the same numbers."""
    done = bench.two("short", "--set", "train.micro_batch=2", fault=partial(out_of_memory, 0))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert said == ["step 1: out of memory; train.micro_batch 2 -> 1, 4 forwards a step, the same 4 rows"]
    assert_the_same(bench.run("short"), bench.run("one"))


def test_out_of_memory_later_stops_all_processes(bench: Bench) -> None:
    """Gradients are under way then. The line names what --resume takes."""
    done = bench.two("late", "--set", "train.micro_batch=2", fault=partial(out_of_memory, 12))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hildanext convert-wsd:")]
    assert line.startswith(
        "hildanext convert-wsd: step 4: out of memory (CUDA out of memory. Tried to allocate 1.16 GiB.); lower "
        "train.micro_batch (2) or set train.gradient_checkpointing or set train.sharding to 'fsdp2', and continue with --resume; or"
    )
    assert [step for step, _ in list_checkpoints(bench.run("late") / "checkpoints")] == [2]


GATED = {"rank": 4, "gate": True, "draft_head": 8}


@pytest.mark.parametrize(("lora", "sharding"), [({"rank": 4}, "none"), (GATED, "none"), (GATED, "fsdp2")])
def test_two_processes_train_an_adapter_as_one_does(
    bench: Bench, tmp_path: Path, lora: dict[str, Any], sharding: str
) -> None:
    raw = bench.config.model_dump(mode="json")
    raw["wsd"] |= {"warmup_steps": 1, "stable_steps": 1, "decay_steps": 1}
    if lora is GATED:
        raw["noise"] = {"anchors": 4, "edit_share": 0.3}
        raw["wsd"] |= {"start_block": 2, "peak_block": 3, "final_block": 3}
    raw["lora"], raw["paths"] = lora, raw["paths"] | {"runs": str(tmp_path / "runs")}
    adapted = Bench(parse_config(raw), tmp_path / "config.json", bench.script)
    adapted.file.write_text(json.dumps(raw))
    convert_wsd(adapted.config, "adapter-one")
    done = adapted.two("adapter-two", "--set", f"train.sharding={sharding}")
    assert done.returncode == 0, done.stderr
    assert_the_same(adapted.run("adapter-two"), adapted.run("adapter-one"), steps=3)
    one, two = (
        load_file(adapted.run(f"adapter-{n}") / "checkpoints" / "step-3" / "adapter_model.safetensors")
        for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def preferring(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same of `dpo`, from the checkpoint that one process made."""
    folder = tmp_path_factory.mktemp("preferring")
    raw = bench.config.model_dump(mode="json")
    raw["model"]["base"] = str(bench.run("one") / "checkpoints" / "step-6")
    raw["data"] |= {"seq_len": 56, "eval_share": 0.2}
    raw |= {"lora": {"rank": 4}, "paths": raw["paths"] | {"runs": str(folder)}}
    raw["dpo"] = {"pairs": str(write_pairs(folder / "pairs.jsonl")), "steps": 3, "lr": 0.01, "lr_warmup_steps": 0}
    found = Bench(parse_config(raw), folder / "config.json", bench.script, "dpo")
    found.file.write_text(json.dumps(raw))
    dpo(found.config, "one")
    return found


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_learn_the_preferences_of_one(preferring: Bench, sharding: str) -> None:
    """The reference too is gathered from shards, and the policy is back in them before the gradients are."""
    done = preferring.two(sharding, "--set", f"train.sharding={sharding}")
    assert done.returncode == 0, done.stderr
    rows, others = metrics(preferring.run(sharding)), metrics(preferring.run("one"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, other in zip(rows, others, strict=True):
        for key in ("loss", "reward_margin", "grad_norm", "eval_loss", "eval_margin"):
            assert (key in row) == (key in other)
            if key in other:
                assert row[key] == pytest.approx(other[key], abs=1e-5, rel=1e-5), (row["step"], key)
    assert rows[-1]["reward_margin"] != 0
    one, two = (
        load_file(preferring.run(run) / "checkpoints" / "step-3" / "adapter_model.safetensors")
        for run in (sharding, "one")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-4)


def test_a_signal_to_the_launcher_saves_and_one_process_goes_on(bench: Bench) -> None:
    """Two processes; both stop at the same step, though one was told later; what they saved resumes on one."""
    done = bench.launch(torchrun(2), "two", SIGNAL="SIGTERM")
    assert "SIGTERM: saved step 3 of 6" in done.stderr, done.stderr
    assert (answer(done)["steps"], answer(done)["finished"]) == (3, False)
    assert_the_same(bench.run("two"), bench.run("one"), steps=3)
    assert [step for step, _ in list_checkpoints(bench.run("two") / "checkpoints")] == [2, 3]
    assert_the_same(bench.resumed_here("two"), bench.run("one"))


@pytest.fixture(scope="module")
def sharded(bench: Bench) -> Path:
    """A run of two processes, sharded."""
    done = bench.two("sharded", "--set", "train.sharding=fsdp2")
    assert done.returncode == 0, done.stderr
    return bench.run("sharded")


def test_one_process_takes_up_a_sharded_checkpoint(bench: Bench, sharded: Path) -> None:
    bench.half_of("sharded", "unsharded")
    record = json.loads((bench.run("unsharded") / "config.json").read_text())
    changed = parse_config(record["config"])
    convert_wsd(changed, "unsharded", resume=True)  # FSDP2 in one process shards nothing
    assert_the_same(bench.run("unsharded"), bench.run("one"))


@pytest.mark.slow
def test_fsdp2_under_accelerate_launch(bench: Bench) -> None:
    """Sharded parameters, the same numbers."""
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1"),
        *("--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"),
    ]
    done = bench.launch(launcher, "launched", "--set", "train.sharding=fsdp2")
    assert done.returncode == 0, done.stderr
    assert answer(done)["finished"]
    assert_the_same(bench.run("launched"), bench.run("one"))


@pytest.mark.parametrize("saved_by", ["one", "sharded"])
def test_fsdp2_takes_up_a_checkpoint(bench: Bench, sharded: Path, saved_by: str) -> None:
    """Weights and optimizer that one process or two sharded ones saved go into the shards of two."""
    bench.half_of(saved_by, f"{saved_by}-on")
    done = bench.two(f"{saved_by}-on", "--resume", "--set", "train.sharding=fsdp2")
    assert done.returncode == 0, done.stderr
    assert_the_same(bench.run(f"{saved_by}-on"), bench.run("one"))


def test_only_who_writes_keeps_what_is_gathered() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        model[1].weight = model[0].weight
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert whole_weights(model, keep=False) == optimizer_tensors(optimizer, names, keep=False) == {}
        found, moments = whole_weights(model, keep=True), optimizer_tensors(optimizer, names, keep=True)
        assert not any(isinstance(value, DTensor) for value in (*found.values(), *moments.values()))
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert found["0.weight"] is found["1.weight"]
        assert {name.partition("|")[0] for name in moments} == set(names.values())
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two network namespaces joined by a cable where this user may make them, else loopback twice."""
    names = [f"hilda{os.getpid()}-{i}" for i in range(2)]
    ends = [f"hn{os.getpid() % 10**6}-{i}" for i in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("-n", name, "addr", "add", f"10.213.0.{i + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [
            Host(["ip", "netns", "exec", name], f"10.213.0.{i + 1}", end)
            for i, (name, end) in enumerate(zip(names, ends, strict=True))
        ]
    except (OSError, subprocess.CalledProcessError):
        yield [Host([], "127.0.0.1", "lo")] * 2
    finally:
        for name in names:
            if os.path.exists(f"/run/netns/{name}"):
                ip("netns", "del", name)


@pytest.mark.slow
def test_two_hosts_take_up_what_one_process_saved(bench: Bench, hosts: list[Host]) -> None:
    """Two torchrun agents that share no network but a cable, one process each."""
    bench.half_of("one", "hosts")
    port = free_port()
    agents = []
    for rank, host in enumerate(hosts):
        launcher = [
            *host.prefix, *TORCHRUN, "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
            "--master-addr", hosts[0].address, "--master-port", str(port), "--",
        ]  # fmt: skip
        env = os.environ | {"GLOO_SOCKET_IFNAME": host.interface}
        command = bench.command(launcher, "hosts", "--resume")
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    outputs = [agent.communicate() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert outputs[1][0] == ""
    assert json.loads(outputs[0][0])["finished"]
    assert_the_same(bench.run("hosts"), bench.run("one"))


def test_a_batch_that_cannot_be_shared_is_one_line(bench: Bench) -> None:
    done = bench.two("odd", "--set", "train.rows_per_step=3")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = {line for line in done.stderr.splitlines() if line.startswith("hildanext convert-wsd:")}
    assert lines == {
        "hildanext convert-wsd: 'train.rows_per_step': 3 rows in micro-batches of 1 cannot be divided evenly among 2 processes; "
        "use a multiple of 2"
    }
    assert not bench.run("odd").exists()


@pytest.mark.parametrize("plugin", ["FSDP", "MEGATRON_LM", "DEEPSPEED"])
def test_plugins_of_accelerate_are_refused(plugin: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(
        UsageError, match=f"accelerate's {plugin} plugin; launch without a plugin and set train.sharding to 'fsdp2'"
    ):
        parallel.start(choose_policy("cpu", "float32"), parse_config({}).train)
