"""Decoding loops without a cache, one text at a time: from LLaDA2.1's equations, and as SGLang's JointThreshold decides.

Neither shares code with the package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    tau_mask: float
    tau_edit: float | None  # None: no editing
    max_post_steps: int


class Decoded(NamedTuple):
    tokens: list[int]
    margin: float  # how far the closest decision was from another one, in probability


def block_logits(model: Any, tokens: list[int], block: int) -> Tensor:
    """Logits [block, V] of the last block of a text; every token sees its block and those before it."""
    index = torch.arange(len(tokens)) // block
    hidden = index[:, None] < index
    mask = torch.zeros(hidden.shape, dtype=model.dtype).masked_fill(hidden, torch.finfo(model.dtype).min)[None, None]
    with torch.inference_mode():
        logits: Tensor = model(
            torch.tensor([tokens]), attention_mask=mask, position_ids=torch.arange(len(tokens))[None], use_cache=False
        ).logits[0, -block:]
    return logits.clone()


def paper_loop(model: Any, prompt: list[int], settings: Settings, block: int, new: int, mask: int, eos: int) -> Decoded:
    """LLaDA2.1 (arXiv 2602.08676) eq. 1-3 with the mask token and everything after it left out of p."""
    tokens, margin = list(prompt), 1.0
    while len(tokens) < len(prompt) + new and eos not in tokens[len(prompt) :]:
        tokens += [mask] * (block - len(tokens) % block)
        start, post = len(tokens) - block, 0
        while True:
            p = block_logits(model, tokens, block)[:, :mask].softmax(-1)
            best = p.topk(2)
            masked = [i for i in range(block) if tokens[start + i] == mask]
            written = [i for i in range(block) if start + i >= len(prompt) and i not in masked]
            if not masked and (settings.tau_edit is None or post == settings.max_post_steps):
                break
            post += not masked
            gamma = [i for i in masked if best.values[i, 0] > settings.tau_mask]
            sure = sorted((best.values[i, 0].item() for i in masked), reverse=True)
            if masked and not gamma:
                gamma = [max(masked, key=lambda i: best.values[i, 0].item())]
                margin = min(margin, sure[0] - sure[1] if len(sure) > 1 else 1.0)
            delta = []
            if settings.tau_edit is not None:
                changed = [i for i in written if best.indices[i, 0] != tokens[start + i]]
                delta = [i for i in changed if best.values[i, 0] > settings.tau_edit]
                margin = min([margin, *(abs(best.values[i, 0].item() - settings.tau_edit) for i in changed)])
            margin = min([margin, *(abs(value - settings.tau_mask) for value in sure)])
            decided = masked + (written if settings.tau_edit is not None else [])
            margin = min([margin, *((best.values[i, 0] - best.values[i, 1]).item() for i in decided)])
            for i in (*gamma, *delta):
                tokens[start + i] = int(best.indices[i, 0])
            if not masked and not delta:
                break
    return Decoded(cut(tokens[len(prompt) :], new, eos), margin)


def served_loop(
    model: Any, prompt: list[int], settings: Settings, block: int, new: int, mask: int, eos: int
) -> list[int]:
    """As SGLang's JointThreshold decides: all logits count, and a threshold of 0 takes every change.

    It counts a pass without masks before it looks at its budget, and stops on the pass after the last one it may edit in.
    No block takes more than block + most + 1 passes, also where the mask token is the likeliest.
    """
    edit, most = (1.0, 0) if settings.tau_edit is None else (settings.tau_edit, settings.max_post_steps)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new and eos not in tokens[len(prompt) :]:
        tokens += [mask] * (block - len(tokens) % block)
        start, post = len(tokens) - block, 0
        prompt_part = [token != mask for token in tokens[start:]]
        for _ in range(block + most + 1):
            probability, choice = block_logits(model, tokens, block).softmax(-1).max(-1)
            masked = torch.tensor([token == mask for token in tokens[start:]])
            fill = masked & (probability > settings.tau_mask)
            if masked.any():
                if not fill.any():
                    fill[torch.where(masked, probability, -1.0).argmax()] = True
            else:
                post += 1
                if post > most:
                    break
            current = torch.tensor(tokens[start:])
            change = (probability > edit) & (choice != current) & ~masked & ~torch.tensor(prompt_part)
            if not (fill | change).any():
                break
            tokens[start:] = torch.where(fill | change, choice, current).tolist()
    return cut(tokens[len(prompt) :], new, eos)


def cut(tokens: list[int], new: int, eos: int) -> list[int]:
    """The completion: at most `new` tokens, up to and with the end of text."""
    tokens = tokens[:new]
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
