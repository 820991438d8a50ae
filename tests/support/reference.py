"""Decoding the slow way, from the definitions: every pass runs the whole text through the plain model, no cache at all."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hildanext.decoding.rule import propose
from hildanext.decoding.settings import Settings
from hildanext.diffusion.noise import sample_generator
from hildanext.model.diffusion_lm import DiffusionLM


def whole_text_logits(lm: DiffusionLM, tokens: list[int], window: int, size: int) -> torch.Tensor:
    """Logits [n, V] that predict each token; before `window` the text is block-causal, from there on it sees itself."""
    n = len(tokens)
    mask = torch.full((1, 1, n, n), torch.finfo(lm.model.dtype).min, dtype=lm.model.dtype)
    for query in range(n):
        sees = n if query >= window else (query // size + 1) * size
        mask[..., query, :sees] = 0
    logits = lm.model(
        input_ids=torch.tensor([tokens]), attention_mask=mask, position_ids=torch.arange(n)[None], use_cache=False
    ).logits[0]
    return torch.cat([logits[:1], logits[:-1]]) if lm.convention == "shifted" else logits


NEVER = torch.empty(0)  # of a token of the draft that no pass fixed


class Decoded(NamedTuple):
    tokens: list[int]  # new ones
    passes: int
    logps: list[torch.Tensor]  # of each new token: the model's log-probabilities [vocab_size] in the pass that fixed it


@torch.inference_mode()
def reference(
    lm: DiffusionLM, prompt: list[int], settings: Settings, eos: int = -1, draft: list[int] | None = None
) -> Decoded:
    """The completion of a request. draft: tokens to begin with in place of masks."""
    size, mask_id, n_prompt = settings.block_size, lm.mask_token_id, len(prompt)
    first = block = n_prompt // size
    tokens, passes, fixed, rest = list(prompt), 0, {}, list(draft or [])
    indels = settings.min_indel_confidence is not None
    while True:
        while len(tokens) < (block + 1) * size:
            tokens.append(rest.pop(0) if rest else mask_id)
        window = max(first, block - (settings.edit_blocks if settings.tau_edit is not None else 0)) * size
        post_steps = in_block = 0
        seen = []
        while True:
            passes, in_block = passes + 1, in_block + 1
            is_last = in_block == size + settings.max_post_steps + 2
            closed = lm.edit_ids if not indels or is_last or post_steps >= settings.max_post_steps else ()
            logits = whole_text_logits(lm, tokens, window, size)
            after, changed, was_clean = list(tokens), False, mask_id not in tokens
            gamma = []
            logits[:, list(closed)] = -torch.inf
            proposals = {
                p: _propose(lm, logits[p : p + 1], tokens, p, n_prompt, settings) for p in range(window, len(tokens))
            }
            if indels:
                for p, (token, sure) in proposals.items():
                    if token in lm.edit_ids and (sure <= settings.min_indel_confidence or p < block * size):
                        proposals[p] = (token if tokens[p] == mask_id else tokens[p], 0.0)
            for p, (token, sure) in proposals.items():
                settled = lm.convention == "shifted" and p == window
                if tokens[p] == mask_id:
                    if sure > settings.tau_mask or settled or (indels and is_last):
                        gamma.append(p)
                elif (
                    settings.tau_edit is not None
                    and p >= n_prompt
                    and token != tokens[p]
                    and sure > settings.tau_edit
                    and not (settled and in_block > 1 and window == block * size)
                ):
                    after[p], changed = token, True
            if not was_clean and not gamma:
                gamma = [max((p for p in proposals if tokens[p] == mask_id), key=lambda p: proposals[p][1])]
            for p in gamma:
                after[p] = proposals[p][0]
            state = (tokens[window:], len(rest))
            changing = [p for p in proposals if after[p] != tokens[p]]
            if state in seen and changing:
                p = min(changing, key=lambda p: (proposals[p][1], tokens[p] != mask_id))
                others = logits[p : p + 1].clone()
                others[0, after[p]] = -torch.inf
                after[p], _ = _propose(lm, others, tokens, p, n_prompt, settings)
                if after[p] in lm.edit_ids and p < block * size:
                    after[p] = tokens[p]
                changed = any(after[p] != tokens[p] for p in changing)
            written = [p for p in proposals if after[p] not in (tokens[p], *lm.edit_ids)]
            fixed |= {p: _logp(lm, logits[p]) for p in written}
            if indels:
                seen.append(state)
                after, fixed, rest = _moved(lm, tokens, after, block * size, fixed, rest if draft else [])
                changed = changed or any(token in lm.edit_ids for token in after)
                rest = [token for token in rest if token != mask_id] if draft else []
            tokens = after
            post_steps += was_clean
            if mask_id not in tokens and (
                settings.tau_edit is None
                or post_steps >= settings.max_post_steps
                or (was_clean and not changed)
                or (indels and is_last)
            ):
                break
        new = tokens[n_prompt:][: settings.max_new_tokens]
        if eos in new or len(new) == settings.max_new_tokens:
            new = new[: new.index(eos) + 1] if eos in new else new
            return Decoded(new, passes, [fixed.get(n_prompt + i, NEVER) for i in range(len(new))])
        block += 1


def _moved(
    lm: DiffusionLM, tokens: list[int], after: list[int], start: int, fixed: dict[int, torch.Tensor], rest: list[int]
) -> tuple[list[int], dict[int, torch.Tensor], list[int]]:
    """The text with the insertions and deletions of the block at `start`, the log-probabilities, and what was cut off."""
    delete, insert = lm.edit_ids
    moved: list[tuple[int, int | None]] = []  # token, its old position
    for p in range(start, len(after)):
        if after[p] == insert:
            moved += [(lm.mask_token_id, None), (tokens[p], p)]
        elif after[p] != delete:
            moved.append((after[p], p))
    moved += [(token, None) for token in rest]
    size = len(after) - start
    block = (moved + [(lm.mask_token_id, None)] * size)[:size]
    kept = {p: logp for p, logp in fixed.items() if p < start}
    kept |= {start + i: fixed[p] for i, (_, p) in enumerate(block) if p in fixed}
    return after[:start] + [token for token, _ in block], kept, [token for token, _ in moved[size:]]


def _logp(lm: DiffusionLM, logits: torch.Tensor) -> torch.Tensor:
    scores = logits[: lm.vocab_size].to(torch.float32, copy=True)
    scores[[lm.mask_token_id, *lm.edit_ids]] = -torch.inf
    return scores.log_softmax(-1)


def _propose(
    lm: DiffusionLM, logits: torch.Tensor, tokens: list[int], p: int, n_prompt: int, settings: Settings
) -> tuple[int, float]:
    noise = None
    size = settings.block_size
    if settings.temperature > 0:
        drawn = torch.empty(size, lm.vocab_size)
        drawn.exponential_(generator=sample_generator(settings.seed, p // size, "decode"))
        noise = -drawn[p % size][None].log()
    scores = logits.to(torch.float32, copy=True)
    for token, bias in settings.logit_bias:
        scores[0, token] += bias
    for token in set(tokens[:p]):
        rate = settings.repetition_penalty
        scores[0, token] = scores[0, token] / rate if scores[0, token] > 0 else scores[0, token] * rate
    for token in tokens[n_prompt:p]:
        scores[0, token] -= settings.frequency_penalty
    for token in set(tokens[n_prompt:p]):
        scores[0, token] -= settings.presence_penalty
    # What is left: temperature and the filters.
    plain = settings._replace(repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, logit_bias=())
    ids, sure = propose(scores, mask_token_id=lm.mask_token_id, vocab_size=lm.vocab_size, settings=plain, noise=noise)
    return int(ids), float(sure)
