"""The reference engine: any model the loader accepts, through transformers, with finished blocks in a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache

from hildanext.chat import encode_prompt
from hildanext.config import Config, EngineName
from hildanext.decode import Finished, Settings, Step, check_request, decode, resolve
from hildanext.engines.protocol import Completion, Event, Request, Stats, last_completion
from hildanext.masks import additive, block_causal_mask
from hildanext.model import DiffusionLM, load_diffusion_lm, read_record
from hildanext.probe import max_positions


class CachedContext:
    """`decode.Context` on a DiffusionLM. A block's scoring pass is also its storing pass when nothing changed after it."""

    def __init__(self, lm: DiffusionLM, prompt_ids: list[int], block_size: int) -> None:
        self.lm, self.shifted = lm, lm.convention == "shifted"
        self.cache = DynamicCache()
        self.forwards = self.prefill_forwards = 0
        self.scored: Tensor | None = None  # block whose keys and values lie at the cache's end, not stored yet
        self.carry: Tensor | None = (
            None  # shifted: logits [1, V] of the last stored token, which predict the next block's first
        )
        self.last: Tensor | None = None
        whole = len(prompt_ids) // block_size * block_size
        if whole:
            positions = torch.arange(whole, device=lm.device)[None]
            mask = block_causal_mask(torch.zeros_like(positions), positions // block_size)
            ids = torch.tensor([prompt_ids[:whole]], device=lm.device)
            self.carry = self._head(self._body(ids, positions, mask)[:, -1:])
            self.prefill_forwards = 1

    def _body(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.lm.model.base_model(
            input_ids=ids,
            attention_mask=additive(mask, self.lm.model.dtype),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.lm.model.get_output_embeddings()(hidden)[0]

    def _forward(self, tokens: Tensor) -> Tensor:
        """Run a block behind the stored ones: it sees them and itself. Returns logits [n, V] as the model gives them."""
        if self.scored is not None:
            self.cache.crop(-len(self.scored))
        past, n = self.cache.get_seq_length(), len(tokens)
        mask = torch.ones(1, n, past + n, dtype=torch.bool, device=tokens.device)
        positions = torch.arange(past, past + n, device=tokens.device)[None]
        logits = self._head(self._body(tokens[None], positions, mask))
        self.forwards += 1
        self.scored, self.last = tokens, logits[-1:]
        return logits

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        logits = self._forward(tokens)
        if not self.shifted:
            return logits
        # Token i is predicted at i-1; a document's first token has no predictor, but it is always the prompt's.
        first = self.carry if self.carry is not None else torch.zeros_like(logits[:1])
        return torch.cat([first, logits[:-1]])

    @torch.inference_mode()
    def store(self, tokens: Tensor) -> None:
        if self.scored is None or not torch.equal(self.scored, tokens):
            self._forward(tokens)
        self.carry, self.scored = self.last, None


class TransformersEngine:
    """Batch of one, block by block."""

    name: EngineName = "transformers"

    def __init__(self, config: Config, reasons: dict[str, str], lm: DiffusionLM | None = None) -> None:
        self.lm = load_diffusion_lm(config.model)[0] if lm is None else lm
        self.lm.model.eval()
        self.reasons = reasons
        self.trained_block = self.lm.block_size
        self.device: str | None = str(self.lm.device)

    @staticmethod
    def can_serve(config: Config) -> str | None:
        if read_record(config.model) is None:
            return f"'{config.model.base}' is not a converted checkpoint; run 'hildanext convert-wsd' first"
        return None

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        return encode_prompt(self.lm.tokenizer, prompt)

    def settings(self, config: Config) -> Settings:
        assert self.lm.block_size is not None
        return resolve(config.decode, self.lm.block_size)

    def decode_tokens(self, token_ids: list[int]) -> str:
        return str(self.lm.tokenizer.decode(token_ids, skip_special_tokens=True))

    def generate(self, request: Request) -> Completion:
        return last_completion(self.stream(request))

    def stream(self, request: Request) -> Iterator[Event]:
        """Steps, finished blocks, then the Completion. Raises UsageError for a prompt that is empty or does not fit."""
        lm, settings = self.lm, request.settings
        check_request(request.prompt_ids, settings, max_positions(lm.model))
        began = time.perf_counter()
        with torch.inference_mode():
            context = CachedContext(lm, request.prompt_ids, settings.block_size)
        token_ids: list[int] = []
        ratios: list[float] = []
        drafts = edits = 0
        events = decode(
            context,
            request.prompt_ids,
            settings,
            mask_token_id=lm.mask_token_id,
            vocab_size=lm.vocab_size,
            eos_token_id=lm.tokenizer.eos_token_id,
            device=lm.device,
        )
        for event in events:
            if isinstance(event, Step):
                ratios.append(event.mask_ratio)
                drafts += len(event.drafted)
                edits += len(event.edited)
            elif isinstance(event, Finished):
                token_ids += event.new_tokens
            yield event
        seconds = time.perf_counter() - began
        n = len(token_ids)
        yield Completion(
            text=self.decode_tokens(token_ids),
            token_ids=token_ids,
            finish_reason="stop" if token_ids[-1:] == [lm.tokenizer.eos_token_id] else "length",
            engine=self.name,
            engine_reasons=self.reasons,
            mode=settings.mode,
            tau_mask=settings.tau_mask,
            tau_edit=settings.tau_edit,
            stats=Stats(
                context.forwards,
                context.prefill_forwards,
                n / context.forwards,
                ratios,
                drafts,
                edits,
                seconds,
                n / seconds,
            ),
        )

    def close(self) -> None:
        """Nothing runs between requests."""
