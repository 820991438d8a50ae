"""Instruction tuning: what is supervised, the turns of a step, and the loss against a loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hildanext.config import Config
from hildanext.data.prepare import prepare_data
from hildanext.data.rows import Rows
from hildanext.data.tokenize import tokenize_data
from hildanext.diffusion.noise import complement, sample_generator
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.errors import DataError
from hildanext.model.diffusion_lm import DiffusionLM, make_batch
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.denoising import Denoised, Recipe, noise_rows
from hildanext.training.trainer import Sums, TrainingJob, TrainingStep
from support.training import material, row_loss, trainer_for

BLOCK = 4


JOB = TrainingJob("sft", 4, lambda step: SchedulePoint("stable", BLOCK, 0.0), BLOCK)


def noised(lm: DiffusionLM, rows: Rows, recipe: Recipe, config: Config, samples: int) -> Tensor:
    """[rows, L] bool: positions that the noise of some sample masked or corrupted."""
    touched = torch.zeros(len(rows), rows.seq_len, dtype=torch.bool)
    for row in range(len(rows)):
        for sample in range(samples):
            batch = make_batch(lm, [sample], rows.batch([row]))
            noisy = noise_rows(lm, batch, BLOCK, recipe, config.noise.corrupt_rate, 0)
            changed = noisy.masked | noisy.corrupted
            touched[row] |= changed[0]
            assert torch.equal(noisy.noisy_ids[~changed], batch.input_ids[~changed])
    return touched


def test_noise_falls_on_answers_and_their_ends_only(
    tmp_path: Path,
    tiny_base: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
):
    """Multi-turn conversations from a file to x_t: both answers and the end-of-text fill, no user turn, no padding."""
    conversations = [
        {"messages": [
            {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "saw a dog"},
            {"role": "user", "content": "once"}, {"role": "assistant", "content": "upon a time" + " a" * n},
        ]}
        for n in range(8)
    ]  # fmt: skip
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in conversations))
    config = make_config(
        {"kind": "instruct", "path": str(path)}, sft={"block_size": BLOCK}, seq_len=128, eval_share=0.0
    )
    prepare_data(config)
    tokenize_data(config, tiny_tokenizer)
    rows = Rows.open(tmp_path / "data" / "tokenized" / "sft_train.rows")
    _, lm = trainer_for(material(tmp_path / "other", tiny_base), JOB, Recipe(1, False, 0.5, 1.0, 0.0))
    monkeypatch.setattr(lm, "ordinary_ids", torch.arange(10, 20))
    touched = noised(lm, rows, Recipe(1, False, 0.5, 1.0, 0.0), config, samples=40)
    eos = tiny_tokenizer.eos_token_id
    whole = rows.batch(range(len(rows)))
    answers = []
    for row in range(len(rows)):
        for doc in range(int(whole["doc_ids"][row].max()) + 1):
            where = whole["doc_ids"][row] == doc
            ids, hit = whole["input_ids"][row][where], touched[row][where]
            assert len(ids) % BLOCK == 0
            spans = torch.tensor_split(ids, (hit[1:] != hit[:-1]).nonzero()[:, 0] + 1)
            kinds = [bool(part) for part in hit[torch.tensor([0, *(hit[1:] != hit[:-1]).nonzero()[:, 0] + 1])]]
            assert kinds == [False, True, False, True]
            first, second = spans[1].tolist(), spans[3].tolist()
            assert first[-1] == eos
            assert second[-1] == eos
            assert set(second[second.index(eos) :]) == {eos}
            answers.append((tiny_tokenizer.decode(first[:-1]), tiny_tokenizer.decode(second[: second.index(eos)])))
    assert sorted(answers) == sorted(("saw a dog", "upon a time" + " a" * n) for n in range(8))
    assert not touched[whole["doc_ids"] < 0].any()


def test_a_complementary_pair_is_two_halves_of_one_mask(tmp_path: Path, tiny_base: Path):
    recipe = Recipe(1, True, 0.05, 1.0, 0.0)
    trainer, lm = trainer_for(material(tmp_path, tiny_base), JOB, recipe, "sft_train")
    batch = make_batch(lm, [0, 1, 2], trainer.rows.batch([0, 1, 2]))
    first = noise_rows(lm, batch, BLOCK, recipe, trainer.config.noise.corrupt_rate, 0)
    second = complement(batch.input_ids, batch.allowed, first, lm.mask_token_id, recipe.t_min)
    assert torch.equal(first.masked | second.masked, batch.allowed)
    assert not (first.masked & second.masked).any()
    assert not second.corrupted.any()
    # Masking each token with probability t leaves each with probability 1 - t.
    torch.testing.assert_close(second.t, (1 - first.t).clamp_min(0.05))
    inverse = batch.input_ids.masked_fill(second.masked, lm.mask_token_id)
    assert torch.equal(second.noisy_ids, inverse)


def test_the_mask_ratio_stays_in_its_band(tmp_path: Path, tiny_base: Path):
    config = material(tmp_path, tiny_base)
    recipe = Recipe(1, False, 0.3, 0.6, 0.0)
    trainer, lm = trainer_for(config, JOB, recipe, "sft_train")
    masked = allowed = 0
    for sample in range(300):
        batch = make_batch(lm, [sample], trainer.rows.batch([sample]))
        noisy = noise_rows(lm, batch, BLOCK, recipe, config.noise.corrupt_rate, 0)
        assert 0.3 <= noisy.t.min() <= noisy.t.max() <= 0.6
        masked, allowed = masked + int(noisy.masked.sum()), allowed + int(batch.allowed.sum())
    assert masked / allowed == pytest.approx(0.45, abs=0.02)


# A step's loss over all its turns


def step_loss(config: Config, lm: DiffusionLM, rows: list[dict[str, Tensor]], recipe: Recipe) -> float:
    """Turn 0, its complement, and the turn on the model's own drafts, as LLaDA2.1 section 3 describes them."""
    total, allowed_tokens = 0.0, 0
    for sample, row in enumerate(rows):
        batch = make_batch(lm, [sample], row)
        ids, doc_ids, allowed = batch.input_ids[0], batch.doc_ids[0], batch.allowed[0]
        allowed_tokens += int(allowed.sum())
        first = noise_rows(lm, batch, BLOCK, recipe, config.noise.corrupt_rate, config.train.seed)
        turns = [(first.noisy_ids[0], first.masked[0], first.t[0])]
        if recipe.complementary:
            inverse = allowed & ~first.masked[0]
            turns.append(
                (ids.masked_fill(inverse, lm.mask_token_id), inverse, (1 - first.t[0]).clamp_min(recipe.t_min))
            )
        drafts = None
        for noisy_ids, masked, t in turns:
            loss, filled = row_loss(config, lm, ids, doc_ids, allowed, noisy_ids, masked, t, BLOCK, recipe.cap_weight)
            total += loss
            drafts = filled if drafts is None else drafts
        if recipe.turns == 2:
            assert drafts is not None
            draws = torch.rand(len(ids), generator=sample_generator(config.train.seed, sample, "draft"))
            shown = first.masked[0] & (draws < config.noise.draft_share)
            assert shown.any()
            noisy_ids = torch.where(shown, drafts, first.noisy_ids[0])
            t = (first.t[0] * (1 - config.noise.draft_share)).clamp_min(recipe.t_min)
            still_masked = first.masked[0] & ~shown
            total += row_loss(config, lm, ids, doc_ids, allowed, noisy_ids, still_masked, t, BLOCK, recipe.cap_weight)[
                0
            ]
    return total / allowed_tokens / (1 + recipe.complementary + (recipe.turns - 1))


