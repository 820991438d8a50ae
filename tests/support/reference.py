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


class Decoded(NamedTuple):
    tokens: list[int]  # new ones
    passes: int
    logps: list[torch.Tensor]  # of each new token: the model's log-probabilities [vocab_size] in the pass that fixed it


@torch.inference_mode()
def reference(lm: DiffusionLM, prompt: list[int], settings: Settings, eos: int = -1) -> Decoded:
    """The completion of a request."""
    size, mask_id, n_prompt = settings.block_size, lm.mask_token_id, len(prompt)
    first = block = n_prompt // size
    tokens, passes, fixed = list(prompt), 0, {}
    while True:
        tokens += [mask_id] * ((block + 1) * size - len(tokens))
        window = max(first, block - (settings.edit_blocks if settings.tau_edit is not None else 0)) * size
        post_steps = 0
        while True:
            passes += 1
            logits = whole_text_logits(lm, tokens, window, size)
            after, changed, was_clean = list(tokens), False, mask_id not in tokens
            gamma = []
            proposals = {
                p: _propose(lm, logits[p : p + 1], tokens, p, n_prompt, settings) for p in range(window, len(tokens))
            }
            for p, (token, sure) in proposals.items():
                settled = lm.convention == "shifted" and p == window
                if tokens[p] == mask_id:
                    if sure > settings.tau_mask or settled:
                        gamma.append(p)
                elif (
                    settings.tau_edit is not None and p >= n_prompt and token != tokens[p] and sure > settings.tau_edit
                ):
                    after[p], changed = token, True
                    fixed[p] = _logp(lm, logits[p])
            if not was_clean and not gamma:
                gamma = [max((p for p in proposals if tokens[p] == mask_id), key=lambda p: proposals[p][1])]
            for p in gamma:
                after[p] = proposals[p][0]
                fixed[p] = _logp(lm, logits[p])
            tokens = after
            post_steps += was_clean
            if mask_id not in tokens and (
                settings.tau_edit is None or post_steps >= settings.max_post_steps or (was_clean and not changed)
            ):
                break
        new = tokens[n_prompt:][: settings.max_new_tokens]
        if eos in new or len(new) == settings.max_new_tokens:
            new = new[: new.index(eos) + 1] if eos in new else new
            return Decoded(new, passes, [fixed[n_prompt + i] for i in range(len(new))])
        block += 1


def _logp(lm: DiffusionLM, logits: torch.Tensor) -> torch.Tensor:
    scores = logits[: lm.vocab_size].float()
    scores[lm.mask_token_id] = -torch.inf
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
    scores = logits.float()
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
