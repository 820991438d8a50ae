"""Parts of a stock causal LM: its hidden states, weight matrices, positions and embedding rows."""

from __future__ import annotations

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


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise ModelError when rows of `length` tokens exceed the model's positions or its sliding window.

    what: the subject of the message, for example the configuration key that sets the length.
    """
    config = model.config.get_text_config()
    limit = max_positions(model)
    if limit is not None and length > limit:
        raise ModelError(
            f"{what} needs {length} positions but {model.config.model_type} has {limit}; use a shorter one"
        )
    layers = config.to_dict().get("layer_types") or []
    window = config.to_dict().get("sliding_window")
    # Without `layer_types` (Mistral) every layer has the window.
    has_window = "sliding_attention" in layers or not layers
    if window is not None and has_window and length > window:
        raise ModelError(
            f"{what} needs {length} positions but {model.config.model_type} has a sliding window of {window}, which "
            "a 4-D mask disables; use a shorter one"
        )
