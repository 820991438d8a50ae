"""Preference tuning: the loss against loops from LLaDA2.0 eq. 7-8, the reference, the noise, what is read, whole runs."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hildanext import cli
from hildanext.config import Config, LoraConfig
from hildanext.data.documents import Rejects
from hildanext.data.encode import Encoded
from hildanext.data.preferences import PreferencePair, PreferencePairs, encode_pairs, read_pairs
from hildanext.diffusion.noise import Noisy
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.errors import CheckpointError, ConfigError, DataError, UsageError
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.loading import load_diffusion_lm, set_adapter, weights_of
from hildanext.model.tiny import story_tokenizer
from hildanext.training import parallel
from hildanext.training.convert import convert_wsd
from hildanext.training.dpo import dpo, open_pairs, reference
from hildanext.training.preference import ElboModule, Preference, PreferenceTask, draw_noise
from hildanext.training.run_folder import RunFolder
from hildanext.training.trainer import Trainer, TrainingJob
from support import forked
from support.resume import KILLS, assert_undisturbed
from support.training import material, pair, predictions, write_pairs

BLOCK, LENGTH = 4, 56


def preferring(folder: Path, base: Path, **sections: Any) -> Config:
    pairs = write_pairs(folder / "pairs.jsonl") if not (folder / "pairs.jsonl").exists() else folder / "pairs.jsonl"
    dpo_section = {"pairs": str(pairs), "steps": 6, "lr": 0.01, "lr_warmup_steps": 0} | sections.pop("dpo", {})
    data = {"seq_len": LENGTH, "eval_share": 0.2} | sections.pop("data", {})
    lora = {"rank": 4} | sections.pop("lora", {})
    return material(folder, base, dpo=dpo_section, data=data, lora=lora, **sections)


@pytest.fixture(scope="module", params=["in_place", "shifted"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A whole converted checkpoint."""
    folder = tmp_path_factory.mktemp("converted")
    return Path(convert_wsd(material(folder, tiny_base, model={"convention": request.param}))["checkpoint"])


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return Path(convert_wsd(material(tmp_path_factory.mktemp("shifted"), tiny_base))["checkpoint"])


def opened(config: Config, recipe: Preference) -> tuple[Trainer, PreferenceTask]:
    """What `dpo` makes, without a run folder. The learning rate is 0."""
    lm, policy = load_diffusion_lm(config.model, training=True, seed=config.train.seed, lora=config.lora)
    accelerator = parallel.start(policy, config.train)
    pairs, held_out = open_pairs(config, lm, BLOCK)
    task = PreferenceTask(config, lm, accelerator, recipe, pairs, held_out, BLOCK, reference(config, lm))
    job = TrainingJob("dpo", 4, lambda step: SchedulePoint("stable", BLOCK, 0.0), BLOCK)
    return Trainer(config, lm, policy, accelerator, job, task, RunFolder(Path(config.paths.runs) / "unused")), task


