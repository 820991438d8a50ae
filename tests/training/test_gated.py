"""Gated training: the packed loss and its gradients against separate full forwards with the gate applied by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from hildanext.config import LoraConfig, ModelConfig, NoiseConfig
from hildanext.data.rows import Rows
from hildanext.diffusion.groups import Groups
from hildanext.diffusion.objective import Weights
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch
from hildanext.model.draft_head import DraftHead
from hildanext.model.gate import clean_forward
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.model.lora import trained_parameters
from hildanext.training.convert import convert_wsd
from hildanext.training.gated import GatedModule, GroupRecipe, draw_groups
from hildanext.training.memory import checkpoint_activations
from support.training import material, write_base

K, RANK, HEAD = 3, 4, 8
WEIGHTS = Weights("elbo", 1.0, 0.5, 0.7)


def gated_lm(base: Path, **lora: Any) -> DiffusionLM:
    """The tiny base with a gated adapter whose factors are not zero."""
    config = LoraConfig(rank=RANK, gate=True, draft_head=HEAD, **lora)
    lm, _ = load_diffusion_lm(ModelConfig(base=str(base), device="cpu", dtype="float32"), training=True, lora=config)
    lm.model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(lm.model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return lm


def two_rows(config: Any, lm: DiffusionLM) -> Batch:
    rows = Rows.open(Path(config.paths.data) / "tokenized" / "sft_train.rows")
    return make_batch(lm, [0, 1], rows.batch([0, 1]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated") / "base"
    write_base(folder)
    return folder


def by_hand(base: Path, lm: DiffusionLM, batch: Batch, groups: Groups, row: int, number: int, causal: bool) -> Tensor:
    """The summed, weighted loss of one group: a forward of its document up to the anchor and the group, and no other row."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").double().requires_grad_(False)
    weights = trained_parameters(lm.model)
    queries = (groups.group[row] == number).nonzero()[:, 0]
    anchor = int(groups.anchors[row, queries[0]])
    doc = batch.doc_ids[row] == batch.doc_ids[row, anchor]
    columns = [c for c in range(anchor + 1) if doc[c]]
    n = len(columns)

    def hook(name: str) -> Callable[..., Tensor]:
        def add(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            a, b = weights[f"{name}.low_rank.A"], weights[f"{name}.low_rank.B"]
            gate = (torch.arange(output.shape[1]) >= n).double()[None, :, None]
            return output + gate * 2.0 * (inputs[0] @ a.T @ b.T)

        return add

    for name, module in model.named_modules():
        if f"{name}.low_rank.A" in weights:
            module.register_forward_hook(hook(name))
    embedding = model.get_input_embeddings().weight
    ids = torch.cat([batch.input_ids[row, columns], groups.noisy_ids[row, queries]])
    known = F.embedding(ids.clamp(max=len(embedding) - 1), embedding)
    mask_row = lm.embedding.weight[lm.mask_token_id] + weights["model.embed_tokens.row.0"]
    embeds = torch.where((ids == lm.mask_token_id)[:, None], mask_row, known)
    width = len(ids)
    seen = torch.zeros(width, width, dtype=torch.bool)
    for q in range(width):
        for key in range(width):
            same_group = q >= n and key >= n and (key <= q or not causal)
            seen[q, key] = (key <= q and key < n) or same_group
    mask = torch.zeros(1, 1, width, width, dtype=torch.double).masked_fill(~seen, torch.finfo(torch.double).min)
    first = int(batch.position_ids[row, columns[0]])
    positions = torch.arange(first, first + width)[None]
    hidden = model.model(inputs_embeds=embeds[None], attention_mask=mask, position_ids=positions).last_hidden_state[0]
    total, state = torch.zeros((), dtype=torch.double), torch.zeros(HEAD, dtype=torch.double)
    for j, query in enumerate(queries.tolist(), start=1):
        if not groups.wanted[row, query]:
            continue
        h, label = hidden[n + j - 1], int(batch.input_ids[row, anchor + j + 1])
        if not groups.plain[row, query]:
            e = embedding[batch.input_ids[row, anchor + j]]
            unit = torch.cat([h / h.square().mean().add(1e-16).sqrt(), e / e.square().mean().add(1e-16).sqrt()])
            read = weights["draft_head.down.weight"] @ unit
            state = F.silu(read + weights["draft_head.recur.weight"] @ state)
            h = h + weights["draft_head.up.weight"] @ state
        ce = -F.log_softmax(lm.head.weight @ h, -1)[label]
        if groups.masked[row, query]:
            total = total + ce / groups.t[row, query]
        else:
            total = total + ce * 0.5 * (1.0 if groups.corrupted[row, query] else 0.7)
    return total


@pytest.mark.parametrize(("causal", "edit_share"), [(False, 0.0), (True, 0.0), (False, 1.0)])
def test_a_packed_row_equals_separate_forwards_of_each_group(
    base: Path, tmp_path: Path, causal: bool, edit_share: float
):
    config, lm = material(tmp_path, base), gated_lm(base, causal_groups=causal)
    batch = two_rows(config, lm)
    noise = NoiseConfig(anchors=4, offset_keep=0.8, edit_share=edit_share, corrupt_rate=0.5, plain_share=0.4)
    groups = draw_groups(lm, batch, K, GroupRecipe(noise, 0.2, 0.9, causal), seed=2)
    n_rows = int(groups.wanted.sum())
    assert n_rows > 8
    assert bool(groups.plain.any())
    module = GatedModule(lm, WEIGHTS, 0.0, causal)
    found = module(batch, groups, K, n_rows).loss.total
    weights = trained_parameters(lm.model)
    own = torch.autograd.grad(found, list(weights.values()), allow_unused=True)
    expected = torch.zeros((), dtype=torch.double)
    for row in range(2):
        for number in range(int(groups.group[row].max()) + 1):
            expected = expected + by_hand(base, lm, batch, groups, row, number, causal) / n_rows
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    others = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    for name, one, other in zip(weights, own, others, strict=True):
        if edit_share == 1.0 and name.startswith("draft_head"):
            continue
        assert one is not None
        assert other is not None
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_clean_states_are_the_bases_bit_for_bit(base: Path, tmp_path: Path):
    config, lm = material(tmp_path, base), gated_lm(base)
    lm.model.float()
    batch = two_rows(config, lm)
    plain, _ = load_diffusion_lm(ModelConfig(base=str(base), device="cpu", dtype="float32"))
    docs = batch.doc_ids
    seen = (docs[:, :, None] == docs[:, None, :]) & (docs[:, :, None] >= 0)
    seen = seen.tril() | torch.eye(docs.shape[1], dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        expected = plain.model.base_model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
    assert torch.equal(clean_forward(lm.model, batch).hidden, expected)


def test_the_bases_distribution_as_the_target(base: Path, tmp_path: Path):
    """loss.distill 1: the gradient is that of KL(q || p) with the base's q at the clean row before the label."""
    config, lm = material(tmp_path, base), gated_lm(base)
    batch = two_rows(config, lm)
    groups = draw_groups(lm, batch, K, GroupRecipe(NoiseConfig(anchors=4), 0.2, 0.9, False), seed=2)
    n_rows = int(groups.wanted.sum())
    weights = trained_parameters(lm.model)
    value = GatedModule(lm, Weights(), 1.0, False)(batch, groups, K, n_rows).loss.total
    own = torch.autograd.grad(value, list(weights.values()))
    clean = clean_forward(lm.model, batch)
    from hildanext.model.gate import draft_states, group_forward

    hidden = draft_states(lm.model, batch, groups, K, group_forward(lm.model, batch, groups, clean, False))
    total = torch.zeros((), dtype=torch.double)
    for row, query in groups.wanted.nonzero().tolist():
        q = lm.decodable_logits(clean.hidden[row, int(groups.labels_at[row, query]) - 1][None])[0].double().softmax(-1)
        p = (lm.head.weight @ hidden[row, query]).log_softmax(-1)
        kept = q > 0
        total = total + (q[kept] * (q[kept].log() - p[kept])).sum() / n_rows
    assert value.item() == pytest.approx(total.item(), rel=1e-5)
    for one, other in zip(own, torch.autograd.grad(total, list(weights.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients(base: Path, tmp_path: Path):
    config, lm = material(tmp_path, base), gated_lm(base)
    batch = two_rows(config, lm)
    groups = draw_groups(lm, batch, K, GroupRecipe(NoiseConfig(anchors=4), 0.2, 0.9, False), seed=2)
    weights = [*trained_parameters(lm.model).values()]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(GatedModule(lm, Weights(), 0.0, False)(batch, groups, K, 8).loss.total, weights)

    lm.model.train()
    plain = gradients()
    runs = 0

    def counted(*_: object) -> None:
        nonlocal runs
        runs += 1

    lm.model.base_model.layers[0].self_attn.register_forward_hook(counted)
    checkpoint_activations(lm.model)
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert runs == 3  # clean rows, groups, and the groups again in the backward


def test_training_learns_and_a_checkpoint_loads_again(base: Path, tmp_path: Path):
    changes = {"lora": {"rank": 4, "gate": True, "draft_head": 8}, "wsd": {"peak_block": K, "final_block": K}}
    config = material(tmp_path, base, **changes)
    result = convert_wsd(config)
    lm, _ = load_diffusion_lm(
        config.model.model_copy(update={"base": result["checkpoint"]}), training=True, lora=config.lora
    )
    assert lm.record["gate"] | {"fresh": None} == {"causal": False, "draft_head": 8, "edits": False, "fresh": None}
    assert len(lm.record["gate"]["fresh"]) == K
    assert lm.block_size == K
    save_diffusion_lm(lm, tmp_path / "again")
    again, _ = load_diffusion_lm(
        config.model.model_copy(update={"base": str(tmp_path / "again")}), training=True, lora=config.lora
    )
    for name, value in trained_parameters(lm.model).items():
        assert torch.equal(value, trained_parameters(again.model)[name]), name
    assert any(value.abs().max() > 0 for name, value in trained_parameters(lm.model).items() if name.endswith("B"))


def test_the_draft_head_reads_a_group_row_by_row():
    """States of all rows at once against a plain loop over each group; decoding makes the same steps."""
    head = DraftHead(6, 5).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        hidden, before = torch.randn(2, 2, 7, 6, generator=generator, dtype=torch.double)
        offsets = torch.tensor([[1, 2, 3, 1, 1, 2, 1], [1, 1, 2, 3, 4, 1, 1]])
        found = head.changed(hidden, head.states(head.read(hidden, before), offsets, 4))
        for row in range(2):
            state = None
            for column in range(7):
                state = None if offsets[row, column] == 1 else state
                state = head.step(head.read(hidden[row, column], before[row, column]), state)
                expected = head.changed(hidden[row, column], state)
                torch.testing.assert_close(found[row, column], expected, rtol=1e-12, atol=1e-12)
