"""Training with insertions and deletions: the two tokens from vocabulary to checkpoint, the second turn, refused settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hildanext.config import LoraConfig, ModelConfig, parse_config
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.diffusion.edits import edit_labels
from hildanext.errors import ConfigError, ModelError, UsageError
from hildanext.model.diffusion_lm import DiffusionLM, make_batch
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.denoising import Recipe, noise_rows
from support.models import make_tokenizer, random_llama
from support.training import job, material, trainer_for

EDITS = {"edits": "levenshtein", "turns": 2, "deletion_rate": 0.2, "insertion_rate": 0.2}
WANTED = {"delete_token_id": 301, "insert_token_id": 302}  # behind the mask token
RANK = LoraConfig(rank=4, alpha=6.0)


def load(folder: Path, lora: LoraConfig | None = None, edits: bool = False) -> DiffusionLM:
    config = ModelConfig(base=str(folder), device="cpu", dtype="float32")
    return load_diffusion_lm(config, training=lora is not None, seed=5, lora=lora, edits=edits)[0]


@pytest.mark.parametrize(("rows", "tied"), [(300, True), (300, False), (320, True)])
def test_the_two_tokens_are_added_like_the_mask_token(tmp_path: Path, rows: int, tied: bool):
    base = random_llama(rows, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lm = load(tmp_path / "base", edits=True)
    assert (lm.mask_token_id, lm.edit_ids, lm.record["edits"]) == (300, (301, 302), WANTED)
    assert not {300, 301, 302} & set(lm.ordinary_ids.tolist())
    assert {301, 302} <= set(lm.holes)
    assert len(lm.embedding.weight) == max(rows, 303)  # padding rows are used before anything is resized
    assert (lm.head.weight is lm.embedding.weight) == tied
    old = base.get_input_embeddings().weight
    assert torch.equal(lm.embedding.weight[:300], old[:300])
    assert torch.isfinite(lm.decodable_logits(torch.randn(2, 32))[:, 299]).all()
    assert torch.isinf(lm.decodable_logits(torch.randn(2, 32))[:, 300:]).all()
    assert lm.tokenizer.decode([5, 301, 302, 6], skip_special_tokens=True) == lm.tokenizer.decode([5, 6])
    lm.block_size = 4
    save_diffusion_lm(lm, tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (stored["delete_token_id"], stored["split_token_id"], stored["hilda"]["edits"]) == (301, 302, WANTED)
    again = load(tmp_path / "saved", edits=True)
    assert again.edit_ids == (301, 302)
    assert torch.equal(again.embedding.weight, lm.embedding.weight)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.split_token_id == 302
    stored["hilda"]["edits"]["delete_token_id"] = 7
    (tmp_path / "saved" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match="its tokenizer"):
        load(tmp_path / "saved")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_keeps_the_rows_of_the_two_tokens(tmp_path: Path, tied: bool):
    random_llama(300, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lm = load(tmp_path / "base", RANK, edits=True)
    assert len(lm.embedding.row) == (3 if tied else 1)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 8)
    lm.block_size = 4
    save_diffusion_lm(lm, tmp_path / "adapter")
    merged, beside = load(tmp_path / "adapter"), load(tmp_path / "adapter", RANK)
    ids, hidden = torch.arange(20)[None], torch.randn(3, 32)
    for other in (merged, beside):
        assert other.edit_ids == (301, 302)
        torch.testing.assert_close(other.embedding(ids), lm.embedding(ids))
        torch.testing.assert_close(other.head(hidden), lm.head(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convention", ["in_place", "shifted"])
def test_the_second_turn_has_edits_and_the_first_has_not(tmp_path: Path, tiny_base: Path, convention: str):
    config = material(tmp_path, tiny_base, noise=EDITS, model={"convention": convention})
    recipe = Recipe(2, False, 0.05, 1.0, 0.0)
    trainer, lm = trainer_for(config, job(4, 4), recipe)
    task = trainer.task
    batch = make_batch(lm, [0, 1, 2, 3], task.rows.batch([0, 1, 2, 3]))
    first = noise_rows(lm, batch, 4, recipe, 0.1, 0)
    assert torch.equal(task.noise_of("noised", batch, first, batch.input_ids, 4).labels, batch.input_ids)
    drafts = torch.full_like(batch.input_ids, lm.edit_ids[0])  # a model that predicts DELETE: no draft
    noisy = task.noise_of("drafts", batch, first, drafts, 4)
    x, labels, y = noisy.noisy_ids, noisy.labels, batch.input_ids
    assert not torch.isin(x, torch.tensor(lm.edit_ids)).any()
    assert torch.isin(labels, torch.tensor(lm.edit_ids)).sum() > 4
    assert torch.equal(x[~batch.allowed], y[~batch.allowed])
    assert torch.equal(noisy.masked, batch.allowed & (x == lm.mask_token_id))
    for row in range(4):
        for position in batch.allowed[row].nonzero()[:, 0].tolist():
            start = position - int(batch.position_ids[row, position]) % 4
            inside = [
                p for p in range(start, min(start + 4, 24)) if batch.doc_ids[row, p] == batch.doc_ids[row, position]
            ]
            inside = [p for p in inside if batch.allowed[row, p]]
            if convention == "shifted":
                assert int(labels[row, start]) == int(y[row, start])
                inside = [p for p in inside if batch.position_ids[row, p] % 4]
            found = edit_labels(x[row, inside].tolist(), y[row, inside].tolist(), lm.edit_tokens)
            assert labels[row, inside].tolist() == found


def test_a_run_learns_the_labels_and_its_checkpoint_inserts_and_deletes(tmp_path: Path, tiny_base: Path):
    config = material(tmp_path, tiny_base, noise=EDITS)
    result = convert_wsd(config, "convert")
    tuned = sft(
        config.model_copy(update={"model": config.model.model_copy(update={"base": result["checkpoint"]})}), "sft"
    )
    raw = {"model": {"base": tuned["checkpoint"], "device": "cpu"}, "engine": {"runtime": "eager", "context": 64}}
    config = parse_config(raw | {"decode": {"max_new_tokens": 16}})
    engine = TransformersEngine(config, {})
    settings = engine.settings(config)
    assert settings.min_indel_confidence == 0.0
    done = engine.generate(Request([5, 6, 7], settings, draft=list(range(40, 56))))
    assert len(done.token_ids) == 16
    assert not {*engine.vocabulary.edit_tokens} & set(done.token_ids)
    for token in engine.vocabulary.edit_tokens:
        with pytest.raises(UsageError, match="the prompt contains"):
            engine.submit(Request([5, token], settings))
    for wrong, message in (
        (settings._replace(tau_edit=None), "'draft': only editing"),
        (settings._replace(logprobs=0), "'draft': its own tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            engine.submit(Request([5], wrong, draft=[6]))
    zero = parse_config(raw | {"decode": {"max_post_steps": 0}})
    with pytest.raises(UsageError, match=r"'decode.max_post_steps': 0 leaves no pass"):
        engine.settings(zero)
    assert engine.settings(parse_config(raw | {"decode": {"max_post_steps": 0, "min_indel_confidence": None}}))


def test_refused_settings(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"'noise.edits': does not apply to gated adapters"):
        parse_config({"noise": {"edits": "levenshtein"}, "lora": {"gate": True, "rank": 4}})
    for value in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="min_indel_confidence"):
            parse_config({"decode": {"min_indel_confidence": value}})
    for key in ("deletion_rate", "insertion_rate"):
        with pytest.raises(ConfigError, match=key):
            parse_config({"noise": {key: 1.0}})
    with pytest.raises(UsageError, match=r"set noise.turns to 2"):
        convert_wsd(material(tmp_path, tiny_base, noise=EDITS | {"turns": 1}))
    lm = load(tiny_base)
    lm.block_size = 4
    config = parse_config({"engine": {"runtime": "eager", "context": 64}, "decode": {"min_indel_confidence": 0.5}})
    with pytest.raises(UsageError, match="has no DELETE and INSERT tokens"):
        TransformersEngine(config, {}, lm)
    adapter = load(tiny_base, RANK)
    adapter.block_size = 4
    save_diffusion_lm(adapter, tmp_path / "adapter")
    with pytest.raises(UsageError, match="trained without insertions and deletions"):
        load(tmp_path / "adapter", RANK, edits=True)
