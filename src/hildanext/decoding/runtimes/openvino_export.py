"""A model as OpenVINO's exporter sees it: it traces transformers' own forward.

The attention and the cache of the graph are passed through transformers' public interfaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._recursive import concrete_type_store
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hildanext.errors import ModelError
from hildanext.model.decoding_attention import EXTRAS
from hildanext.model.gated_linear import find_gate

Parts = tuple[Tensor, Tensor]  # cached [B, H, K, D] and new [B, H, W, D]


def split_attention(
    module: nn.Module, query: Tensor, key: Parts, value: Parts, mask: Tensor, scaling: float, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention over cached and new keys without concatenating them, which would copy the cache in every forward.

    query [B, Hq, W, D]; key, value: as returned by `SplitCache.update`. The G query heads that share a key head are
    stacked along W, so that keys are not repeated. mask [B, 1, G W, W + K] is additive, with its rows repeated G
    times and the new keys first. Returns [B, W, Hq, D]. Raises ModelError if the model needs an attention feature
    that is missing here.
    """
    if needed := [name for name in EXTRAS if kwargs.get(name) is not None]:
        raise ModelError(
            f"{type(module).__name__} needs '{needed[0]}', which OpenVINO does not support here; use engine.runtime 'eager'"
        )
    (cached_keys, new_keys), (cached_values, new_values) = key, value
    batch, n_heads, width, dim = query.shape
    n_kv = new_keys.shape[1]
    query = query.reshape(batch, n_kv, n_heads // n_kv * width, dim) * scaling
    scores = torch.cat([query @ new_keys.transpose(2, 3), query @ cached_keys.transpose(2, 3)], -1)
    weights = (scores + mask).softmax(-1)
    output = weights[..., :width] @ new_values + weights[..., width:] @ cached_values
    return output.reshape(batch, n_heads, width, dim).transpose(1, 2), None


class SplitCache(Cache):
    """Passes cached and new keys to the attention separately, and collects the new ones."""

    def __init__(self, cached: Sequence[Tensor]) -> None:
        super().__init__(layers=[])
        self.cached = cached  # keys and values of each layer in turn
        self.new: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> Any:
        self.new += [key_states, value_states]
        return (self.cached[2 * layer_idx], key_states), (self.cached[2 * layer_idx + 1], value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Exported(nn.Module):
    """A model's body with tensors as its only inputs and outputs, for the exporter."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.body, self.gate = model.base_model, find_gate(model)

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """rest: the gate [B, W, 1] of a gated model, then cached keys and values of each layer in turn."""
        if self.gate is not None:
            self.gate.rows, *rest = rest  # type: ignore[assignment]
        cache = SplitCache(rest)
        hidden = self.body(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return hidden, *cache.new


@contextlib.contextmanager
def traces_freed() -> Iterator[None]:
    """On exit, free what torch.jit.trace would keep until the process ends: 4 to 7 MB for each layer, mostly call stacks.

    This takes the methods of every module that torch.jit has compiled, so nothing is freed if there was one before.
    """
    is_first = not concrete_type_store.type_store
    try:
        yield
    finally:
        if is_first:
            torch._C._jit_clear_class_registry()
            concrete_type_store.type_store.clear()
            concrete_type_store.methods_compiled.clear()
