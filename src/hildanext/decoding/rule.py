"""The decode rule: what one pass changes in a block. Pure functions of logits and token ids, without a model or state.

Threshold-edit decoding (LLaDA2.1, arXiv 2602.08676, eq. 1-3). x_i is the token at position i, and p_i is the model's
distribution there with the mask token excluded:

    v_i   = argmax p_i                                                   proposal                  `propose`
    c_i   = p_i(v_i)                                                     its confidence            `propose`
    Gamma = { i : x_i is the mask token, c_i > tau_mask }                drafts, mask to token     `edit_step`
    Delta = { i : x_i is another token, v_i != x_i, c_i > tau_edit }     edits, token to token     `edit_step`
    x_i  <- v_i  for all i in Gamma and Delta at once

A model that was trained to insert and delete (LLaDA2.2) may propose INSERT and DELETE as v_i        `indel_step`

All engines and evaluations share this rule. `sequence.py` decides which positions a pass may change and when a block ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.decoding.events import TokenLogprob
from hildanext.decoding.settings import Settings
from hildanext.diffusion.edits import EditTokens, apply_edits

COLDEST = 1e-5  # vLLM's limit: a lower temperature samples as this one, which takes the most likely token


def edit_step(
    tokens: list[int],
    ids: list[int],
    confidence: list[float],
    editable: list[bool],
    *,
    mask_token_id: int,
    tau_mask: float,
    tau_edit: float | None,
    settled: int | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Apply the threshold-edit rule to n positions. Returns (new tokens, Gamma, Delta), both sets as sorted indices.

    tokens x_i, ids v_i, confidence c_i, editable: n values each. Positions that are not `editable` (the prompt) never
    enter Delta. `tau_edit` None turns editing off. If Gamma is empty and masks remain, Gamma is the most confident
    masked position, so every pass makes progress (LLaDA2.1). The masked position `settled` joins Gamma at any
    confidence: its prediction does not depend on the block, so waiting cannot change it (ours).

    The rule works on lists: for a few dozen positions that is faster than a single tensor operation.
    """
    masked = [i for i, token in enumerate(tokens) if token == mask_token_id]
    gamma = [i for i in masked if confidence[i] > tau_mask or i == settled]
    if masked and not gamma:
        gamma = [max(masked, key=confidence.__getitem__)]
    delta = []
    if tau_edit is not None:
        delta = [
            i
            for i, token in enumerate(tokens)
            if token != mask_token_id and editable[i] and ids[i] != token and confidence[i] > tau_edit
        ]
    new = list(tokens)
    for i in (*gamma, *delta):
        new[i] = ids[i]
    return new, gamma, delta


class Change(NamedTuple):
    """What a pass did to n positions. Indices are those of the new tokens, sorted."""

    tokens: list[int]  # n
    drafted: list[int]
    edited: list[int]
    inserted: list[int]  # masks that were put before a token
    deleted: list[tuple[int, int]]  # (index of the token that follows now, the token that was dropped)
    sources: list[int | None]  # the old index of each token; None: it is new
    rest: list[int]  # tokens that were cut off, then those of `behind` that the block did not take


def indel_step(
    tokens: list[int],
    ids: list[int],
    confidence: list[float],
    editable: list[bool],
    edit_tokens: EditTokens | None,
    *,
    mask_token_id: int,
    block_size: int,
    tau_mask: float,
    tau_edit: float | None,
    min_indel_confidence: float = 0.0,
    settled: int | None = None,
    second: list[int] | None = None,
    behind: Sequence[int] = (),
) -> Change:
    """`edit_step` where v_i may be DELETE, which drops x_i, or INSERT, which puts a mask before x_i (LLaDA2.2). Without
    `edit_tokens` it is `edit_step`.

    Only the current block, the last `block_size` of the n positions, is inserted into and deleted from: it is cut to its
    size, or filled with the tokens `behind` it and masks. DELETE and INSERT also need c_i > min_indel_confidence.
    second: given if the block was in this state before; the least confident position that would change takes this
    choice instead, its second one, so that edits do not undo each other for ever.
    """
    first, ids, sure = len(tokens) - block_size, list(ids), list(confidence)
    indels = () if edit_tokens is None else edit_tokens[1:]
    for i, token in enumerate(ids):
        if token in indels and (sure[i] <= min_indel_confidence or i < first):
            sure[i] = 0.0
            ids[i] = token if tokens[i] == mask_token_id else tokens[i]
    new, gamma, delta = edit_step(
        tokens, ids, sure, editable, mask_token_id=mask_token_id, tau_mask=tau_mask, tau_edit=tau_edit, settled=settled
    )
    if edit_tokens is None:
        return Change(new, gamma, delta, [], [], list(range(len(tokens))), list(behind))
    if second is not None and (gamma or delta):
        least = min((*gamma, *delta), key=sure.__getitem__)
        new[least] = tokens[least] if second[least] in indels and least < first else second[least]
        gamma, delta = ([i for i in found if new[i] != tokens[i]] for found in (gamma, delta))
    block = apply_edits(tokens[first:], new[first:], edit_tokens, behind)
    places = [*range(first), *(None if place is None else first + place for place in block.places)]
    sources: list[int | None] = [None] * len(tokens)
    drafted, edited, inserted = list[int](), list[int](), list[int]()
    deleted, following = list[tuple[int, int]](), 0
    for i, place in enumerate(places):
        if place is None:
            deleted.append((min(following, len(tokens) - 1), tokens[i]))
            continue
        following = place + 1
        if new[i] == edit_tokens.insert and place <= len(tokens):
            inserted.append(place - 1)
        if place < len(tokens):
            sources[place] = i
            if new[i] != edit_tokens.insert:
                drafted += [place] if i in gamma else []
                edited += [place] if i in delta else []
    return Change([*new[:first], *block.tokens], drafted, edited, inserted, deleted, sources, block.rest)


