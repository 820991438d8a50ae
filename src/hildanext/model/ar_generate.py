"""Completions by the autoregressive base, which the diffusion model is compared with and can learn from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hildanext.errors import NonFiniteLogitsError
from hildanext.model.diffusion_lm import special_ids
from hildanext.model.prompts import end_ids
from hildanext.model.text_stream import MOST_MISSING, REPLACEMENT, TextStream


class ArCompletion(NamedTuple):
    """A completion by the AR model."""

    text: str
    token_ids: list[int]
    seconds: float  # the batch's time divided by its size
    ended: bool  # by an end-of-text token or a stop string; False when the token budget ended it


class _StopAt(StoppingCriteria):
    """Ends a row when its new text contains a stop string.

    The criterion of transformers would also match strings that begin in the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_prompt: int, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.n_prompt, self.stop = tokenizer, n_prompt, stop
        self.special = special_ids(tokenizer)
        # A token has at least one byte of text, unless it is special. The first may end in a character cut before it.
        self.window = max(len(string.encode()) for string in stop) + MOST_MISSING

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        rows = input_ids[:, self.n_prompt :].tolist()
        texts = [self._end([i for i in row if i not in self.special][-self.window :]) for row in rows]
        found = [any(stop in text for stop in self.stop) for text in texts]
        return cast(torch.BoolTensor, torch.tensor(found, device=input_ids.device))

    def _end(self, ids: list[int]) -> str:
        """The text of a row's last tokens, without the rest of a character at its beginning, which can hide the others."""
        for start in range(MOST_MISSING + 1):
            text = str(self.tokenizer.decode(ids[start:]))
            if not text.startswith(REPLACEMENT):
                break
        return text


class _Finite(LogitsProcessor):
    """Raises NonFiniteLogitsError. `generate` would take token 0 again and again."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.amax(-1).isfinite().all():  # a maximum is NaN if any value is
            raise NonFiniteLogitsError("AR base")
        return scores


@contextlib.contextmanager
def _generation(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Make `generate` use `config` alone within the block.

    Otherwise it fills unset values, such as penalties and sampling settings, from the model's generation_config.json.
    """
    original, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = original


def ar_complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], max_new_tokens: int
) -> ArCompletion:
    """Greedy completion of one prompt, see `ar_complete_batch`."""
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
    """Completions by `generate` of transformers, as one batch padded on the left, with a KV cache.

    Text and tokens end before the first stop string, and with the first of `end_ids`. Temperature 0 is greedy decoding.
    Otherwise the sampled tokens depend on the seed and on the other prompts in the batch. Raises NonFiniteLogitsError.
    """
    ends, longest = end_ids(tokenizer, model.generation_config.eos_token_id), max(map(len, prompts))
    ids = torch.full((len(prompts), longest), ends[0], device=model.device)
    attention_mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    stops = {"pad_token_id": ends[0], "eos_token_id": [*ends]}
    plain = GenerationConfig(max_new_tokens=max_new_tokens, top_k=0, **stops, **sampling)
    criteria = StoppingCriteriaList([_StopAt(tokenizer, longest, stop)] if stop else [])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _generation(model, plain):
        torch.manual_seed(seed)
        began = time.perf_counter()
        output = cast(Any, model).generate(
            ids,
            attention_mask=attention_mask,
            stopping_criteria=criteria,
            logits_processor=LogitsProcessorList([_Finite()]),
        )
        seconds = (time.perf_counter() - began) / len(prompts)
    completions = []
    for new in output[:, longest:].tolist():
        length = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))  # the rest is padding
        new = new[:length]
        text = TextStream(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), stop)
        text.push(new, last=True)
        ended = text.stopped or new[-1] in ends
        completions.append(ArCompletion(text.text, text.token_ids, seconds, ended))
    return completions
