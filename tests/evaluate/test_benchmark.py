"""`benchmark`: its figures against the same figures worked out here, and its report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from hildanext.config import Config
from hildanext.data.prepare import prepare_data
from hildanext.data.rows import open_rows
from hildanext.data.synthetic import synthetic_instructions
from hildanext.data.tokenize import tokenize_data
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.settings import Preset
from hildanext.errors import UsageError
from hildanext.evaluate.ar_likelihood import ar_likelihood
from hildanext.evaluate.benchmark import _continuations, benchmark
from hildanext.evaluate.judge import distinct_2, mean_log_likelihood
from hildanext.model.ar_generate import ar_complete, ar_complete_batch
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import base_of, load_causal_lm, load_tokenizer
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.smoke import smoke_config
from hildanext.training.convert import convert_wsd


class Measured:
    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.report = benchmark(config, None, folder / "report.json")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("benchmark")
    tokenizer = story_tokenizer()
    tiny_llama(tokenizer, hidden=32, layers=2, context=256, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = (json.dumps(one) + "\n" for one in synthetic_instructions(20, seed=2))
    (folder / "instructions.jsonl").write_text("".join(lines), encoding="utf-8")
    config = smoke_config(folder, str(folder / "base"))
    prepare_data(config)
    tokenize_data(config, load_tokenizer(config.model))
    checkpoint = convert_wsd(config)["checkpoint"]
    return Measured(config.model_copy(update={"model": config.model.model_copy(update={"base": checkpoint})}), folder)


@pytest.fixture(scope="module")
def base(measured: Measured) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(measured.folder / "base").eval()


def documents_one_by_one(measured: Measured) -> list[list[int]]:
    """The held-out documents as they lie in the rows, cut out again."""
    lm, _ = load_diffusion_lm(measured.config.model)
    rows = open_rows(measured.config, "eval", lm.tokenizer)
    assert rows is not None
    batch = rows.batch(list(range(min(len(rows), 16))))
    found = []
    for ids, docs in zip(batch["input_ids"], batch["doc_ids"], strict=True):
        found += [ids[docs == doc].tolist() for doc in docs.unique() if doc >= 0]
    return found


def test_ar_likelihood_is_transformers_own(measured: Measured, base: PreTrainedModel):
    """Document masks and positions of a packed row against each document alone through the model's own loss."""
    nats, tokens = 0.0, 0
    for ids in documents_one_by_one(measured):
        if len(ids) > 1:
            row = torch.tensor([ids])
            nats += base(row, labels=row).loss.item() * (len(ids) - 1)
            tokens += len(ids) - 1
    lm, _ = load_diffusion_lm(measured.config.model)
    rows = open_rows(measured.config, "eval", lm.tokenizer)
    assert rows is not None
    found = ar_likelihood(base, rows, 16, 2)
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_report(measured: Measured):
    report = measured.report
    stored = json.loads((measured.folder / "report.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in report.items() if key not in ("stdout", "out")} == stored
    likelihood = report["likelihood"]
    text = documents_one_by_one(measured)
    tokenizer = AutoTokenizer.from_pretrained(measured.folder / "base")
    assert likelihood["text_tokens"] == sum(len(ids) - 1 for ids in text)
    # Each document alone, without its first token and the end of text: letters only.
    n_bytes = sum(len(tokenizer.decode(ids[1:]).replace("<|end|>", "").encode()) for ids in text)
    assert n_bytes < sum(len(tokenizer.decode(ids[1:]).encode()) for ids in text)
    for one in ("ar_exact", "dllm_bound"):
        found = likelihood[one]
        assert found["bits_per_byte"] / found["bits_per_token"] == pytest.approx(
            likelihood["text_tokens"] / n_bytes, rel=1e-9
        )
        # One training step from random weights: close to guessing among the vocabulary.
        assert found["bits_per_token"] == pytest.approx(math.log2(len(tokenizer)), rel=0.1)
    assert likelihood["ar_exact"]["standard_error"] == 0
    assert set(report["continuation"]) == {"ar", "q_mode", "s_mode", "s_mode_no_edit"}
    for name, row in report["continuation"].items():
        assert row["tokens"] > 0, name
        assert row["tokens_per_second"] > 0, name
        assert 0 <= row["distinct_2"] <= 1, name
    assert report["continuation"]["ar"]["tokens_per_forward"] == 1
    assert report["continuation"]["s_mode_no_edit"]["edits"] == 0
    assert report["code"]["problems"] > 0
    assert report["code"]["executed"] is False
    assert report["peak_memory_mb"] > 0
    for name in report["continuation"]:
        assert name in report["stdout"]


def test_calibrated_modes_are_what_is_measured(measured: Measured, monkeypatch: pytest.MonkeyPatch):
    modes = {"Q_MODE": Preset(0.9, None, 2, 8), "S_MODE": Preset(0.1, 0.3, 3, 4)}
    asked = []

    class Engine(TransformersEngine):
        def generate(self, request: Request) -> Completion:
            asked.append(request.settings)
            return super().generate(request)

    lm, policy = load_diffusion_lm(measured.config.model)
    lm.modes = {name: preset._asdict() for name, preset in modes.items()}
    base, tokenizer = load_causal_lm(base_of(measured.config.model, lm.record), policy, policy.compute)
    _continuations(measured.config, Engine(measured.config, {}, lm), base.eval(), tokenizer)
    found = {(one.mode, one.tau_mask, one.tau_edit, one.max_post_steps, one.block_size) for one in asked}
    assert found == {("Q_MODE", 0.9, None, 2, 8), ("S_MODE", 0.1, 0.3, 3, 4), ("S_MODE", 0.1, None, 3, 4)}


def test_base_log_likelihood_by_hand(base: PreTrainedModel):
    prompt, new = [5, 6, 7], [8, 9]
    with torch.no_grad():
        first = base(torch.tensor([prompt])).logits[0, -1].softmax(-1)[8]
        second = base(torch.tensor([[*prompt, 8]])).logits[0, -1].softmax(-1)[9]
    assert mean_log_likelihood(base, prompt, new) == pytest.approx((first.log() + second.log()).item() / 2, rel=1e-5)
    assert math.isnan(mean_log_likelihood(base, prompt, []))


@pytest.mark.parametrize("file", [{}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "max_length": 5}])
def test_ar_complete_is_the_greedy_loop(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, file: dict[str, Any]):
    """Whatever the model's generation_config.json asks for, which stays as it was."""
    own = GenerationConfig(**file)
    monkeypatch.setattr(base, "generation_config", own)
    tokenizer: Any = story_tokenizer()
    ids = tokenizer("Once upon a time")["input_ids"]
    expected = list(ids)
    with torch.no_grad():
        for _ in range(10):
            expected.append(int(base(torch.tensor([expected])).logits[0, -1].argmax()))
            if expected[-1] == tokenizer.eos_token_id:
                break
    assert ar_complete(base, tokenizer, ids, 10).token_ids == expected[len(ids) :]
    assert base.generation_config is own


def test_ar_complete_draws_from_the_model(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    """Not from the few tokens that its generation_config.json leaves: 500 first tokens are as likely as its entropy says."""
    monkeypatch.setattr(
        base, "generation_config", GenerationConfig(do_sample=True, top_p=0.1, top_k=2, temperature=0.1)
    )
    tokenizer: Any = story_tokenizer()
    ids = tokenizer("Once upon a time")["input_ids"]
    drawn = [one.token_ids[0] for one in ar_complete_batch(base, tokenizer, [ids] * 500, 1, temperature=1.0)]
    with torch.no_grad():
        log_p = base(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum()
    spread = (log_p.exp() * (log_p + entropy) ** 2).sum().sqrt()
    assert abs(log_p[drawn].mean() + entropy) < 5 * spread / math.sqrt(len(drawn))
    assert len(set(drawn)) > 100


def test_distinct_2():
    for texts, share in [([[1, 2, 1, 2]], 2 / 3), ([[1, 2, 3]], 1.0), ([[1, 2], [1, 2]], 0.5), ([[1]], 0.0), ([], 0.0)]:
        assert distinct_2(texts) == pytest.approx(share), (texts, share)


def test_an_unconverted_model_is_refused(measured: Measured):
    config = measured.config.model_copy(
        update={"model": measured.config.model.model_copy(update={"base": str(measured.folder / "base")})}
    )
    with pytest.raises(UsageError, match="not a converted checkpoint"):
        benchmark(config, None, measured.folder / "never.json")
    assert not (measured.folder / "never.json").exists()