def verify_step(
    drafts: list[int], choices: list[int], ratios: list[float], repeats: list[bool], tau_accept: float
) -> int:
    """Length of the longest accepted prefix of m drafts.

    choices [m + 1]: the verifying model's choice at the row before each draft, and behind the last one; `choices[n]` is
    the token after n accepted drafts. Draft j is accepted if it is the choice, or if its probability is at least
    tau_accept of the likeliest token's, `ratios[j]` = p(d_j) / max p, and `repeats[j]` (`repeated_pairs`) is false. With
    tau_accept 1 the text is the model's own, greedy or sampled (speculative decoding, Leviathan et al. 2023, arXiv
    2211.17192).
    """
    for n, (draft, choice, ratio, repeat) in enumerate(zip(drafts, choices[:-1], ratios, repeats, strict=True)):
        if draft != choice and (tau_accept == 1.0 or ratio < tau_accept or repeat):
            return n
    return len(drafts)


def repeated_pairs(text: list[int], drafts: list[int]) -> list[bool]:
    """For each draft, whether it and the token before it stand side by side earlier in `text` or the drafts.

    Drafts fall into such repetition sooner than the verifying model does, so they are not accepted in its place.
    """
    seen = set(itertools.pairwise(text))
    found = []
    for pair in itertools.pairwise([*text[-1:], *drafts]):
        found.append(pair in seen)
        seen.add(pair)
    return found if text else [False, *found][: len(drafts)]


def propose(
    logits: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    holes: Sequence[int] = (),
    settings: Settings | None = None,
    noise: Tensor | None = None,
    seen: Tensor | None = None,
    counts: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """v_i and c_i of n positions: logits [n, V] of any float dtype -> ids [n] int64, confidence [n] float32.

    The mask token, `holes` (ids without a token) and the padding rows of the vocabulary (ids from `vocab_size` on) are
    never proposed, whatever the settings. Without `noise` the proposal is greedy. With finite `noise` [n, vocab_size], Gumbel noise, v_i =
    argmax(log p_i / T + noise_i), which is a sample of the softmax at temperature T (Gumbel 1954); reusing the noise in
    every pass keeps a token once it is drawn. c_i is always the model's probability at temperature 1, so thresholds
    mean the same at every T. `seen` and `counts`: see `decodable_scores`. `allowed` [n, V] bool: v_i is one of these tokens;
    c_i is still its probability among all.

    c_i is NaN if a logit is NaN or infinitely large; the v_i of such a position means nothing. Finite logits never give
    NaN.
    """
    scores = decodable_scores(logits, mask_token_id, vocab_size, settings, seen, holes, counts)
    if allowed is not None:
        assert settings is not None
        ids = choose(scores.masked_fill(~allowed, -torch.inf), settings, noise).ids
        return ids, scores.softmax(-1).gather(1, ids[:, None])[:, 0]
    ids = largest(scores) if settings is None or noise is None else choose(scores, settings, noise).ids
    return ids, scores.softmax(-1).gather(1, ids[:, None])[:, 0]


def decodable_scores(
    logits: Tensor,
    mask_token_id: int,
    vocab_size: int,
    settings: Settings | None = None,
    seen: Tensor | None = None,
    holes: Sequence[int] = (),
    counts: Tensor | None = None,
) -> Tensor:
    """Logits [n, V] as float32 scores [n, vocab_size], with the mask token and the holes at -inf.

    The settings change the score z of a token in this order, which is vLLM's:

        z + logit_bias
        z / repetition_penalty if z > 0, else z * repetition_penalty     where `seen` (Keskar et al. 2019, section 4.1)
        z - frequency_penalty * c - presence_penalty * [c > 0]           c from `counts` (OpenAI's API)

    seen [n, vocab_size] bool: the tokens of the text before each position, prompt included. counts [n, vocab_size]
    float32: how often each token occurs before it in the completion. None leaves that step out.
    """
    scores = logits[:, :vocab_size].to(torch.float32, copy=True)
    scores[:, mask_token_id : mask_token_id + 1] = -torch.inf
    if holes:
        scores[:, list(holes)] = -torch.inf
    if settings is None or not settings.changes_scores:
        return scores
    changed = scores
    if settings.logit_bias:
        changed = changed + bias_row(settings.logit_bias, vocab_size).to(scores.device)
    if seen is not None:
        rate = settings.repetition_penalty
        changed = torch.where(seen, torch.where(changed > 0, changed / rate, changed * rate), changed)
    if counts is not None:
        changed = changed - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
    largest = torch.finfo(torch.float32).max  # a finite score stays finite
    return torch.where(scores.isfinite(), changed.clamp(-largest, largest), scores)


def bias_row(logit_bias: Sequence[tuple[int, float]], vocab_size: int) -> Tensor:
    """What is added to each token's score: [vocab_size] float32."""
    row = torch.zeros(vocab_size)
    for token, bias in logit_bias:
        row[token] = bias
    return row


def token_logprobs(
    logits: Tensor, ids: Sequence[int], n_top: int, *, mask_token_id: int, vocab_size: int, holes: Sequence[int] = ()
) -> list[TokenLogprob]:
    """log p of the tokens `ids` at n positions, and the `n_top` likeliest tokens of each. logits [n, V].

    p is the model's own distribution at temperature 1, without penalties, bias and filters, as in vLLM.
    """
    logp = decodable_scores(logits, mask_token_id, vocab_size, holes=holes).log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(ids, device=logp.device)[:, None])[:, 0].tolist()
    best = logp.topk(min(n_top, vocab_size), dim=-1)
    rows = zip(ids, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, [pair for pair in zip(tops, values, strict=True) if pair[1] > -math.inf])
        for token, value, tops, values in rows
    ]


