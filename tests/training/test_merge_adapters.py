"""Merging adapters: the mean of what they change, exactly; cut to a rank; made a whole checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hildanext import cli
from hildanext.config import ModelConfig
from hildanext.errors import CheckpointError, UsageError
from hildanext.model.loading import load_diffusion_lm
from hildanext.training.convert import convert_wsd, evaluate_checkpoint
from hildanext.training.merge import merge
from hildanext.training.run_folder import RunFolder
from support.training import Trained, material

STEPS = (1, 3, 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Trained:
    """A run with five evaluated adapters."""
    config = material(
        tmp_path_factory.mktemp("trained"), tiny_base,
        wsd={"warmup_steps": 1, "stable_steps": 2, "decay_steps": 2}, lora={"rank": 4, "alpha": 6.0},
        train={"save_every": 1, "eval_every": 1, "keep_best": 5, "keep_last": 5, "lr": 0.02},
    )  # fmt: skip
    convert_wsd(config)
    return Trained(config, RunFolder(Path(config.paths.runs) / "convert"))


@pytest.fixture
def folders(trained: Trained) -> list[Path]:
    return [trained.run.checkpoints / f"step-{step}" for step in STEPS]


def changed(folder: Path, trained: Trained) -> dict[str, torch.Tensor]:
    """What loading a folder makes of every matrix of the base, in float64."""
    lm, _ = load_diffusion_lm(trained.config.model.model_copy(update={"base": str(folder)}))
    base, _ = load_diffusion_lm(trained.config.model, seed=trained.config.train.seed)
    before = dict(base.model.named_parameters())
    return {name: p.detach().double() - before[name].double() for name, p in lm.model.named_parameters()}


def dense_mean(folders: list[Path], trained: Trained) -> dict[str, torch.Tensor]:
    parts = [changed(folder, trained) for folder in folders]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def test_the_merge_is_the_mean_of_the_changes(trained: Trained, folders: list[Path], tmp_path: Path):
    record = merge(folders, tmp_path / "merged")
    expected, found = dense_mean(folders, trained), changed(tmp_path / "merged", trained)
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=2e-7)
    assert max(change.abs().max() for change in expected.values()) > 1e-3
    settings = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (settings["r"], settings["rank_pattern"]["lm_head"]) == (12, 13)
    hilda = json.loads((tmp_path / "merged" / "config.json").read_text())["hilda"]
    assert hilda["merged"] == record["merged"] == [str(folder) for folder in folders]
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert not names & {"trainer.json", "trainer.safetensors", "model.safetensors"}
    assert not list(tmp_path.glob(".*"))


def test_one_adapter_stays_what_it_is(folders: list[Path], tmp_path: Path):
    merge(folders[:1], tmp_path / "merged")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (folders[0], tmp_path / "merged"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def products(folder: Path) -> dict[str, torch.Tensor]:
    """scaling * B A of every pair in a file, without the mask token's row (the embedding's last rank)."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    settings = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, a in tensors.items():
        if "_A" in name:
            b = tensors[name.replace("_A", "_B")]
            product = b[:, :-1] @ a[:-1] if "embedding" in name else b @ a
            found[name] = settings["lora_alpha"] / settings["r"] * product
    return found


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_cut_to_a_rank_it_is_the_nearest(trained: Trained, folders: list[Path], tmp_path: Path, rank: int):
    """Eckart-Young: what is left out is the rest of the singular values, and no more."""
    record = merge(folders, tmp_path / "merged", rank=rank)
    parts, found = [products(folder) for folder in folders], products(tmp_path / "merged")
    lost = kept = 0.0
    for name in parts[0]:
        change = torch.stack([part[name] for part in parts]).mean(0)
        values = torch.linalg.svdvals(change)
        assert (found[name] - change).norm().item() == pytest.approx(values[rank:].norm().item(), rel=1e-3, abs=1e-6)
        assert torch.linalg.matrix_rank(found[name], atol=1e-5) <= rank
        lost, kept = lost + values[rank:].square().sum().item(), kept + values.square().sum().item()
    assert record["rank_error"] == pytest.approx((lost / kept) ** 0.5, rel=1e-3)
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["r"] == rank
    name = "base_model.model.model.embed_tokens.lora_embedding_B"  # the mask token's row is not cut
    rows = [load_file(folder / "adapter_model.safetensors")[name][:, -1] for folder in (*folders, tmp_path / "merged")]
    torch.testing.assert_close(rows.pop(), torch.stack(rows).mean(0))


