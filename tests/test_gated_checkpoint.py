"""A gated checkpoint in every command: its text is its base's, and its base is in it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hildanext.cli import main
from hildanext.config import Config, ModelConfig, parse_config
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.errors import ConfigError, HildaError, UsageError
from hildanext.evaluate.calibrate import calibrate
from hildanext.evaluate.ways import Models, Question, complete, ways
from hildanext.model.loading import load_diffusion_lm, load_with_base
from hildanext.training.merge import merge
from support import serving
from support.models import write_gated

PROMPTS = ["Once upon a time", "Mia has a kite. It", "x"]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_gated(tmp_path_factory.mktemp("gated"), decode={"max_new_tokens": 16}, engine={"runtime": "eager"})


@pytest.fixture(scope="module")
def truth(gated: Config) -> Any:
    """`truth(prompt)`: 16 tokens by transformers' greedy `generate` on the base."""
    folder = Path(gated.model.base).parent / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def complete(prompt: str) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        return model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()

    return complete


def test_generate_writes_the_bases_text_by_default(gated: Config, truth: Any):
    engine = TransformersEngine(gated, {})
    for prompt in PROMPTS:
        done = engine.generate(Request(engine.encode(prompt), engine.settings(gated)))
        assert (done.mode, done.token_ids) == ("EXACT", truth(prompt))
        assert done.stats.rows >= done.stats.forwards
        assert sum(done.stats.tried_by_offset) == done.stats.drafts


def test_an_unconverted_base_decodes_exactly_with_lookups_only(gated: Config, truth: Any):
    folder = Path(gated.model.base).parent / "base"
    changes = {"base": str(folder)}
    decode = gated.decode.model_copy(update={"mode": "EXACT", "lookup": 2})
    config = gated.model_copy(update={"model": gated.model.model_copy(update=changes), "decode": decode})
    engine = TransformersEngine(config, {})
    for prompt in PROMPTS:
        assert engine.generate(Request(engine.encode(prompt), engine.settings(config))).token_ids == truth(prompt)
    with pytest.raises(UsageError, match="convert-wsd"):
        engine.settings(config.model_copy(update={"decode": decode.model_copy(update={"mode": "Q_MODE"})}))


def test_blocks_are_edited_over_the_bases_own_cache(gated: Config):
    """tau_accept null: the first block's drafts are those of one forward with clean causal rows before open ones."""
    decode = gated.decode.model_copy(update={"mode": "Q_MODE", "tau_accept": None, "tau_mask": 0.0, "tau_edit": None})
    config = gated.model_copy(update={"decode": decode})
    engine = TransformersEngine(config, {})
    lm, _ = load_diffusion_lm(gated.model)
    prompt = engine.encode("Once upon a time there was a")[:6]  # ends with a block of 3
    done = engine.generate(Request(prompt, engine.settings(config)))
    assert len(done.token_ids) == 16
    n = len(prompt)
    ids = torch.tensor([prompt + [lm.mask_token_id] * 3])
    rows = torch.arange(n + 3)
    seen = (rows[:, None] >= rows) | (rows[:, None] >= n) & (rows >= n)
    mask = torch.zeros(1, 1, n + 3, n + 3).masked_fill(~seen, torch.finfo(torch.float32).min)
    from hildanext.model.gated_linear import find_gate

    gate = find_gate(lm.model)
    assert gate is not None
    gate.rows = (rows >= n).float()[None, :, None]
    with torch.no_grad():
        hidden = lm.model.base_model(ids, attention_mask=mask, position_ids=rows[None], use_cache=False)[0][0]
        logits = lm.decodable_logits(hidden[n - 1 : n + 2])
    assert done.token_ids[:3] == logits.argmax(-1).tolist()


def test_the_base_is_the_same_weights_with_the_gate_closed(gated: Config, truth: Any):
    loaded = load_with_base(gated.model)
    assert loaded.base is loaded.lm.model
    models = Models(loaded.lm, TransformersEngine(gated, {}, loaded.lm), loaded.base)
    found = {way.name: way for way in ways(gated, models)}
    assert list(found) == ["ar", "exact", "s_mode", "q_mode"]
    questions = [Question(loaded.lm.tokenizer(prompt)["input_ids"], 16) for prompt in PROMPTS]
    answers = {name: complete(models, found[name], questions, "t") for name in ("exact", "ar")}
    for name in ("exact", "ar"):
        assert [answer.token_ids for answer in answers[name]] == [truth(prompt) for prompt in PROMPTS]


def test_the_server_answers_as_the_base_without_a_second_copy(gated: Config, truth: Any):
    with serving.client(gated) as client:
        for prompt in PROMPTS:
            answer = client.post("/generate", json={"prompt": prompt, "max_new_tokens": 16}).json()
            assert (answer["mode"], answer["token_ids"]) == ("EXACT", truth(prompt))
            base = client.post("/generate/base", json={"prompt": prompt, "max_new_tokens": 16}).json()
            assert (base["engine"], base["mode"], base["token_ids"]) == ("transformers", "AR", truth(prompt))
            assert base["stats"]["forwards"] == len(truth(prompt))


