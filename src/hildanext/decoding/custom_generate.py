"""EXACT decoding inside transformers' `generate`: `base.generate(**inputs, custom_generate=exact(adapter))`.

`generate` prepares the prompt, the logits processors and the stopping criteria, as for its own loop. Here they decide
about each token in order, along the accepted drafts only. So whatever they do, the tokens are those of `generate`:
greedy, and sampled too, for the random numbers are drawn as `torch.multinomial` draws them in that loop.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from hildanext.config import DecodeConfig, parse_config
from hildanext.config.names import decode_settings
from hildanext.decoding.drafter import GroupDrafter, fresh_chances
from hildanext.decoding.events import Stats
from hildanext.decoding.exact import ExactSequence
from hildanext.decoding.generate_rules import Rules
from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.scheduler import Scheduler
from hildanext.decoding.settings import Settings, read_presets, resolve
from hildanext.decoding.span import Vocabulary
from hildanext.errors import HildaError, UsageError
from hildanext.model.backbone import length_limit
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import GatedAdapter, beside, load_gated_adapter

PREFILL_CHUNK = 512  # prompt tokens of a forward
NEVER = -2  # no token, and not NO_CHOICE: stands behind the last choice, so that no draft equals it
# What `generate` hands over and this loop makes for itself, or does not need.
KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def exact(adapter: str | Path, *, rows: int | None = None, lookup: int | None = None) -> Exact:
    """The `custom_generate` that drafts with a gated adapter and verifies with the model that it is given to.

    adapter: the folder of a gated adapter, 'hilda-smollm2-135m' or a name on the hub. rows, lookup: `decode.rows` and
    `decode.lookup`. The model may have other weights than those the adapter was trained on: the text is the model's
    all the same, with fewer drafts right. Raises UsageError for a model without a gated adapter and for a bad setting.
    """
    found = load_gated_adapter(str(adapter))
    given = {"rows": "preset" if rows is None else rows, "lookup": lookup, "mode": "EXACT"}
    decode: DecodeConfig = parse_config({"decode": decode_settings(given)}, "exact").decode
    return Exact(found, resolve(decode, found.block_size, read_presets(found.modes), "gated"))


class Exact:
    """What `exact` returns: `generate` calls it. `stats` has the cost of each row of the last call.

    It keeps no weights of a model, but the adapter beside those of each model it has seen, as long as that model lives.
    The model itself is not changed. Calls from several threads wait for each other.
    """

    def __init__(self, adapter: GatedAdapter, settings: Settings) -> None:
        self.adapter, self.settings = adapter, settings
        self.stats: list[Stats] = []
        self._lock = threading.Lock()
        self._beside: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list[Any], DiffusionLM]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """input_ids [B, L], padded on the left -> the same ids and the new ones [B, L + N], as `generate` returns them.

        With `return_dict_in_generate` the scores and logits of a row that has ended are 0. Raises UsageError for a
        feature of `generate` that EXACT decoding does not have, ModelError when the adapter does not fit the model.
        """
        if streamer is None:
            streamer = _passed_streamer()
        prompts = _prompts(model, input_ids, generation_config, model_kwargs)
        with self._lock:
            lm = self._lm(model)
            rules = Rules(input_ids, logits_processor, stopping_criteria, generation_config)
            sequences = self._sequences(lm, prompts, rules, generation_config)
            _decode(lm, sequences, rules, streamer)
            self.stats = [sequence.stats() for sequence in sequences]
        return rules.output()

    def _lm(self, model: PreTrainedModel) -> DiffusionLM:
        """The adapter beside a model. It is put there again if the model's tensors are other ones, or were moved."""
        now = [(tensor, tensor.device, tensor.dtype) for tensor in (*model.parameters(), *model.buffers())]
        if model in self._beside:
            before, lm = self._beside[model]
            same = len(now) == len(before) and all(
                a[0] is b[0] and a[1:] == b[1:] for a, b in zip(now, before, strict=True)
            )
            if same:
                return lm
        lm = beside(model, self.adapter)
        self._beside[model] = (now, lm)
        return lm

    def _sequences(
        self, lm: DiffusionLM, prompts: list[list[int]], rules: Rules, config: GenerationConfig
    ) -> list[Row]:
        n_new = cast(int, config.max_length) - rules.n_prompt
        settings = self.settings._replace(
            max_new_tokens=n_new,
            temperature=(1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0,
            top_k=config.top_k or None,
            top_p=1.0 if config.top_p is None else config.top_p,
        )
        longest, limit = max(map(len, prompts)) + n_new, length_limit(lm.model)
        if limit is not None and longest > limit.length:
            raise UsageError(
                f"prompt and new tokens need {longest} positions, but {lm.model.config.model_type} {limit.reason}; lower "
                "max_new_tokens"
            )
        drafter = GroupDrafter(lm, fresh_chances(lm))
        vocabulary = Vocabulary(lm.vocab_size, lm.mask_token_id, (), shifted=True, gated=True)
        return [Row(prompt, settings, vocabulary, drafter, rules, row) for row, prompt in enumerate(prompts)]


class Row(ExactSequence):
    """A row of the batch. The rules of `generate` choose and end; drafts and passes are those of EXACT decoding."""

    def __init__(
        self,
        prompt_ids: list[int],
        settings: Settings,
        vocabulary: Vocabulary,
        drafter: GroupDrafter,
        rules: Rules,
        row: int,
    ) -> None:
        super().__init__(prompt_ids, settings, vocabulary, lambda ids: "", drafter)
        self.rules, self.row = rules, row

    def _choices(self, logits: Tensor, drafts: list[int]) -> tuple[list[int], list[float]]:
        """The choices along the accepted drafts, then NEVER: no rule sees a text that is not accepted."""
        choices: list[int] = []
        for depth in range(len(logits)):
            choices.append(self.rules.choose(self.row, logits[depth]))
            if self.rules.ended[self.row] or depth == len(drafts) or choices[-1] != drafts[depth]:
                break
        return choices + [NEVER] * (len(logits) - len(choices)), [1.0] * len(drafts)

    def _append(self, new: list[int]) -> int:
        """Add what the rules have chosen. `new` may have NEVER behind it."""
        new = self.rules.new[self.row][len(self.tokens) - self.n_prompt :]
        self.tokens += new
        if self.lookup:
            self.lookup.extend(new)
        if self.rules.ended[self.row]:
            self.finish_reason = "stop"
        return len(new)

    def _noise(self, positions: range) -> Tensor | None:
        """Gumbel noise [n, V] of text positions from the numbers that `generate` draws there; None if greedy."""
        if self.settings.temperature == 0:
            return None
        n_ids = next(iter(self.rules.noise.values())).shape[1]
        drawn = [self.rules.draw(position - self.n_prompt, n_ids)[self.row] for position in positions]
        return -torch.stack(drawn).clamp(min=torch.finfo(torch.float32).tiny).log()


def _decode(lm: DiffusionLM, sequences: list[Row], rules: Rules, streamer: BaseStreamer | None) -> None:
    """Run all rows side by side to their ends. Tokens go to the streamer when every row has them."""
    longest = max(sequence.n_prompt + sequence.settings.max_new_tokens for sequence in sequences)
    runtime = EagerRuntime(lm.model)
    rows = sequences[0].settings.rows
    scheduler = Scheduler(runtime, len(sequences), longest, PREFILL_CHUNK, scratch=rows)
    n_sent = 0
    try:
        for sequence in sequences:
            scheduler.submit(sequence)
        while not scheduler.is_idle:
            for _, event in scheduler.step():
                if isinstance(event, HildaError):
                    raise event
            rules.forget_noise()
            for step in range(n_sent, rules.n_common):
                if streamer is not None:
                    streamer.put(torch.tensor(rules.column(step)))
            n_sent = rules.n_common
    finally:
        runtime.close()
        rules.rewind()
    if streamer is not None:
        streamer.end()


def _prompts(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> list[list[int]]:
    """The prompts without their padding. Raises UsageError for what EXACT decoding does not have."""
    _refuse(model, config, model_kwargs)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
    if input_ids.shape[1] == 0 or bool((mask[:, -1] == 0).any()) or bool((mask.diff(dim=1) < 0).any()):
        raise UsageError("'attention_mask': each prompt needs a token, and padding on the left (padding_side='left')")
    positions, given = (mask.long().cumsum(1) - 1).clamp(min=0), model_kwargs.get("position_ids")
    if given is not None and not torch.equal((given * mask).cpu(), (positions * mask).cpu()):
        raise UsageError("'position_ids': only those that follow from the attention mask are supported; leave them out")
    return [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]


def _refuse(model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise UsageError for a feature of `generate` that EXACT decoding does not have."""
    mode = config.get_generation_mode()
    unsupported = {
        f"the generation mode '{mode.value}'": mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "an encoder": bool(model.config.is_encoder_decoder),
        "guidance_scale": config.guidance_scale not in (None, 1),
        "watermarking_config": config.watermarking_config is not None,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
    }
    unsupported |= {f"'{key}'": value is not None for key, value in model_kwargs.items() if key not in KNOWN}
    cache = model_kwargs.get("past_key_values")
    unsupported["a filled past_key_values"] = cache is not None and cache.get_seq_length() > 0
    for name in (name for name, is_used in unsupported.items() if is_used):
        raise UsageError(
            f"custom_generate=hildanext.exact(...) does not support {name}; it decodes greedily or samples, without beams"
        )


def _passed_streamer() -> BaseStreamer | None:
    """The streamer of the call of `generate` above.

    transformers 5 hands a callable no streamer, though it has put the prompt into it: its reader would wait for ever.
    """
    own = inspect.currentframe()
    caller = None if own is None or own.f_back is None else own.f_back.f_back  # of `Exact.__call__`
    if caller is None or caller.f_code.co_name != "generate":
        return None
    found = caller.f_locals.get("streamer")
    return found if isinstance(found, BaseStreamer) else None
