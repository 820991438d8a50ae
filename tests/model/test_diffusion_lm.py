"""The claims of docs/design.md section 2 in float64, the mask token, and what a checkpoint holds.

The truth: transformers' own forward under masks written here by hand, and the same model on other rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hildanext import __version__
from hildanext.config import Convention, ModelConfig
from hildanext.data.tokenizer import fingerprint
from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.runtimes.protocol import pad_batch
from hildanext.errors import UsageError
from hildanext.model.backbone import n_embeddings
from hildanext.model.diffusion_lm import Batch, DiffusionLM, add_mask_token, ordinary_ids, special_ids
from hildanext.model.loading import load_diffusion_lm, load_with_base, save_diffusion_lm
from hildanext.model.pretrained import base_of, read_record
from support.models import make_tokenizer, random_llama

MASK, BLOCK = 300, 4
EXACT = {"rtol": 0.0, "atol": 1e-12}  # float64, logits of size one
CONVENTIONS: list[Convention] = ["in_place", "shifted"]


@pytest.fixture(scope="module", params=CONVENTIONS)
def lm(request: pytest.FixtureRequest) -> DiffusionLM:
    """A random Qwen3 in float64 on SDPA, decided enough that every token it sees matters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    tokenizer, model = make_tokenizer(), Qwen3ForCausalLM(config).double().eval()
    mask_id = add_mask_token(model, tokenizer)
    assert mask_id == MASK
    record = {"base_model": "tiny", "tokens_trained": 0}
    return DiffusionLM(
        model, tokenizer, mask_token_id=mask_id, block_size=BLOCK, convention=request.param, record=record
    )


class Document(NamedTuple):
    """One document's clean and noisy tokens, [n] int64."""

    clean: Tensor
    noisy: Tensor


def document(n: int, seed: int = 0) -> Document:
    """Random tokens; in x_t half of them masked and some replaced."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(4, 300, (n,), generator=generator)
    draws = torch.rand(n, generator=generator)
    noisy = torch.where(draws < 0.2, torch.randint(4, 300, (n,), generator=generator), clean)
    return Document(clean, torch.where(draws > 0.5, MASK, noisy))


@torch.no_grad()
def run(lm: DiffusionLM, docs: list[Document], padding: int = 0, block: int = BLOCK, pad_id: int = 1) -> list[Tensor]:
    """The training forward on one packed row: logits [n, V] of each document; NaN where nothing predicts a token."""
    pad = torch.full((padding,), pad_id)
    clean, noisy = (torch.cat([*(doc[i] for doc in docs), pad])[None] for i in (0, 1))
    sizes = [len(doc.clean) for doc in docs]
    doc_ids = torch.cat([torch.full((n,), i) for i, n in [*enumerate(sizes), (-1, padding)]])[None]
    positions = torch.cat([torch.arange(n) for n in [*sizes, padding]])[None]
    wanted = lm.allowed(doc_ids >= 0, positions)
    logits = torch.full((sum(sizes) + padding, n_embeddings(lm.model)), torch.nan, dtype=torch.float64)
    logits[wanted[0]] = lm.head(lm(Batch([0], clean, doc_ids, positions, wanted), noisy, wanted, block))
    return list(logits.split([*sizes, padding])[: len(docs)])


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, **EXACT, equal_nan=True)


@torch.no_grad()
def by_hand(lm: DiffusionLM, doc: Document, b: int) -> Tensor:
    """Transformers' forward, no cache: clean blocks before b, then the noisy block b; logits [size, V] that predict it."""
    start = b * BLOCK
    ids = torch.cat([doc.clean[:start], doc.noisy[start : start + BLOCK]])
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float64).min, dtype=torch.float64)
    for i in range(len(ids)):
        for j in range(len(ids)):
            if j // BLOCK <= i // BLOCK:
                mask[i, j] = 0.0
    positions = torch.arange(len(ids))[None]
    logits = lm.model(
        input_ids=ids[None], attention_mask=mask[None, None], position_ids=positions, use_cache=False
    ).logits[0]
    if lm.convention == "shifted":
        logits = torch.cat([torch.full_like(logits[:1], torch.nan), logits[:-1]])
    return logits[start:]


