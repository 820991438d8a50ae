"""preflight: predicted peaks against measured ones, faked cards, and changes that make a training fit."""

import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hildanext import cli
from hildanext.config import parse_config
from hildanext.data.packing import pack
from hildanext.data.rows import write_meta
from hildanext.data.shards import compact, write_shard
from hildanext.data.tokenizer import fingerprint, pad_id
from hildanext.errors import ConfigError
from hildanext.model.policy import choose_policy
from hildanext.model.tiny import story_tokenizer
from hildanext.training.footprint import LiveBytes, predict
from hildanext.training.preflight import advice, policy_of, preflight

# Large enough for tensors to outweigh what a process is; one layer costs what every layer does.
SHAPE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6}


def write_shape(folder, **other):
    LlamaConfig(
        **{"vocab_size": 16000, "num_key_value_heads": 2, "tie_word_embeddings": True, **SHAPE, **other}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("shape"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers: enough where nothing is measured."""
    return write_shape(tmp_path_factory.mktemp("small"), num_hidden_layers=2)


def raw(base, **sections):
    found = {
        "model": {"base": str(base), "device": "cpu", "dtype": "float32"},
        "data": {"seq_len": 256},
        "wsd": {"final_block": 16, "start_block": 16},
        "train": {"rows_per_step": 8, "micro_batch": 8},
    }
    for name, section in sections.items():
        found[name] = found.get(name, {}) | section
    return found


GATED = {"rank": 8, "gate": True, "draft_head": 64}
GROUPS = {"start_block": 1, "peak_block": 4, "final_block": 4}
CASES = {
    "all weights": {},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "checkpointing and Adafactor": {"train": {"gradient_checkpointing": True, "optimizer": "adafactor"}},
    "8-bit AdamW": {"train": {"gradient_checkpointing": True, "optimizer": "adamw8bit", "micro_batch": 1}},
    "an adapter": {"lora": {"rank": 8}},
    "a gated adapter": {"lora": GATED, "wsd": GROUPS, "noise": {"anchors": 64}},
    "a gated adapter, checkpointing": {
        "lora": GATED,
        "wsd": GROUPS,
        "noise": {"anchors": 64},
        "train": {"gradient_checkpointing": True},
    },
    "preferences": {"lora": {"rank": 8}, "dpo": {"block_size": 16}, "train": {"rows_per_step": 4, "micro_batch": 4}},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_the_prediction_is_within_15_percent_of_the_measured_peak(base, tmp_path, name):
    """In a process of its own, whose peak resident memory is the truth."""
    if name == "bf16" and choose_policy("cpu").compute != torch.bfloat16:
        pytest.skip("this CPU has no bf16 instructions: the steps would take many minutes")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw(base, **CASES[name])))
    command = [sys.executable, "-m", "hildanext.cli", "preflight", "--config", str(file), "--measure", "--json"]
    command += ["--for", "dpo" if name == "preferences" else "convert-wsd"]
    for _ in range(3):  # what the C library's allocator happens to hold adds to a peak, and never takes from it
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if found["measured"] <= found["peak"]["total"] / 0.85:
            break
    assert found["peak"]["total"] == pytest.approx(found["measured"], rel=0.15), found["peak"]
    assert found["peak"]["total"] == sum(value for key, value in found["peak"].items() if key != "total")
    # And not by the process alone.
    assert found["measured"] > 1.5 * found["peak"]["process"]


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2])
def test_the_prediction_is_within_15_percent_of_a_real_run(base, tmp_path, turns):
    """Against what `convert-wsd` itself logs: loading, noise, optimizer and all; a second turn has the first one's gradients."""
    tokenizer = story_tokenizer(300)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    del model
    docs = [(np.arange(256, dtype=np.int32) % 200 + 5, np.ones(256, dtype=bool))] * 8
    folder = tmp_path / "data" / "tokenized" / "train.rows"
    folder.mkdir(parents=True)
    record = write_shard(folder, 0, compact(pack(docs, 256, pad_id(tokenizer)), 256), {})
    write_meta(folder, {"seq_len": 256, "tokenizer": fingerprint(tokenizer), "block_size": 16}, [record])
    eval_folder = folder.with_name("eval.rows")
    eval_folder.mkdir()
    write_meta(eval_folder, {"seq_len": 256, "tokenizer": fingerprint(tokenizer), "block_size": 16}, [])
    sections = {
        "paths": {"data": str(tmp_path / "data"), "runs": str(tmp_path / "runs")},
        "noise": {"turns": turns},
        "wsd": {"warmup_steps": 0, "stable_steps": 2, "decay_steps": 0, "peak_block": 16},
        "train": {"eval_every": 0, "save_every": 100},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw(tmp_path / "base", **sections)))

    def run(command, *more):
        done = subprocess.run(
            [sys.executable, "-m", "hildanext.cli", command, "--config", str(file), "--json", *more],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    run("convert-wsd", "--run", "x")
    lines = (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    measured = max(json.loads(line)["peak_memory_mb"] for line in lines) * 1e6
    assert run("preflight")["peak"]["total"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("command", ["convert-wsd", "dpo"])
def test_a_measurement_runs_real_steps(tmp_path, command):
    """In this process, whose peak says little; in a fresh one it is compared with the prediction."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 500,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sections = {"data": {"seq_len": 32}, "lora": {"rank": 2} if command == "dpo" else {}, "dpo": {"block_size": 16}}
    config = parse_config(raw(write_shape(tmp_path, **shape), **sections))
    report = preflight(config, command, None, 100.0, True)
    assert 0 < report["measured"] < psutil.virtual_memory().total
    assert "measured" in report["stdout"]


# In a process of its own: in an older one, memory that other tests freed would be used again and not be counted.
EIGHT_BIT_STEP = """
import psutil, torch
from torch import nn
from hildanext.config import parse_config
from hildanext.training.footprint import optimizer_bytes, peak_of, start_peak
from hildanext.training.optimizer import make_optimizer

cpu, model = torch.device("cpu"), nn.Embedding(20_000, 1_000)
optimizer = make_optimizer(model, parse_config({"train": {"optimizer": "adamw8bit"}}).train, False)
for _ in range(2):  # the first step makes the state
    model.weight.grad = torch.ones_like(model.weight)
    before = psutil.Process().memory_info().rss
    start_peak(cpu)
    optimizer.step()
print(peak_of(cpu) - before, optimizer_bytes(model, "adamw8bit", "cpu")[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset")
def test_temporary_memory_of_8_bit_adamw_on_a_cpu():
    """Measured on a tensor so large that the C library maps and returns each temporary tensor by itself."""
    done = subprocess.run([sys.executable, "-c", EIGHT_BIT_STEP], capture_output=True, text=True, check=True)
    measured, predicted = map(int, done.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.15)


def test_a_second_pass_runs_beside_the_gradients_of_the_first():
    """With one micro-batch a step too: by the multi-turn forward, or by complementary masks."""
    shape = Qwen3Config(vocab_size=32000, head_dim=64, **SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 2})

    def needed(command, **sections):
        config = parse_config(raw("nowhere", **sections))
        return predict(config, command, policy_of(config.model, "sm_80"), shape).activations

    once = needed("sft", sft={"turns": 1})
    assert needed("convert-wsd") == once
    twice = needed("convert-wsd", noise={"turns": 2})
    assert twice > once
    assert needed("sft", sft={"turns": 2}) == needed("sft", sft={"turns": 1, "complementary": True}) == twice


def test_activations_do_not_grow_with_the_vocabulary():
    """But for the head's own weights: logits of every supervised position would be eight times as much here."""
    small, large = (
        Qwen3Config(vocab_size=n, head_dim=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=2)
        for n in (8_000, 64_000)
    )  # fmt: skip
    for card in ("sm_61", "sm_90"):
        config = parse_config(raw("nowhere", model={"device": "auto", "dtype": "auto"}))
        policy = policy_of(config.model, card)
        first, second = (predict(config, "convert-wsd", policy, shape) for shape in (small, large))
        weights = 4 * 64 * (64_000 - 8_000)
        assert second.gradients - first.gradients == 2 * weights  # embedding and head
        logits = 4 * 8 * 255 * (64_000 - 8_000)
        assert second.activations - first.activations < 3 * weights < 0.1 * logits


def test_attention_is_that_of_the_training():
    """FlexAttention keeps no masks and no copies of keys; the dense mask is the largest."""
    shape = Qwen3Config(vocab_size=1000, head_dim=64, **SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 2})

    def needed(card, **train):
        config = parse_config(raw("nowhere", model={"dtype": "auto"}, train={"micro_batch": 2, "rows_per_step": 2} | train,
                                  data={"seq_len": 2048}))  # fmt: skip
        return predict(config, "convert-wsd", policy_of(config.model, card), shape).activations

    flex = needed("sm_90")
    assert flex == needed("sm_90", attention="flex")
    assert flex < needed("sm_90", attention="pieces") < needed("sm_90", attention="dense")
    assert needed("sm_61") == needed("sm_61", attention="pieces")
    config = parse_config(raw("nowhere", train={"attention": "flex"}))
    with pytest.raises(ConfigError, match=r"'train.attention': 'flex' has no backward on a CPU"):
        predict(config, "convert-wsd", policy_of(config.model, None), shape)


def test_preferences_cost_two_answers_in_every_draw(small):
    sections = {"lora": {"rank": 4}, "train": {"rows_per_step": 2, "micro_batch": 2}}

    def found(**dpo):
        return preflight(parse_config(raw(small, dpo=dpo, **sections)), "dpo", None, 100.0, False)["peak"]

    one, two = found(), found(draws=2)
    assert two["activations"] > 1.25 * one["activations"]  # but for the head's chunk of logits, which is full already
    assert found(complementary=True, mask_band=[0.1, 0.9])["activations"] == two["activations"]
    assert one["weights"] - one["gradients"] == predict(
        parse_config(raw(small, **sections)), "sft", policy_of(parse_config(raw(small)).model, None), AutoConfig.from_pretrained(small)
    ).weights  # fmt: skip
    with pytest.raises(ConfigError, match=r"'lora.rank': dpo trains an adapter"):
        preflight(parse_config(raw(small)), "dpo", None, None, False)


@pytest.mark.slow
def test_groups_of_a_gated_adapter_cost_memory_and_fewer_anchors_are_suggested(small, monkeypatch):
    # The process would grow between predictions.
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=400_000_000))

    def found(anchors):
        sections = {"lora": GATED, "wsd": GROUPS, "noise": {"anchors": anchors}}
        return preflight(parse_config(raw(small, **sections)), "convert-wsd", None, 0.001, False)

    few, many = found(8), found(16)
    assert many["policy"]["training_attention"] == "groups"
    assert 1.3 < many["peak"]["activations"] / few["peak"]["activations"] < 2.1
    by_change = {tuple(change["set"].items()): change["total"] for change in many["changes"]}
    assert by_change[(("noise.anchors", 8),)] == few["peak"]["total"]


def test_live_bytes_counts_what_is_held_once():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        c = a + 1
        assert live.live == 8000
        del a
        assert live.live == 8000  # the view holds it
        gone = weakref.ref(b)
        del b
        assert gone() is None
        assert live.live == 4000
        del c
    assert (live.live, live.peak) == (0, 8000)


def test_weights_gradients_and_optimizer_are_those_of_the_formula(base):
    def parts(**sections):
        config = parse_config(raw(base, **sections))
        return predict(config, "convert-wsd", policy_of(config.model, None), AutoConfig.from_pretrained(base))

    h, inner, layers, vocabulary = 384, 1536, 4, 16000
    layer = h * (h + 128 + 128) + h * h + 3 * h * inner + 2 * h
    n = layers * layer + h + vocabulary * h
    whole = parts()
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * n, 4 * n, 8 * n)
    assert parts(train={"optimizer": "adamw8bit"}).optimizer < 2.1 * n
    assert parts(train={"optimizer": "adafactor"}).optimizer < 0.1 * n
    rank = 8
    adapter = (
        layers * rank * (2 * (h + h) + 2 * (h + 128) + 2 * (h + inner) + (inner + h)) + rank * (h + vocabulary) + h
    )
    low = parts(lora={"rank": rank})
    assert (low.gradients, low.optimizer) == (4 * adapter, 8 * adapter)
    assert parts(lora={"rank": rank, "base": "nf4"}).weights < 0.5 * low.weights
    assert parts(train={"gradient_checkpointing": True}).activations < 0.5 * whole.activations
    assert parts(train={"micro_batch": 4, "rows_per_step": 4}).activations < 0.6 * whole.activations


@pytest.mark.parametrize(
    ("card", "dtype", "attention", "scaler", "compiles"),
    [
        ("sm_61", "float16", "pieces", True, False),
        ("sm_75", "float16", "pieces", True, False),
        ("sm_80", "bfloat16", "flex", False, True),
        ("sm_90", "bfloat16", "flex", False, True),
    ],
)
def test_a_card_that_is_not_here(small, card, dtype, attention, scaler, compiles):
    config = parse_config(raw(small, model={"device": "auto", "dtype": "auto"}))
    report = preflight(config, "convert-wsd", card, 8.0, False)
    found = report["policy"]
    assert (found["device"], found["dtype"], found["training_attention"]) == ("cuda", dtype, attention)
    assert (found["loss_scaler"], found["compile"]) == (scaler, compiles)
    assert report["fits"]
    assert f"loss scaler: {'yes' if scaler else 'no'}" in report["stdout"]
    assert preflight(config, "convert-wsd", card, None, False)["fits"] is None


def test_what_does_not_fit_is_made_to_fit(tmp_path, monkeypatch):
    # This process may hold far more than a training's would: other tests ran in it.
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=400_000_000))
    small = write_shape(tmp_path, num_hidden_layers=1)
    config = parse_config(raw(small))
    needed = preflight(config, "convert-wsd", None, 100.0, False)
    assert needed["fits"]
    assert "changes" not in needed
    limit = 0.7 * needed["peak"]["total"] / 1e9
    report = preflight(config, "convert-wsd", None, limit, False)
    assert not report["fits"]
    assert report["fitting"]["total"] <= 1e9 * limit
    # What is proposed is a configuration, and it fits when asked for.
    again = raw(small)
    for key, value in report["fitting"]["set"].items():
        section, _, name = key.partition(".")
        again[section] = again.get(section, {}) | {name: value}
    assert preflight(parse_config(again), "convert-wsd", None, limit, False)["fits"]
    assert all(f"--set {key}=" in report["stdout"] for one in report["changes"] for key in one["set"])
    # With all else changed already, two changes are left.
    frugal = {"train": {"micro_batch": 1, "rows_per_step": 1}, "lora": {"rank": 4, "base": "nf4"}}
    nothing = preflight(parse_config(raw(small, **frugal)), "convert-wsd", None, 0.01, False)
    assert nothing["fitting"] is None
    assert "all changes together are not enough" in nothing["stdout"]


