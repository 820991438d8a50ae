"""Architectures on tiny models: each one converts, trains, saves and loads, or is refused by name with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Gemma2PreTrainedModel,
    PreTrainedModel,
)

from hildanext.config import ModelConfig, NoiseConfig, parse_config
from hildanext.data.packing import position_ids
from hildanext.decoding.engines.protocol import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.diffusion.objective import Target, Weights, denoising_loss
from hildanext.errors import ModelError, UsageError
from hildanext.model.backbone import check_length
from hildanext.model.diffusion_lm import DiffusionLM, make_batch
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.model.probe import probe
from hildanext.training.denoising import Recipe, noise_rows
from support.models import make_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 3,
}
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
OPT_SIZES = {"ffn_dim": 64, "word_embed_proj_dim": 16}  # projections around the layers, as in OPT-350M
MPT_SIZES = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}
MAMBA2_SIZES = {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 1}
LINEAR_SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LLAMA4_SIZES = {"head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2, "attn_temperature_tuning": False}
ORIGINAL = {"original_max_position_embeddings": 16, "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", **ORIGINAL, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
PHI3_SIZES = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
NO_SOFTCAP = {"final_logit_softcapping": None, "attn_logit_softcapping": None}


def tiny(model_type: str, *, auto: Any = AutoModelForCausalLM, attention: str = "sdpa", **sizes: Any) -> Any:
    """A random model for `make_tokenizer()`, its weights as large as trained ones: at the usual 0.02 a soft cap or a
    convolution changes next to nothing."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | {"vocab_size": 300} | sizes)
    model: PreTrainedModel = auto.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.25)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **changes: Any) -> DiffusionLM:
    return load_diffusion_lm(ModelConfig(base=str(folder), device="cpu", dtype="float32", **changes))[0]


def rows() -> dict[str, torch.Tensor]:
    """Two packed rows of 24 tokens: documents of 13 and 7 tokens, then padding."""
    generator = torch.Generator().manual_seed(1)
    doc_ids = torch.tensor([[0] * 13 + [1] * 7 + [-1] * 4] * 2)
    return {
        "input_ids": torch.randint(4, 300, (2, 24), generator=generator),
        "doc_ids": doc_ids,
        "position_ids": torch.from_numpy(position_ids(doc_ids.numpy())),
        "loss_mask": doc_ids >= 0,
    }


