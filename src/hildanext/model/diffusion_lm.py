"""A stock causal LM that denoises blocks: loading, the mask token, the [x_t ; x_0] forward, saving.

The base architecture is never changed; attention mask, mask token and training are all that differ (DESIGN section 2).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext import __version__
from hildanext.config import Convention, LoraConfig, ModelConfig
from hildanext.data.documents import fingerprint
from hildanext.errors import ModelError, UsageError
from hildanext.files import write_json
from hildanext.model.adapter_file import SETTINGS, WEIGHTS, Adapter, add_adapter, read_adapter, write_adapter
from hildanext.model.lora import collect, inject, peft_settings, trained_parameters, values_of
from hildanext.model.policy import Policy, choose_policy, compute_dtype
from hildanext.model.pretrained import (
    find_file,
    fingerprint_weights,
    load_causal_lm,
    load_tokenizer,
    read_config_dict,
    read_modes,
    read_record,
)
from hildanext.model.probe import body, n_embeddings, probe
from hildanext.model.training_attention import Kind, visible_keys

MASK_TOKEN = "<|mask|>"


class Injected(NamedTuple):
    """The adapter that a model is being trained with."""

    config: LoraConfig
    targets: list[str]  # names of the adapted linear layers, as peft matches them


class DiffusionLM(nn.Module):
    """A model, its tokenizer and the three facts that make it a block-diffusion model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask_token_id: int,
        block_size: int | None,
        convention: Convention,
        record: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.block_size = block_size  # the decoding block; None until a conversion has set it
        self.convention = convention
        self.record = record  # the `hilda` section of config.json
        self.modes: dict[str, Any] = {}  # the `hilda` section of generation_config.json: what `calibrate` wrote
        self.ordinary_ids = torch.tensor(ordinary_ids(tokenizer))
        self.attention: Kind = "dense"  # how `forward` computes attention: see `training_attention`
        self.adapter: Injected | None = None  # in training with `lora.rank`; else every weight is the model's own

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def embedding(self) -> nn.Module:
        layer = self.model.get_input_embeddings()
        assert isinstance(layer, nn.Module)
        return layer

    def embedding_std(self) -> Tensor:
        """Of the embeddings' elements: the unit of embedding noise."""
        return _weight(self.embedding).detach().std()

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows. Rows of the embedding beyond it are padding and never decoded."""
        return len(self.tokenizer)

    @property
    def name(self) -> str:
        return str(self.record["base_model"])

    def allowed(self, loss_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Tokens that may be noised: `loss_mask`, less each document's first token when it cannot be predicted."""
        return loss_mask & (position_ids > 0) if self.convention == "shifted" else loss_mask

    @property
    def head(self) -> nn.Module:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head

    def decodable_logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32 without what decoding cannot predict: the mask token, and the vocabulary's padding rows."""
        logits: Tensor = self.head(hidden).float()
        logits[:, self.mask_token_id] = -torch.inf
        logits[:, self.vocab_size :] = -torch.inf
        return logits

    def forward(
        self,
        noisy_ids: Tensor,
        input_ids: Tensor,
        doc_ids: Tensor,
        position_ids: Tensor,
        wanted: Tensor,
        block_size: int,
        embed_noise: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [S, H] whose logits predict x_0 at the S wanted positions, in row-major order.

        noisy_ids, input_ids, doc_ids, position_ids: [B, L] int64. wanted: [B, L] bool. block_size >= L is full
        diffusion over x_t alone (eq. 4); else the model runs on [x_t ; x_0], 2L long, same positions twice (eq. 3).
        embed_noise [B, L, H] is added to the embeddings of x_t.
        """
        length = noisy_ids.shape[1]
        full_diffusion = block_size >= length
        ids = noisy_ids if full_diffusion else torch.cat([noisy_ids, input_ids], dim=1)
        embeds = self.embedding(ids)
        if embed_noise is not None:
            embeds = embeds + nn.functional.pad(embed_noise, (0, 0, 0, ids.shape[1] - length))
        visible = visible_keys(
            self.attention, doc_ids, position_ids, block_size, compute_dtype(embeds), query_groups(self.model)
        )
        dense = isinstance(visible, Tensor)
        hidden = body(
            self.model,
            inputs_embeds=embeds,
            attention_mask=visible if dense else None,
            position_ids=position_ids if full_diffusion else position_ids.repeat(1, 2),
            **({} if dense else {"visible": visible}),
        )
        row, column = wanted.nonzero(as_tuple=True)
        if self.convention == "shifted":
            column = column - 1
            if not full_diffusion:
                # A block's first token is predicted by the clean stream, whose last token closes the block before.
                opens_block = position_ids[wanted] % block_size == 0
                column = torch.where(opens_block, column + length, column)
        return hidden[row, column]


def query_groups(model: PreTrainedModel) -> int:
    """Query heads that share a key head."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_key_value_heads"):
        return 1
    groups: int = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
    return groups


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id with a meaning of its own, the unnamed added special tokens included."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Sorted ids that noise may put in place of a token: no special token, nothing beyond the tokenizer."""
    special = special_ids(tokenizer)
    return [i for i in range(len(tokenizer)) if i not in special]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> int:
    """Give the model a mask token and return its id.

    The tokenizer's own if it has one, else the new atomic special token `<|mask|>`. A row of a padded vocabulary is
    used before anything is resized. Its embedding is the mean row plus small noise; tied heads stay tied. An existing
    special token with a meaning is never reused (DESIGN section 2).
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    before = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    mask_id = tokenizer.get_vocab()[MASK_TOKEN]
    embedding = _weight(model.get_input_embeddings())
    mean, std = embedding[:before].mean(0), embedding[:before].std(0)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
    if mask_id >= embedding.shape[0]:
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    embedding = _weight(model.get_input_embeddings())
    embedding[mask_id] = mean + 0.02 * std * noise
    head = _weight(model.get_output_embeddings())
    if head is not embedding:  # not tied
        head[mask_id] = head[:before].mean(0)
    return mask_id


def load_diffusion_lm(
    config: ModelConfig,
    *,
    training: bool = False,
    seed: int = 0,
    lora: LoraConfig | None = None,
    added: Adapter | None = None,
) -> tuple[DiffusionLM, Policy]:
    """Load a converted checkpoint, an adapter with its base, or an AR base that gets a mask token and no block size yet.

    training=True keeps fp32 weights (autocast computes lower); else weights are in the policy's type. With lora.rank the
    weights are frozen, held as `lora.base` says, and an adapter is trained: the one that is loaded, or a fresh one.
    Otherwise an adapter is added to its base's weights (`added` in its place, where given). Raises UsageError (no such model), ModelError (damaged, refused by
    the probe, another convention than asked for, or an adapter whose base has other weights now).
    """
    policy = choose_policy(config.device, config.dtype)
    stored = read_config_dict(config)
    record: dict[str, Any] | None = stored.get("hilda")
    if record is not None and config.convention not in (None, record["convention"]):
        raise UsageError(
            f"'model.convention' is '{config.convention}' but checkpoint '{config.base}' was trained with "
            f"'{record['convention']}'; set it to null or convert again"
        )
    lora = lora if training and lora is not None and lora.rank is not None else None
    part = record.get("adapter") if record is not None else None
    source = config if part is None else base_of(config, part)
    dtype = torch.float32 if training and lora is None else policy.compute
    model, tokenizer = load_causal_lm(source, policy, dtype, "native" if lora is None else lora.base)
    probe(model)
    if record is None:
        mask_id = add_mask_token(model, tokenizer, seed)
        record = {
            "base_model": config.base,
            "base_revision": config.revision,
            "convention": config.convention or "shifted",
            "tokens_trained": 0,
        }
        lm = _assemble(model, tokenizer, mask_id, None, record)
    else:
        if part is not None:
            if read_record(source) is None:
                add_mask_token(model, tokenizer, part["seed"])
            tokenizer = load_tokenizer(config)
        _check_tokenizer(config, tokenizer, stored, record, model)
        lm = _assemble(model, tokenizer, stored["mask_token_id"], stored["block_size"], record)
        lm.modes = read_modes(config)
    if lora is not None or part is not None:
        _adapt(lm, config, part, lora, seed, added)
    return lm, policy


def _check_tokenizer(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    stored: dict[str, Any],
    record: dict[str, Any],
    model: PreTrainedModel,
) -> None:
    same = tokenizer.mask_token_id == stored["mask_token_id"] and fingerprint(tokenizer) == record["tokenizer"]
    if not same or len(tokenizer) > n_embeddings(model):
        raise ModelError(
            f"checkpoint '{config.base}': its tokenizer (mask token {tokenizer.mask_token_id}, {len(tokenizer)} ids) is not "
            f"the one it was trained with (mask token {stored['mask_token_id']}); restore the tokenizer files"
        )


def adapted(config: ModelConfig, part: dict[str, Any]) -> ModelConfig:
    """The configuration of the model that an adapter belongs to. part: `hilda.adapter` of its config.json."""
    return config.model_copy(update={"base": part["base"], "revision": part["revision"], "convention": None})


def base_of(config: ModelConfig, part: dict[str, Any]) -> ModelConfig:
    """`adapted`, once it is found to be what it was.

    Raises UsageError when the base is not there, ModelError when its weights are not those the adapter was trained on.
    """
    source = adapted(config, part)
    try:
        found = fingerprint_weights(source)
    except UsageError as error:
        raise UsageError(f"adapter '{config.base}' needs its base: {error}") from None
    if found != part["fingerprint"]:
        raise ModelError(
            f"adapter '{config.base}' was trained on other weights than those of '{part['base']}'; restore that base"
        )
    return source


def _adapt(
    lm: DiffusionLM,
    config: ModelConfig,
    part: dict[str, Any] | None,
    lora: LoraConfig | None,
    seed: int,
    loaded: Adapter | None,
) -> None:
    """Train an adapter (lora), the one that config.base is (part) or a fresh one; or add the one it is to the weights."""
    if part is not None and loaded is None:
        weights, settings = find_file(config, WEIGHTS), find_file(config, SETTINGS)
        if weights is None or settings is None:
            raise ModelError(f"adapter '{config.base}': {WEIGHTS} or {SETTINGS} is missing")
        loaded, _ = read_adapter(weights, settings)
    if lora is None:
        assert loaded is not None
        add_adapter(lm.model, loaded, config.base)
        lm.record = {key: value for key, value in lm.record.items() if key != "adapter"}
        return
    if loaded is not None and (loaded.rank, loaded.scaling) != (lora.rank, lora.scaling):
        raise UsageError(
            f"adapter '{config.base}' has rank {loaded.rank} and alpha {loaded.rank * loaded.scaling:g}; set lora.rank and "
            "lora.alpha to them, or make a whole checkpoint of it with 'hildanext merge-topk --full'"
        )
    lm.adapter = Injected(lora, inject(lm.model, lora, lm.mask_token_id, seed))
    if loaded is not None:
        set_adapter(lm, values_of(lm.model, loaded, config.base))
    else:
        base = str(Path(config.base).resolve()) if Path(config.base).exists() else config.base
        known = {"base": base, "revision": config.revision, "fingerprint": fingerprint_weights(config), "seed": seed}
        lm.record["adapter"] = known


@torch.no_grad()
def set_adapter(lm: DiffusionLM, values: dict[str, Tensor]) -> None:
    """Put tensors into the adapter in training, by the names of `weights_of`."""
    for name, parameter in trained_parameters(lm.model).items():
        parameter.copy_(values[name])


def _assemble(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_id: int, block: int | None, record: dict[str, Any]
) -> DiffusionLM:
    return DiffusionLM(
        model, tokenizer, mask_token_id=mask_id, block_size=block, convention=record["convention"], record=record
    )


def weights_of(lm: DiffusionLM) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: all weights, or the adapter's that is being trained."""
    return trained_parameters(lm.model) if lm.adapter is not None else lm.model.state_dict()