def test_the_server_says_how_many_drafts_the_base_accepted(gated: Config):
    with serving.client(gated) as client:
        health = client.get("/health").json()
        assert (health["modes"], health["mode"]) == (["EXACT", "Q_MODE", "S_MODE"], "EXACT")
        stats = [
            client.post("/generate", json={"prompt": prompt, "max_new_tokens": 16}).json()["stats"]
            for prompt in PROMPTS
        ]
        metrics = client.get("/metrics").text
    tried = [sum(counts) for counts in zip(*(one["tried_by_offset"] for one in stats), strict=True)]
    right = [sum(counts) for counts in zip(*(one["right_by_offset"] for one in stats), strict=True)]
    assert sum(tried) > 0
    for row, (n, n_right) in enumerate(zip(tried, right, strict=True)):
        assert f'hildanext_drafts_verified_total{{result="accepted",row="{row}"}} {n_right:.1f}' in metrics
        assert f'hildanext_drafts_verified_total{{result="rejected",row="{row}"}} {n - n_right:.1f}' in metrics


def test_a_request_chooses_what_is_accepted(gated: Config, truth: Any):
    with serving.client(gated) as client:

        def ask(**changes: Any) -> Any:
            return client.post("/generate", json={"prompt": PROMPTS[0], "max_new_tokens": 16} | changes)

        assert ask(lookup=2).json()["token_ids"] == truth(PROMPTS[0])
        loose = ask(mode="S_MODE", tau_accept=0.001).json()
        assert loose["stats"]["accepted"] > ask().json()["stats"]["accepted"]
        assert ask(mode="Q_MODE", tau_accept=None).json()["stats"]["rows"] == 0  # blocks are edited
        assert ask(tau_accept=0).status_code == ask(lookup=1).status_code == 422
        name = client.get("/v1/models").json()["data"][0]["id"]
        chat = {"model": name, "prompt": PROMPTS[0], "max_tokens": 16, "lookup": 2}
        answer = client.post("/v1/completions", json=chat).json()
        assert (answer["hildanext"][0]["mode"], answer["usage"]["completion_tokens"]) == (
            "EXACT",
            len(truth(PROMPTS[0])),
        )


def test_calibrate_writes_three_modes_and_the_checkpoint_uses_them(gated: Config, tmp_path: Path, capsys: Any):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Tell a story\nHello there\n", encoding="utf-8")
    options = {"tau_accept": [0.5, 0.01], "rows": [2, 8], "s_loss": 100.0, "least_variety": 0.0}
    config = parse_config(gated.model_dump(mode="json") | {"calibrate": options})
    report = calibrate(config, str(prompts), None, tmp_path / "out")
    stored = json.loads((Path(gated.model.base) / "generation_config.json").read_text(encoding="utf-8"))["hilda"]
    assert set(stored) == {"EXACT", "Q_MODE", "S_MODE"}
    assert stored["EXACT"]["tau_accept"] == 1.0
    tried = sorted((point["tau_accept"], point["rows"]) for point in report["points"])
    assert tried == [*itertools.product([0.01, 0.5, 1.0], [2, 8])]
    fastest = max(report["points"], key=lambda point: point["tokens_per_second"])
    assert all(stored["S_MODE"][key] == fastest[key] for key in ("tau_accept", "rows"))
    asked = ["generate", "Hello", "--model", gated.model.base, "--raw", "--json", "--set", "decode.max_new_tokens=4"]
    assert main([*asked, "--set", "engine.runtime=eager"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "EXACT"


def test_what_a_gated_adapter_cannot_do_is_refused_in_a_line(gated: Config, tmp_path: Path):
    folder, base = Path(gated.model.base), {"base": str(Path(gated.model.base).parent / "base")}
    with pytest.raises(UsageError, match="gated adapter acts on denoised rows only"):
        merge([folder], tmp_path / "out", full=ModelConfig(device="cpu"))
    for raw, match in [
        ({"lora": {"gate": True}}, "'lora.gate': a gate belongs to an adapter; set lora.rank"),
        ({"lora": {"rank": 2, "draft_head": 8}}, "'lora.draft_head': applies to gated adapters only"),
        (
            {"lora": {"rank": 2, "gate": True}, "model": {"convention": "in_place"}},
            "'model.convention': a gated adapter",
        ),
        ({"lora": {"rank": 2, "gate": True}, "noise": {"turns": 2}}, "'noise.turns': does not apply to gated"),
        ({"decode": {"tau_accept": 0.0}}, "tau_accept"),
        ({"decode": {"tau_accept": 1.5}}, "tau_accept"),
    ]:
        with pytest.raises(ConfigError, match=match):
            parse_config(raw)
    mixed = parse_config({"model": {"base": str(folder)}, "lora": {"rank": 2}})
    with pytest.raises(HildaError, match=r"has a gated adapter; set lora\.gate to true"):
        load_diffusion_lm(mixed.model, training=True, lora=mixed.lora)
    weights = Path(base["base"]) / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\0\1")
        with pytest.raises(HildaError, match="trained on other weights"):
            load_diffusion_lm(gated.model)
    finally:
        weights.write_bytes(kept)
