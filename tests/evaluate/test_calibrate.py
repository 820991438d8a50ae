"""`calibrate` on a tiny checkpoint: the choice by a brute-force rule, what is written, and what generate makes of it."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.cli import main
from hildanext.config import parse_config
from hildanext.decoding.engines import Request, open_engine
from hildanext.decoding.settings import Preset
from hildanext.errors import DataError, UsageError
from hildanext.evaluate.calibrate import FrontierPoint, calibrate, choose, measure
from hildanext.evaluate.judge import mean_log_likelihood
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import load_causal_lm
from hildanext.model.prompts import read_prompts
from hildanext.training.merge import merge
from support.models import make_tokenizer, random_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny converted checkpoint whose base stands beside it."""
    folder = tmp_path_factory.mktemp("calibrate")
    tokenizer = make_tokenizer()
    random_llama(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lm, _ = load_diffusion_lm(parse_config({"model": {"base": str(folder / "base")}}).model)
    lm.block_size = 4
    save_diffusion_lm(lm, folder / "converted")
    return folder


def config(checkpoint, **changes):
    sweep = {"tau_mask": [0.0, 0.01, 0.9], "tau_edit": [None, 0.0], "max_post_steps": [1, 3], "prompts": 3}
    return parse_config(
        {
            "model": {"base": str(checkpoint / "converted"), "dtype": "float32"},
            "decode": {"max_new_tokens": 12},
            "engine": {"order": ["transformers"]},
            "calibrate": {**sweep, "least_variety": 0.0, **changes},
        }
    )


def point(tau, quality, speed, variety=1.0):
    return FrontierPoint(Preset(tau, None), quality, speed, speed, variety, 0)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.integers(-20, 0), st.integers(1, 9), st.integers(1, 10)),
        min_size=1,
        max_size=8,
    ),
    loss=st.sampled_from([0.0, 0.5, 3.0]),
)
@settings(max_examples=100, deadline=None)
def test_the_fastest_setting_near_the_best_quality_is_chosen(rows, loss):
    points = [point(tau, quality / 4, speed, variety / 10) for tau, quality, speed, variety in rows]
    found = choose(points, loss, least_variety=0.8)
    strictest = max(p.preset.tau_mask for p in points)
    slowest = min(p.tokens_per_forward for p in points if p.preset.tau_mask == strictest)
    careful = [p for p in points if p.preset.tau_mask == strictest and p.tokens_per_forward == slowest]
    floors = [0.8 * p.distinct_2 for p in careful]
    assert found.distinct_2 >= min(floors)
    for floor in floors:
        rivals = [p for p in points if p.distinct_2 >= floor]
        near = [p for p in rivals if p.quality >= max(r.quality for r in rivals) - loss]
        if found in near and found.tokens_per_forward == max(p.tokens_per_forward for p in near):
            return
    raise AssertionError("not the fastest one near the best")


def test_repetition_is_not_quality():
    points = [point(0.9, -2.0, 1.0, 0.8), point(0.1, -0.1, 8.0, 0.05)]
    assert choose(points, 0.3, least_variety=0.8) is points[0]