def test_every_change_makes_it_smaller():
    """On a shape where weights, optimizer and activations all count."""
    shape = Qwen3Config(vocab_size=32000, head_dim=64, **SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 2})
    config = parse_config(raw("nowhere"))
    policy = policy_of(config.model, "sm_80")
    before = predict(config, "convert-wsd", policy, shape).total
    alone, _ = advice(config, "convert-wsd", policy, shape, before)
    assert {key for one in alone for change in one.changes for key in change.settings} == {
        "train.gradient_checkpointing", "train.micro_batch", "train.optimizer", "lora.rank", "lora.base", "data.seq_len",
    }  # fmt: skip
    assert all(one.peak.total < before for one in alone), [(one.changes, one.peak.total / before) for one in alone]


def test_bad_input_is_one_line(base, capsys):
    config = parse_config(raw(base))
    with pytest.raises(ConfigError, match=r"--card pascal: expected a compute capability, for example sm_61"):
        preflight(config, "convert-wsd", "pascal", None, False)
    with pytest.raises(ConfigError, match="--measure: measures on this machine and cannot be combined with --card"):
        preflight(config, "convert-wsd", "sm_61", None, True)
    assert cli.main(["preflight", "--model", "./nowhere"]) == 2
    assert capsys.readouterr().err == "hildanext preflight: model './nowhere': no such folder\n"
    pascal = parse_config(raw(base, model={"device": "auto", "dtype": "bfloat16"}))
    with pytest.raises(ConfigError, match="bfloat16 is not native on sm_61"):
        preflight(pascal, "convert-wsd", "sm_61", None, False)
