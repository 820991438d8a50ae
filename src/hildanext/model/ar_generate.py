"""The autoregressive side: exact likelihood of the base model, its training from scratch (demo), its completions.

It is what the diffusion model is measured against, on the same packed rows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hildanext.model.text_stream import TextStream


class ArCompletion(NamedTuple):
    """Text of the AR model and what it cost."""

    text: str
    token_ids: list[int]
    seconds: float
    ended: bool  # by an end-of-text token or a stop string, not by the budget


class _StopAt(StoppingCriteria):
    """Ends a row whose new text holds a stop string. transformers' own also finds those that begin in the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_prompt: int, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.n_prompt, self.stop = tokenizer, n_prompt, stop
        self.window = 2 * max(map(len, stop))  # tokens at the end that can hold one that is new; bytes may be tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        ends = input_ids[:, max(self.n_prompt, input_ids.shape[1] - self.window) :].tolist()
        texts = [str(self.tokenizer.decode(end, skip_special_tokens=True)) for end in ends]
        found = [any(stop in text for stop in self.stop) for text in texts]
        return cast(torch.BoolTensor, torch.tensor(found, device=input_ids.device))


@contextlib.contextmanager
def _generation(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` by this configuration only: what a caller leaves open it takes from the model's file (generation_config.json),
    such as penalties and samplers, which greedy text and the model's own distribution know nothing of."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def ar_complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], max_new_tokens: int
) -> ArCompletion:
    """Greedy completion by transformers' own `generate` (with its KV cache), batch of one."""
    return ar_complete_batch(model, tokenizer, [prompt_ids], max_new_tokens)[0]


@torch.no_grad()
def ar_complete_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    stop: tuple[str, ...] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> list[ArCompletion]:
    """Completions by transformers' own `generate`, side by side (padded on the left); each has its part of the seconds.

    Text and tokens end before the first of the `stop` strings. Temperature 0 is greedy; else the draws depend on the
    seed and on who is in the batch.
    """
    eos, longest = tokenizer.eos_token_id, max(map(len, prompts))
    ids = torch.full((len(prompts), longest), eos, device=model.device)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        seen[row, longest - len(prompt) :] = 1
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    plain = GenerationConfig(max_new_tokens=max_new_tokens, top_k=0, pad_token_id=eos, eos_token_id=eos, **how)
    criteria = StoppingCriteriaList([_StopAt(tokenizer, longest, stop)] if stop else [])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _generation(model, plain):
        torch.manual_seed(seed)
        began = time.perf_counter()
        output = cast(Any, model).generate(ids, attention_mask=seen, stopping_criteria=criteria)
        seconds = (time.perf_counter() - began) / len(prompts)
    found = []
    for new in output[:, longest:].tolist():
        new = new[: new.index(eos) + 1] if eos in new else new  # the rest is padding
        text = TextStream(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), stop)
        text.push(new, last=True)
        ended = text.stopped or new[-1:] == [eos]
        found.append(ArCompletion(text.text, text.token_ids, seconds, ended))
    return found
