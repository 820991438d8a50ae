"""QLoRA: frozen weights quantized by bitsandbytes, an adapter trained beside them and served with the base as it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hildanext import cli
from hildanext.errors import ConfigError, UsageError
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.quantized import check_quantized
from hildanext.training.convert import convert_wsd
from support.training import CONVERT, job, material, trainer_for

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
KINDS = {"int8": torch.int8, "nf4": torch.uint8}


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_beside_a_quantized_base(
    tmp_path: Path, tiny_base: Path, kind: str, dtype: str, capfd: pytest.CaptureFixture[str]
):
    lora = {"rank": 4, "base": kind}
    config = material(tmp_path, tiny_base, lora=lora, model={"dtype": dtype}, train={"lr": 0.02})
    trainer, lm = trainer_for(config, job(4), CONVERT)
    layers = {n: p for n, p in lm.model.named_parameters() if ".layers." in n and n.endswith("base_layer.weight")}
    assert len(layers) == 14
    assert {p.dtype for p in layers.values()} == {KINDS[kind]}
    before = {name: value.clone() for name, value in layers.items()}
    losses = [trainer.train_step(step)["m2t_ce"] for step in range(8)]
    assert sum(losses[4:]) < sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in layers.items())
    assert "MatMul8bitLt" not in capfd.readouterr().err


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_served_with_the_base_as_it_is(tmp_path: Path, tiny_base: Path, kind: str):
    config = material(tmp_path, tiny_base, lora={"rank": 4, "base": kind}, train={"lr": 0.02})
    done = convert_wsd(config)
    stored = json.loads((Path(done["checkpoint"]) / "config.json").read_text())
    assert "quantization_config" not in stored
    lm, _ = load_diffusion_lm(config.model.model_copy(update={"base": done["checkpoint"]}))
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}
    assert convert_wsd(config, resume=True) == done


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_adapter_learns_beside_a_quantized_base(tmp_path: Path, tiny_base: Path, kind: str):
    """Its clean rows are the quantized base's own, and what it trained is served with the base as it is."""
    lora = {"rank": 4, "base": kind, "gate": True, "draft_head": 8}
    wsd = {"start_block": 2, "peak_block": 3, "final_block": 3}
    config = material(tmp_path, tiny_base, lora=lora, noise={"anchors": 8}, wsd=wsd, train={"lr": 0.02})
    done = convert_wsd(config)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "convert" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["m2t_ce"] < rows[0]["m2t_ce"]
    stored = json.loads((Path(done["checkpoint"]) / "config.json").read_text())
    assert "quantization_config" not in stored
    lm, _ = load_diffusion_lm(config.model.model_copy(update={"base": done["checkpoint"]}))
    assert lm.gated
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "gate"), [("int8", False), ("nf4", False), ("nf4", True)])
def test_a_quantized_run_resumes(tmp_path: Path, tiny_base: Path, kind: str, gate: bool):
    """Steps 3 and 4 of a run of four, and of one that was loaded again after step 2."""
    lora = {"rank": 4, "base": kind, "gate": gate}
    wsd = {"start_block": 2, "peak_block": 3, "final_block": 3} if gate else {}
    config = material(tmp_path, tiny_base, lora=lora, wsd=wsd, train={"keep_last": 3})
    convert_wsd(config)
    run = tmp_path / "runs" / "convert"
    expected = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in (4, 6):
        (run / "checkpoints" / f"step-{step}" / "adapter_model.safetensors").unlink()
    convert_wsd(config, resume=True)
    assert [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] == expected


@pytest.mark.parametrize(
    ("device", "capability", "named"),
    [
        ("cuda", (5, 2), "needs compute capability 6.0, but this GPU has 5.2"),
        ("mps", None, "runs on CPUs and NVIDIA GPUs, not on 'mps'"),
    ],
)
@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_devices_that_cannot(kind: Any, device: str, capability: tuple[int, int] | None, named: str):
    with pytest.raises(ConfigError, match=named):
        check_quantized(kind, device, capability)
    for fine in ((6, 0), (6, 1), (9, 0)):
        check_quantized(kind, "cuda", fine)


def test_without_the_package(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    file = tmp_path / "config.json"
    file.write_text(material(tmp_path, tiny_base, lora={"rank": 4, "base": "nf4"}).model_dump_json())
    assert cli.main(["convert-wsd", "--config", str(file)]) == 2
    assert (
        "'lora.base': 'nf4' needs bitsandbytes; install it with: pip install 'hildanext[quant]'"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "runs" / "convert").exists()


def test_without_an_adapter_nothing_could_learn(tmp_path: Path, tiny_base: Path):
    with pytest.raises(ConfigError, match=r"'lora\.base': 'nf4' freezes the base .*; set lora.rank"):
        material(tmp_path, tiny_base, lora={"base": "nf4"})


def test_int8_is_not_sharded(tmp_path: Path, tiny_base: Path):
    with pytest.raises(ConfigError, match=r"'lora\.base': 'int8' cannot be sharded"):
        material(tmp_path, tiny_base, lora={"rank": 4, "base": "int8"}, train={"sharding": "fsdp2"})


def test_a_gguf_file_is_refused(tmp_path: Path, tiny_base: Path):
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="'nf4' cannot be made from the GGUF file"):
        convert_wsd(material(tmp_path, gguf, lora={"rank": 4, "base": "nf4"}))
