"""Low-rank adapters in training (LoRA, Hu et al. 2021, arXiv 2106.09685): the base is frozen, small matrices beside it learn.

peft puts them beside the linear layers, quantized ones too; `lowrank` computes the others. Three things are done here. The
mask token's row is new to the base, so it is trained whole: peft's own way copies the whole embedding, and the head with it,
in every forward. The head gets a low-rank change. Where head and embedding are one matrix that change is the matrix's, as in
full training: tied heads stay tied, and a merged model is no larger than its base.
"""

from __future__ import annotations

import math
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
from hildanext.model.quantized import quiet_bitsandbytes

_PEFT = ".lora_{}.default.weight"  # a linear layer's factors, by peft
_OURS = ".low_rank.{}"


class LowRank(nn.Module):
    """The change scaling * B A of a matrix [n_out, n_in]; zero at first."""

    def __init__(self, rank: int, n_in: int, n_out: int, scaling: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, n_in)), nn.Parameter(torch.zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling = scaling


class AdaptedEmbedding(nn.Module):
    """The input embedding with the mask token's row trained, and a low-rank change where it is the head's matrix too."""

    def __init__(self, base: nn.Module, mask_token_id: int, low_rank: LowRank | None) -> None:
        super().__init__()
        self.base, self.low_rank, self.mask_token_id = base, low_rank, mask_token_id
        # In a list, which is a module: the model's first parameter, whose type is the model's, stays the base's.
        self.row = nn.ParameterList([torch.zeros(self.weight.shape[1])])
        # Gemma multiplies what it looks up.
        scale = cast(Tensor, base.embed_scale) if hasattr(base, "embed_scale") else torch.ones(())
        self.scale = torch.as_tensor(scale).to(self.weight.dtype).item()

    @property
    def weight(self) -> Tensor:
        """The frozen [V, H] matrix, without the change."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., H]."""
        embeds: Tensor = self.base(ids)
        change = (ids == self.mask_token_id)[..., None] * self.row[0]
        if self.low_rank is not None:
            change = change + self.low_rank.scaling * (F.embedding(ids, self.low_rank.B) @ self.low_rank.A)
        return embeds + (self.scale * change).to(embeds.dtype)


class AdaptedHead(nn.Module):
    """The output head with a low-rank change. row: the embedding's, where the two are one matrix."""

    def __init__(self, base: nn.Module, mask_token_id: int, low_rank: LowRank, row: nn.ParameterList | None) -> None:
        super().__init__()
        self.base, self.low_rank, self.row, self.mask_token_id = base, low_rank, row, mask_token_id

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        logits: Tensor = self.base(hidden)
        hidden = hidden.to(self.low_rank.A.dtype)
        change = self.low_rank.scaling * F.linear(F.linear(hidden, self.low_rank.A), self.low_rank.B)
        logits = logits + change.to(logits.dtype)
        if self.row is not None:
            logits[..., self.mask_token_id] += (hidden @ self.row[0]).to(logits.dtype)
        return logits


class Names(NamedTuple):
    """Modules of a model that carry its vocabulary."""

    embedding: str
    head: str
    tied: bool


def vocabulary_names(model: PreTrainedModel) -> Names:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return Names(names[id(embedding)], names[id(head)], head.weight is embedding.weight)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the body's linear layers, the head left out."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def one_matrix(config: LoraConfig) -> bool:
    """Whether an adapted layer is computed as one matrix; the others are computed by peft, the change beside the layer."""
    return config.rank is not None and config.base == "native" and not config.dropout


def inject(model: PreTrainedModel, config: LoraConfig, mask_token_id: int, seed: int) -> list[str]:
    """Freeze a model and put a fresh adapter of `config.rank` into it, which changes nothing yet. The model stays what it is.

    Its factors are float32 whatever the base's type. Returns the adapted layers' names as peft matches them. Raises
    ConfigError for a target that the model does not have.
    """
    quiet_bitsandbytes()  # peft imports it where it is installed
    import peft

    assert config.rank is not None
    layers = linear_layers(model)
    kinds = {name.rpartition(".")[2] for name in layers}
    for name in config.targets if isinstance(config.targets, list) else []:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ConfigError(
                f"'lora.targets': {type(model).__name__} has no linear layer '{name}'; it has {', '.join(sorted(kinds))}"
            )
    names = vocabulary_names(model)
    targets = sorted(kinds) if config.targets == "all-linear" else list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scaling * config.rank,  # type: ignore[arg-type]  # any number does
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=[names.head],
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),
    )
    if one_matrix(config):
        from hildanext.model.lora_linear import OneMatrix

        settings._register_custom_module({nn.Linear: OneMatrix})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2 has both kinds of layers
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)
        _adapt_vocabulary(model, config, names, mask_token_id)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return targets


def _adapt_vocabulary(model: PreTrainedModel, config: LoraConfig, names: Names, mask_token_id: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    n_out, n_in = head.weight.shape
    assert config.rank is not None
    low_rank = LowRank(config.rank, n_in, n_out, config.scaling).to(model.device)
    adapted = AdaptedEmbedding(embedding, mask_token_id, low_rank if names.tied else None).to(model.device)
    model.set_input_embeddings(adapted)
    model.set_output_embeddings(AdaptedHead(head, mask_token_id, low_rank, adapted.row if names.tied else None))


def peft_settings(
    model: PreTrainedModel, targets: list[str], dropout: float, base: str, revision: str | None
) -> dict[str, Any]:
    """What `adapter.write_adapter` takes: peft's LoraConfig but for ranks and scaling, for a model with an adapter in it."""
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
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _factors(weights: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Module -> names of its A and B among trained parameters."""
    found = {}
    for name in weights:
        for form in (_PEFT, _OURS):
            if name.endswith(form.format("A")):
                module = name.removesuffix(form.format("A"))
                found[module] = (name, module + form.format("B"))
    return found


def collect(model: PreTrainedModel, weights: dict[str, Tensor], scaling: float) -> Adapter:
    """The adapter in a model. weights: `trained_parameters`, or copies of them by the same names."""
    embedding, name = model.get_input_embeddings(), vocabulary_names(model).embedding
    assert isinstance(embedding, AdaptedEmbedding)
    pairs = {module: LoraFactors(weights[a], weights[b]) for module, (a, b) in _factors(weights).items()}
    return Adapter(scaling, pairs, name, weights[f"{name}.row.0"], embedding.mask_token_id, embedding.weight.shape[0])


def values_of(model: PreTrainedModel, adapter: Adapter, what: str) -> dict[str, Tensor]:
    """An adapter's tensors by the names of `trained_parameters`. Raises ModelError (naming `what`) for other layers or shapes."""
    weights = trained_parameters(model)
    factors = _factors(weights)
    if odd := sorted(set(factors) ^ set(adapter.pairs)):
        raise ModelError(
            f"adapter '{what}': '{odd[0]}' is adapted in it or by lora.targets, not in both; set lora.targets"
        )
    values = {f"{adapter.embedding}.row.0": adapter.row}
    for module, (a, b) in factors.items():
        values[a], values[b] = adapter.pairs[module]
    for name, value in values.items():
        if value.shape != weights[name].shape:
            raise ModelError(
                f"adapter '{what}': '{name}' is {list(value.shape)}, the base needs {list(weights[name].shape)}"
            )
    return values


def fresh_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of an adapter that changes nothing, by the same names."""
    weights = trained_parameters(model)
    zero = {name for _, name in _factors(weights).values()} | {name for name in weights if name.endswith(".row.0")}
    return {name: torch.zeros_like(w) if name in zero else w.detach().clone() for name, w in weights.items()}
