"""Attention in pieces and FlexAttention against the dense mask: forward, gradients, and a whole training step's loss."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.config import ModelConfig
from hildanext.diffusion.masks import Pieces, document_mask, training_mask, training_pieces
from hildanext.diffusion.noise import block_ids
from hildanext.errors import ConfigError, ModelError
from hildanext.model import training_attention
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.policy import Policy, choose_policy
from hildanext.model.training_attention import in_pieces, use_training_attention, visible_keys
from hildanext.training import memory
from hildanext.training.attention_choice import choose_attention
from hildanext.training.memory import checkpoint_activations
from support.models import random_llama


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """doc_ids, position_ids [B, L] of packed rows with padding, and a block size (L or more: full diffusion)."""
    length = draw(st.integers(1, 40))
    docs, positions = [], []
    for _ in range(draw(st.integers(1, 3))):
        row_docs: list[int] = []
        row_positions: list[int] = []
        while len(row_docs) < length and draw(st.booleans()):
            n = min(draw(st.integers(1, 25)), length - len(row_docs))
            row_docs += [max(row_docs, default=-1) + 1] * n
            row_positions += range(n)
        padding = length - len(row_docs)
        docs.append(row_docs + [-1] * padding)
        positions.append([*row_positions, *range(padding)])
    return torch.tensor(docs), torch.tensor(positions), draw(st.integers(1, 45))


def dense(docs: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    full = size >= docs.shape[1]
    return document_mask(docs) if full else training_mask(docs, block_ids(positions, size))


@given(batches(), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_pieces_hold_every_allowed_score_once(batch: tuple[torch.Tensor, torch.Tensor, int], chunk: int) -> None:
    docs, positions, size = batch
    n_rows, length = docs.shape
    blocks = block_ids(positions, size) if size < length else None
    pieces = training_pieces(docs, blocks, chunk)
    width = pieces.streams * length
    seen = torch.zeros(n_rows * width, n_rows * width, dtype=torch.int64)
    keys = pieces.keys.split(pieces.sizes)
    for number, (at, mask) in enumerate(zip(keys, pieces.masks, strict=True)):
        tokens = torch.arange(number * chunk, min((number + 1) * chunk, n_rows * length))
        places = torch.cat([tokens // length * width + tokens % length + s * length for s in range(pieces.streams)])
        seen[places[:, None], at[None]] += mask
    expected = torch.block_diag(*dense(docs, positions, size)) > 0
    assert torch.equal(seen, expected.long())
    assert pieces.scores == sum(mask.numel() for mask in pieces.masks)


@given(batches(), st.integers(1, 20), st.sampled_from([(2, 2), (4, 2), (3, 1)]))
@settings(max_examples=60, deadline=None)
def test_pieces_give_the_dense_attention_and_its_gradients(
    batch: tuple[torch.Tensor, torch.Tensor, int], chunk: int, heads: tuple[int, int]
) -> None:
    docs, positions, size = batch
    n_rows, length = docs.shape
    blocks = block_ids(positions, size) if size < length else None
    pieces = training_pieces(docs, blocks, chunk).additive(torch.float64, heads[0] // heads[1])
    width, generator = pieces.streams * length, torch.Generator().manual_seed(length)

    def leaf(n_heads: int) -> torch.Tensor:
        made = torch.randn(n_rows, n_heads, width, 8, generator=generator, dtype=torch.float64)
        return made.requires_grad_()

    query, key, value = leaf(heads[0]), leaf(heads[1]), leaf(heads[1])
    upstream = torch.randn(query.shape, generator=generator, dtype=torch.float64)
    found = in_pieces(query, key, value, pieces, 0.3)
    groups = heads[0] // heads[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    scores = scores.masked_fill(~dense(docs, positions, size)[:, None], -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@given(batches())
@settings(max_examples=25, deadline=None)
def test_flex_masks_say_the_same(batch: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    docs, positions, size = batch
    mask = visible_keys("flex", docs, positions, size, torch.float32, 1)
    assert isinstance(mask, torch.nn.attention.flex_attention.BlockMask)
    expected = dense(docs, positions, size)
    rows, width = torch.arange(len(docs))[:, None, None], torch.arange(expected.shape[1])
    assert torch.equal(mask.mask_mod(rows, torch.tensor(0), width[None, :, None], width[None, None]), expected)


def test_more_shapes_than_kernels_is_an_error_and_not_slow_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(training_attention, "SHAPES", 2)

    def attend(length: int) -> None:
        docs, positions = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None]
        x = torch.randn(1, 1, 2 * length, 8)
        run(x, x, x, block_mask=visible_keys("flex", docs, positions, 8, torch.float32, 1))

    with torch._dynamo.config.patch(recompile_limit=2):
        run = training_attention.compiled_flex.__wrapped__()
        for length in (32, 64, 32):
            attend(length)
        with pytest.raises(
            ModelError, match=r"compiled kernels for 2 shapes of rows, .* needs another; set train\.att"
        ):
            attend(96)
    torch._dynamo.reset()


def test_short_rows_keep_the_dense_mask_and_long_ones_do_not() -> None:
    def kind(length: int) -> type:
        docs, positions = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None]
        return type(visible_keys("pieces", docs, positions, 8, torch.float32, 1))

    assert (kind(32), kind(1024)) == (torch.Tensor, Pieces)


def rows(lm: DiffusionLM) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Two rows of 300 tokens: clean rows, x_t, wanted positions."""
    generator = torch.Generator().manual_seed(1)
    lengths = ([130, 1, 100, 60], [7, 200, 40])
    docs = torch.full((2, 300), -1)
    positions = torch.zeros(2, 300, dtype=torch.int64)
    for row, found in enumerate(lengths):
        at = 0
        for number, n in enumerate([*found, 300 - sum(found)]):
            docs[row, at : at + n] = number if number < len(found) else -1
            positions[row, at : at + n] = torch.arange(n)
            at += n
    clean = torch.randint(0, lm.vocab_size, (2, 300), generator=generator)
    noisy = clean.masked_fill(torch.rand(2, 300, generator=generator) < 0.5, lm.mask_token_id)
    wanted = (docs >= 0) & (positions > 0)
    return Batch([0, 1], clean, docs, positions, wanted), noisy, wanted


