"""Published diffusion models as `model.base`: tiny checkpoints in SDAR's and LLaDA2.x's layouts, written here by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import hildanext
from hildanext import cli
from hildanext.config import ModelConfig
from hildanext.data.tokenizer import fingerprint
from hildanext.errors import HildaError, ModelError, UsageError
from hildanext.export.command import export
from hildanext.model.loading import load_diffusion_lm, load_with_base
from support.exports import BLOCK, SIZES, tiny_qwen3
from support.models import make_tokenizer
from support.training import material, write_pairs

MASK, ROWS = 300, 320
# What a folder of remote code would do if it were run.
TRAP = "raise SystemExit('code of the repository was run')\n"


def write_tokenizer(folder: Path, named: bool) -> None:
    """The tokenizer with a mask token; named: as its mask_token, not only as a token."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|MASK|>"} if named else {"additional_special_tokens": ["<|MASK|>"]})
    assert tokenizer.convert_tokens_to_ids("<|MASK|>") == MASK
    tokenizer.save_pretrained(folder)


def write_sdar(folder: Path, named: bool = True, **changes: Any) -> Path:
    """A folder as SDAR's authors publish theirs, with code that must not run."""
    model = tiny_qwen3(ROWS)
    folder.mkdir(parents=True)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, named)
    config = {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "model_type": "sdar",
        "attn_implementation": "flex_attention",
        "debug": False,
        "fuse_cross_entropy": True,
        "vocab_size": ROWS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "block_size": BLOCK,
        "mask_token_id": MASK,
        **SIZES,
    } | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (folder / name).write_text(TRAP)
    return folder


LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    "model_type": "llada2_moe",
    "vocab_size": ROWS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 600.0,
    "partial_rotary_factor": 0.5,
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "norm_head": False,
    "tie_word_embeddings": False,
    "first_k_dense_replace": 2,
    "num_experts": 4,
    "mask_token_id": MASK,
    "block_size": BLOCK,
    **SIZES,
}


def llada2_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.35

    hidden, wide, head, n_q, n_kv = 32, 48, 8, 4, 2
    found = {"model.word_embeddings.weight": draw(ROWS, hidden), "lm_head.weight": draw(ROWS, hidden)}
    found["model.norm.weight"] = 1 + draw(hidden)
    for layer in range(2):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}input_layernorm.weight": 1 + draw(hidden),
            f"{at}post_attention_layernorm.weight": 1 + draw(hidden),
            f"{at}attention.query_key_value.weight": draw((n_q + 2 * n_kv) * head, hidden),
            f"{at}attention.query_layernorm.weight": 1 + draw(head),
            f"{at}attention.key_layernorm.weight": 1 + draw(head),
            f"{at}attention.dense.weight": draw(hidden, n_q * head),
            f"{at}mlp.gate_proj.weight": draw(wide, hidden),
            f"{at}mlp.up_proj.weight": draw(wide, hidden),
            f"{at}mlp.down_proj.weight": draw(hidden, wide),
        }
    return found


