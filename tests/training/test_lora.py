"""Adapters: what is trained, what a folder holds, that the base with the adapter added is the base with it beside."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hildanext.config import Config, LoraConfig, ModelConfig, parse_config
from hildanext.errors import ConfigError, HildaError, ModelError, UsageError
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.model.lora import one_matrix
from hildanext.model.lora_linear import OneMatrix
from hildanext.model.tiny import story_tokenizer
from hildanext.terminal.generate import generate
from hildanext.training.convert import convert_wsd, evaluate_checkpoint, sft
from support.models import make_tokenizer, random_llama
from support.training import CONVERT, MULTI_TURN, assert_same, job, material, trainer_for

MASK = 300  # the id that the tiny tokenizer's mask token gets
RANK = LoraConfig(rank=4, alpha=6.0)


def random_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


BASES = {
    "tied": lambda: random_llama(tie_word_embeddings=True),
    "untied": lambda: random_llama(tie_word_embeddings=False),
    "padded": lambda: random_llama(320, tie_word_embeddings=True),
    "gpt2": random_gpt2,  # linear layers that are stored transposed
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", request.param)


def write_base(folder: Path, kind: str) -> Path:
    BASES[kind]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, lora: LoraConfig | None = None, **changes: Any) -> DiffusionLM:
    config = ModelConfig(base=str(folder), device="cpu", dtype="float32", **changes)
    return load_diffusion_lm(config, training=lora is not None, seed=5, lora=lora)[0]


def stir(lm: DiffusionLM, seed: int) -> DiffusionLM:
    """Random values in everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return lm


def save(lm: DiffusionLM, folder: Path) -> Path:
    lm.block_size = 4
    folder.mkdir()
    save_diffusion_lm(lm, folder)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[5, 9, MASK, 17, MASK, 40, 299]])
    with torch.no_grad():
        return model(ids).logits


# What is trained


def test_a_fresh_adapter_changes_nothing(base: Path):
    assert torch.equal(logits(load(base, RANK).model), logits(load(base).model))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_factors_the_masks_row_and_the_head_are_trained(tmp_path: Path, kind: str):
    lm = load(write_base(tmp_path / "base", kind), RANK)
    trained = {name: list(p.shape) for name, p in lm.model.named_parameters() if p.requires_grad}
    layers = {"q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 32)}
    layers |= {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    expected: dict[str, list[int]] = {"model.embed_tokens.row.0": [32]}
    where = "model.embed_tokens" if kind == "tied" else "lm_head"
    expected |= {f"{where}.low_rank.A": [4, 32], f"{where}.low_rank.B": [301, 4]}
    for number in range(2):
        for name, (n_in, n_out) in layers.items():
            module = f"model.layers.{number}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}"
            expected[f"{module}.{name}.lora_A.default.weight"] = [4, n_in]
            expected[f"{module}.{name}.lora_B.default.weight"] = [n_out, 4]
    assert trained == expected
    assert type(lm.model).__name__ == "LlamaForCausalLM"


def test_targets_by_name(tmp_path: Path):
    lora = LoraConfig(rank=2, targets=["q_proj", "layers.1.mlp.up_proj"])
    lm = load(write_base(tmp_path / "base", "tied"), lora)
    adapted = {name.split(".lora_")[0] for name, _ in lm.model.named_parameters() if "lora_A" in name}
    assert adapted == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)} | {"model.layers.1.mlp.up_proj"}
    with pytest.raises(
        ConfigError, match=r"'lora.targets': LlamaForCausalLM has no linear layer 'qproj'; it has down_proj, "
    ):
        load(tmp_path / "base", LoraConfig(rank=2, targets=["qproj"]))


