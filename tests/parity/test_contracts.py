"""What SGLang's and LMDeploy's loaders look up (contracts.json, with the file of each name) against an exported folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoConfig

from hildanext.export import sdar
from hildanext.export.command import export
from hildanext.export.source import open_checkpoint
from support.exports import BLOCK, tiny_qwen3, tiny_qwen3_moe, write_checkpoint

CONTRACTS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "contracts.json").read_text())
LAYERS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("contract"), tiny_qwen3(151936, tied=True))


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return Path(export(checkpoint, "sdar", None)["out"])


@pytest.mark.parametrize("server", CONTRACTS)
def test_the_configuration_has_every_key(exported: Path, server: str) -> None:
    """As JSON, and as the object that AutoConfig makes of it, which the servers read."""
    contract = CONTRACTS[server]
    stored = json.loads((exported / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    keys = [*contract["model"]["config_keys"], *contract["model"]["config_defaults"]]
    for key in keys:
        assert key in stored, key  # also where the server has a default: it is another one than the model's
        if key != "rope_scaling":  # transformers 5 answers with rope_parameters, of the type "default"
            assert getattr(loaded, key) == stored[key], key
    assert stored["rope_theta"] == 5000.0 != contract["model"]["config_defaults"]["rope_theta"]
    assert stored["architectures"] == [contract["architecture"]["architectures"]]
    assert stored["mask_token_id"] == contract["architecture"]["mask_id"] == sdar.SERVED_MASK_ID
    assert stored["model_type"] == CONTRACTS["lmdeploy"]["architecture"]["model_type"]


@pytest.mark.parametrize("server", CONTRACTS)
def test_the_tensors_have_the_names_that_are_looked_up(exported: Path, server: str) -> None:
    """All of them, and no other: LMDeploy fails at a name that it does not know."""
    wanted = {name.format(layer=layer) for name in CONTRACTS[server]["model"]["tensors"] for layer in range(LAYERS)}
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert set(file.keys()) == wanted


def test_a_model_with_experts_has_its_keys_and_names(tmp_path: Path) -> None:
    out = Path(export(write_checkpoint(tmp_path, tiny_qwen3_moe(151936)), "sdar", None)["out"])
    stored = json.loads((out / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(out, trust_remote_code=True)
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for contract in CONTRACTS.values():
        dense, experts = contract["model"], contract["experts"]
        for key in (*dense["config_keys"], *experts["config_keys"]):
            assert getattr(loaded, key) == stored[key], key
        assert stored["architectures"] == [experts["architectures"]]
        looked_up = [name for name in dense["tensors"] if ".mlp." not in name] + experts["tensors"]
        assert names == {
            name.format(layer=layer, expert=expert)
            for name in looked_up
            for layer in range(LAYERS)
            for expert in range(4)
        }


def test_the_settings_and_the_commands(checkpoint: Path, exported: Path) -> None:
    known = {
        *CONTRACTS["sglang"]["architecture"]["yaml_keys"],
        *CONTRACTS["sglang"]["algorithm"]["yaml_keys"],
    }
    for mode in sdar.MODES:
        settings = yaml.safe_load((exported / sdar.yaml_name(mode)).read_text())
        assert settings.keys() <= known
        assert settings["block_size"] == BLOCK
    sglang, lmdeploy = map(shlex.split, sdar.launch_commands(open_checkpoint(checkpoint), exported.name, "Q_MODE"))
    for words, server in ((sglang, "sglang"), (lmdeploy, "lmdeploy")):
        options = {word for word in words if word.startswith("--")}
        assert options == set(CONTRACTS[server]["options"]["names"])
    strategy = lmdeploy[lmdeploy.index("--dllm-unmasking-strategy") + 1]
    assert strategy in CONTRACTS["lmdeploy"]["options"]["strategies"]
    assert lmdeploy[lmdeploy.index("--dllm-block-length") + 1] == str(BLOCK)
    # The card shows these commands, and the file that the first one names is there.
    readme = (exported / "README.md").read_text()
    assert shlex.join(sglang) in readme
    assert shlex.join(lmdeploy) in readme
    assert (exported.parent / sglang[sglang.index("--dllm-algorithm-config") + 1]).is_file()