def stir(lm: DiffusionLM, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    set_adapter(lm, {n: 0.2 * torch.randn(p.shape, generator=generator) for n, p in weights_of(lm).items()})


# The loss, from the formulas, with the stock model one block of one answer at a time


def answer_elbo(lm: DiffusionLM, batch: Batch, noisy: Noisy, row: int) -> float:
    """Eq. 7: minus the cross-entropy of every masked token over its t, each block seen after the clean ones before it."""
    n = int((batch.doc_ids[row] == 0).sum())
    clean, x_t, total = batch.input_ids[row, :n], noisy.noisy_ids[row, :n], 0.0
    for start in range(0, n, BLOCK):
        for i, logits in predictions(lm, clean, x_t, BLOCK, start, min(start + BLOCK, n)).items():
            if noisy.masked[row, i]:
                total += logits.log_softmax(-1)[clean[i]].item() / noisy.t[row, i].item()
    return total


def merged(lm: DiffusionLM, values: dict[str, Tensor], folder: Path, config: Config) -> DiffusionLM:
    """The model with these adapter values added to the weights: a stock model."""
    from hildanext.model.loading import save_diffusion_lm

    now = {name: value.clone() for name, value in weights_of(lm).items()}
    set_adapter(lm, values)
    lm.block_size = BLOCK
    folder.mkdir()
    save_diffusion_lm(lm, folder)
    set_adapter(lm, now)
    return load_diffusion_lm(config.model.model_copy(update={"base": str(folder)}))[0]


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("complementary", [False, True])
def test_the_loss_is_eq_8(tmp_path: Path, converted: Path, draws: int, complementary: bool):
    config = preferring(tmp_path, converted, train={"micro_batch": 2})
    recipe = Preference(0.3, draws, complementary, 0.2, 0.8)
    trainer, task = opened(config, recipe)
    stir(trainer.lm)
    policy = merged(trainer.lm, dict(weights_of(trainer.lm)), tmp_path / "policy", config)
    before = merged(trainer.lm, task.reference, tmp_path / "before", config)
    expected: list[float] = []
    rewards: list[tuple[float, float]] = []
    for samples in ([4, 5], [6, 7]):
        batch = task.fetch(samples)
        rows, noisy = draw_noise(trainer.lm, batch, BLOCK, LENGTH, recipe, config.train.seed, "dpo")
        passes = draws * (2 if complementary else 1)
        assert len(rows.input_ids) == passes * 4
        for p in range(2):
            gained = []
            for side in (0, 1):
                at = [k * 4 + 2 * p + side for k in range(passes)]
                gained.append(
                    sum(answer_elbo(policy, rows, noisy, r) - answer_elbo(before, rows, noisy, r) for r in at) / passes
                )
            expected.append(math.log1p(math.exp(-0.3 * (gained[0] - gained[1]))))
            rewards.append((0.3 * gained[0], 0.3 * gained[1]))
    found = trainer.train_step(1)
    assert found["loss"] == pytest.approx(sum(expected) / 4, rel=1e-3)
    assert found["reward_chosen"] == pytest.approx(sum(r[0] for r in rewards) / 4, rel=1e-3, abs=1e-3)
    assert found["reward_rejected"] == pytest.approx(sum(r[1] for r in rewards) / 4, rel=1e-3, abs=1e-3)
    assert found["reward_margin"] == pytest.approx(
        found["reward_chosen"] - found["reward_rejected"], rel=1e-4, abs=1e-5
    )
    assert found["reward_accuracy"] == sum(r[0] > r[1] for r in rewards) / 4


def test_its_gradient_is_the_loss_s(tmp_path: Path, shifted: Path):
    """Against autograd through the formula itself, log-probabilities and all."""
    trainer, task = opened(preferring(tmp_path, shifted), Preference(0.3, 2, True, 0.2, 0.8))
    lm = trainer.lm
    stir(lm)
    batch = task.fetch([0, 1, 2])
    rows, noisy = draw_noise(lm, batch, BLOCK, LENGTH, task.recipe, 0, "dpo")
    target = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    found = ElboModule(lm, 0.3)(rows, noisy, BLOCK, target)
    found.loss.backward()
    grads = {name: p.grad.clone() for name, p in weights_of(lm).items() if p.grad is not None}
    lm.model.zero_grad()
    hidden = lm(rows, noisy.noisy_ids, noisy.masked, BLOCK)
    log_p = lm.head(hidden).log_softmax(-1).gather(1, rows.input_ids[noisy.masked][:, None])[:, 0]
    terms = torch.zeros(noisy.masked.shape).masked_scatter(noisy.masked, log_p / noisy.t[noisy.masked])
    gained = terms.sum(1).view(4, 3, 2).mean(0) - target
    loss = -torch.nn.functional.logsigmoid(0.3 * (gained[:, 0] - gained[:, 1])).sum()
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in weights_of(lm).items():
        assert parameter.grad is not None
        assert (grads[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max(), name


# The reference


def test_a_fresh_adapter_s_reference_is_the_model_without_it(tmp_path: Path, converted: Path):
    config = preferring(tmp_path, converted)
    trainer, task = opened(config, Preference(0.1, 1, False, 0.1, 1.0))
    plain = load_diffusion_lm(config.model)[0]
    stir(trainer.lm)
    trained = {name: value.clone() for name, value in weights_of(trainer.lm).items()}
    batch = task.fetch([0, 1])
    rows, noisy = draw_noise(trainer.lm, batch, BLOCK, LENGTH, task.recipe, 0, "dpo")
    with torch.no_grad():
        with task.as_reference():
            found = task.module(rows, noisy, BLOCK, None)
        assert torch.equal(found, ElboModule(plain, 0.1)(rows, noisy, BLOCK, None))
        assert not torch.equal(found, task.module(rows, noisy, BLOCK, None))
    for name, value in weights_of(trainer.lm).items():
        assert torch.equal(value, trained[name])


def test_at_the_first_step_the_loss_is_log_2(tmp_path: Path, converted: Path):
    config = preferring(tmp_path, converted, dpo={"lr": 0.002}, lora={"dropout": 0.0})
    dpo(config)
    first, *rest = RunFolder(tmp_path / "runs" / "dpo").read_metrics()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["reward_margin"], first["reward_accuracy"]) == (0.0, 0.5)
    assert all(row["reward_margin"] != 0 for row in rest)


def test_an_adapter_is_its_own_reference(tmp_path: Path, tiny_base: Path):
    """A run that begins with an adapter is held to that adapter, not to the base without it, also once it is resumed."""
    start = convert_wsd(material(tmp_path, tiny_base, lora={"rank": 4}, train={"lr": 0.02}))["checkpoint"]
    config = preferring(tmp_path, Path(start), train={"keep_last": 3})
    done = dpo(config)
    assert RunFolder(tmp_path / "runs" / "dpo").read_metrics()[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    one, other = (json.loads((Path(path) / "config.json").read_text())["hilda"] for path in (start, done["checkpoint"]))
    assert one["adapter"] == other["adapter"]
    begun, _ = load_diffusion_lm(config.model, training=True, lora=config.lora)
    later, _ = load_diffusion_lm(
        config.model.model_copy(update={"base": done["checkpoint"]}), training=True, lora=config.lora
    )
    for name, value in reference(config, later).items():
        assert torch.equal(value, weights_of(begun)[name])
        assert not torch.equal(value, weights_of(later)[name])


# The noise


def test_an_answer_s_noise_does_not_depend_on_its_batch(tmp_path: Path, shifted: Path):
    trainer, task = opened(preferring(tmp_path, shifted), Preference(0.1, 2, True, 0.2, 0.8))
    _, many = draw_noise(trainer.lm, task.fetch([3, 4, 5]), BLOCK, LENGTH, task.recipe, 7, "dpo")
    _, one = draw_noise(trainer.lm, task.fetch([4]), BLOCK, LENGTH, task.recipe, 7, "dpo")
    length = one.masked.shape[1]
    at = [k * 6 + 2 + side for k in range(4) for side in (0, 1)]
    assert torch.equal(many.masked[at, :length], one.masked)
    assert torch.equal(many.t[at, :length], one.t)
    assert not many.masked[at, length:].any()


def test_both_answers_and_the_inverse_share_levels_and_draws(tmp_path: Path, shifted: Path):
    trainer, task = opened(preferring(tmp_path, shifted), Preference(0.1, 1, True, 0.2, 0.8))
    batch = task.fetch([0, 1])
    rows, noisy = draw_noise(trainer.lm, batch, BLOCK, LENGTH, task.recipe, 7, "dpo")
    chosen, rejected = noisy.masked[0::2], noisy.masked[1::2]
    both = rows.allowed[0::2] & rows.allowed[1::2]
    assert both.any()
    assert torch.equal(chosen[both], rejected[both])
    assert torch.equal(noisy.t[0::2][both], noisy.t[1::2][both])
    first, inverse = noisy.masked[:4], noisy.masked[4:]
    assert torch.equal(first ^ inverse, rows.allowed[:4])
    torch.testing.assert_close(noisy.t[4:], 1 - noisy.t[:4])
    assert torch.equal(noisy.noisy_ids == trainer.lm.mask_token_id, noisy.masked)


def test_pairing_the_noise_lowers_the_variance(tmp_path: Path, shifted: Path):
    """The margin's spread over noise draws: reference on the policy's noise, against noise of its own; and with inverses."""
    trainer, task = opened(preferring(tmp_path, shifted), Preference(1.0, 1, False, 0.1, 0.9))
    lm = trainer.lm
    stir(lm)
    set_adapter(lm, {name: 0.3 * value for name, value in weights_of(lm).items()})
    batch = task.fetch([0, 1, 2])

    def margins(recipe: Preference, other: int) -> Tensor:
        task.recipe, found = recipe, []
        for seed in range(40):
            mine, theirs = (draw_noise(lm, batch, BLOCK, LENGTH, recipe, s, "dpo") for s in (seed, seed + other))
            with torch.no_grad():
                with task.as_reference():
                    held = task.module(*theirs, BLOCK, None)
                gained = task.module(*mine, BLOCK, None) - held
            found.append(gained[:, 0] - gained[:, 1])
        return torch.stack(found)

    paired, apart = margins(task.recipe, 0), margins(task.recipe, 1000)
    assert (paired.var(0) < 0.5 * apart.var(0)).all()
    inverse = margins(task.recipe._replace(complementary=True), 0)
    assert inverse.var(0).sum() < paired.var(0).sum()
    # The same thing is estimated.
    error = (paired.var(0) / 40 + inverse.var(0) / 40).sqrt()
    assert ((paired.mean(0) - inverse.mean(0)).abs() < 4 * error).all()


# Whole runs


@pytest.mark.usefixtures("with_curves")
def test_the_margin_grows_and_the_record_is_kept(tmp_path: Path, shifted: Path):
    config = preferring(tmp_path, shifted, dpo={"steps": 30, "beta": 0.5}, train={"eval_every": 10, "save_every": 15})
    done = dpo(config)
    run = RunFolder(tmp_path / "runs" / "dpo")
    rows = run.read_metrics()
    assert sum(row["reward_margin"] for row in rows[-5:]) / 5 > 1
    assert sum(row["reward_accuracy"] for row in rows[-5:]) / 5 > 0.9
    assert done["eval_loss"] < math.log(2)
    assert rows[-1]["eval_margin"] > 0.5
    assert done["eval_loss"] == rows[-1]["eval_loss"]
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    assert (Path(done["checkpoint"]) / "adapter_model.safetensors").is_file()
    lm, _ = load_diffusion_lm(config.model.model_copy(update={"base": done["checkpoint"]}))
    assert lm.block_size == BLOCK


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_equals_one_large_batch(tmp_path: Path, shifted: Path, micro_batch: int):
    rows = []
    for size, name in ((4, "one"), (micro_batch, "many")):
        config = preferring(tmp_path, shifted, train={"micro_batch": size, "optimizer": "adafactor"}, dpo={"steps": 3})
        dpo(config, name)
        rows.append(RunFolder(tmp_path / "runs" / name).read_metrics())
    for one, many in zip(*rows, strict=True):
        for key in ("loss", "reward_margin", "grad_norm"):
            assert one[key] == pytest.approx(many[key], rel=1e-3, abs=1e-5)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, shifted: Path):
    config = preferring(tmp_path, shifted, train={"keep_last": 1, "keep_best": 1}, lora={"dropout": 0.1})
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    assert forked.run(["dpo", "--config", file], tmp_path, KILLS["in a step"]).returncode == -signal.SIGKILL
    assert cli.main(["dpo", "--config", str(file), "--resume"]) == 0
    dpo(config, name="reference")
    assert_undisturbed(tmp_path / "runs" / "dpo", tmp_path / "runs" / "reference")


# What is read


def chosen_and_rejected(record: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    (folder / "one.json").write_text(json.dumps([record]))
    rejects = Rejects()
    found = list(read_pairs(str(folder / "one.json"), rejects))
    if not found:
        raise DataError(str(rejects))
    return [side.messages or [] for side in found[0]]


ASKED = {"role": "user", "content": "Which?"}
SHAPES: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "Which?", "chosen": "this", "rejected": "that"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Which?"}],
        "chosen": {"from": "gpt", "value": "this"},
        "rejected": {"from": "gpt", "value": "that"},
    },
    "whole conversations": {
        "prompt": "Which?",
        "chosen": [ASKED, {"role": "assistant", "content": "this"}],
        "rejected": [ASKED, {"role": "assistant", "content": "that"}],
    },
    "prompt as messages": {
        "prompt": [ASKED],
        "chosen": [{"role": "assistant", "content": "this"}],
        "rejected": [{"role": "assistant", "content": "that"}],
    },
    "prompt as messages, answers as text": {"prompt": [ASKED], "chosen": "this", "rejected": "that"},
    "instruction": {"instruction": "Which?", "input": "", "chosen": "this", "rejected": "that"},
}  # fmt: skip


def test_the_shapes_of_pairs(tmp_path: Path):
    for shape in SHAPES:
        sides = chosen_and_rejected(SHAPES[shape], tmp_path)
        for messages, answer in zip(sides, ("this", "that"), strict=True):
            assert [(m["role"], m["content"]) for m in messages] == [("user", "Which?"), ("assistant", answer)], shape


def test_earlier_answers_belong_to_the_prompt(tmp_path: Path):
    record = SHAPES["sharegpt"] | {
        "conversations": [
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Which?"},
        ]
    }  # fmt: skip
    for messages in chosen_and_rejected(record, tmp_path):
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert [m.get("train") for m in messages if m["role"] == "assistant"] == [False, True]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "no 'rejected' answer"),
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the two answers are the same"),
    "other prompts": (
        {"chosen": [ASKED, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "b"}]},
        "different prompts",
    ),
    "no prompt": (
        {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]},
        "no prompt",
    ),
    "no text": ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty message"),
    "unknown": ({"chosen": "a", "rejected": "b"}, "unknown record shape"),
}  # fmt: skip