def test_the_seed_is_the_adapter(tmp_path: Path):
    folder = write_base(tmp_path / "base", "tied")
    one = load(folder, RANK)
    torch.manual_seed(1)
    other = load(folder, RANK)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_near(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """To float32 rounding in sums of many terms: a part in ten thousand of the largest element."""
    assert found is not None
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def one_step(config: Config, block: int) -> tuple[float, DiffusionLM]:
    """Loss of a step, and the model with the step's gradients still in it."""
    trainer, lm = trainer_for(config, job(block, lr=0.0), MULTI_TURN)
    trainer.optimizer.zero_grad = lambda **_: None
    return trainer.train_step(0)["loss"], lm


@pytest.mark.parametrize("block", [4, 24])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_whole_matrices_by_the_chain_rule(tmp_path: Path, tied: bool, block: int):
    tokenizer = story_tokenizer(300)  # the rows' own
    random_llama(len(tokenizer), tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    no_clip = {"clip_norm": 1e9}
    config = material(tmp_path, tmp_path / "base", lora={"rank": 4, "alpha": 6.0}, train=no_clip)
    adapter = save(stir(load(tmp_path / "base", RANK), seed=1), tmp_path / "adapter")
    beside = config.model_copy(update={"model": config.model.model_copy(update={"base": str(adapter)})})
    loss, lm = one_step(beside, block)
    whole_loss, dense = one_step(beside.model_copy(update={"lora": LoraConfig()}), block)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    trained = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    whole = {name: p.grad for name, p in dense.model.named_parameters()}
    row = whole["model.embed_tokens.weight"][lm.mask_token_id]
    assert_near(trained.pop("model.embed_tokens.row.0").grad, row)
    firsts = [name for name in trained if re.search(r"low_rank\.A$|lora_A", name)]
    assert len(firsts) * 2 == len(trained)
    for name in firsts:
        a, b = trained[name], trained[re.sub(r"(low_rank\.|lora_)A", r"\1B", name)]
        grad = whole[re.split(r"\.low_rank|\.lora_A", name)[0] + ".weight"]
        assert_near(a.grad, 1.5 * b.detach().T @ grad)
        assert_near(b.grad, 1.5 * grad @ a.detach().T)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_one_matrix_is_what_peft_computes(compute: torch.dtype, bias: bool):
    """Output and all gradients of an adapted layer, against peft's own forward; in bf16 against it in fp32, to bf16's rounding."""
    import peft

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).requires_grad_(False)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"]), copy.deepcopy(layer)
    )
    settings = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"])
    settings._register_custom_module({torch.nn.Linear: OneMatrix})
    ours = peft.inject_adapter_in_model(settings, layer.to(compute))
    assert type(ours[0]) is OneMatrix
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
                ours.get_parameter(name).data = parameter.detach().clone()
    slope, found = torch.randn(2, 5, 40), []
    x = torch.randn(2, 5, 24)
    for model, autocast in ((theirs, False), (ours, compute != torch.float32)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(leaf)
        assert y.dtype == (compute if autocast else torch.float32)
        y.backward(slope.to(y.dtype))
        factors = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        found.append({"y": y.detach().float(), "x": leaf.grad, **factors})
    for name, expected in found[0].items():
        assert found[1][name].dtype == torch.float32
        off = (found[1][name] - expected).abs().max() / expected.abs().max()
        assert off <= (1e-5 if compute == torch.float32 else 2e-2), name


def test_what_is_quantized_or_dropped_out_is_left_to_peft():
    assert one_matrix(RANK)
    assert not one_matrix(LoraConfig(rank=4, dropout=0.1))
    assert not one_matrix(LoraConfig(rank=4, base="nf4"))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_base: Path):
    ends = []
    for frugal in (False, True):
        config = material(tmp_path, tiny_base, lora={"rank": 4}, train={"gradient_checkpointing": frugal})
        trainer, lm = trainer_for(config, job(4), MULTI_TURN)
        losses = [trainer.train_step(step)["loss"] for step in range(3)]
        ends.append((losses, {name: value.detach().clone() for name, value in lm.model.named_parameters()}))
    assert_same(*ends)


def test_the_base_is_frozen(tmp_path: Path, tiny_base: Path):
    trainer, lm = trainer_for(material(tmp_path, tiny_base, lora={"rank": 4}), job(4), CONVERT)
    before = {name: value.detach().clone() for name, value in lm.model.named_parameters()}
    for step in range(3):
        trainer.train_step(step)
    for name, value in lm.model.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name


def test_frozen_weights_are_held_in_the_compute_type(tmp_path: Path, tiny_base: Path):
    config = material(tmp_path, tiny_base, lora={"rank": 4}, model={"dtype": "bfloat16"})
    trainer, lm = trainer_for(config, job(4), CONVERT)
    trainer.train_step(0)
    assert lm.model.dtype == torch.bfloat16
    for name, value in lm.model.named_parameters():
        assert value.dtype == (torch.float32 if value.requires_grad else torch.bfloat16), name


# What a folder holds


