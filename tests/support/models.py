"""A small tokenizer and tiny random models, made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hildanext.config import Config, Convention, LoraConfig, parse_config
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.model.lora import trained_parameters
from hildanext.model.tiny import story_tokenizer, tiny_llama

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CORPUS = [
    "the cat saw a dog and the dog saw the cat",
    "once upon a time there was a red house",
    "1 2 3 4 answer user",
] * 5


def make_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 300 tokens: every text round-trips, so nothing is unknown to it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, learner)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHATML
    # As from a file, where the template's markers are special tokens.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]})
    return tokenizer


def make_byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: some letters, and a token `<0x41>` for each byte of all other characters."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"theca",
        "th",
        "\u2581c",
    ]
    ids = {token: number for number, token in enumerate(vocabulary)}
    merges = [("t", "h"), ("\u2581", "c")]
    backend = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def random_llama(vocab_size: int = 300, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama of random weights, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=3,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def random_lm(convention: Convention, vocab_size: int, mask_token_id: int) -> DiffusionLM:
    """`random_llama`, decided enough that a token's loss depends on what else is masked, as a model to evaluate."""
    return DiffusionLM(
        random_llama(vocab_size, initializer_range=0.25),
        make_tokenizer(),
        mask_token_id=mask_token_id,
        block_size=None,
        convention=convention,
        record={"base_model": "tiny", "tokens_trained": 0},
    )


def write_converted(folder: Path, context: int, **sections: Any) -> Config:
    """A configuration whose model is a tiny converted checkpoint in `folder`: random weights, blocks of 4."""
    tokenizer = story_tokenizer(400)
    tiny_llama(tokenizer, hidden=32, layers=1, context=context, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"}
    lm, _ = load_diffusion_lm(parse_config({"model": model}).model)
    lm.block_size = 4
    save_diffusion_lm(lm, folder / "model")
    return parse_config({"model": model | {"base": str(folder / "model")}} | sections)


def write_gated(folder: Path, context: int = 64, **sections: Any) -> Config:
    """A configuration whose model is a tiny gated checkpoint in `folder`: random weights and factors, groups of 3."""
    tokenizer = story_tokenizer(400)
    tiny_llama(tokenizer, hidden=32, layers=2, context=context, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"}
    lora = LoraConfig(rank=2, gate=True, draft_head=8)
    lm, _ = load_diffusion_lm(parse_config({"model": model}).model, training=True, lora=lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(lm.model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    lm.block_size = 3
    save_diffusion_lm(lm, folder / "model")
    return parse_config({"model": model | {"base": str(folder / "model")}} | sections)