@pytest.mark.parametrize("convention", ["in_place", "shifted"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(2, False, 0.05, 1.0, 0.0),
        Recipe(1, True, 0.3, 0.8, 0.0),
        Recipe(2, True, 0.3, 0.8, 0.7),
        Recipe(1, False, 0.05, 1.0, 0.5),
    ],
)
@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
def test_the_loss_of_a_step(tmp_path: Path, tiny_base: Path, convention: str, recipe: Recipe, weighting: str):
    config = material(
        tmp_path, tiny_base,
        model={"convention": convention}, loss={"weighting": weighting, "w_t2t": 0.5, "keep": 0.7},
    )  # fmt: skip
    trainer, lm = trainer_for(config, JOB, recipe, "sft_train")
    rows = [trainer.rows.batch([sample]) for sample in range(4)]
    with torch.no_grad():
        expected = step_loss(config, lm, rows, recipe)
    assert trainer.train_step(0)["loss"] == pytest.approx(expected, rel=2e-5)


def test_a_wrong_draft_is_an_edit_to_learn_and_a_right_one_is_kept(tmp_path: Path, tiny_base: Path):
    """The logged edit accuracy counts wrong tokens only, drafts included."""
    config = material(tmp_path, tiny_base, noise={"corrupt_rate": 0.0}, train={"rows_per_step": 2})
    trainer, _ = trainer_for(config, JOB, Recipe(2, False, 0.9, 1.0, 0.0), "sft_train")
    batch = make_batch(trainer.lm, [0, 1], trainer.rows.batch([0, 1]))
    seen: list[Denoised] = []
    trainer.task.module.register_forward_hook(lambda module, inputs, found: seen.append(found))
    trainer.task.backward(batch, TrainingStep(0, trainer.job.point(0), 10), Sums(), sync=True)
    first, second = seen
    assert first.counts.corrupted == 0
    assert 0 < second.counts.corrupted <= first.counts.masked - second.counts.masked


