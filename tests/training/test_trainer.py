"""The training step against loops written from docs/design.md sections 3 and 4, and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hildanext import cli
from hildanext.config import Config
from hildanext.data.rows import ShuffledRows
from hildanext.diffusion.noise import Noisy, add_noise, block_ids, noise_levels, sample_generator
from hildanext.errors import NonFiniteLossError
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.training.convert import convert_wsd
from hildanext.training.denoising import DenoisingTask, Recipe
from hildanext.training.run_folder import RunFolder
from support.training import CONVERT, LENGTHS, MULTI_TURN, SEQ_LEN, assert_same, job, material, row_loss, trainer_for


def step_loss(config: Config, lm: DiffusionLM, rows: list[dict[str, Tensor]], samples: list[int], block: int) -> float:
    """The loss of a step: each row noised from its own generator, one sum, divided by the step's allowed tokens."""
    total, allowed_tokens = 0.0, 0
    for sample, row in zip(samples, rows, strict=True):
        ids, doc_ids, position_ids = (row[name][0] for name in ("input_ids", "doc_ids", "position_ids"))
        allowed = lm.allowed(row["loss_mask"], row["position_ids"])[0]
        generator = sample_generator(config.train.seed, sample)
        t = noise_levels(doc_ids, block_ids(position_ids, block), 0.05, 1.0, generator)
        noisy = add_noise(
            ids, allowed, t,
            mask_token_id=lm.mask_token_id, ordinary_ids=lm.ordinary_ids,
            corrupt_rate=config.noise.corrupt_rate, generator=generator,
        )  # fmt: skip
        total += row_loss(config, lm, ids, doc_ids, allowed, noisy.noisy_ids, noisy.masked, t, block)[0]
        allowed_tokens += int(allowed.sum())
    return total / allowed_tokens


@pytest.mark.parametrize("convention", ["in_place", "shifted"])
@pytest.mark.parametrize("block", [1, 4, 5, SEQ_LEN, 99])
@pytest.mark.parametrize("loss", [{}, {"weighting": "uniform", "w_m2t": 2.0, "w_t2t": 0.5, "keep": 0.25}, {"keep": 0}])
def test_the_loss_of_a_step(tmp_path: Path, tiny_base: Path, convention: str, block: int, loss: dict[str, Any]):
    config = material(
        tmp_path, tiny_base, model={"convention": convention}, loss=loss, noise={"corrupt_rate": 0.3, "embed_std": 0}
    )
    trainer, lm = trainer_for(config, job(block, lr=0.0), CONVERT)
    for step in (0, 2):
        samples = list(range(step * 4, step * 4 + 4))
        rows = [trainer.rows.batch([sample]) for sample in samples]
        with torch.no_grad():
            expected = step_loss(config, lm, rows, samples, block)
        assert trainer.train_step(step)["loss"] == pytest.approx(expected, rel=2e-5)


# What must not change the numbers