@pytest.mark.parametrize("convention", ["in_place", "shifted"])
def test_added_to_the_base_it_is_what_it_is_beside_it(base: Path, tmp_path: Path, convention: str):
    beside = stir(load(base, RANK, convention=convention), seed=2)
    added = load(save(beside, tmp_path / "adapter"))
    assert (added.convention, added.block_size, added.adapter) == (convention, 4, None)
    plain = load(base)
    assert (logits(plain.model) - logits(beside.model)).abs().max() > 1
    torch.testing.assert_close(logits(added.model), logits(beside.model), rtol=1e-5, atol=2e-5)
    ids = torch.tensor([[5, 9, 8, 17, 20, 40, 299, 6]])
    noisy = ids.masked_fill(ids % 2 == 0, MASK)
    positions = torch.arange(8)[None]
    wanted = beside.allowed(ids > 0, positions)
    args = (Batch([0], ids, torch.zeros_like(ids), positions, wanted), noisy, wanted, 4)
    with torch.no_grad():
        one, other = (lm.head(lm(*args)) for lm in (beside, added))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_the_added_model_is_the_bases_architecture(tmp_path: Path):
    for kind in ("tied", "untied"):
        folder = write_base(tmp_path / kind, kind)
        added = load(save(stir(load(folder, RANK), 1), tmp_path / f"{kind}-adapter"))
        shapes = {name: value.shape for name, value in load(folder).model.state_dict().items()}
        assert {name: value.shape for name, value in added.model.state_dict().items()} == shapes
        head, embedding = added.model.get_output_embeddings(), added.model.get_input_embeddings()
        assert (head.weight is embedding.weight) == (kind == "tied")


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_peft_loads_it(tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder):
    import peft

    base = write_base(tmp_path / "base", kind)
    lm = stir(load(base, RANK), 3)
    model = load(base).model  # the base with the mask token
    theirs = peft.PeftModel.from_pretrained(model, save(lm, tmp_path / "adapter"))
    recwarn.clear()  # it misses the head's own tensors, which are the embedding's
    torch.testing.assert_close(logits(theirs), logits(lm.model), rtol=1e-5, atol=2e-5)


def test_a_folder_is_small_and_complete(tmp_path: Path, tiny_base: Path):
    config = material(tmp_path, tiny_base, lora={"rank": 2})
    step = Path(convert_wsd(config)["checkpoint"])
    names = {path.name for path in step.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.json",
        "tokenizer.json",
        "trainer.json",
    }
    assert "model.safetensors" not in names
    stored = json.loads((step / "config.json").read_text())
    hilda = stored["hilda"]
    assert (stored["block_size"], hilda["base_model"]) == (4, str(tiny_base))
    assert hilda["adapter"] == {
        "base": str(tiny_base),
        "revision": None,
        "fingerprint": hilda["adapter"]["fingerprint"],
        "seed": 0,
    }
    assert json.loads((step / "adapter_config.json").read_text())["r"] == 2
    weights = load_file(step / "adapter_model.safetensors")
    ranks = 2 * sum(n for n in (32 + 32,) * 8 + (32 + 96,) * 6) * 1
    vocabulary = 3 * (301 + 32)
    assert sum(tensor.numel() for tensor in weights.values()) == ranks + vocabulary


def test_what_training_measured_is_what_the_folder_gives(tmp_path: Path, tiny_base: Path):
    """The held-out loss of the last checkpoint, adapter beside the base, is that of the loaded folder."""
    config = material(tmp_path, tiny_base, lora={"rank": 4}, train={"lr": 0.02})
    done = convert_wsd(config)
    found = evaluate_checkpoint(config, Path(done["checkpoint"]), "eval")
    assert found["eval_loss"] == pytest.approx(done["eval_loss"], rel=1e-5)


def test_tuning_goes_on_with_the_adapter(tmp_path: Path, tiny_base: Path):
    config = material(tmp_path, tiny_base, lora={"rank": 4}, train={"lr": 0.02})
    converted = convert_wsd(config)["checkpoint"]
    tuned = sft(material(tmp_path, Path(converted), lora={"rank": 4}))["checkpoint"]
    one, other = (json.loads((Path(path) / "config.json").read_text())["hilda"] for path in (converted, tuned))
    assert one["adapter"] == other["adapter"]
    assert other["tokens_trained"] > one["tokens_trained"]
    config = parse_config({"model": {"base": tuned, "device": "cpu"}, "decode": {"max_new_tokens": 4}})
    answer = generate(config, "once", raw=True, trace=None, live=False)
    assert answer["engine"] == "transformers"
    # Without a rank, everything is trained from there.
    whole = sft(material(tmp_path, Path(converted), sft={"steps": 1}), name="whole")["checkpoint"]
    assert (Path(whole) / "model.safetensors").is_file()
    assert "adapter" not in json.loads((Path(whole) / "config.json").read_text())["hilda"]