def test_what_is_no_pair_is_counted_by_place(tmp_path: Path, subtests: pytest.Subtests):
    for what in BAD:
        with subtests.test(what=what):
            record, reason = BAD[what]
            with pytest.raises(DataError, match=f"{reason} x1 \\(.*one.json:1\\)"):
                chosen_and_rejected(record, tmp_path)


def test_answers_are_supervised_alone_and_end_with_a_block(tmp_path: Path):
    tokenizer = story_tokenizer(300)
    rejects = Rejects()
    answers = list(read_pairs(str(write_pairs(tmp_path / "pairs.jsonl")), rejects))
    pairs, *left = encode_pairs(answers, tokenizer, 64, BLOCK, rejects)
    assert (len(pairs), left, rejects.total) == (12, [0, 0], 0)
    for number, one in enumerate(pairs):
        for side, name in zip(one, ("chosen", "rejected"), strict=True):
            assert len(side.input_ids) % BLOCK == 0
            said = tokenizer.decode(side.input_ids[side.loss_mask], skip_special_tokens=True)
            assert said.strip() == pair(number)[name]
            assert side.input_ids[-1] == tokenizer.eos_token_id
    kept = []
    for seq_len in (4, 24, 32):
        short, _, n_left_out = encode_pairs(answers, tokenizer, seq_len, BLOCK, rejects)
        assert all(len(side.input_ids) <= seq_len and side.loss_mask.any() for one in short for side in one)
        assert len(short) + n_left_out == 12
        kept.append(len(short))
    assert kept[0] == 0  # the prompt alone is longer
    assert kept[2] > 0
    assert rejects.total == 0


