"""Drafts from the mask rows of a group: each is chosen knowing the token before it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from hildanext.decoding.constraint import Constraint
from hildanext.decoding.memory import TokenRows
from hildanext.decoding.rule import COLDEST, keep_likely
from hildanext.decoding.settings import FRESH, Settings
from hildanext.model.backbone import weight_matrix
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.draft_head import CANDIDATES, find_draft_head

LEAST_REACH = 0.05  # a draft behind this chance is hardly ever part of a plan
CHUNK = 4096  # rows of a table that are made at once


def fresh_chances(lm: DiffusionLM) -> list[float]:
    """For row 1 ... k of a new group, the chance that its draft is right: as measured for a gated checkpoint, else FRESH."""
    return lm.record["gate"].get("fresh") or FRESH[: lm.block_size]


class GroupDrafter:
    """Ranks each row's likeliest tokens with the model's draft head, one row after the other.

    The head's products with embeddings are made once, as tables of one row for each token: what remains of a draft is a
    product with the recurrent weight and one with the candidates' rows (names as in `DraftHead`):

        D [h_j ; e] = D_h h_j + before[x],  before = E D_e        score of v = logit_v + changes[v] . s_j,  changes = W U
    """

    def __init__(self, lm: DiffusionLM, fresh: list[float]) -> None:
        self.fresh, self.mask_token_id, self.vocab_size = fresh, lm.mask_token_id, lm.vocab_size
        draft_head = find_draft_head(lm.model)
        # In float32: a CPU multiplies a matrix with a single vector faster than in 16 bits.
        self.draft_head = None if draft_head is None else copy.deepcopy(draft_head).float()
        if self.draft_head is None:
            return
        embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
        up = self.draft_head.up.weight
        self.before = _table(weight_matrix(embedding), self.draft_head.read_before)
        self.changes = _table(weight_matrix(head), lambda rows: rows @ up)

    @torch.inference_mode()
    def drafts(
        self,
        hidden: Tensor,
        logits: Tensor,
        before: int,
        settings: Settings,
        noise: Tensor | None,
        constraint: Constraint | None = None,
    ) -> tuple[list[int], list[float]]:
        """Drafts of at most n rows and the chance of each. hidden [n, H], logits [n, V]; before: the token before the first.

        They end where the chance that all are right falls below LEAST_REACH. noise [n, V]: Gumbel noise of the drafts'
        positions, None for greedy drafts. constraint: drafts are chosen from the allowed tokens, and end where none of a
        row's candidates is allowed; forced ones have the chance 1.
        """
        scores = logits[:, : self.vocab_size].float()
        scores[:, self.mask_token_id : self.mask_token_id + 1] = -torch.inf
        tokens: list[int] = []
        chances: list[float] = []
        state = None
        draft_head, reach = self.draft_head, 1.0
        if draft_head is not None:  # what does not depend on the drafts, for all rows at once
            read = draft_head.read_hidden(hidden.float())
        for row, of_row in enumerate(scores):
            ranked, ids = of_row.topk(min(CANDIDATES, len(of_row)))  # row by row: drafts often end before the last one
            if draft_head is not None:
                state = draft_head.step(read[row] + self.before.rows(torch.tensor(before)), state)
                ranked = ranked + self.changes.rows(ids) @ state
            follows = None if constraint is None else constraint.behind(tokens)
            if follows is not None:
                ranked = ranked.masked_fill(~follows.tensor[ids.cpu()].to(ids.device), -torch.inf)
                if follows.only is None and not bool((ranked > -torch.inf).any()):
                    break
            probabilities = ranked.softmax(-1)
            if noise is None:
                best = int(ranked.argmax())
            else:
                warm = keep_likely(ranked[None] / max(settings.temperature, COLDEST), settings)[0]
                best = int((warm + noise[row, ids]).argmax())
            forced = None if follows is None else follows.only
            before = int(ids[best]) if forced is None else forced
            tokens.append(before)
            chances.append(float(probabilities[best]) if forced is None else 1.0)
            reach *= chances[-1]
            if reach < LEAST_REACH or (constraint is not None and before in constraint.ends):
                break
        return tokens, chances


@torch.no_grad()
def _table(weight: Tensor, product: Callable[[Tensor], Tensor]) -> TokenRows:
    """`product` of all rows of a weight [V, H], in int8."""
    return TokenRows(torch.cat([product(rows.float()) for rows in weight.split(CHUNK)]), int8=True)
