"""The AR base as a teacher: its next-token distribution is the soft target of `loss.distill`.

It is used at masked tokens whose left context is clean. Elsewhere the teacher would see tokens hidden from the student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hildanext.config import Config
from hildanext.diffusion.masks import additive, document_mask
from hildanext.diffusion.noise import Noisy, left_visible
from hildanext.diffusion.objective import Soft
from hildanext.model.backbone import body
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.loading import adapter_base
from hildanext.model.lora import AdaptedHead, trained_parameters
from hildanext.model.policy import Policy, compute_dtype
from hildanext.model.pretrained import base_of, load_causal_lm, read_record


class Teacher:
    """The base of a model in training: the model without its adapter, or a frozen copy if the weights are trained."""

    def __init__(self, lm: DiffusionLM, config: Config, policy: Policy) -> None:
        self.lm, self.share = lm, config.loss.distill
        self.beside: PreTrainedModel | None = None
        if lm.adapter is None or read_record(adapter_base(config.model, lm.record["adapter"])) is not None:
            self.beside, _ = load_causal_lm(base_of(config.model, lm.record), policy, policy.compute)
            self.beside.eval().requires_grad_(False)
        head = (self.beside or lm.model).get_output_embeddings()
        self.head = head.base if isinstance(head, AdaptedHead) else head

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Hidden states [B, L, H'] of the clean rows, causal within each document."""
        with self.as_base() as model:
            embeds = model.get_input_embeddings()(batch.input_ids)
            mask = additive(document_mask(batch.doc_ids).tril(), compute_dtype(embeds))
            return body(model, inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position_ids)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H'] -> [n, V] float32 with the student's V; -inf for ids that decoding cannot predict."""
        assert isinstance(self.head, nn.Module)
        assert isinstance(self.lm.head.weight, Tensor)
        logits = self.head(hidden).float()[:, : self.lm.vocab_size]  # the base may lack the mask token's row
        logits = F.pad(logits, (0, len(self.lm.head.weight) - logits.shape[1]), value=-torch.inf)
        logits[:, [self.lm.mask_token_id, *self.lm.holes]] = -torch.inf
        return logits

    def soft(self, states: Tensor, batch: Batch, noisy: Noisy, wanted: Tensor, block_size: int) -> Soft:
        """Soft targets at the wanted positions [B, L] bool of a turn, in row-major order. states: from `states(batch)`."""
        row, column = wanted.nonzero(as_tuple=True)
        fair = left_visible(noisy, batch.position_ids, block_size) & (batch.position_ids > 0)
        fair &= noisy.labels == batch.input_ids  # not a mask to be deleted
        return Soft(states[row, (column - 1).clamp_min(0)], self.logits, fair[wanted].float() * self.share)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[PreTrainedModel]:
        """Yield the base. Within the block the student's adapter is set to zero in place, so no graph may need its values."""
        if self.beside is not None:
            yield self.beside
            return
        model, values = self.lm.model, trained_parameters(self.lm.model)
        kept = {name: value.detach().clone() for name, value in values.items()}
        was_training = model.training
        model.eval()
        for value in values.values():
            value.zero_()
        try:
            yield model
        finally:
            for name, value in values.items():
                value.copy_(kept[name])
            model.train(was_training)