def test_a_rank_above_a_layer_s_smaller_side(trained: Trained, folders: list[Path], tmp_path: Path):
    """Three adapters of rank 14 make one of 42; the layers of 32 lose nothing, at any rank from 32 on."""
    config = material(
        tmp_path,
        Path(trained.config.model.base),
        lora={"rank": 14},
        train={"save_every": 2, "keep_last": 3, "lr": 0.02},
    )
    convert_wsd(config)
    parts = [tmp_path / "runs" / "convert" / "checkpoints" / f"step-{step}" for step in (2, 4, 6)]
    for rank, kept in ((34, 34), (1000, 42)):
        record = merge(parts, tmp_path / f"merged-{rank}", rank=rank)
        assert record["rank_error"] == pytest.approx(0.0, abs=1e-6)
        assert json.loads((tmp_path / f"merged-{rank}" / "adapter_config.json").read_text())["r"] == kept
        means = [products(part) for part in parts]
        for name, change in products(tmp_path / f"merged-{rank}").items():
            torch.testing.assert_close(change, torch.stack([part[name] for part in means]).mean(0), rtol=0, atol=1e-6)
        lm, _ = load_diffusion_lm(trained.config.model.model_copy(update={"base": str(tmp_path / f"merged-{rank}")}))
        assert lm.block_size == 4


def test_half_is_half_the_size(trained: Trained, folders: list[Path], tmp_path: Path):
    merge(folders, tmp_path / "merged")
    merge(folders, tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("merged", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    exact, found = (changed(tmp_path / name, trained) for name in ("merged", "half"))
    for name, change in exact.items():
        assert (found[name] - change).norm() <= 2e-3 * change.norm()


@pytest.mark.parametrize("number", [1, 3])
def test_made_whole(trained: Trained, folders: list[Path], tmp_path: Path, number: int):
    from transformers import AutoModelForCausalLM

    merge(folders[:number], tmp_path / "whole", full=trained.config.model)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    base, _ = load_diffusion_lm(trained.config.model, seed=trained.config.train.seed)
    expected = dense_mean(folders[:number], trained)
    for name, parameter in base.model.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name).double(), parameter.double() + expected[name], rtol=0, atol=3e-7
        )
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert stored["block_size"] == 4
    assert "adapter" not in stored["hilda"]
    assert stored["hilda"]["merged"] == [str(folder) for folder in folders[:number]]
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"model.safetensors", "tokenizer.json"}
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


def test_the_command(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "config.json"
    file.write_text(trained.config.model_dump_json())
    losses = []
    for name, options in (("merged", []), ("cut", ["--rank", "4", "--half"]), ("whole", ["--full"])):
        out = tmp_path / name
        assert cli.main(["merge-topk", "--config", str(file), "--k", "2", "--out", str(out), "--json", *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["eval_loss"] == evaluate_checkpoint(trained.config, out, "eval")["eval_loss"]
        assert ("rank_error" in answer) == (name == "cut")
        losses.append(answer["eval_loss"])
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def edit(*path: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = node = json.loads((folder / "config.json").read_text())
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def whole(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


MISMATCHES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another base": (edit("hilda", "adapter", "fingerprint", value="00"), "an adapter of .* with other weights"),
    "another seed": (edit("hilda", "adapter", "seed", value=7), "an adapter of .* with other weights"),
    "block size": (edit("block_size", value=8), "block_size is 8, but 4"),
    "damaged": (cut, "adapter_model.safetensors: damaged"),
    "mixed": (whole, "holds a whole model, .* an adapter; they cannot be merged"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_is_refused_by_name(folders: list[Path], tmp_path: Path, what: str):
    change, named = MISMATCHES[what]
    odd = Path(shutil.copytree(folders[1], tmp_path / "odd"))
    change(odd)
    with pytest.raises(CheckpointError, match=named) as caught:
        merge([folders[0], odd], tmp_path / "merged")
    assert str(odd) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_other_layers_are_refused_by_name(trained: Trained, folders: list[Path], tmp_path: Path, tiny_base: Path):
    config = material(tmp_path, tiny_base, lora={"rank": 4, "targets": ["q_proj"]}, train={"save_every": 6})
    other = Path(convert_wsd(config)["checkpoint"])
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.down_proj' is not in both adapters"):
        merge([folders[0], other], tmp_path / "merged")


def test_options_for_the_other_kind(trained: Trained, folders: list[Path], tmp_path: Path, tiny_base: Path):
    step = Path(convert_wsd(material(tmp_path, tiny_base))["checkpoint"])
    wrong: list[tuple[list[Path], dict[str, Any], str]] = [
        ([step], {"rank": 4}, "are for adapters"),
        ([step], {"half": True}, "are for adapters"),
        ([step], {"full": ModelConfig()}, "are for adapters"),
        (folders, {"full": ModelConfig(), "half": True}, "leave out --rank and --half"),
        (folders, {"rank": 0}, "--rank 0"),
    ]
    for parts, options, named in wrong:
        with pytest.raises(UsageError, match=named):
            merge(parts, tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()
