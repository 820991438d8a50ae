"""For decode.py: the other ways to run the same weights."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.runtimes.protocol import ForwardBatch
from hildanext.decoding.sequence import Sequence
from hildanext.decoding.settings import Settings
from hildanext.decoding.span import Span
from hildanext.diffusion.masks import additive, block_causal_mask
from hildanext.model.decoding_attention import use_grouped_attention
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.pretrained import locate

Shape = tuple[int, int, int]  # B, W, K of a forward


class SeparateCaching(Sequence):
    """Caches a finished block in a forward of its own, as in the loops of SDAR and LLaDA2."""

    def next_span(self, chunk: int) -> Span:
        span = super().next_span(chunk)
        n = self.window - self.num_cached_tokens
        if span.wanted and n > 0:
            return Span(span.start, span.tokens[:n], span.visible[:n], [])
        return span


class AsDiffusersExpects(nn.Module):
    """A stock causal LM with the interface of LLaDA2 models. It builds the block-causal mask itself."""

    def __init__(self, lm: DiffusionLM, block: int) -> None:
        super().__init__()
        self.model, self.mask_id, self.block = lm.model, lm.mask_token_id, block
        self.config, self.vocab = lm.model.config, lm.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, ids: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor) -> Any:
        mask = block_causal_mask(torch.zeros_like(ids), position_ids // self.block)
        output = self.model(ids, attention_mask=additive(mask, self.dtype), position_ids=position_ids, use_cache=False)
        output.logits[..., self.mask_id] = -torch.inf
        output.logits[..., self.vocab :] = -torch.inf
        return output


def diffusers_tokens(lm: DiffusionLM, prompt: list[int], wanted: Settings) -> list[int]:
    """Greedy tokens of diffusers' LLaDA2Pipeline with the same thresholds."""
    import diffusers

    model = AsDiffusersExpects(lm, wanted.block_size)
    pipe = diffusers.LLaDA2Pipeline(model=model, scheduler=diffusers.BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    sequences, _ = pipe(
        input_ids=torch.tensor([prompt]),
        use_chat_template=False,
        gen_length=wanted.max_new_tokens,
        block_length=wanted.block_size,
        num_inference_steps=2 * wanted.block_size,
        temperature=0.0,
        sampling_method="greedy",
        threshold=wanted.tau_mask,
        editing_threshold=wanted.tau_edit,
        max_post_steps=wanted.max_post_steps - 1,  # the pipeline makes one more
        eos_early_stop=False,
        mask_token_id=lm.mask_token_id,
        output_type="seq",
        return_dict=False,
    )
    return sequences[0].tolist()


def recorded_shapes(engine: TransformersEngine, call: Callable[[], Any]) -> tuple[list[Shape], float]:
    """The shapes of all forwards in a call, and the call's seconds."""
    shapes: list[Shape] = []
    real = engine.runtime.body

    def body(batch: ForwardBatch) -> torch.Tensor:
        shapes.append((*batch.ids.shape, batch.length))  # type: ignore[arg-type]
        return real(batch)

    engine.scheduler.runtime.body = body  # type: ignore[method-assign]
    try:
        began = time.perf_counter()
        call()
        return shapes, time.perf_counter() - began
    finally:
        engine.scheduler.runtime.body = real  # type: ignore[method-assign]


@torch.inference_mode()
def bare_forwards(model: PreTrainedModel, shapes: list[Shape]) -> float:
    """Seconds of transformers' own forwards of these shapes, with its DynamicCache and logits at all W positions."""
    total = 0.0
    model.set_attn_implementation("sdpa")  # transformers' default
    for (n, width, length), count in Counter(shapes).items():
        past = length - width
        cache = DynamicCache()
        if past:
            model(torch.randint(5, 500, (n, past)), past_key_values=cache)
        ids = torch.randint(5, 500, (n, width))
        mask = torch.zeros(n, 1, width, length, dtype=model.dtype)
        positions = torch.arange(past, length)[None].expand(n, -1)
        for run in range(count + 2):
            began = time.perf_counter()
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            total += time.perf_counter() - began if run >= 2 else 0.0  # the first two are warm-up
            cache.crop(-width)
    use_grouped_attention(model)
    return total


@torch.inference_mode()
def ar_rate(model: PreTrainedModel, prompt: list[int], new: int) -> float:
    """Tokens per second of transformers' greedy `generate`, without the prompt and its first token; median of three."""
    ids = torch.tensor([prompt])

    def spent(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    return statistics.median((new - 1) / (spent(new) - spent(1)) for _ in range(3))


def llama_cpp_rate(prompt: list[int], new: int) -> float | None:
    """Tokens per second of llama.cpp on the Q4_1 file, greedy AR, without the prompt. None if it is not installed.

    The prompt is evaluated token by token: some builds crash on AMX CPUs if it is evaluated at once.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    from llama_cpp import Llama

    folder, file = locate("smollm2-135m")
    threads = torch.get_num_threads() if torch.get_num_threads() > 1 else 2
    llama = Llama(str(Path(folder) / str(file)), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    rates = []
    for _ in range(3):
        llama.reset()
        for token in prompt:
            llama.eval([token])
        began = time.perf_counter()
        for token in range(new):
            llama.eval([1000 + token])
        rates.append(new / (time.perf_counter() - began))
    llama.close()
    return statistics.median(rates)