def after_steps(config: Config, block: int, recipe: Recipe = CONVERT) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of three steps."""
    trainer, lm = trainer_for(config, job(block), recipe)
    losses = [trainer.train_step(step)["loss"] for step in range(3)]
    return losses, {name: value.detach().clone() for name, value in lm.model.named_parameters()}


@pytest.mark.parametrize(("block", "recipe"), [(4, CONVERT), (SEQ_LEN, CONVERT), (4, MULTI_TURN)])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_equals_one_large_batch(
    tmp_path: Path, tiny_base: Path, block: int, recipe: Recipe, micro_batch: int
):
    # AdamW's first step is the gradient's sign: rounding in a vanishing gradient would be a whole step.
    noise = {"embed_std": 0.5, "embed_steps": 2}
    one = material(tmp_path, tiny_base, noise=noise, train={"optimizer": "adafactor", "micro_batch": 4})
    many = material(tmp_path, tiny_base, noise=noise, train={"optimizer": "adafactor", "micro_batch": micro_batch})
    assert_same(after_steps(one, block, recipe), after_steps(many, block, recipe))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_base: Path):
    plain = material(tmp_path, tiny_base)
    frugal = material(tmp_path, tiny_base, train={"gradient_checkpointing": True})
    assert_same(after_steps(plain, 4, MULTI_TURN), after_steps(frugal, 4, MULTI_TURN))


def test_gradient_checkpointing_recomputes_activations(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = {}
    for frugal in (False, True):
        trainer, lm = trainer_for(
            material(tmp_path, tiny_base, train={"gradient_checkpointing": frugal}), job(4), CONVERT
        )
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        lm.model.model.layers[0].self_attn.q_proj.register_forward_hook(counted)
        trainer.train_step(0)
        calls[frugal] = count
    assert calls[True] == 2 * calls[False]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_step_without_overlap(tmp_path: Path, tiny_base: Path, world: int):
    config = material(tmp_path, tiny_base, train={"rows_per_step": 8, "micro_batch": 2})
    trainer, _ = trainer_for(config, job(4), CONVERT)
    seen: list[int] = []
    for rank in range(world):
        trainer.accelerator = SimpleNamespace(num_processes=world, process_index=rank)  # type: ignore[assignment]
        seen += [sample for micro in trainer.samples_of(5) for sample in micro]
    assert sorted(seen) == list(range(40, 48))


def test_the_seed_is_the_run(tmp_path: Path, tiny_base: Path):
    """The same seed gives the same numbers to the last bit; another seed another order and noise."""
    same = [after_steps(material(tmp_path, tiny_base, train={"seed": 7}), 4)[0] for _ in range(2)]
    assert same[0] == same[1]
    assert after_steps(material(tmp_path, tiny_base, train={"seed": 8}), 4)[0] != same[0]


# A whole run


@pytest.mark.usefixtures("with_curves")
def test_a_run_learns_and_leaves_its_record(tmp_path: Path, tiny_base: Path):
    config = material(
        tmp_path, tiny_base,
        wsd={"warmup_steps": 10, "stable_steps": 10, "decay_steps": 20},
        train={"rows_per_step": 6, "eval_every": 20, "save_every": 20, "lr": 0.01},
    )  # fmt: skip
    done = convert_wsd(config)
    run = RunFolder(tmp_path / "runs" / "convert")
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 41))
    always = {
        "step", "loss", "m2t", "t2t", "m2t_ce", "masked_accuracy", "edit_accuracy", "block_size", "phase", "lr",
        "grad_norm", "tokens_seen", "tokens_per_second", "peak_memory_mb",
    }  # fmt: skip
    for row in metrics:
        evaluated = {"eval_loss", "eval_accuracy"} if row["step"] % 20 == 0 else set()
        assert set(row) == always | evaluated
        assert row["loss"] == pytest.approx(row["m2t"] + row["t2t"], rel=1e-5)  # both weights are 1
    assert sum(row["m2t_ce"] for row in metrics[-5:]) < 0.75 * sum(row["m2t_ce"] for row in metrics[:5])
    assert done["tokens_seen"] == metrics[-1]["tokens_seen"]
    assert metrics[-1]["eval_loss"] == done["eval_loss"]
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    record = json.loads(run.record.read_text())
    assert record["command"] == "convert-wsd"
    assert record["seed"] == config.train.seed
    assert record["config"] == config.model_dump(mode="json", exclude={"server", "jobs"})
    assert {"hildanext", "python", "torch", "transformers", "accelerate"} <= set(record["versions"])
    assert "git" in record
    hilda = json.loads((Path(done["checkpoint"]) / "config.json").read_text())["hilda"]
    assert hilda["tokens_trained"] == done["tokens_seen"]
    assert hilda["schedule"] == config.wsd.model_dump(mode="json")


def test_tokens_seen_are_the_real_ones(tmp_path: Path, tiny_base: Path):
    """Padding is not text: a pass over all rows has seen each document's tokens once."""
    trainer, _ = trainer_for(material(tmp_path, tiny_base), job(4), CONVERT)
    assert isinstance(trainer.rows, ShuffledRows)
    n_rows = len(trainer.rows.rows)
    config = material(tmp_path, tiny_base, train={"rows_per_step": n_rows, "micro_batch": n_rows})
    trainer, _ = trainer_for(config, job(4), CONVERT)
    assert trainer.train_step(0)["tokens"] == sum(LENGTHS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_float32_whatever_computes(tmp_path: Path, tiny_base: Path, dtype: str):
    config = material(tmp_path, tiny_base, model={"dtype": dtype})
    done = convert_wsd(config)
    weights = AutoModelForCausalLM.from_pretrained(done["checkpoint"], dtype="auto").state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    reference = convert_wsd(material(tmp_path, tiny_base), name="reference")
    assert done["eval_loss"] == pytest.approx(reference["eval_loss"], rel=0.02)
    assert (done["eval_loss"] == reference["eval_loss"]) == (dtype == "float32")


def test_ruined_weights_stop_the_run_with_the_step_and_its_rows(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
):
    """A learning rate far too high ruins the weights at step 1; step 2 sees it before it is saved or logged."""
    config = material(tmp_path, tiny_base, train={"lr": 1e30, "clip_norm": 1e30, "save_every": 1, "lr_warmup_steps": 0})
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    assert cli.main(["convert-wsd", "--config", str(file)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hildanext convert-wsd: step 2: the gradient is nan (block size 12, rows [")
    trainer, _ = trainer_for(config, job(4), CONVERT)
    assert isinstance(trainer.rows, ShuffledRows)
    rows = sorted(trainer.rows.order.row(sample) for sample in range(4, 8))
    assert f"rows {rows})" in last
    run = RunFolder(tmp_path / "runs" / "convert")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-1"]
    assert [row["step"] for row in run.read_metrics()] == [1]


def test_a_held_out_loss_that_is_no_number_is_not_saved(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    step_of = torch.optim.AdamW.step

    def ruin(self: torch.optim.AdamW, *rest: Any, **options: Any) -> Any:
        result = step_of(self, *rest, **options)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    with pytest.raises(NonFiniteLossError, match="step 1: the held-out loss is nan"):
        convert_wsd(material(tmp_path, tiny_base, train={"save_every": 1}))
    assert not list((tmp_path / "runs" / "convert" / "checkpoints").iterdir())


def test_a_loss_that_is_no_number_moves_no_weight(tmp_path: Path, tiny_base: Path):
    trainer, lm = trainer_for(material(tmp_path, tiny_base), job(4), CONVERT)
    with torch.no_grad():
        lm.model.model.norm.weight[0] = float("nan")
    before = [parameter.detach().clone() for parameter in lm.model.parameters()]
    with pytest.raises(
        NonFiniteLossError, match=r"step 4: the loss is nan \(block size 4, rows \[\d+, \d+\], turn 'noised'\)"
    ):
        trainer.train_step(3)
    for old, new in zip(before, lm.model.parameters(), strict=True):
        torch.testing.assert_close(old, new, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("turn", MULTI_TURN.order())
def test_an_error_names_the_turn(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, turn: str):
    trainer, _ = trainer_for(material(tmp_path, tiny_base), job(4), MULTI_TURN)
    task = trainer.task
    noise_of = DenoisingTask.noise_of

    def ruined(self: DenoisingTask, which: Any, *rest: Any) -> Noisy:
        noisy = noise_of(self, which, *rest)
        return noisy._replace(t=noisy.t * float("nan")) if which == turn else noisy

    assert isinstance(task, DenoisingTask)
    monkeypatch.setattr(DenoisingTask, "noise_of", ruined)
    with pytest.raises(NonFiniteLossError, match=rf"step 1: the loss is nan .*, turn '{turn}'\)"):
        trainer.train_step(0)


def test_embedding_noise_decays_and_marks_masks_only(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    config = material(tmp_path, tiny_base, noise={"embed_std": 0.5, "embed_steps": 4})
    trainer, lm = trainer_for(config, job(4, lr=0.0), CONVERT)
    seen: list[tuple[Tensor, Tensor | None]] = []
    forward = type(lm).forward

    def spy(self: Any, batch: Any, noisy_ids: Tensor, *rest: Any) -> Tensor:
        seen.append((noisy_ids, rest[-1]))
        return forward(self, batch, noisy_ids, *rest)

    monkeypatch.setattr(type(lm), "forward", spy)
    for step in (0, 2, 4):
        trainer.train_step(step)
    std = lm.embedding.weight.std().item()
    for step, (noisy_ids, noise) in zip((0, 0, 2, 2), seen[:4], strict=True):
        masked = noisy_ids == lm.mask_token_id
        assert noise is not None
        assert noise[~masked].abs().max() == 0
        assert noise[masked].std().item() == pytest.approx(0.5 * (1 - step / 4) * std, rel=0.15)
    assert [noise for _, noise in seen[4:]] == [None, None]