def train(lm: DiffusionLM, steps: int = 8, block_size: int = 4) -> list[float]:
    """The denoising loss on the same rows and the same noise at every step."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, fused=True)
    batch = make_batch(lm, [0, 1], rows())
    noisy = noise_rows(lm, batch, block_size, Recipe(1, False, 0.3, 1.0, 0.0), NoiseConfig().corrupt_rate, seed=0)
    wanted, losses = batch.allowed, []
    for _ in range(steps):
        hidden = lm(batch, noisy.noisy_ids, wanted, block_size)
        target = Target(batch.input_ids[wanted], noisy.t[wanted], noisy.masked[wanted], noisy.corrupted[wanted])
        loss, *_ = denoising_loss(hidden, lm.head, target, int(wanted.sum()), Weights())
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.item())
    return losses


WORKS = [
    ("llama", "sdpa", {}),
    ("llama", "eager", {}),
    ("qwen2", "sdpa", {"tie_word_embeddings": True}),
    ("qwen3", "sdpa", {"head_dim": 16}),
    ("qwen3_moe", "sdpa", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ("mistral", "sdpa", {"head_dim": 16}),
    ("gpt_neox", "sdpa", {}),
    ("gpt2", "sdpa", GPT_SIZES),
    ("opt", "sdpa", OPT_SIZES),
    ("falcon", "sdpa", {}),
    ("gemma", "sdpa", {"head_dim": 16}),
    ("gemma2", "eager", NO_SOFTCAP | {"head_dim": 16}),
    ("gemma3_text", "sdpa", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    ("llama", "sdpa", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    ("llama", "sdpa", {"rope_parameters": {"rope_type": "yarn", **ORIGINAL}}),
    ("phi3", "sdpa", PHI3_SIZES),
]


@pytest.mark.parametrize(
    ("model_type", "attention", "sizes"), WORKS, ids=[f"{w[0]}-{w[1]}-{i}" for i, w in enumerate(WORKS)]
)
def test_an_architecture_that_works(tmp_path: Path, model_type: str, attention: Any, sizes: dict[str, Any]) -> None:
    lm = load(save(tiny(model_type, attention=attention, **sizes), tmp_path / "base"), attention=attention)
    losses = train(lm)
    assert losses[-1] < 0.9 * losses[0]
    lm.block_size = 4
    save_diffusion_lm(lm, tmp_path / "converted")
    again = load(tmp_path / "converted", attention=attention)
    assert (again.block_size, again.mask_token_id, again.convention) == (4, lm.mask_token_id, "shifted")
    assert json.loads((tmp_path / "converted/config.json").read_text())["architectures"] == [type(lm.model).__name__]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", attn_implementation=attention)
    batch = make_batch(lm, [0, 1], rows())
    ids = batch.input_ids
    with torch.no_grad():
        assert torch.equal(lm.eval()(batch, ids, batch.allowed, 4), again.eval()(batch, ids, batch.allowed, 4))
        assert torch.equal(plain(input_ids=ids).logits, lm.model(input_ids=ids).logits)


REFUSED = [
    # Positions by ALiBi: no position_ids to restart at a document, and the 2-D mask is what the bias is built from.
    ("bloom", "sdpa", GPT_SIZES, "BloomForCausalLM does not support"),
    ("bloom", "eager", GPT_SIZES, "BloomForCausalLM fails with a 4-D mask and position_ids"),
    ("mpt", "sdpa", MPT_SIZES, "MptForCausalLM does not support"),
    ("mpt", "eager", MPT_SIZES, "MptForCausalLM ignores position_ids"),
    ("falcon", "sdpa", {"alibi": True}, "FalconForCausalLM fails with a 4-D mask"),
    # Logits scaled or capped after the head: the package runs the head alone.
    # (The transformers of Python 3.10 runs Gemma 2 with SDPA, where it does not cap its attention.)
    *(
        []
        if Gemma2PreTrainedModel._supports_sdpa
        else [("gemma2", "sdpa", NO_SOFTCAP, "Gemma2ForCausalLM does not support")]
    ),
    ("gemma2", "eager", {"head_dim": 16}, "Gemma2ForCausalLM computes more than one projection"),
    ("cohere", "sdpa", {}, "CohereForCausalLM computes more than one projection"),
    ("granite", "sdpa", {"logits_scaling": 2.0}, "GraniteForCausalLM computes more than one projection"),
    # Token mixing that no mask reaches.
    ("lfm2", "sdpa", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM has layers of the kind 'conv'"),
    (
        "qwen3_next",
        "sdpa",
        LINEAR_SIZES | EXPERTS | {"layer_types": ["linear_attention", "full_attention"]},
        "'linear_attention'",
    ),
    (
        "jamba",
        "sdpa",
        {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8, "use_mamba_kernels": False},
        "Jamba",
    ),
    (
        "falcon_h1",
        "sdpa",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "FalconH1ForCausalLM ",
    ),
    (
        "llama4_text",
        "sdpa",
        LLAMA4_SIZES | {"attn_temperature_tuning": True},
        "scales queries by their index in the row",
    ),
    ("llama4_text", "sdpa", LLAMA4_SIZES, "Llama4ForCausalLM does not separate its body from its head"),
    ("recurrent_gemma", "sdpa", {}, "RecurrentGemmaForCausalLM carries a recurrent state"),
    ("gpt_neo", "eager", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}, "GPTNeoForCausalLM"),
    ("mamba", "sdpa", {}, "MambaForCausalLM does not support"),
    ("mamba", "eager", {}, "MambaForCausalLM carries a recurrent state"),
    ("mamba2", "eager", MAMBA2_SIZES, "Mamba2ForCausalLM carries a recurrent state"),
]


@pytest.mark.parametrize(
    ("model_type", "attention", "sizes", "reason"), REFUSED, ids=[f"{r[0]}-{r[1]}-{i}" for i, r in enumerate(REFUSED)]
)
def test_an_architecture_that_is_refused(
    tmp_path: Path, model_type: str, attention: Any, sizes: dict[str, Any], reason: str
) -> None:
    save(tiny(model_type, attention="eager", **sizes), tmp_path)
    with pytest.raises(ModelError, match=re.escape(reason)) as refusal:
        load(tmp_path, attention=attention)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("model_type", "auto", "name"),
    [("bert", AutoModelForMaskedLM, "BertLMHeadModel"), ("t5", AutoModelForSeq2SeqLM, "T5Config")],
)
def test_an_encoder_is_refused(tmp_path: Path, model_type: str, auto: Any, name: str) -> None:
    save(tiny(model_type, auto=auto, attention="eager", decoder_start_token_id=1), tmp_path)
    with pytest.raises(ModelError, match=name) as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_the_probe_leaves_no_trace() -> None:
    model = tiny("llama").train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    probe(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


FAULTS = {
    "mask": "ignores a bidirectional 4-D",
    "causality": "does not honour a causal 4-D attention mask",
    "position_ids": "ignores position_ids",
    "documents": "gives a packed document other logits",
    "length": "changes its rotary factors with the longest text of a batch, already below 64 positions",
    "cache": "gives other logits with a key-value cache",
    "embeddings": "uses ids beside the input embeddings",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", FAULTS)
def test_the_probe_sees_each_fault(monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: torch.dtype) -> None:
    """The same Llama with one thing broken at a time."""
    model = tiny("llama").to(dtype)
    probe(model)  # rounding is no fault
    forward = model.model.forward

    def broken(**inputs: Any) -> Any:
        if wrong == "mask":
            inputs.pop("attention_mask")
        elif wrong == "causality":
            inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
        elif wrong == "position_ids":
            inputs.pop("position_ids")
        elif wrong == "documents":  # a short convolution beside the attention
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            embeds[:, 1:] += 0.3 * embeds[:, :-1].clone()
            inputs["inputs_embeds"] = embeds
        elif wrong == "length" and inputs["position_ids"].max() > 40:
            inputs["position_ids"] = inputs["position_ids"] / 2
        elif wrong == "cache" and inputs.get("past_key_values") and inputs["past_key_values"].get_seq_length():
            inputs["position_ids"] = inputs["position_ids"] - inputs["position_ids"].min()
        elif wrong == "embeddings" and inputs.get("input_ids") is None:
            inputs["inputs_embeds"] = inputs["inputs_embeds"] + 1  # ids and their embeddings no longer mean the same
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(ModelError, match=f"LlamaForCausalLM .*{FAULTS[wrong]}"):
        probe(model)


@pytest.mark.parametrize(
    ("model_type", "sizes", "longest", "reason"),
    [
        ("llama", {}, 64, "llama has 64"),
        ("gpt2", GPT_SIZES, 64, "gpt2 has 64"),  # `n_positions`
        ("mistral", {"sliding_window": 16}, 16, "sliding window of 16"),  # no `layer_types`: every layer slides
        ("gemma3_text", {"sliding_window": 16}, 16, "sliding window of 16"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 64, "qwen2 has 64"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16, "sliding window"),
        ("llama4_text", LLAMA4_SIZES | {"attention_chunk_size": 16}, 16, "chunks of 16"),
        ("phi3", PHI3_SIZES, 16, "changes its rotary factors beyond 16"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", **ORIGINAL}}, 64, "llama has 64"),
    ],
)
def test_a_row_longer_than_the_model_can_see(model_type: str, sizes: Any, longest: int, reason: str) -> None:
    model = tiny(model_type, **sizes)
    check_length(model, longest, "data.seq_len")
    with pytest.raises(ModelError, match=f"^data.seq_len needs {longest + 1} positions but .*{reason}"):
        check_length(model, longest + 1, "data.seq_len")


def test_a_prompt_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    lm = load(save(tiny("gpt2", **GPT_SIZES), tmp_path))
    lm.block_size = 8
    engine = TransformersEngine(parse_config({"engine": {"order": ["transformers"]}}), {}, lm)
    settings = engine.settings(parse_config({"decode": {"max_new_tokens": 8}}))
    engine.generate(Request([5] * 56, settings))
    with pytest.raises(UsageError, match="exceed the model's context of 64"):
        engine.generate(Request([5] * 57, settings))


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("gemma3_text", {"head_dim": 16, "sliding_window": 16}, "gemma3_text has a sliding window of 16"),
        ("phi3", PHI3_SIZES, "phi3 changes its rotary factors beyond 16"),
    ],
)
def test_decoding_ends_where_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, sizes: Any, reason: str
) -> None:
    lm = load(save(tiny(model_type, **sizes), tmp_path))
    lm.block_size = 4
    engine = TransformersEngine(parse_config({"engine": {"runtime": "eager"}}), {}, lm)
    assert f"context: 16 tokens instead of 64: {reason}" in capsys.readouterr().err
    settings = engine.settings(parse_config({"decode": {"max_new_tokens": 8}}))
    engine.generate(Request([5] * 8, settings))
    with pytest.raises(UsageError, match="exceed the model's context of 16"):
        engine.generate(Request([5] * 9, settings))
    with pytest.raises(UsageError, match=rf"'engine.context': 20 tokens, but {reason}.*set at most 16"):
        TransformersEngine(parse_config({"engine": {"runtime": "eager", "context": 20}}), {}, lm)