def save_diffusion_lm(lm: DiffusionLM, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a plain Hugging Face folder (safetensors) that `AutoModelForCausalLM` loads; not atomic by itself.

    With an adapter in training the folder holds the adapter in place of the weights, as peft writes it. config.json carries
    block_size, mask_token_id and `hilda`, and both `rope_theta` and `rope_parameters`. weights: whole, as `weights_of` names
    them.
    """
    config = lm.model.config
    config.block_size = lm.block_size
    config.mask_token_id = lm.mask_token_id
    config.hilda = {
        **lm.record,
        "version": __version__,
        "convention": lm.convention,
        "tokenizer": fingerprint(lm.tokenizer),
    }
    if lm.adapter is None:
        lm.model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    else:
        config.architectures = [type(lm.model).__name__]
        config.save_pretrained(folder)
        _save_adapter(lm, folder, weights or weights_of(lm))
    lm.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.pop("quantization_config", None)  # of the base in this training; the adapter goes with the base as it is
    rope = stored.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has one for each kind of layer
    if "rope_theta" in rope:
        # transformers 5 writes rope_parameters only; other readers would fall back to 10,000.
        stored["rope_theta"] = rope["rope_theta"]
    write_json(path, stored)


def _save_adapter(lm: DiffusionLM, folder: Path, weights: dict[str, Tensor]) -> None:
    assert lm.adapter is not None
    known, (config, targets) = lm.record["adapter"], lm.adapter
    settings = peft_settings(lm.model, targets, config.dropout, known["base"], known["revision"])
    write_adapter(folder, collect(lm.model, weights, config.scaling), settings)
