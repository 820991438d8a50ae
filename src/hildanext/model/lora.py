"""Training of low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): the base is frozen, factors A and B learn.

peft adapts the linear layers, including quantized ones; `lora_linear` computes those without quantization and dropout
as one matrix. This file adapts the vocabulary:
- The mask token's embedding row is new to the base and gets a full-rank change, as do in tied models the rows of DELETE
  and INSERT. peft's own option for trained rows copies the whole embedding, and a tied head, in every forward.
- The head gets a low-rank change. In tied models the embedding shares it, so that tied heads stay tied and a merged
  model is no larger than its base.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hildanext.config import LoraConfig
from hildanext.errors import ConfigError, ModelError
from hildanext.model.adapter_file import Adapter, LoraFactors
from hildanext.model.backbone import weight_matrix
from hildanext.model.low_rank import LowRank
from hildanext.model.quantized import quiet_bitsandbytes

# Names of a module's factors among the parameters, with "A" or "B" for {}.
_PEFT = ".lora_{}.default.weight"  # linear layers
_OURS = ".low_rank.{}"  # embedding and head; all layers of a gated adapter
_DRAFT_HEAD = "draft_head."


class AdaptedEmbedding(nn.Module):
    """The input embedding with trained rows for new tokens, the mask token first, and in tied models a low-rank change.

    The others, DELETE and INSERT, are no input: their rows act in the tied head only.
    """

    def __init__(self, base: nn.Module, token_ids: list[int], low_rank: LowRank | None) -> None:
        super().__init__()
        self.base, self.low_rank, self.token_ids = base, low_rank, token_ids
        # transformers takes a model's dtype from its first parameter. A ParameterList, being a submodule, comes after
        # the base's weight, which a plain parameter would precede.
        self.row = nn.ParameterList([torch.zeros(self.weight.shape[1]) for _ in token_ids])
        # Gemma multiplies its embeddings by a constant.
        scale = cast(Tensor, base.embed_scale) if hasattr(base, "embed_scale") else torch.ones(())
        self.scale = torch.as_tensor(scale).to(self.weight.dtype).item()

    @property
    def weight(self) -> Tensor:
        """The frozen matrix [V, H], without the change."""
        return weight_matrix(self.base)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., H]."""
        embeds: Tensor = self.base(ids)
        change = (ids == self.token_ids[0])[..., None] * self.row[0]
        if self.low_rank is not None:
            change = change + self.low_rank.scaling * (F.embedding(ids, self.low_rank.B) @ self.low_rank.A)
        return embeds + (self.scale * change).to(embeds.dtype)


class AdaptedHead(nn.Module):
    """The output head with a low-rank change.

    row: in tied models, the trained rows of the embedding, those of `token_ids`.
    """

    def __init__(self, base: nn.Module, token_ids: list[int], low_rank: LowRank, row: nn.ParameterList | None) -> None:
        super().__init__()
        self.base, self.low_rank, self.row, self.token_ids = base, low_rank, row, token_ids

    @property
    def weight(self) -> Tensor:
        """The frozen matrix [V, H], without the change."""
        return weight_matrix(self.base)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        logits: Tensor = self.base(hidden)
        hidden = hidden.to(self.low_rank.A.dtype)
        change = self.low_rank.scaling * F.linear(F.linear(hidden, self.low_rank.A), self.low_rank.B)
        logits = logits + change.to(logits.dtype)
        if self.row is not None:
            for token, row in zip(self.token_ids, self.row, strict=True):
                logits[..., token] += (hidden @ row).to(logits.dtype)
        return logits


class VocabularyNames(NamedTuple):
    """Names of the modules whose weights have a row for each token."""

    embedding: str
    head: str
    tied: bool


def vocabulary_names(model: PreTrainedModel) -> VocabularyNames:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return VocabularyNames(names[id(embedding)], names[id(head)], head.weight is embedding.weight)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers, without the head."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def find_targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The names of `lora.targets` as peft matches them. Raises ConfigError for one that the model does not have."""
    layers = linear_layers(model)
    kinds = {name.rpartition(".")[2] for name in layers}
    for name in config.targets if isinstance(config.targets, list) else []:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ConfigError(
                f"'lora.targets': {type(model).__name__} has no linear layer '{name}'; it has {', '.join(sorted(kinds))}"
            )
    return sorted(kinds) if config.targets == "all-linear" else list(config.targets)


def one_matrix(config: LoraConfig) -> bool:
    """Whether adapted layers are computed as one matrix (`lora_linear`). Otherwise peft adds the change's output."""
    return config.rank is not None and config.base == "native" and not config.dropout