def test_the_demo_pairs_are_read(shared: Callable[[str], Path]):
    rejects = Rejects()
    answers = list(read_pairs(str(shared("instruct/dpo_en_demo.json")), rejects))
    assert len(answers) + rejects.total == 300
    assert rejects.total <= 3, str(rejects)


def test_rows_of_pairs_have_few_widths():
    """Of pairs of every length: a kernel is compiled for each width."""

    def side(n: int) -> Encoded:
        return Encoded(np.full(n, 7, dtype=np.int32), np.ones(n, dtype=bool))

    pairs = [PreferencePair(side(n), side(max(n // 2, 1))) for n in range(1, 1001)]
    rows = PreferencePairs(pairs, story_tokenizer(300), 0, seq_len=1000)
    widths = {rows.batch([sample])["input_ids"].shape[1] for sample in range(1000)}
    assert widths == {128, 256, 384, 512, 640, 768, 896, 1000}
    found = rows.of([199])
    assert (found["doc_ids"] >= 0).sum(1).tolist() == [200, 100]
    assert found["loss_mask"].sum(1).tolist() == [200, 100]


def test_what_dpo_cannot_do_without(tmp_path: Path, tiny_base: Path, shifted: Path):
    whole = preferring(tmp_path, shifted)
    refused: list[tuple[Config, type[Exception], str]] = [
        (whole.model_copy(update={"lora": LoraConfig()}), ConfigError, "'lora.rank': dpo trains an adapter"),
        (
            whole.model_copy(update={"dpo": whole.dpo.model_copy(update={"pairs": None})}),
            ConfigError,
            "'dpo.pairs': no file of preference pairs",
        ),
        (preferring(tmp_path, tiny_base), UsageError, "is not converted; run 'hildanext convert-wsd'"),
        (
            preferring(tmp_path, shifted, dpo={"pairs": "/no/where.json"}),
            UsageError,
            "dpo.pairs: path '/no/where.json' does",
        ),
    ]
    for config, kind, named in refused:
        with pytest.raises(kind, match=named):
            dpo(config)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"3 of 3 records rejected .*no 'rejected' answer x3"):
        dpo(preferring(tmp_path, shifted, dpo={"pairs": str(bad)}))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match=r"'dpo\.complementary': the inverse of a mask at noise level 1"):
        preferring(tmp_path, shifted, dpo={"complementary": True})


def test_other_pairs_do_not_resume(tmp_path: Path, shifted: Path):
    config = preferring(tmp_path, shifted, dpo={"steps": 2})
    dpo(config)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(1, 13)))
    with pytest.raises(CheckpointError, match="the preference pairs have changed since the run started"):
        dpo(config, resume=True)
