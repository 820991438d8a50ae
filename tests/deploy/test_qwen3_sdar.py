"""From data to a served folder: the launch page's commands, and deploy/qwen3_sdar.sh with a tiny Qwen3 on CPUs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hildanext.cli import build_parser
from hildanext.config import load_config
from support.exports import tiny_qwen3
from support.models import make_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "deploy" / "qwen3_sdar.sh"
CONTRACTS = json.loads((ROOT / "tests" / "parity" / "contracts.json").read_text(encoding="utf-8"))
SECTION = PAGE.partition("## From Qwen3-1.7B to a server")[2].partition("\n## ")[0]
LINES = [line for block in re.findall(r"^```\n(.*?)^```", SECTION, re.M | re.S) for line in block.splitlines()]
PRESET = ROOT / "src" / "hildanext" / "configs" / "qwen3-1.7b-sdar.json"


def test_the_servers_take_the_pages_options() -> None:
    """Their parsers cannot be imported without a GPU: their options are in the contracts."""
    by_server = {"sglang": "python -m sglang", "lmdeploy": "lmdeploy serve"}
    for server, begins in by_server.items():
        (line,) = [line for line in LINES if line.startswith(begins)]
        words = shlex.split(line)
        assert {word for word in words if word.startswith("--")} == set(CONTRACTS[server]["options"]["names"])
        assert "qwen3-sdar" in words
    block = load_config(PRESET).wsd.final_block
    assert f"--dllm-block-length {block} " in SECTION


def test_hildanext_takes_the_pages_commands() -> None:
    for line in LINES:
        words = shlex.split(line)
        if words[0] == "hildanext":
            build_parser().parse_args(words[1:])
    (script,) = [line for line in LINES if "qwen3_sdar.sh" in line]
    assert script == "PROCESSES=8 bash deploy/qwen3_sdar.sh hildanext.json NAME qwen3-sdar"
    preset = load_config(PRESET)
    assert (preset.model.convention, preset.train.sharding, preset.lora.gate) == ("in_place", "fsdp2", False)


def test_the_script_tells_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "a.json"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: PROCESSES=N" in done.stderr


@pytest.mark.slow
def test_from_data_to_a_folder_for_servers(tmp_path: Path) -> None:
    """The preset but for its sizes: two processes of torchrun, FSDP2, merge, export; a second call has nothing to do."""
    tiny_qwen3(151936, tied=True, max_position_embeddings=64).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text").mkdir()
    records = [{"text": f"{n} birds sat in the old tree and sang. " * 4} for n in range(60)]
    (tmp_path / "text" / "part.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    raw = json.loads(PRESET.read_text())
    raw["model"] |= {"base": str(tmp_path / "base"), "device": "cpu", "dtype": "float32"}
    raw["data"] |= {"sources": [{"kind": "dolma", "path": str(tmp_path / "text")}], "seq_len": 32, "workers": 1}
    raw["data"]["eval_share"] = 0.2
    raw["wsd"] |= {"warmup_steps": 2, "stable_steps": 1, "decay_steps": 2, "final_block": 4}
    raw["wsd"] |= {"warmup_ladder": [1, 32], "decay_ladder": [16, 4]}
    raw["train"] |= {
        "rows_per_step": 4,
        "micro_batch": 2,
        "eval_every": 1,
        "eval_rows": 4,
        "save_every": 1,
        "keep_best": 3,
    }
    raw["train"] |= {"lr_warmup_steps": 0}
    raw["paths"] = {"data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")}
    (tmp_path / "hildanext.json").write_text(json.dumps(raw))
    tools = Path(sys.executable).parent
    env = os.environ | {"PROCESSES": "2", "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT / "src")}
    command = ["bash", str(SCRIPT), str(tmp_path / "hildanext.json"), "tiny", str(tmp_path / "qwen3-sdar")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "qwen3-sdar"
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.config.block_size == 4
    assert torch.isfinite(model(torch.tensor([[5, 6, 7, 151669]])).logits[..., :300]).all()
    metrics = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 5
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    assert "exists; choose another --out" in again.stderr