def test_no_weight_is_above_that_of_t_min(tmp_path: Path, tiny_base: Path):
    """Drafts lower the noise level; 1/t stays clipped, in both turns."""
    trainer, _ = trainer_for(material(tmp_path, tiny_base), JOB, Recipe(2, False, 0.3, 0.5, 0.0), "sft_train")
    levels: list[Tensor] = []
    trainer.task.module.register_forward_hook(lambda module, inputs, found: levels.append(inputs[1].t))
    batch = make_batch(trainer.lm, [0, 1], trainer.rows.batch([0, 1]))
    trainer.task.backward(batch, TrainingStep(0, trainer.job.point(0), 10), Sums(), sync=True)
    assert len(levels) == 2
    assert all(t.min() >= 0.3 for t in levels)


def test_tuning_teaches_the_answers(tmp_path: Path, tiny_base: Path):
    """Six steps become sixty: the loss on the answers it trains on falls, and the checkpoint keeps its block."""
    converted = convert_wsd(material(tmp_path, tiny_base))
    rarely = {"save_every": 30, "eval_every": 30}
    sections = {"sft": {"steps": 60, "lr": 0.01, "turns": 2}, "train": rarely}
    config = material(tmp_path, Path(converted["checkpoint"]), **sections)
    done = sft(config)
    losses = [json.loads(line)["m2t_ce"] for line in (tmp_path / "runs/sft/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    stored: dict[str, Any] = json.loads((Path(done["checkpoint"]) / "config.json").read_text())
    assert stored["block_size"] == BLOCK
    assert stored["hilda"]["tokens_trained"] == converted["tokens_seen"] + done["tokens_seen"]


def test_answers_filled_for_another_block_are_refused(tmp_path: Path, tiny_base: Path):
    """Answers end on the border of the blocks they were tokenized for; other blocks would supervise padding or less."""
    converted = convert_wsd(material(tmp_path, tiny_base))
    config = material(tmp_path, Path(converted["checkpoint"]), sft={"block_size": 8})
    with pytest.raises(DataError, match=r"blocks of 4, which 8 does not divide; set sft\.block_size to 8 and tokenize"):
        sft(config)
    assert not (tmp_path / "runs" / "sft").exists()
