"""Next-token training of a small AR model on packed rows. The demo makes its base with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.data.rows import RowOrder, Rows
from hildanext.diffusion.masks import additive, document_mask
from hildanext.model.backbone import body
from hildanext.model.policy import compute_dtype
from hildanext.progress import progress


def next_token_losses(model: PreTrainedModel, rows: dict[str, Tensor]) -> Tensor:
    """Next-token cross-entropy in nats, [S] float32: one value per supervised token except the first of each document.

    rows: a batch of `Rows.batch` ([B, L] tensors) on the model's device. Attention is causal within each document;
    values are in row-major order.
    """
    ids = rows["input_ids"]
    causal = document_mask(rows["doc_ids"]).tril()
    embeds = model.get_input_embeddings()(ids)
    hidden = body(
        model,
        inputs_embeds=embeds,
        attention_mask=additive(causal, compute_dtype(embeds)),
        position_ids=rows["position_ids"],
    )
    supervised = rows["loss_mask"] & (rows["position_ids"] > 0)
    row, column = supervised.nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(hidden[row, column - 1])
    return F.cross_entropy(logits.float(), ids[supervised], reduction="none")


def train_ar(model: PreTrainedModel, rows: Rows, *, steps: int, batch_rows: int, lr: float, seed: int) -> float:
    """Train a causal LM on packed rows with AdamW and a one-cycle schedule; returns the last loss in nats per token."""
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
