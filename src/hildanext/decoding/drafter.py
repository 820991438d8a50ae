"""Drafts from the mask rows of a group: each is chosen knowing the token before it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hildanext.decoding.memory import TokenRows
from hildanext.decoding.rule import COLDEST, keep_likely
from hildanext.decoding.settings import Settings
from hildanext.model.backbone import weight_matrix
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.draft_head import CANDIDATES, find_draft_head


class GroupDrafter:
    """Ranks each row's likeliest tokens with the model's draft head, one row after the other."""

    def __init__(self, lm: DiffusionLM, fresh: list[float], embedding: TokenRows | None = None) -> None:
        """embedding: rows of the input embedding; by default the model's own."""
        model = lm.model
        self.fresh, self.mask_token_id, self.vocab_size = fresh, lm.mask_token_id, lm.vocab_size
        table, head = (weight_matrix(part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
        self.embedding = embedding or TokenRows(table, int8=False)
        self.head = self.embedding if head is table else TokenRows(head, self.embedding.int8)
        draft_head = find_draft_head(model)
        # In float32: a CPU multiplies a matrix with a single vector faster than in 16 bits.
        self.draft_head = None if draft_head is None else copy.deepcopy(draft_head).float()

    @torch.inference_mode()
    def drafts(
        self, hidden: Tensor, logits: Tensor, before: int, settings: Settings, noise: Tensor | None
    ) -> tuple[list[int], list[float]]:
        """Drafts of n rows and the chance of each. hidden [n, H], logits [n, V]; before: the token before the first.

        noise [n, V]: Gumbel noise of the drafts' positions, None for greedy drafts.
        """
        scores = logits[:, : self.vocab_size].float()
        scores[:, self.mask_token_id : self.mask_token_id + 1] = -torch.inf
        top, ids = scores.topk(min(CANDIDATES, scores.shape[1]), dim=-1)
        tokens, chances, state = [], [], None
        draft_head, hidden = self.draft_head, hidden.float()
        if draft_head is not None:  # what does not depend on the drafts, for all rows at once
            read, candidates = draft_head.read_hidden(hidden), self.head.rows(ids)
        for row in range(len(hidden)):
            ranked = top[row]
            if draft_head is not None:
                state = draft_head.step(
                    read[row] + draft_head.read_before(self.embedding.rows(torch.tensor(before))), state
                )
                ranked = candidates[row] @ draft_head.changed(hidden[row], state)
            probabilities = ranked.softmax(-1)
            if noise is None:
                best = int(ranked.argmax())
            else:
                warm = keep_likely(ranked[None] / max(settings.temperature, COLDEST), settings)[0]
                best = int((warm + noise[row, ids[row]]).argmax())
            before = int(ids[row, best])
            tokens.append(before)
            chances.append(float(probabilities[best]))
        return tokens, chances
