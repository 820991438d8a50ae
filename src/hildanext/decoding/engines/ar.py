"""The AR base of a converted checkpoint, decoded one token per forward: the baseline of the diffusion model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NoReturn

import torch
from transformers import DynamicCache

from hildanext.config import Config, ModelConfig
from hildanext.data.tokenizer import token_ids
from hildanext.decoding.engines.protocol import (
    AS_USUAL,
    Completion,
    Event,
    Prompt,
    Rendering,
    Request,
    Stats,
    last_completion,
    refuse_grammar,
)
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.grammar import Grammar
from hildanext.decoding.memory import return_freed_memory
from hildanext.decoding.settings import MODES_OF, Settings, check_request, resolve
from hildanext.errors import NonFiniteLogitsError, UsageError
from hildanext.model.backbone import max_positions, n_embeddings
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import base_of, load_causal_lm, locate, read_record
from hildanext.model.prompts import decode_prompt, encode_prompt, end_ids
from hildanext.model.text_stream import TextStream


def converted_from(config: ModelConfig) -> ModelConfig:
    """The base of a converted checkpoint. Raises UsageError if the model is not a converted checkpoint."""
    record = read_record(config)
    if record is None:
        raise UsageError(f"'{config.base}' is not a converted checkpoint")
    return base_of(config, record)


class ArEngine:
    """Greedy decoding of one request at a time with transformers' own cache. A block is one token."""

    name = "ar"
    modes = MODES_OF["blocks"]
    has_base = False
    trained_block: int | None = 1
    slots = 1
    mask_token_id: int | None = None

    def __init__(self, config: Config, reasons: dict[str, str], threads: int | None = None) -> None:
        base = converted_from(config.model)
        if threads is not None:
            torch.set_num_threads(threads)  # for the calling thread only
        self.reasons, self.base = reasons, base.base
        policy = choose_policy(base.device, base.dtype)
        self.model, self.tokenizer = load_causal_lm(base, policy, policy.compute)
        self.eos_token_ids = end_ids(self.tokenizer, self.model.generation_config.eos_token_id)
        self.n_ids = token_ids(self.tokenizer)[-1] + 1
        self.model.eval()
        self.context = max_positions(self.model)
        self.device: str | None = str(self.model.device)
        self.dtype: str | None = str(self.model.dtype).removeprefix("torch.")
        self.policy: dict[str, object] | None = policy.as_dict()

    @staticmethod
    def can_serve(config: Config) -> str | None:
        try:
            locate(converted_from(config.model).base)
        except UsageError as error:
            return str(error)
        return None

    def encode(self, prompt: Prompt, known: list[int] | None = None, rendering: Rendering = AS_USUAL) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, known, **rendering._asdict())

    def settings(self, config: Config) -> Settings:
        return resolve(config.decode, 1)._replace(block_size=1, tau_mask=0.0, tau_edit=None, temperature=0.0)

    def compile(self, grammar: Grammar) -> NoReturn:
        refuse_grammar(self.name)

    def decode_tokens(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def detokenize(self, token_ids: list[int]) -> str:
        return decode_prompt(self.tokenizer, token_ids)

    def generate(self, request: Request) -> Completion:
        return last_completion(self.stream(request))

    @torch.inference_mode()
    def _next(self, ids: list[int], cache: DynamicCache) -> tuple[int, float]:
        """The most likely token after the cached tokens and `ids`, and its probability. Caches `ids`.

        Raises NonFiniteLogitsError.
        """
        hidden = self.model.base_model(
            input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache, use_cache=True
        ).last_hidden_state
        scores = self.model.get_output_embeddings()(hidden[0, -1]).float()[: self.n_ids]
        confidence, token = scores.softmax(-1).max(-1)
        if confidence.isnan():
            raise NonFiniteLogitsError(f"AR base '{self.base}'")
        return int(token), float(confidence)

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield a Step and a Finished for each token, then the Completion.

        Raises UsageError for an empty prompt, ContextError for one that exceeds the context, NonFiniteLogitsError.
        """
        settings, prompt_ids = request.settings, request.prompt_ids
        check_request(prompt_ids, settings, self.context)
        if max(prompt_ids) >= n_embeddings(self.model):
            raise UsageError(
                f"'{self.base}' has no embedding for the token id {max(prompt_ids)} of the prompt; remove it"
            )
        began = time.perf_counter()
        cache = DynamicCache(config=self.model.config)
        text = TextStream(self.decode_tokens, settings.stop)
        ids, finish_reason, forwards = prompt_ids, None, 0
        while finish_reason is None:
            token, confidence = self._next(ids, cache)
            ids, position = [token], len(prompt_ids) + forwards
            yield Step(position, 0, ids, [0], [], [confidence], 1.0, position)
            forwards += 1
            last = token in self.eos_token_ids or forwards == settings.max_new_tokens
            piece = text.push(ids, last)
            if token in self.eos_token_ids or text.stopped:
                finish_reason = "stop"
            elif last:
                finish_reason = "length"
            yield Finished(position, ids, piece)
        seconds, n_tokens = time.perf_counter() - began, len(text.token_ids)
        yield Completion(
            text=text.text,
            token_ids=text.token_ids,
            finish_reason=finish_reason,
            engine=self.name,
            engine_reasons=self.reasons,
            mode="AR",
            tau_mask=settings.tau_mask,
            tau_edit=settings.tau_edit,
            stats=Stats(forwards, 0, n_tokens / forwards, [1.0] * forwards, forwards, 0, seconds, n_tokens / seconds),
        )

    def rest(self) -> None:
        return_freed_memory()

    def close(self) -> None:
        """Nothing to close."""
