"""Tokenizers whose length is not their largest id plus one, and such with more ids than the model has rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hildanext.config import ModelConfig, parse_config
from hildanext.data.documents import Document
from hildanext.data.encode import encode_documents
from hildanext.data.tokenizer import token_ids
from hildanext.decoding.engines import Request, open_base
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.errors import DataError, ModelError, UsageError
from hildanext.model.backbone import n_embeddings, weight_matrix
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import check_loadable, load_diffusion_lm, save_diffusion_lm
from support.models import make_tokenizer, random_llama


def with_gap(size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the tests with `size` ids unused before its last 20 tokens."""
    tokenizer = make_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    words = parts["model"]["vocab"]
    n = len(words)
    parts["model"]["vocab"] = {word: i + size * (i >= n - 20) for word, i in words.items()}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return tokenizer


def write(folder: Path, tokenizer: PreTrainedTokenizerFast, n_rows: int, **changes: bool) -> ModelConfig:
    random_llama(n_rows, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(base=str(folder), device="cpu", dtype="float32")


def converted(config: ModelConfig, folder: Path) -> DiffusionLM:
    """The base, saved as a checkpoint and loaded again."""
    lm, _ = load_diffusion_lm(config)
    check_loadable(lm, config, folder)
    lm.block_size = 4
    save_diffusion_lm(lm, folder)
    return load_diffusion_lm(config.model_copy(update={"base": str(folder)}))[0]


def test_ids_without_a_token_are_never_written(tmp_path: Path) -> None:
    n = len(make_tokenizer())
    lm = converted(write(tmp_path / "base", with_gap(100), n + 110), tmp_path / "model")
    gap = set(range(n - 20, n + 80))
    assert lm.mask_token_id in gap  # where the tokenizers library puts it: its number of tokens
    assert lm.vocab_size == n + 100
    assert set(lm.holes) == gap - {lm.mask_token_id}
    assert not set(lm.ordinary_ids.tolist()) & gap
    logits = lm.decodable_logits(torch.randn(2, 32))
    never = logits.isneginf().all(0).nonzero()[:, 0].tolist()
    assert set(never) == gap | set(range(n + 100, n_embeddings(lm.model)))
    engine = TransformersEngine(parse_config({"engine": {"runtime": "eager"}}), {}, lm)
    drawn = engine.settings(parse_config({"decode": {"max_new_tokens": 32}}))._replace(temperature=20.0)
    written = [engine.generate(Request([5, 6], drawn._replace(seed=seed))).token_ids for seed in range(2)]
    assert not {i for ids in written for i in ids} & gap
    assert len({i for ids in written for i in ids}) > 20


def test_ids_without_a_token_are_no_data() -> None:
    tokenizer = with_gap(100)
    n = len(tokenizer)
    right = [*range(4, n - 20), n + 99]
    docs = [
        Document("a", "s", input_ids=ids) for ids in ([4, n], right, [4, n + 100], [4, -1], [4, 1 << 40], [n + 80, 5])
    ]
    found = encode_documents(docs, tokenizer)
    assert [isinstance(result, DataError) for result in found] == [True, False, True, True, True, False]


def test_a_mask_token_that_would_share_an_id_is_refused(tmp_path: Path) -> None:
    tokenizer = with_gap(10)
    config = write(tmp_path, tokenizer, len(tokenizer) + 20)
    with pytest.raises(ModelError, match=r"would get the id \d+ of '.+'; give it a mask_token") as refusal:
        load_diffusion_lm(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_tokens_that_have_no_row_get_one(tmp_path: Path, own: bool, tied: bool) -> None:
    """As in Gemma 3 1B, whose tokenizer has an image token more than the model has rows."""
    tokenizer = make_tokenizer()
    n_rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if own:
        tokenizer.add_special_tokens({"mask_token": "<MASK>"})
    config = write(tmp_path / "base", tokenizer, n_rows, tie_word_embeddings=tied)
    mean = random_llama(n_rows, tie_word_embeddings=tied).get_input_embeddings().weight.detach().mean(0)
    lm = converted(config, tmp_path / "model")
    assert lm.mask_token_id == n_rows + 1
    assert n_embeddings(lm.model) == n_rows + 2
    torch.testing.assert_close(weight_matrix(lm.embedding)[n_rows], mean)
    assert (weight_matrix(lm.head) is weight_matrix(lm.embedding)) == tied
    assert token_ids(lm.tokenizer) == list(range(n_rows + 2))
    base = open_base(parse_config({"model": {"base": str(tmp_path / "model"), "device": "cpu", "dtype": "float32"}}), 1)
    request = Request([5, n_rows], base.settings(parse_config({"decode": {"max_new_tokens": 4}})))
    with pytest.raises(UsageError, match=rf"has no embedding for the token id {n_rows} of the prompt"):
        base.generate(request)
