"""The autoregressive side: exact likelihood of the base model, its training from scratch (demo), its completions.

It is what the diffusion model is measured against, on the same packed rows.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.masks import additive, document_mask
from hildanext.model import compute_dtype
from hildanext.probe import body
from hildanext.progress import progress
from hildanext.rows import RowOrder, Rows


def next_token_losses(model: PreTrainedModel, rows: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of every token that has one before it in its document, [S] float32, row-major order.

    rows: as from `Rows.batch`, on the model's device. Causal within each document.
    """
    ids, docs = rows["input_ids"], rows["doc_ids"]
    mask = document_mask(docs).tril()
    embeds = model.get_input_embeddings()(ids)
    hidden = body(
        model,
        inputs_embeds=embeds,
        attention_mask=additive(mask, compute_dtype(embeds)),
        position_ids=rows["position_ids"],
    )
    wanted = rows["loss_mask"] & (rows["position_ids"] > 0)
    row, column = wanted.nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(hidden[row, column - 1])
    return F.cross_entropy(logits.float(), ids[wanted], reduction="none")


class Likelihood(NamedTuple):
    """Negative log-likelihood (or its bound) of held-out rows, in nats."""

    nats: float
    tokens: int
    standard_error: float  # of `nats`; 0 where the figure is exact


@torch.no_grad()
def ar_likelihood(model: PreTrainedModel, rows: Rows, n_rows: int, batch_rows: int) -> Likelihood:
    """Exact negative log-likelihood of the first `n_rows` rows under the AR model."""
    nats, tokens = 0.0, 0
    n_rows = min(n_rows, len(rows))
    for start in range(0, n_rows, batch_rows):
        batch = rows.batch(list(range(start, min(start + batch_rows, n_rows))))
        losses = next_token_losses(model, {key: value.to(model.device) for key, value in batch.items()})
        nats += losses.double().sum().item()
        tokens += len(losses)
    return Likelihood(nats, tokens, 0.0)


def train_ar(model: PreTrainedModel, rows: Rows, *, steps: int, batch_rows: int, lr: float, seed: int) -> float:
    """Train a (tiny) causal LM from scratch on packed rows; returns the last loss in nats per token."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    order = RowOrder(len(rows), seed)
    model.train()
    with progress("AR base", steps, "steps") as advance:
        for step in range(steps):
            batch = rows.batch([order.row(step * batch_rows + i) for i in range(batch_rows)])
            loss = next_token_losses(model, batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            advance(step + 1, f"loss {loss.item():.3f}")
    model.eval()
    return loss.item()


class ArCompletion(NamedTuple):
    """Greedy text of the AR model and what it cost."""

    text: str
    token_ids: list[int]
    seconds: float


@torch.no_grad()
def ar_complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], max_new_tokens: int
) -> ArCompletion:
    """Greedy completion by transformers' own `generate` (with its KV cache), batch of one."""
    ids = torch.tensor([prompt_ids], device=model.device)
    began = time.perf_counter()
    output = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    seconds = time.perf_counter() - began
    new = output[0, len(prompt_ids) :].tolist()
    return ArCompletion(str(tokenizer.decode(new, skip_special_tokens=True)), new, seconds)