def forced_logprob(token: int, n_top: int) -> TokenLogprob:
    """Of a token that its grammar forced: certain, because no other token may stand there."""
    return TokenLogprob(token, 0.0, [(token, 0.0)][:n_top])


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Finite Gumbel noise, float32."""
    drawn = torch.empty(shape).exponential_(generator=generator)
    # A draw of 0 would be infinite noise, which no logit outweighs.
    return drawn.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_()


def tokens_before(tokens: list[int], positions: Sequence[int], vocab_size: int) -> Tensor:
    """[n, vocab_size] bool: the tokens that occur in a text before each of n positions."""
    seen = torch.zeros(len(positions), vocab_size, dtype=torch.bool)
    for row, position in enumerate(positions):
        seen[row, torch.tensor(tokens[:position], dtype=torch.long)] = True
    return seen


def counts_before(tokens: list[int], start: int, positions: Sequence[int], vocab_size: int) -> Tensor:
    """[n, vocab_size] float32: how often each token occurs in a text from `start` to before each of n positions."""
    counts = torch.zeros(len(positions), vocab_size)
    for row, position in enumerate(positions):
        found = torch.tensor(tokens[start:position], dtype=torch.long)
        counts[row] = torch.bincount(found, minlength=vocab_size)[:vocab_size]
    return counts


class Choice(NamedTuple):
    """The token of each of n rows."""

    ids: Tensor  # [n] int64
    best: Tensor  # [n] float32: each row's largest score; not finite if a logit is NaN or infinitely large


def largest(scores: Tensor) -> Tensor:
    """Index [n] int64 of the first largest score of each row, or of a NaN. scores [n, V] float32."""
    if scores.device.type == "cpu":  # torch takes ten times as long as numpy
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)


def choose(scores: Tensor, settings: Settings, noise: Tensor | None) -> Choice:
    """The likeliest token of each row of scores [n, V], or with Gumbel noise [n, V] a sample at the settings' temperature.

    The noise must be finite. Tokens at -inf are never chosen.
    """
    ids = largest(scores)
    best = scores.gather(1, ids[:, None])[:, 0]
    if noise is None:
        return Choice(ids, best)
    relative = scores - best[:, None]  # at most 0: no temperature can overflow it upwards
    warm = keep_likely(relative / max(settings.temperature, COLDEST), settings) + noise
    return Choice(warm.masked_fill(scores == -torch.inf, -torch.inf).argmax(-1), best)


def keep_likely(scores: Tensor, settings: Settings) -> Tensor:
    """Min-p, top-k, then top-p filtering: -inf at excluded entries of scores [n, V].

    Nguyen et al. 2024 (arXiv 2407.01082); Fan et al. 2018; Holtzman et al. 2020. The best token of a row always remains.
    """
    top_k, top_p = settings.top_k, settings.top_p
    if settings.min_p > 0.0:
        best = scores.max(-1, keepdim=True).values
        scores = scores.masked_fill(scores < best + math.log(settings.min_p), -torch.inf)
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = scores.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # total probability of the more likely tokens
        outside = before >= top_p
        outside[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return scores