def test_an_adapter_on_a_whole_checkpoint(tmp_path: Path, tiny_base: Path):
    converted = convert_wsd(material(tmp_path, tiny_base))["checkpoint"]
    tuned = sft(material(tmp_path, Path(converted), lora={"rank": 4}))["checkpoint"]
    hilda = json.loads((Path(tuned) / "config.json").read_text())["hilda"]
    assert (hilda["base_model"], hilda["adapter"]["base"]) == (str(tiny_base), converted)
    assert load(Path(tuned)).mask_token_id == load(Path(converted)).mask_token_id


# Refusals


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(stir(load(write_base(tmp_path / "base", "tied"), RANK), 1), tmp_path / "adapter")


def change_base(adapter: Path) -> None:
    model = random_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    model.save_pretrained(adapter.parent / "base")


def other_base(adapter: Path) -> None:
    shutil.rmtree(adapter.parent / "base")
    random_gpt2().save_pretrained(adapter.parent / "base")
    make_tokenizer().save_pretrained(adapter.parent / "base")


def other_shape(adapter: Path) -> None:
    """As if the recorded digest were right: the weights still do not fit."""
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(weights | {name: torch.ones(4, 7)}, adapter / "adapter_model.safetensors")


def cut(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def not_ours(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t for n, t in weights.items() if "embedding" not in n}, adapter / "adapter_model.safetensors")


BAD = {
    "weights changed": (change_base, "was trained on other weights than '.*' has now"),
    "another model": (other_base, "was trained on other weights than '.*' has now"),
    "base gone": (lambda adapter: shutil.rmtree(adapter.parent / "base"), "needs its base: model .* no such folder"),
    "no adapter": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "is missing"),
    "damaged": (cut, "adapter_model.safetensors: damaged"),
    "settings": (lambda adapter: (adapter / "adapter_config.json").write_text("{}"), "adapter_config.json: damaged"),
    "other shape": (other_shape, r"changes 'model.layers.0.mlp.up_proj' as a matrix of shape \[64, 7\], but .* has shape \[64, 32\]"),
    "not ours": (not_ours, "not an adapter of a converted model"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_adapter_is_one_line(adapter: Path, what: str):
    change, named = BAD[what]
    change(adapter)
    with pytest.raises(HildaError, match=named) as caught:
        load(adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "kind", "named"),
    [
        (
            LoraConfig(rank=2, alpha=3.0),
            UsageError,
            "has rank 4 and alpha 6; set lora.rank and lora.alpha to these values",
        ),
        (LoraConfig(rank=4), UsageError, "has rank 4 and alpha 6"),
        (
            LoraConfig(rank=4, alpha=6.0, targets=["q_proj"]),
            ModelError,
            "only the file has the layer .*; set lora.targets",
        ),
    ],
)
def test_another_adapter_is_not_continued(adapter: Path, lora: LoraConfig, kind: type[HildaError], named: str):
    with pytest.raises(kind, match=named):
        load(adapter, lora)


def test_a_foreign_adapter_ruins_no_run(tmp_path: Path, tiny_base: Path):
    """A run whose base was exchanged refuses to resume; its checkpoints stay, and serve once the base is back."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = material(tmp_path, base, lora={"rank": 4}, train={"keep_last": 3})
    done = convert_wsd(config)
    weights = (base / "model.safetensors").read_bytes()
    random_llama().save_pretrained(base)
    before = {path: path.read_bytes() for path in Path(done["run"]).rglob("*") if path.is_file()}
    with pytest.raises(ModelError, match="was trained on other weights than"):
        convert_wsd(config, resume=True)
    assert {path: path.read_bytes() for path in Path(done["run"]).rglob("*") if path.is_file()} == before
    shutil.copytree(tiny_base, base, dirs_exist_ok=True)
    assert (base / "model.safetensors").read_bytes() == weights
    assert convert_wsd(config, resume=True)["finished"]