def test_the_modes_are_measured_drawn_written_and_used(checkpoint, tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("the cat\n\nonce upon a time\n1 2 3\nnever read\n")
    report = calibrate(config(checkpoint), str(prompts), None, tmp_path / "out")
    assert report["prompts"] == 3
    assert (tmp_path / "out" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["modes"] == report["modes"]
    # Every threshold pair, and around the choices the other passes, block sizes and editable blocks.
    tried = {(p["tau_mask"], p["tau_edit"]) for p in report["points"]}
    assert tried == {(mask, edit) for mask in (0.0, 0.01, 0.9) for edit in (None, 0.0)}
    assert {p["block_size"] for p in report["points"]} == {2, 4, 8}
    assert all(p["edit_blocks"] == 0 for p in report["points"] if p["tau_edit"] is None)
    written = json.loads((checkpoint / "converted" / "generation_config.json").read_text())["hilda"]
    for mode in ("S_MODE", "Q_MODE"):
        assert written[mode] == {name: report["modes"][mode][name] for name in Preset._fields}
    assert report["modes"]["S_MODE"]["tokens_per_forward"] >= report["modes"]["Q_MODE"]["tokens_per_forward"]
    # What generate and serve resolve is what was written, and it gives the speed that was measured.
    engine = open_engine(config(checkpoint))
    asked = engine.settings(parse_config({"decode": {"mode": "S_MODE", "max_new_tokens": 12}}))
    assert {name: asked._asdict()[name] for name in Preset._fields} == written["S_MODE"]
    done = [engine.generate(Request(prompt, asked)) for prompt in read_prompts(prompts, engine.tokenizer)[:3]]
    forwards = sum(one.stats.forwards for one in done)
    assert sum(len(one.token_ids) for one in done) / forwards == report["modes"]["S_MODE"]["tokens_per_forward"]


def test_editable_blocks_are_tried_where_editing_is_on(checkpoint, tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("the cat\nonce upon a time\n")
    changed = config(
        checkpoint, tau_mask=[0.01], tau_edit=[0.0], max_post_steps=[0], block_sizes=[4], edit_blocks=[1, 3]
    )
    report = calibrate(changed, str(prompts), None, tmp_path / "out")
    assert {p["edit_blocks"] for p in report["points"]} == {1, 3}
    # What was measured is what decoding with that setting gives.
    engine = open_engine(changed)
    for found in report["points"]:
        asked = engine.settings(parse_config({"decode": {"max_new_tokens": 12}}))
        asked = asked._replace(**{name: found[name] for name in Preset._fields})
        done = engine.generate_batch([Request(p, asked) for p in read_prompts(prompts, engine.tokenizer)])
        assert sum(one.stats.edits for one in done) == found["edits"]


def test_an_empty_answer_does_not_count(checkpoint, monkeypatch):
    """Its log-likelihood is no number; where every answer is empty there is nothing to measure."""
    engine = open_engine(config(checkpoint))
    base = load_causal_lm(
        parse_config({"model": {"base": str(checkpoint / "base")}}).model,
        choose_policy("cpu", "float32"),
        torch.float32,
    )[0]
    prompts = [[5, 6, 7], [8, 9]]
    start = engine.settings(config(checkpoint))
    real = engine.generate_batch
    monkeypatch.setattr(
        engine,
        "generate_batch",
        lambda requests: [replace(real(requests)[0], token_ids=[], text=""), *real(requests)[1:]],
    )
    found = measure(engine, base, prompts, start)
    alone = real([Request(prompts[1], start)])[0]
    assert found.quality == pytest.approx(mean_log_likelihood(base, prompts[1], alone.token_ids))
    with pytest.raises(UsageError, match="every answer is empty"):
        measure(engine, base, prompts[:1], start)


def test_other_weights_do_not_inherit_the_modes(checkpoint, tmp_path):
    calibrate(config(checkpoint, tau_mask=[0.5], tau_edit=[None]), _prompts(tmp_path), None, tmp_path / "out")
    lm, _ = load_diffusion_lm(config(checkpoint).model)
    save_diffusion_lm(lm, tmp_path / "trained")
    merge([checkpoint / "converted"], tmp_path / "merged")
    for folder in ("trained", "merged"):
        assert "hilda" not in json.loads((tmp_path / folder / "generation_config.json").read_text())


def _prompts(folder):
    path = folder / "prompts.jsonl"
    path.write_text('{"prompt": "the cat"}\n{"messages": [{"role": "user", "content": "hello"}]}\n')
    return str(path)


def test_prompt_files(checkpoint, tmp_path):
    engine = open_engine(config(checkpoint))
    plain, chat = read_prompts(tmp_path / _prompts(tmp_path), engine.tokenizer)
    assert engine.tokenizer.decode(plain) == "the cat"
    assert engine.tokenizer.decode(chat).startswith("<|im_start|>user\nhello")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"promt": "x"}\n')
    with pytest.raises(DataError, match=r'bad.jsonl:2: expected {"prompt": ...} or {"messages": \[...\]}'):
        read_prompts(bad, engine.tokenizer)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(DataError, match="no prompts in the file"):
        read_prompts(empty, engine.tokenizer)


def test_only_a_local_converted_checkpoint_can_be_calibrated(checkpoint, tmp_path, capsys):
    with pytest.raises(UsageError, match="not a local checkpoint folder"):
        calibrate(parse_config({"model": {"base": "someone/model"}}), None, None, tmp_path)
    assert main(["calibrate", "--model", str(checkpoint / "base"), "--set", "model.dtype=float32"]) == 2
    assert "is not a converted checkpoint; run 'hildanext convert-wsd' first" in capsys.readouterr().err
    assert main(["calibrate", "--model", str(checkpoint / "converted"), "--set", "calibrate.tau_mask=[2]"]) == 2
    assert "every value must be between 0 and 1, got 2" in capsys.readouterr().err
