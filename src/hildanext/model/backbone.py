"""Parts of a stock causal LM: its hidden states, weight matrices, positions and embedding rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from hildanext.errors import ModelError


def body(model: PreTrainedModel, **inputs: object) -> Tensor:
    """Run the model without its head and return the hidden states [B, L, H]. No [B, L, V] logits are allocated."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of an embedding or a head, [V, H]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def n_embeddings(model: PreTrainedModel) -> int:
    """Rows of the input embedding. The vocabulary may be padded beyond the tokenizer's ids."""
    return weight_matrix(model.get_input_embeddings()).shape[0]


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest row that the model has positions for, or None without such a limit."""
    # transformers maps other names, such as GPT-2's `n_positions`, to this attribute.
    config = model.config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None


class Limit(NamedTuple):
    """The longest text that a model runs exactly, and what ends it there."""

    length: int  # tokens
    reason: str  # follows the model's type, as in "gemma3_text has a sliding window of 512, ..."


def length_limit(model: PreTrainedModel) -> Limit | None:
    """The smallest limit on a text that is run with a 4-D mask and one cache for all layers, or None without a limit.

    Such a mask replaces the model's own sliding window or chunks, so longer texts would see more than in the base.
    Longrope's factors depend on the longest text of a batch, so keys cached before it grew would have other factors.
    """
    config: dict[str, Any] = model.config.get_text_config().to_dict()
    limits = []
    if (positions := max_positions(model)) is not None:
        limits.append(Limit(positions, f"has {positions}"))
    layers = config.get("layer_types") or []
    window, chunk = config.get("sliding_window"), config.get("attention_chunk_size")
    # Without `layer_types` (Mistral) every layer has the window.
    if window and ("sliding_attention" in layers or not layers):
        limits.append(Limit(window, f"has a sliding window of {window}, which a 4-D mask disables"))
    if chunk and "chunked_attention" in layers:
        limits.append(Limit(chunk, f"attends within chunks of {chunk}, which a 4-D mask disables"))
    for rope in _rotary_settings(config):
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original:
            limits.append(Limit(original, f"changes its rotary factors beyond {original}"))
    return min(limits, default=None)


def _rotary_settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotary settings of a text configuration: one, or one for each kind of layer (Gemma 3)."""
    rope = config.get("rope_parameters") or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    return kinds or [rope]


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise ModelError when texts of `length` tokens exceed `length_limit`.

    what: the subject of the message, for example the configuration key that sets the length.
    """
    limit = length_limit(model)
    if limit is not None and length > limit.length:
        raise ModelError(
            f"{what} needs {length} positions but {model.config.model_type} {limit.reason}; use a shorter one"
        )