def inject(
    model: PreTrainedModel, config: LoraConfig, mask_token_id: int, seed: int, edit_ids: tuple[int, ...] = ()
) -> list[str]:
    """Freeze a model and insert a new adapter of `config.rank`. The model's outputs do not change yet.

    edit_ids: DELETE and INSERT, if the model has them.
    The factors are float32 for every dtype of the base. Returns the names of the adapted layers in the form that peft
    matches. Raises ConfigError for a target that the model does not have.
    """
    quiet_bitsandbytes()  # peft imports bitsandbytes if it is installed
    import peft

    assert config.rank is not None
    layers, targets = linear_layers(model), find_targets(model, config)
    names = vocabulary_names(model)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scaling * config.rank,  # type: ignore[arg-type]  # floats work too
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=[names.head],
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),
    )
    if one_matrix(config):
        from hildanext.model.lora_linear import OneMatrix

        settings._register_custom_module({nn.Linear: OneMatrix})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2 has layers of both orientations
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)
        _adapt_vocabulary(model, config, names, [mask_token_id, *(edit_ids if names.tied else ())])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return targets


def _adapt_vocabulary(model: PreTrainedModel, config: LoraConfig, names: VocabularyNames, token_ids: list[int]) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    n_out, n_in = head.weight.shape
    assert config.rank is not None
    low_rank = LowRank(config.rank, n_in, n_out, config.scaling).to(model.device)
    adapted = AdaptedEmbedding(embedding, token_ids, low_rank if names.tied else None).to(model.device)
    model.set_input_embeddings(adapted)
    model.set_output_embeddings(AdaptedHead(head, token_ids, low_rank, adapted.row if names.tied else None))


def peft_settings(
    model: PreTrainedModel, targets: list[str], dropout: float, base: str, revision: str | None
) -> dict[str, Any]:
    """The settings for `adapter_file.write_adapter`: peft's LoraConfig without ranks and scaling.

    model: with an adapter inserted. base, revision: the model that the adapter belongs to.
    """
    names = vocabulary_names(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": dropout,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
        "target_modules": [*targets, names.embedding, names.head],
        "ensure_weight_tying": names.tied,
        "rank_pattern": dict.fromkeys([names.embedding, names.head] if names.tied else [names.embedding]),
    }


def trained_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _factors(weights: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Map each adapted module's name to the names of its A and B in `weights`."""
    found = {}
    for name in weights:
        for form in (_PEFT, _OURS):
            if name.endswith(form.format("A")):
                module = name.removesuffix(form.format("A"))
                found[module] = (name, module + form.format("B"))
    return found


def collect(model: PreTrainedModel, weights: dict[str, Tensor], scaling: float) -> Adapter:
    """The adapter that is inserted in a model. weights: its `trained_parameters`, or copies with the same names."""
    embedding, name = model.get_input_embeddings(), vocabulary_names(model).embedding
    assert isinstance(embedding, AdaptedEmbedding)
    pairs = {module: LoraFactors(weights[a], weights[b]) for module, (a, b) in _factors(weights).items()}
    n_rows = embedding.weight.shape[0]
    head = {n.removeprefix(_DRAFT_HEAD): tensor for n, tensor in weights.items() if n.startswith(_DRAFT_HEAD)}
    rows = {token: weights[f"{name}.row.{i}"] for i, token in enumerate(embedding.token_ids)}
    return Adapter(scaling, pairs, name, rows, n_rows, head)


def values_of(model: PreTrainedModel, adapter: Adapter, adapter_name: str) -> dict[str, Tensor]:
    """An adapter's tensors, named as by `trained_parameters`.

    Raises ModelError, which names `adapter_name`, when the model's adapted layers or their shapes differ.
    """
    weights = trained_parameters(model)
    factors = _factors(weights)
    if unmatched := sorted(set(factors) ^ set(adapter.pairs)):
        where = "the file" if unmatched[0] in adapter.pairs else "'lora.targets'"
        raise ModelError(
            f"adapter '{adapter_name}': only {where} has the layer '{unmatched[0]}'; set lora.targets to the "
            "layers in the file"
        )
    values = {f"{adapter.embedding}.row.{i}": row for i, row in enumerate(adapter.rows.values())}
    values |= {f"{_DRAFT_HEAD}{name}": tensor for name, tensor in adapter.draft_head.items()}
    if odd := sorted(
        {n for n in weights if n.startswith(_DRAFT_HEAD)} ^ {n for n in values if n.startswith(_DRAFT_HEAD)}
    ):
        raise ModelError(
            f"adapter '{adapter_name}': '{odd[0]}' is not in both the file and 'lora.draft_head'; set lora.draft_head as "
            "it was in training"
        )
    for module, (a, b) in factors.items():
        values[a], values[b] = adapter.pairs[module]
    for name, value in values.items():
        if value.shape != weights[name].shape:
            raise ModelError(
                f"adapter '{adapter_name}': '{name}' has shape {list(value.shape)}, but the base needs "
                f"{list(weights[name].shape)}"
            )
    return values


def fresh_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of an adapter that changes nothing, named as by `trained_parameters`."""
    weights = trained_parameters(model)
    zero = {name for _, name in _factors(weights).values()} | {name for name in weights if ".row." in name}
    return {name: torch.zeros_like(w) if name in zero else w.detach().clone() for name, w in weights.items()}