def write_llada2(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(llada2_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, named=True)
    config = {key: value for key, value in (LLADA2 | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_llada2_moe.py").write_text(TRAP)
    return folder


def llada2_logits(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[L, V]: a dense LLaDA2.x from its description, one head at a time, attending in blocks. ids [L]."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        """The first half of each head turns: entries i and i + 2 of 4 by the angle position / theta^(2 i / 4)."""
        out, n = x.clone(), x.shape[0]
        for i in range(2):
            angle = torch.arange(n) / 600.0 ** (2 * i / 4)
            out[:, i] = x[:, i] * angle.cos() - x[:, i + 2] * angle.sin()
            out[:, i + 2] = x[:, i + 2] * angle.cos() + x[:, i] * angle.sin()
        return out

    block = torch.arange(len(ids)) // BLOCK
    hides = torch.where(block[:, None] >= block, 0.0, -math.inf)
    x = w["model.word_embeddings.weight"][ids]
    for layer in range(2):
        at = f"model.layers.{layer}."
        h = norm(x, w[f"{at}input_layernorm.weight"]) @ w[f"{at}attention.query_key_value.weight"].T
        heads = h.view(len(ids), 8, 8)  # 4 queries, 2 keys, 2 values
        mixed = []
        for q in range(4):
            query = rotate(norm(heads[:, q], w[f"{at}attention.query_layernorm.weight"]))
            key = rotate(norm(heads[:, 4 + q // 2], w[f"{at}attention.key_layernorm.weight"]))
            mixed.append((query @ key.T / 8**0.5 + hides).softmax(-1) @ heads[:, 6 + q // 2])
        x = x + torch.cat(mixed, -1) @ w[f"{at}attention.dense.weight"].T
        h = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gated = F.silu(h @ w[f"{at}mlp.gate_proj.weight"].T) * (h @ w[f"{at}mlp.up_proj.weight"].T)
        x = x + gated @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def loaded(folder: Path) -> Any:
    return load_diffusion_lm(ModelConfig(base=str(folder), device="cpu", dtype="float32"))[0]


def logits_in_blocks(lm: Any, ids: Tensor) -> Tensor:
    block = torch.arange(len(ids)) // BLOCK
    mask = torch.where(block[:, None] >= block, 0.0, torch.finfo(torch.float32).min)
    positions = torch.arange(len(ids))[None]
    logits: Tensor = lm.model(ids[None], attention_mask=mask[None, None], position_ids=positions).logits[0]
    return logits


@torch.no_grad()
def test_a_dense_llada2_computes_what_its_description_says(tmp_path: Path) -> None:
    lm = loaded(write_llada2(tmp_path / "llada2"))
    assert (lm.mask_token_id, lm.block_size, lm.convention, lm.tokenizer.mask_token_id) == (MASK, 4, "in_place", MASK)
    ids = torch.tensor([5, 9, 120, MASK, 7, MASK, MASK, 44, 12, MASK])
    expected = llada2_logits(llada2_tensors(), ids)
    torch.testing.assert_close(logits_in_blocks(lm, ids), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_an_sdar_is_the_qwen3_it_is_named_after(tmp_path: Path, named: bool) -> None:
    lm = loaded(write_sdar(tmp_path / "sdar", named))
    assert (lm.mask_token_id, lm.block_size, lm.convention, lm.tokenizer.mask_token_id) == (MASK, 4, "in_place", MASK)
    ids = torch.tensor([5, 9, 120, MASK, 7, MASK, MASK, 44, 12, MASK])
    own, lm.model = logits_in_blocks(lm, ids), tiny_qwen3(ROWS)
    assert torch.equal(own, logits_in_blocks(lm, ids))


def test_what_llada2_leaves_to_its_code_has_its_values(tmp_path: Path) -> None:
    folder = write_llada2(tmp_path / "llada2", block_size="absent", mask_token_id="absent")
    with pytest.raises(ModelError, match="tokenizer has no token 156895"):
        loaded(folder)
    assert loaded(write_llada2(tmp_path / "other", block_size="absent")).block_size == 32


def write_base(folder: Path, tokenizer: Path) -> Path:
    """An AR base beside a published model."""
    tiny_qwen3(ROWS).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.mark.parametrize("write", [write_sdar, pytest.param(write_llada2, marks=pytest.mark.slow)])
def test_decode_tune_prefer_and_evaluate(tmp_path: Path, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands take the folder as it is, and what they write is a checkpoint of ours, of a stock architecture."""
    folder = write(tmp_path / "published")
    with hildanext.load(folder, device="cpu", dtype="float32", max_new_tokens=8) as model:
        text = model.generate("the cat saw", raw=True)
    assert 0 < len(text.token_ids) <= 8
    assert MASK not in text.token_ids
    config = material(
        tmp_path,
        folder,
        sft={"steps": 2},
        train={"eval_every": 2, "save_every": 2},
        dpo={"steps": 2, "pairs": str(write_pairs(tmp_path / "pairs.jsonl")), "lr_warmup_steps": 0},
        evaluate={"prompt_tokens": 4, "story_tokens": 8, "limit": 1},
        decode={"max_new_tokens": 8},
    )
    mark_rows(tmp_path / "data" / "tokenized", loaded(folder))
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())

    def run(*words: object) -> None:
        assert cli.main([str(word) for word in (*words, "--config", file)]) == 0, capsys.readouterr().err

    run("sft", "--model", folder)
    tuned = loaded(tmp_path / "runs" / "sft" / "checkpoints" / "step-2")
    assert (tuned.mask_token_id, tuned.block_size, tuned.record["base_model"]) == (MASK, BLOCK, str(folder))
    run("dpo", "--model", folder, "--set", "data.seq_len=56", "--set", "lora.rank=2")
    assert (tmp_path / "runs" / "dpo" / "checkpoints" / "step-2" / "adapter_model.safetensors").is_file()
    stories = tmp_path / "stories.jsonl"
    stories.write_text(json.dumps({"text": "the cat saw a dog and the dog saw the cat " * 4}) + "\n")
    base = write_base(tmp_path / "base", folder)
    words = ["--tasks", "stories", "--data", f"stories={stories}", "--base", base, "--out", tmp_path / "report"]
    run("evaluate", "--model", folder, *words)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["block_size"] == BLOCK
    assert report["tasks"]["stories"].keys() >= {"ar", "q_mode"}


def mark_rows(rows: Path, lm: Any) -> None:
    """Say of packed rows that this model's tokenizer made them; it has as many tokens as the one that did."""
    for meta in rows.glob("*/meta.json"):
        stored = json.loads(meta.read_text())
        meta.write_text(json.dumps(stored | {"tokenizer": fingerprint(lm.tokenizer)}))


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (write_sdar, {"block_size": "absent"}, "no block_size"),
        (write_sdar, {"mask_token_id": "absent"}, "no mask_token_id"),
        (write_sdar, {"mask_token_id": 310}, "has no token 310"),
        (write_sdar, {"rope_theta": "absent"}, "no 'rope_theta'"),
        (write_llada2, {"first_k_dense_replace": 1}, "with experts"),
        (write_llada2, {"norm_head": True}, "norm_head is True"),
        (write_llada2, {"use_qk_norm": False}, "use_qk_norm is False"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(
    tmp_path: Path, write: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(HildaError, match=message) as caught:
        loaded(write(tmp_path / "published", **changes))
    assert "\n" not in str(caught.value)


def test_a_comparison_needs_a_base_by_name(tmp_path: Path) -> None:
    folder = write_sdar(tmp_path / "sdar")
    config = ModelConfig(base=str(folder), device="cpu", dtype="float32")
    with pytest.raises(UsageError, match="--base"):
        load_with_base(config)
    assert load_with_base(config, str(write_base(tmp_path / "base", folder))).block_size == BLOCK


@pytest.mark.parametrize("write", [write_sdar, write_llada2])
def test_their_own_files_are_not_exported(tmp_path: Path, write: Any) -> None:
    with pytest.raises(UsageError, match="published model's own layout"):
        export(write(tmp_path / "published"), "diffusers", tmp_path / "out")
