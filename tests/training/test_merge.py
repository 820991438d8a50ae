"""Merging: the float32 mean of the best checkpoints, refusals by name, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hildanext import cli
from hildanext.config import parse_config
from hildanext.errors import CheckpointError, UsageError, WriteError
from hildanext.model.loading import load_diffusion_lm
from hildanext.training.checkpoint import list_checkpoints
from hildanext.training.convert import convert_wsd, evaluate_checkpoint
from hildanext.training.merge import best_checkpoints, merge
from hildanext.training.run_folder import RunFolder
from support.training import Trained, material


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Trained:
    """A run with five evaluated checkpoints."""
    config = material(
        tmp_path_factory.mktemp("trained"), tiny_base,
        wsd={"warmup_steps": 1, "stable_steps": 2, "decay_steps": 2},
        train={"save_every": 1, "eval_every": 1, "keep_best": 5, "keep_last": 5, "lr": 0.02},
    )  # fmt: skip
    convert_wsd(config)
    return Trained(config, RunFolder(Path(config.paths.runs) / "convert"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_merge_is_the_float32_mean(trained: Trained, tmp_path: Path):
    folders = [trained.run.checkpoints / f"step-{step}" for step in (1, 3, 5)]
    record = merge(folders, tmp_path / "merged")
    parts = [weights(folder) for folder in folders]
    merged = weights(tmp_path / "merged")
    assert merged.keys() == parts[0].keys()
    for name, value in merged.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).double().mean(0).float())
        assert not torch.equal(value, parts[0][name])
    assert record["merged"] == [str(folder) for folder in folders]
    assert record["weights"] == [1 / 3] * 3
    hilda = json.loads((tmp_path / "merged" / "config.json").read_text())["hilda"]
    assert hilda["merged"] == record["merged"]
    trained_for = [json.loads((f / "config.json").read_text())["hilda"]["tokens_trained"] for f in folders]
    assert hilda["tokens_trained"] == max(trained_for) > min(trained_for)
    assert hilda["weights"] == record["weights"]
    assert not list(tmp_path.glob(".*"))


def test_a_merge_of_low_precision_is_computed_in_float32(trained: Trained, tmp_path: Path):
    """bf16 sums would round: 256 + 1 is 256 in bf16, the mean of (256, 1, 1) is 86."""
    folders = []
    for number, value in enumerate((256.0, 1.0, 1.0)):
        folder = Path(shutil.copytree(trained.run.checkpoints / "step-1", tmp_path / f"part-{number}"))
        tensors = {n: torch.full_like(t, value, dtype=torch.bfloat16) for n, t in weights(folder).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    merge(folders, tmp_path / "merged")
    for value in weights(tmp_path / "merged").values():
        assert value.dtype == torch.bfloat16
        assert (value == 86).all()


def test_the_merged_folder_is_a_plain_model(trained: Trained, tmp_path: Path):
    merge(best_checkpoints(trained.run.path, 2), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    lm, _ = load_diffusion_lm(parse_config({"model": {"base": str(tmp_path / "merged"), "device": "cpu"}}).model)
    assert lm.block_size == 4
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"tokenizer.json", "config.json"}
    # What only a resume needs stays with the run.
    assert not {"trainer.json", "trainer.safetensors"} & {path.name for path in (tmp_path / "merged").iterdir()}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_best_are_those_with_the_lowest_held_out_loss(trained: Trained, k: int):
    losses = {row["step"]: row["eval_loss"] for row in trained.run.read_metrics()}
    ranked = sorted(losses, key=losses.__getitem__)
    assert [path.name for path in best_checkpoints(trained.run.path, k)] == [f"step-{step}" for step in ranked[:k]]


def test_too_few_or_none(trained: Trained, tmp_path: Path):
    with pytest.raises(UsageError, match="5 evaluated checkpoints, but --k is 6; lower --k"):
        best_checkpoints(trained.run.path, 6)
    with pytest.raises(UsageError, match="no checkpoints to merge"):
        best_checkpoints(tmp_path, 1)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([], tmp_path / "merged")
    with pytest.raises(UsageError, match="not a checkpoint folder"):
        merge([tmp_path / "nowhere"], tmp_path / "merged")


def test_a_damaged_checkpoint_is_left_out(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = Path(shutil.copytree(trained.run.path, tmp_path / "run"))
    best = best_checkpoints(run, 1)[0]
    cut_weights(best)
    capsys.readouterr()
    found = best_checkpoints(run, 4)
    assert [path.name for path in found] == [path.name for path in best_checkpoints(trained.run.path, 5)[1:]]
    named, counted = capsys.readouterr().err.strip().splitlines()
    assert named.startswith(f"{best / 'model.safetensors'} has ")
    assert named.endswith("the checkpoint is damaged; left out of the merge")
    assert counted == f"{run}: 1 of 5 checkpoints are damaged; merging the best of the others"
    with pytest.raises(UsageError, match=r"4 evaluated checkpoints \(1 more are damaged\), but --k is 5"):
        best_checkpoints(run, 5)


def test_the_command_reports_and_evaluates(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "config.json"
    file.write_text(trained.config.model_dump_json())
    out = tmp_path / "merged"
    assert cli.main(["merge-topk", "--config", str(file), "--k", "3", "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["merged"] == [str(path) for path in best_checkpoints(trained.run.path, 3)]
    expected = evaluate_checkpoint(trained.config, out, "eval")
    assert {key: answer[key] for key in expected} == expected
    assert expected["eval_loss"] > 0


# Mismatches: (what is done to a copy of a checkpoint, what the error names)


def rename_tensor(folder: Path) -> None:
    tensors = weights(folder)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def reshape_tensor(folder: Path) -> None:
    tensors = weights(folder)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def edit_config(*path: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = node = json.loads((folder / "config.json").read_text())
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def unconvert(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hilda"]
    (folder / "config.json").write_text(json.dumps(config))


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"<|user|>"', '"<|human|>"'))


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


MISMATCHES: dict[str, tuple[Callable[[Path], None], str]] = {
    "names": (rename_tensor, r"tensor 'model\.extra\.weight' is not in both"),
    "shapes": (reshape_tensor, r"tensor 'model\.norm\.weight' has shape \[7\], not \[32\]"),
    "convention": (edit_config("hilda", "convention", value="in_place"), "convention 'in_place', but .* has 'shifted'"),
    "block size": (edit_config("block_size", value=8), "block_size is 8, but 4"),
    "mask token": (edit_config("mask_token_id", value=1), "mask_token_id is 1, but"),
    "vocabulary": (edit_config("vocab_size", value=5), "vocab_size is 5, but"),
    "architecture": (edit_config("architectures", value=["Qwen3ForCausalLM"]), "architectures is .*Qwen3ForCausalLM"),
    "not converted": (unconvert, "not a converted checkpoint"),
    "tokenizer": (other_tokenizer, "another tokenizer"),
    "damaged": (cut_weights, "damaged safetensors file"),
    "no weights": (no_weights, "no safetensors weights"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_is_refused_by_name(trained: Trained, tmp_path: Path, what: str):
    change, named = MISMATCHES[what]
    odd = Path(shutil.copytree(trained.run.checkpoints / "step-2", tmp_path / "odd"))
    change(odd)
    with pytest.raises((CheckpointError, UsageError), match=named) as caught:
        merge([trained.run.checkpoints / "step-1", odd], tmp_path / "merged")
    assert str(odd) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_a_folder_of_chat_templates_goes_along(trained: Trained, tmp_path: Path):
    folder = Path(shutil.copytree(trained.run.checkpoints / "step-1", tmp_path / "part"))
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    merge([folder, folder], tmp_path / "merged")
    assert (tmp_path / "merged" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"


def test_an_existing_folder_is_never_replaced(trained: Trained, tmp_path: Path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(UsageError, match="exists; choose another --out"):
        merge(best_checkpoints(trained.run.path, 2), tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_a_full_disk_leaves_nothing(trained: Trained, make_disk: Callable[[int], Path]):
    """The weights are larger than the disk."""
    small_disk = make_disk(64)
    with pytest.raises(WriteError, match=r"merged: cannot be written: .*No space left on device.*; free some space"):
        merge(best_checkpoints(trained.run.path, 2), small_disk / "merged")
    assert not list(small_disk.iterdir())
    assert list_checkpoints(trained.run.checkpoints)
