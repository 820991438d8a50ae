"""Folders and files that are not a model we can use: one clear line each, of the right class."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hildanext.config import ModelConfig, parse_config
from hildanext.errors import HildaError, ModelError, NonFiniteLogitsError, UsageError
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import check_loadable, load_diffusion_lm, save_diffusion_lm
from hildanext.model.pretrained import load_tokenizer, read_record
from hildanext.training.convert import convert_wsd
from support.models import make_tokenizer, random_llama


def load(base: str | Path, **changes: Any) -> DiffusionLM:
    return load_diffusion_lm(ModelConfig(base=str(base), device="cpu", dtype="float32", **changes))[0]


def refusal(kind: type[HildaError], base: str | Path, **changes: Any) -> str:
    """The message of the error, which must be of this very class and one line long."""
    with pytest.raises(HildaError) as error:
        load(base, **changes)
    message = str(error.value)
    assert type(error.value) is kind, message
    assert "\n" not in message
    assert str(base) in message
    return message


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An AR model on disk."""
    random_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    """The same, converted with the convention 'in_place'."""
    lm = load(base, convention="in_place")
    lm.block_size = 8
    save_diffusion_lm(lm, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_convention(checkpoint: Path) -> None:
    message = refusal(UsageError, checkpoint, convention="shifted")
    assert message.startswith("'model.convention' is 'shifted' but")
    assert "'in_place'" in message
    assert load(checkpoint).convention == load(checkpoint, convention="in_place").convention == "in_place"


def larger() -> PreTrainedTokenizerFast:
    """As many tokens before its mask token as ours, and more behind it."""
    tokenizer = make_tokenizer(mask_token="<|mask|>")
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def swapped() -> PreTrainedTokenizerFast:
    """Ours with two words in each other's place: nothing but the words tells."""
    tokenizer = make_tokenizer(mask_token="<|mask|>")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    words = parts["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return tokenizer


@pytest.mark.parametrize(
    "other",
    [make_tokenizer, lambda: make_tokenizer(mask_token="<|pad|>"), larger, swapped],
    ids=["no mask token", "another mask token", "more tokens than rows", "other words"],
)
def test_another_tokenizer(checkpoint: Path, other: Callable[[], PreTrainedTokenizerFast]) -> None:
    other().save_pretrained(checkpoint)
    assert "restore the tokenizer files" in refusal(ModelError, checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000], ids=lambda n: f"{n} bytes")
def test_truncated_safetensors(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged safetensors file" in refusal(ModelError, checkpoint)


def test_safetensors_with_a_broken_header(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    assert "damaged safetensors file" in refusal(ModelError, checkpoint)


def test_a_missing_weight_is_not_filled_with_random_numbers(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    message = refusal(ModelError, base)
    assert "LlamaForCausalLM: 'model.layers.1.mlp.up_proj.weight' and 0 more are missing" in message


def test_a_weight_of_another_shape_is_not_filled_with_random_numbers(base: Path) -> None:
    edit_config(base, intermediate_size=96)
    message = refusal(ModelError, base)
    assert "LlamaForCausalLM: 'model.layers.0.mlp.down_proj.weight' and 5 more are missing or have another" in message


NO_FOLDER = {
    "": "no such folder",
    "/deeper/still": "no such folder",
    "/config.json": "is a file; give its folder, or a .gguf file",
}


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_weight_that_makes_logits_nan(base: Path, checkpoint: Path, damage: float) -> None:
    """Every comparison with NaN is false, so each check of the probe would pass."""
    for folder in (base, checkpoint):
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = damage
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(NonFiniteLogitsError, match="LlamaForCausalLM: logits are NaN or infinite"):
            load(folder)


@pytest.mark.parametrize("name", NO_FOLDER)
def test_a_path_that_is_no_folder(base: Path, name: str) -> None:
    place = f"{base}{name}" if name else f"{base}-nowhere"
    message = refusal(UsageError, place)
    assert message.startswith(f"model '{place}'")
    assert message.endswith(NO_FOLDER[name])
    for reader in (load_tokenizer, read_record):
        with pytest.raises(UsageError, match=NO_FOLDER[name]):
            reader(ModelConfig(base=place))


def test_a_folder_without_config_json(base: Path) -> None:
    (base / "config.json").unlink()
    assert refusal(UsageError, base) == f"model '{base}': the folder has no config.json"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"model_type": "no_such_model"}'])
def test_a_config_json_that_is_none(base: Path, text: str) -> None:
    (base / "config.json").write_text(text)
    refusal(ModelError, base)


def test_a_folder_without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(ModelError, base)


def test_pickled_weights_are_refused(base: Path) -> None:
    """A pickle runs code when it is opened: safetensors only."""
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert "safetensors" in refusal(ModelError, base)


def test_a_gguf_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert refusal(UsageError, path) == f"model '{path}': no such GGUF file"


@pytest.mark.parametrize("content", [b"", b"not a GGUF file" * 9, b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_a_gguf_that_is_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refusal(ModelError, path)


def test_a_tokenizer_without_end_of_text(base: Path) -> None:
    make_tokenizer(eos_token=None).save_pretrained(base)
    assert "no end-of-text token" in refusal(ModelError, base)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_file(base: Path, name: str) -> None:
    (base / name).write_text("{")
    refusal(ModelError, base)


# Nothing may train whose checkpoints could not be loaded


def test_a_model_that_changes_when_it_is_saved_does_not_train(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedTokenizerFast.save_pretrained
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda _, folder: save(swapped(), folder))
    config = parse_config({"model": {"base": str(base), "device": "cpu"}, "paths": {"runs": str(tmp_path / "runs")}})
    line = "its checkpoints could not be loaded after training: .* restore the tokenizer files"
    with pytest.raises(ModelError, match=f"^model '{re.escape(str(base))}': {line}$"):
        convert_wsd(config)
    assert not (tmp_path / "runs").exists()


def test_shapes_that_the_configuration_does_not_describe_are_seen_before_training(base: Path, tmp_path: Path) -> None:
    config, lm = ModelConfig(base=str(base), device="cpu", dtype="float32"), load(base)
    check_loadable(lm, config, tmp_path)
    lm.model.config.intermediate_size = 96
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' would have the shape .*96"):
        check_loadable(lm, config, tmp_path)