@pytest.mark.parametrize("block", [1, 3, 4, 64])
def test_a_packed_row_equals_each_document_alone(lm: DiffusionLM, block: int) -> None:
    docs = [document(11, 1), document(4, 2), document(9, 3)]
    packed = run(lm, docs, padding=3, block=block)
    for doc, logits in zip(docs, packed, strict=True):
        assert equal(run(lm, [doc], block=block)[0], logits)
    # The comparison is not of constants: another neighbour is another logit within the document.
    assert not equal(packed[0][1:2], packed[0][2:3])


def test_a_training_row_equals_the_decode_row(lm: DiffusionLM) -> None:
    doc = document(14)  # the last block is short
    trained = run(lm, [doc, document(5, 1)])[0]
    for b in range(4):
        assert equal(trained[b * BLOCK : (b + 1) * BLOCK], by_hand(lm, doc, b)), f"block {b}"


class Cached:
    """Blocks of a document behind each other in a `SlotCache`."""

    def __init__(self, lm: DiffusionLM) -> None:
        self.lm, self.runtime, self.stored = lm, EagerRuntime(lm.model), 0
        self.runtime.allocate(slots=2, context=64)
        self.last: Tensor | None = None

    def run(self, tokens: Tensor, store: bool) -> Tensor:
        """Logits [n, V] that predict `tokens` [n], whole blocks; nan where nothing does. What is not stored is run over."""
        places = range(self.stored, self.stored + len(tokens))
        span = (tokens.tolist(), self.stored, [(p // BLOCK + 1) * BLOCK for p in places])
        # In the second slot, as wide as the stranger in the first one.
        hidden = self.runtime.body(pad_batch([([5] * 9, 0, [9] * 9), span], 0))[1, : len(tokens)]
        logits = self.runtime.head(hidden)
        if self.lm.convention == "shifted":
            first = torch.full_like(logits[:1], torch.nan) if self.last is None else self.last
            self.last, logits = (logits[-1:] if store else self.last), torch.cat([first, logits[:-1]])
        self.stored += len(tokens) if store else 0
        return logits


def test_a_cached_block_equals_an_uncached_one(lm: DiffusionLM) -> None:
    doc = document(16)
    one_by_one = Cached(lm)
    for b in range(4):
        noisy, clean = (stream[b * BLOCK : (b + 1) * BLOCK] for stream in (doc.noisy, doc.clean))
        expected = by_hand(lm, doc, b)
        at_once = Cached(lm)
        if b:
            at_once.run(doc.clean[: b * BLOCK], store=True)  # several blocks in one block-causal pass
        start = 1 if b == 0 and lm.convention == "shifted" else 0  # nothing predicts a document's first token
        assert equal(at_once.run(noisy, store=False)[start:], expected[start:]), f"block {b}"
        one_by_one.run(doc.noisy[:BLOCK], store=False)  # another draft of the block first: nothing of it may stay
        assert equal(one_by_one.run(noisy, store=False)[start:], expected[start:]), f"block {b}"
        one_by_one.run(clean, store=True)


def test_a_slot_that_is_moved_goes_on_as_it_was(lm: DiffusionLM) -> None:
    doc = document(8)
    cached = Cached(lm)
    cached.run(doc.clean[:BLOCK], store=True)
    cached.runtime.copy(1, 0, BLOCK)
    span = (doc.noisy[BLOCK:].tolist(), BLOCK, [2 * BLOCK] * BLOCK)
    assert equal(cached.runtime.body(pad_batch([span], 0))[0], cached.runtime.body(pad_batch([span], 1))[0])


def test_a_blocks_first_token_is_settled_by_the_blocks_before_when_shifted(lm: DiffusionLM) -> None:
    """Why the decode rule drafts it at once: nothing drafted in its block moves its proposal. In place everything does."""
    doc = document(8)
    cached = Cached(lm)
    cached.run(doc.clean[:BLOCK], store=True)
    one, other = (cached.run(stream[BLOCK:], store=False) for stream in (doc.noisy, doc.clean))
    assert torch.equal(one[0], other[0]) == (lm.convention == "shifted")
    assert not torch.equal(one[1], other[1])


def changed(doc: Document, stream: str, b: int) -> Document:
    """The document with every token of block b of one stream another one."""
    tokens = doc._asdict()[stream].clone()
    tokens[b * BLOCK : (b + 1) * BLOCK] = (tokens[b * BLOCK : (b + 1) * BLOCK] + 7) % 290 + 4
    return doc._replace(**{stream: tokens})


def moved(a: Tensor, b: Tensor) -> list[list[bool]]:
    """For each block, for each of its tokens: did its logits change?"""
    same = (a == b).all(-1) | a.isnan().all(-1)
    return [(~part).tolist() for part in same.split(BLOCK)]


@pytest.mark.parametrize("b", range(4))
def test_a_clean_block_is_seen_by_later_blocks_only(lm: DiffusionLM, b: int) -> None:
    doc = document(16)
    effect = moved(run(lm, [doc])[0], run(lm, [changed(doc, "clean", b)])[0])
    # Not its own block (its clean copy would give the answer away), no earlier one, all of every later one.
    assert effect == [[later > b] * BLOCK for later in range(4)]


@pytest.mark.parametrize("b", range(4))
def test_a_noisy_block_is_seen_by_itself_only(lm: DiffusionLM, b: int) -> None:
    doc = document(16)
    effect = moved(run(lm, [doc])[0], run(lm, [changed(doc, "noisy", b)])[0])
    # Shifted: a block's first token is predicted by the clean stream, which never sees x_t.
    own = [lm.convention == "in_place", True, True, True]
    assert effect == [own if other == b else [False] * BLOCK for other in range(4)]


def test_a_document_sees_no_other_and_no_padding(lm: DiffusionLM) -> None:
    first, second = document(9, 1), document(6, 2)
    logits = run(lm, [first, second], padding=5)
    assert torch.equal(logits[0][1:], run(lm, [first, document(6, 3)], padding=5)[0][1:])
    assert torch.equal(logits[1][1:], run(lm, [document(9, 3), second], padding=5)[1][1:])
    for padding, pad_id in [(5, 77), (5, MASK), (0, 1)]:
        for a, b in zip(logits, run(lm, [first, second], padding, pad_id=pad_id), strict=True):
            assert equal(a, b)


@pytest.mark.parametrize("lm", ["shifted"], indirect=True)  # the AR head's habit
def test_block_size_one_is_the_ar_model(lm: DiffusionLM) -> None:
    doc = document(12)
    with torch.no_grad():
        logits = lm.model(input_ids=doc.clean[None]).logits[0]
    assert equal(run(lm, [Document(doc.clean, torch.full((12,), MASK))], block=1)[0][1:], logits[:-1])


def test_embedding_noise_reaches_the_noisy_stream_only(lm: DiffusionLM) -> None:
    doc = document(8)
    positions = torch.arange(8)[None]
    wanted = lm.allowed(torch.ones(1, 8, dtype=torch.bool), positions)
    batch = Batch([0], doc.clean[None], torch.zeros(1, 8, dtype=torch.long), positions, wanted)
    args = (batch, doc.noisy[None], wanted)
    noise = torch.zeros(1, 8, 32, dtype=torch.float64)
    with torch.no_grad():
        plain = lm(*args, BLOCK)
        assert torch.equal(plain, lm(*args, BLOCK, noise))
        noise[0, :BLOCK] = 1.0
        same = (lm(*args, BLOCK, noise) == plain).all(-1)
    assert same.tolist() == [int(p) >= BLOCK for p in positions[wanted]]


# --- the mask token -------------------------------------------------------------------------------------------------


def test_the_tokenizers_own_mask_token_is_used() -> None:
    tokenizer, model = make_tokenizer(mask_token="[MASK]"), random_llama(310)
    before = model.get_input_embeddings().weight.clone()
    assert add_mask_token(model, tokenizer) == tokenizer.convert_tokens_to_ids("[MASK]") == 300
    assert len(tokenizer) == 301
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [300, 310], ids=["full", "padded"])
def test_a_new_mask_token(vocab_size: int, tied: bool) -> None:
    tokenizer, model = make_tokenizer(), random_llama(vocab_size, tie_word_embeddings=tied)
    meant = special_ids(tokenizer)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for layer in layers:
            layer.weight[300:] = 1e6  # rows beyond the tokenizer say nothing about its tokens
    known = [layer.weight[:300].clone() for layer in layers]
    mask_id = add_mask_token(model, tokenizer)
    assert mask_id == 300
    assert mask_id not in meant
    assert mask_id not in ordinary_ids(tokenizer)
    assert tokenizer("the<|mask|>cat")["input_ids"].count(mask_id) == 1  # atomic
    assert n_embeddings(model) == model.config.vocab_size == max(vocab_size, 301)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is embedding) == tied
    assert torch.equal(embedding[:300], known[0])
    assert torch.equal(head[:300], known[1])
    off = (embedding[mask_id] - known[0].mean(0)) / known[0].std(0)
    assert 0.01 < off.std() < 0.03  # the mean row and a little noise, not the mean itself
    if not tied:
        assert torch.allclose(head[mask_id], known[1].mean(0))


def test_the_mask_tokens_noise_is_a_function_of_the_seed() -> None:
    models = [random_llama() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_mask_token(model, make_tokenizer(), seed)
    a, b, c = (model.get_input_embeddings().weight[300] for model in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_qwen3_gets_its_free_id(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = type(qwen3_tokenizer).from_pretrained(qwen3_tokenizer.name_or_path)  # the fixture is everyone's
    config = Qwen3Config(
        vocab_size=151936, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model = Qwen3ForCausalLM(config)
    assert add_mask_token(model, tokenizer) == 151669
    assert n_embeddings(model) == 151936
    assert tokenizer.convert_ids_to_tokens(151665) == "<tool_response>"


# --- checkpoints ----------------------------------------------------------------------------------------------------


def load(folder: str | Path, **changes: Any) -> DiffusionLM:
    return load_diffusion_lm(ModelConfig(base=str(folder), device="cpu", dtype="float32", **changes))[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    random_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    """A converted model, convention 'in_place'."""
    lm = load(base, convention="in_place")
    lm.block_size, lm.record["tokens_trained"] = 8, 12345
    save_diffusion_lm(lm, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_base_is_found_at_the_revision_that_was_converted(base: Path, tmp_path: Path) -> None:
    lm = load(base, revision="v1")
    lm.block_size = 8
    save_diffusion_lm(lm, tmp_path / "checkpoint")
    converted = ModelConfig(base=str(tmp_path / "checkpoint"), revision="mine")
    record = read_record(converted)
    assert record is not None
    found = base_of(converted, record)
    assert (found.base, found.revision, found.convention) == (str(base), "v1", None)
    assert base_of(converted, record, "another").revision is None
    del record["base_revision"]  # of an older version
    assert base_of(converted, record).revision is None


def test_a_checkpoint_loads_together_with_its_base(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    config = ModelConfig(base=str(checkpoint), device="cpu", dtype="bfloat16")
    loaded = load_with_base(config)
    assert (loaded.block_size, loaded.base_config.base) == (loaded.lm.block_size, str(base))
    assert loaded.base.dtype == loaded.lm.model.dtype == torch.bfloat16
    assert not loaded.base.training
    other = shutil.copytree(base, tmp_path / "other")
    assert load_with_base(config, str(other)).base_config.base == str(other)
    with pytest.raises(UsageError, match="is not a converted checkpoint; run 'hildanext convert-wsd' first"):
        load_with_base(ModelConfig(base=str(base), device="cpu"))


def test_config_json(base: Path, checkpoint: Path) -> None:
    stored = json.loads((checkpoint / "config.json").read_text())
    assert (stored["block_size"], stored["mask_token_id"]) == (8, 300)
    expected = {"version": __version__, "convention": "in_place", "base_model": str(base), "tokens_trained": 12345}
    expected |= {"tokenizer": fingerprint(make_tokenizer()), "base_revision": None}
    assert stored["hilda"] == expected
    assert read_record(ModelConfig(base=str(checkpoint))) == expected
    assert read_record(ModelConfig(base=str(base))) is None
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["model.safetensors"]


def one_more(make: Callable[[], PreTrainedModel], folder: Path) -> dict[str, Any]:
    tokenizer, model = make_tokenizer(), make()
    mask_id = add_mask_token(model, tokenizer)
    record = {"base_model": "tiny", "tokens_trained": 0}
    lm = DiffusionLM(model, tokenizer, mask_token_id=mask_id, block_size=8, convention="shifted", record=record)
    save_diffusion_lm(lm, folder)
    assert load(folder).model.config.to_dict().get("rope_parameters") == model.config.to_dict().get("rope_parameters")
    return json.loads((folder / "config.json").read_text())


def test_both_names_of_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 54321.0}
    stored = one_more(lambda: random_llama(rope_parameters=rope), tmp_path / "llama")
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] == 54321.0
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1}
    gemma = Gemma3TextConfig(**sizes, head_dim=16, intermediate_size=64, num_key_value_heads=1)
    stored = one_more(lambda: Gemma3ForCausalLM(gemma), tmp_path / "gemma3")
    assert stored["rope_theta"] == stored["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    opt = OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32)
    assert "rope_theta" not in one_more(lambda: OPTForCausalLM(opt), tmp_path / "opt")
