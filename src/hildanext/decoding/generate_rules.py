"""What decides about each token in a call of transformers' `generate`: processors, criteria and random numbers.

They are asked for one row and one token at a time, in the order of the text, as the loop of `generate` asks them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, PrefixConstrainedLogitsProcessor

from hildanext.errors import NonFiniteLogitsError, UsageError

# Processors that keep something for each row of the batch, or are told the row's number.
BY_ROW = (RepetitionPenaltyLogitsProcessor, PrefixConstrainedLogitsProcessor)


class Rules:
    """What decides about the tokens of a call, and the tokens so far: processors, criteria and random numbers."""

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        self.prompts, self.processors, self.criteria, self.config = input_ids, processors, criteria, config
        self.n_rows, self.n_prompt = input_ids.shape
        self.new: list[list[int]] = [[] for _ in range(self.n_rows)]  # of each row
        self.ended = [False] * self.n_rows
        self.scores: list[list[Tensor]] = [[] for _ in range(self.n_rows)]  # [V] of each new token, if they are kept
        self.logits: list[list[Tensor]] = [[] for _ in range(self.n_rows)]
        self.noise: dict[int, Tensor] = {}  # step -> Exp(1) numbers [B, V]
        self.states: list[Tensor] = []  # the generator's state after each step's numbers
        pad = cast(Tensor | None, config._pad_token_tensor)
        self.pad = None if pad is None else int(pad)

    def choose(self, row: int, logits: Tensor) -> int:
        """The next token of a row from its logits [V]: processed, chosen and appended as in `generate`'s own loop."""
        new, step = self.new[row], len(self.new[row])
        ids = torch.cat([self.prompts[row], torch.tensor(new, dtype=torch.long, device=self.prompts.device)])[None]
        raw = logits.to(self.prompts.device, torch.float32, copy=True)[None]
        scores = raw
        for processor in self.processors:
            n = self._places(processor)
            found = processor(cast(Any, ids.repeat(n, 1)), cast(Any, scores.repeat(n, 1)))
            scores = found[min(row, n - 1), None]
        if bool(scores.amax().isnan()):
            raise NonFiniteLogitsError(f"generate, new token {step + 1}")
        if self.config.return_dict_in_generate and self.config.output_scores:
            self.scores[row].append(scores[0])
        if self.config.return_dict_in_generate and self.config.output_logits:
            self.logits[row].append(raw[0])
        if self.config.do_sample:
            token = int((scores[0].softmax(-1) / self.draw(step, len(logits))[row]).argmax())
        else:
            token = int(scores[0].argmax())
        new.append(token)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
        self.ended[row] = self._has_ended(row, ids)
        return token

    def _has_ended(self, row: int, ids: Tensor) -> bool:
        """Whether a criterion ends a row. As in `generate`, criteria see the scores only if these are kept."""
        kept = tuple(scores[None] for scores in self.scores[row]) or None
        for criterion in self.criteria:
            n = self._places(criterion)
            repeated = None if kept is None else tuple(scores.repeat(n, 1) for scores in kept)
            found = torch.as_tensor(criterion(cast(Any, ids.repeat(n, 1)), cast(Any, repeated))).reshape(-1)
            if bool(found[min(row, len(found) - 1)]):
                return True
        return False

    def _places(self, rule: object) -> int:
        """Rows that a rule gets: 1, or all with the row in every place for a rule that may know the rows by number."""
        alone = type(rule).__module__.startswith("transformers.") and not isinstance(rule, BY_ROW)
        return 1 if alone else self.n_rows

    def draw(self, step: int, n_ids: int) -> Tensor:
        """Numbers q [B, V] of a step: torch.multinomial takes argmax p / q with q ~ Exp(1). Drawn in the order of steps."""
        while len(self.states) <= step:
            device = self.prompts.device
            self.noise[len(self.states)] = torch.empty(self.n_rows, n_ids, device=device).exponential_()
            self.states.append(_generator(device).get_state())
        return self.noise[step]

    def forget_noise(self) -> None:
        """Drop the numbers that every row has used."""
        first = min((len(new) for new, ended in zip(self.new, self.ended, strict=True) if not ended), default=0)
        for step in [step for step in self.noise if step < first]:
            del self.noise[step]

    def rewind(self) -> None:
        """Set the generator as `generate` leaves it: drafts have drawn numbers of steps that were never reached."""
        if self.states:
            _generator(self.prompts.device).set_state(self.states[max(map(len, self.new)) - 1])

    @property
    def n_common(self) -> int:
        """New tokens that every row has, where an ended row is padded."""
        unfinished = [len(new) for new, ended in zip(self.new, self.ended, strict=True) if not ended]
        return min(unfinished, default=max(map(len, self.new)))

    def column(self, step: int) -> list[int]:
        """The tokens [B] of a step."""
        return [new[step] if step < len(new) else self.fill for new in self.new]

    @property
    def fill(self) -> int:
        if self.pad is None:
            raise UsageError("rows of the batch end at different lengths; set pad_token_id")
        return self.pad

    def output(self) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns."""
        n_new = max(map(len, self.new))
        columns = [self.column(step) for step in range(n_new)]
        new = torch.tensor(columns, dtype=torch.long, device=self.prompts.device).T
        sequences = torch.cat([self.prompts, new], dim=1)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=cast(Any, sequences),
            scores=self._by_step(self.scores, n_new),
            logits=self._by_step(self.logits, n_new),
        )

    def _by_step(self, kept: list[list[Tensor]], n_new: int) -> Any:
        """Tensors [B, V] of each step; None if none were kept."""
        if not kept[0]:
            return None
        empty = torch.zeros_like(kept[0][0])
        return tuple(torch.stack([row[i] if i < len(row) else empty for row in kept]) for i in range(n_new))


def _generator(device: torch.device) -> torch.Generator:
    """torch's own generator of a device, which `torch.manual_seed` seeds."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