@pytest.fixture
def lm(tmp_path: Path, tiny_tokenizer) -> DiffusionLM:
    random_llama(num_key_value_heads=1).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return load_diffusion_lm(ModelConfig(base=str(tmp_path / "base"), device="cpu", dtype="float32"), training=True)[0]


@pytest.mark.parametrize("block_size", [1, 32, 300])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_predicts_the_same(lm: DiffusionLM, block_size: int) -> None:
    """Forward only: torch has no backward of it on a CPU."""
    inputs = rows(lm)
    expected = lm(*inputs, block_size)
    use_training_attention(lm.model)
    lm.attention = "flex"
    torch.testing.assert_close(lm(*inputs, block_size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 32, 300])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_the_same(lm: DiffusionLM, block_size: int, checkpointing: bool) -> None:
    """Loss to 1e-5 and gradients in fp32, against transformers' own attention with the dense mask."""
    if checkpointing:
        checkpoint_activations(lm.model)
    lm.model.train()
    inputs = batch, _, wanted = rows(lm)

    def run() -> tuple[float, list[torch.Tensor]]:
        lm.zero_grad()
        logits = lm.head(lm(*inputs, block_size))
        loss = torch.nn.functional.cross_entropy(logits, batch.input_ids[wanted])
        loss.backward()
        return loss.item(), [p.grad.clone() for p in lm.model.parameters() if p.grad is not None]

    expected, slopes = run()
    assert choose_attention(lm, "auto", choose_policy("cpu", "float32")) == "attention in pieces"
    assert lm.attention == "pieces"
    found, others = run()
    assert found == pytest.approx(expected, abs=1e-5)
    for one, other in zip(others, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_checkpointing_gives_memory_back_before_each_layer(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each forward of a layer, of which the backward pass runs another."""
    calls: list[int] = []
    monkeypatch.setattr(memory, "trimmer", lambda: calls.append)
    checkpoint_activations(lm.model)
    lm.model.train()
    loss = lm(*rows(lm), 32).square().sum()
    n_layers = lm.model.config.num_hidden_layers
    assert len(calls) == n_layers
    loss.backward()
    assert len(calls) == 2 * n_layers


def test_a_kind_that_gives_something_else_is_not_taken(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = choose_policy("cpu", "float32")
    monkeypatch.setattr(training_attention, "in_pieces", lambda query, *_: torch.zeros_like(query))
    assert "dense mask (pieces: hidden states differ" in choose_attention(lm, "auto", policy)
    assert lm.attention == "dense"
    assert lm.model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=r"'train.attention': 'pieces' cannot run on this model: hidden states"):
        choose_attention(lm, "pieces", policy)
    with pytest.raises(ConfigError, match=r"'flex' cannot run on this model: has no backward on a CPU; use 'dense'"):
        choose_attention(lm, "flex", policy)


def test_attention_that_is_not_sdpa_stays(lm: DiffusionLM) -> None:
    lm.model.set_attn_implementation("eager")
    policy: Policy = choose_policy("cpu", "float32")
    assert "model.attention is not sdpa" in choose_attention(lm, "auto", policy)
    assert (lm.attention, lm.model.config._attn_implementation) == ("dense", "eager")
