"""What a stock causal LM is asked for beside its forward: hidden states, positions, embedding rows."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from hildanext.errors import ModelError


def body(model: PreTrainedModel, **inputs: object) -> Tensor:
    """Hidden states [B, L, H] before the head: the model without the head, so that [B, L, V] logits never exist."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest row the model has positions for, under whatever name its config keeps it (GPT-2: `n_positions`)."""
    config = model.config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise ModelError when rows of `length` tokens do not fit the model's positions or sliding window."""
    config = model.config.get_text_config()
    limit = max_positions(model)
    if limit is not None and length > limit:
        raise ModelError(
            f"{what} needs {length} positions but {model.config.model_type} has {limit}; use a shorter one"
        )
    layers = config.to_dict().get("layer_types") or []
    window = config.to_dict().get("sliding_window")
    # Without `layer_types` (Mistral) every layer slides.
    slides = "sliding_attention" in layers or not layers
    if window is not None and slides and length > window:
        raise ModelError(
            f"{what} needs {length} positions but {model.config.model_type} has a sliding window of {window}, which a "
            "4-D mask switches off; use a shorter one"
        )


def n_embeddings(model: PreTrainedModel) -> int:
    """Rows of the input embedding (a vocabulary may be padded beyond the tokenizer)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
