"""Load and save the models that denoise: an AR base with a new mask token, a converted checkpoint, or an adapter."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext import __version__
from hildanext.config import LoraConfig, ModelConfig
from hildanext.data.tokenizer import fingerprint, token_ids
from hildanext.errors import HildaError, ModelError, UsageError
from hildanext.files import write_json
from hildanext.model.adapter_file import SETTINGS, WEIGHTS, Adapter, add_adapter, read_adapter, write_adapter
from hildanext.model.backbone import n_embeddings, weight_matrix
from hildanext.model.diffusion_lm import (
    DELETE_TOKEN,
    INSERT_TOKEN,
    MASK_TOKEN,
    DiffusionLM,
    Injected,
    add_adapters_tokens,
    add_edit_tokens,
    add_mask_token,
    first_mask_row,
)
from hildanext.model.gate import gated_view, inject_gated, open_gate
from hildanext.model.lora import collect, inject, peft_settings, trained_parameters, values_of
from hildanext.model.policy import Policy, choose_policy
from hildanext.model.pretrained import (
    base_of,
    find_file,
    fingerprint_weights,
    load_causal_lm,
    load_tokenizer,
    read_config_dict,
    read_generation_config,
    read_record,
    read_stock_dict,
    weight_shapes,
)
from hildanext.model.probe import probe


def load_diffusion_lm(
    config: ModelConfig,
    *,
    training: bool = False,
    seed: int = 0,
    lora: LoraConfig | None = None,
    added: Adapter | None = None,
    edits: bool = False,
) -> tuple[DiffusionLM, Policy]:
    """Load a converted checkpoint, an adapter with its base, or an AR base, which gets a mask token and no block size.

    training: keep float32 weights and compute in autocast's dtype; else the weights have the policy's compute dtype.
    lora: with a rank and in training, freeze the weights in the format `lora.base` and train the adapter that
    `config.base` names, or a new one. Otherwise that adapter is added to the weights of its base.
    added: an adapter to use instead of the one in `config.base`.
    edits: give a model without them the tokens DELETE and INSERT.

    Raises UsageError for a model that does not exist, an adapter that was trained without these tokens, and another
    `model.convention` than the checkpoint's; ModelError for damaged files, an architecture that the probe refuses, and an
    adapter whose base has changed.
    """
    policy = choose_policy(config.device, config.dtype)
    stored = read_stock_dict(config)
    record: dict[str, Any] | None = stored.get("hilda")
    if record is not None and config.convention not in (None, record["convention"]):
        raise UsageError(
            f"'model.convention' is '{config.convention}' but checkpoint '{config.base}' was trained with "
            f"'{record['convention']}'; set it to null or convert again"
        )
    lora = lora if training and lora is not None and lora.rank is not None else None
    part = record.get("adapter") if record is not None else None
    source = config if part is None else _checked_base(config, part)
    dtype = torch.float32 if training and lora is None else policy.compute
    model, tokenizer = load_causal_lm(source, policy, dtype, "native" if lora is None else lora.base)
    probe(model)
    if training and policy.compute != dtype:
        with policy.autocast():  # in the format that the checkpoint is loaded in
            probe(model)
    if record is None:
        mask_id, block_size, record = add_mask_token(model, tokenizer, seed), None, _new_record(config)
    else:
        if part is not None:
            add_adapters_tokens(model, tokenizer, read_record(source), record)
            tokenizer = load_tokenizer(config)
        _check_tokenizer(config, tokenizer, stored, record, model)
        mask_id, block_size = stored["mask_token_id"], stored["block_size"]
    if edits and "edits" not in record:
        if part is not None:
            raise UsageError(
                f"adapter '{config.base}' was trained without insertions and deletions; make a full checkpoint of it with "
                "'hildanext merge-topk --full', or set noise.edits to 'substitution'"
            )
        record["edits"] = add_edit_tokens(model, tokenizer, seed)
    lm = _assemble(model, tokenizer, mask_id, block_size, record)
    if "hilda" in stored:
        lm.modes = read_generation_config(config).get("hilda", {})
    if lora is not None or part is not None:
        _adapt(lm, config, part, lora, seed, added)
    return lm, policy


def _new_record(config: ModelConfig) -> dict[str, Any]:
    return {
        "base_model": config.base,
        "base_revision": config.revision,
        "convention": config.convention or "shifted",
        "tokens_trained": 0,
    }


class CheckpointWithBase(NamedTuple):
    """A converted checkpoint and the AR base it is compared with, on the same device and in the same dtype."""

    lm: DiffusionLM
    block_size: int  # `lm.block_size`, which a converted checkpoint always has
    base: PreTrainedModel  # in eval mode
    base_tokenizer: PreTrainedTokenizerBase
    base_config: ModelConfig
    policy: Policy


def load_with_base(config: ModelConfig, base_name: str | None = None) -> CheckpointWithBase:
    """Load the converted checkpoint `config.base` and its AR base, both in the policy's compute dtype.

    base_name: a base to load instead of the one that the checkpoint records. Raises UsageError for a model that is not
    converted, and the errors of `load_diffusion_lm` and `load_causal_lm`.
    """
    lm, policy = load_diffusion_lm(config)
    if lm.block_size is None:
        raise UsageError(f"'{config.base}' is not a converted checkpoint; run 'hildanext convert-wsd' first")
    if base_name is None and "published" in lm.record:
        raise UsageError(
            f"'{config.base}' comes from a published diffusion model, which names no base; give one with --base"
        )
    base_config = base_of(config, lm.record, base_name)
    if lm.gated and base_name is None:
        # The gate is closed between forwards: the checkpoint's own weights are its base's.
        return CheckpointWithBase(lm, lm.block_size, lm.model, lm.tokenizer, base_config, policy)
    base, base_tokenizer = load_causal_lm(base_config, policy, policy.compute)
    return CheckpointWithBase(lm, lm.block_size, base.eval(), base_tokenizer, base_config, policy)


def _check_tokenizer(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    stored: dict[str, Any],
    record: dict[str, Any],
    model: PreTrainedModel,
) -> None:
    known = record.get("tokenizer")  # None for a published model, see `published.as_stock`
    same = tokenizer.mask_token_id == stored["mask_token_id"] and known in (None, fingerprint(tokenizer))
    if "edits" in record:
        edit_ids = tokenizer.convert_tokens_to_ids([DELETE_TOKEN, INSERT_TOKEN])
        same = same and edit_ids == [record["edits"][key] for key in ("delete_token_id", "insert_token_id")]
    if not same or token_ids(tokenizer)[-1] >= n_embeddings(model):
        raise ModelError(
            f"checkpoint '{config.base}': its tokenizer (mask token {tokenizer.mask_token_id}, {len(tokenizer)} ids) is not "
            f"the one it was trained with (mask token {stored['mask_token_id']}); restore the tokenizer files"
        )


def adapter_base(config: ModelConfig, part: dict[str, Any]) -> ModelConfig:
    """The configuration of an adapter's base. part: the section `hilda.adapter` of the adapter's config.json."""
    sys.audit("hildanext.reference", config.base, part["base"])
    return config.model_copy(update={"base": part["base"], "revision": part["revision"], "convention": None})


def _checked_base(config: ModelConfig, part: dict[str, Any]) -> ModelConfig:
    """`adapter_base`, after a check of the base's weights.

    Raises UsageError when the base does not exist, ModelError when its weights differ from those in training.
    """
    source = adapter_base(config, part)
    try:
        found = fingerprint_weights(source)
    except UsageError as error:
        raise UsageError(f"adapter '{config.base}' needs its base: {error}") from None
    if found != part["fingerprint"]:
        raise ModelError(
            f"adapter '{config.base}' was trained on other weights than '{part['base']}' has now; restore that base"
        )
    return source


def stored_adapter(config: ModelConfig) -> Adapter:
    """The adapter in a checkpoint's files. Raises ModelError if one is missing, CheckpointError if it is damaged."""
    weights, settings = find_file(config, WEIGHTS), find_file(config, SETTINGS)
    if weights is None or settings is None:
        raise ModelError(f"adapter '{config.base}': {WEIGHTS} or {SETTINGS} is missing")
    return read_adapter(weights, settings)[0]


class GatedAdapter(NamedTuple):
    """A gated adapter without its base."""

    name: str
    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    block_size: int  # rows of a group
    record: dict[str, Any]  # the `hilda` section of its config.json
    modes: dict[str, Any]  # the `hilda` section of its generation_config.json


def load_gated_adapter(name: str) -> GatedAdapter:
    """Read a gated adapter: 'hilda-smollm2-135m', a folder or a name on the hub. Its base is not looked for.

    Raises UsageError for a model that does not exist or has no gated adapter, ModelError or CheckpointError for damaged
    files.
    """
    config = ModelConfig(base=name)
    stored = read_config_dict(config)
    record = stored.get("hilda") or {}
    if "gate" not in record or "adapter" not in record:
        raise UsageError(f"'{name}' is no gated adapter; give the folder of one (made with lora.gate)")
    modes = read_generation_config(config).get("hilda", {})
    return GatedAdapter(name, stored_adapter(config), load_tokenizer(config), stored["block_size"], record, modes)


@torch.no_grad()
def beside(model: PreTrainedModel, found: GatedAdapter) -> DiffusionLM:
    """A model that shares the parameters of `model`, a base that the caller keeps, and has a gated adapter.

    Raises ModelError when the adapter does not fit the base, and for an architecture that the probe refuses.
    """
    adapter, tokenizer, embedding = found.adapter, found.tokenizer, weight_matrix(model.get_input_embeddings())
    known = [i for token, i in tokenizer.get_vocab().items() if token != MASK_TOKEN]
    if adapter.row.shape[0] != embedding.shape[1] or max(known) >= len(embedding):
        raise ModelError(
            f"adapter '{found.name}' was trained on an embedding of {max(known) + 1} tokens and width "
            f"{adapter.row.shape[0]}; {type(model).__name__} has {len(embedding)} and {embedding.shape[1]}"
        )
    # A row of its own, as in `add_mask_token`, unless the base came with a mask token.
    has_row = tokenizer.mask_token != MASK_TOKEN or hasattr(model.config, "hilda")
    rows, seed = embedding[: max(known) + 1], found.record["adapter"]["seed"]
    row = embedding[adapter.mask_token_id] if has_row else first_mask_row(rows, seed)
    with torch.random.fork_rng(devices=[]):  # new modules draw their first values, which the adapter's replace
        view = gated_view(model, adapter, row, found.name)
    probe(view)
    lm = _assemble(view, tokenizer, adapter.mask_token_id, found.block_size, found.record)
    lm.modes = found.modes
    return lm


def _adapt(
    lm: DiffusionLM,
    config: ModelConfig,
    part: dict[str, Any] | None,
    lora: LoraConfig | None,
    seed: int,
    loaded: Adapter | None,
) -> None:
    """Prepare an adapter for training (`lora` given), or add it to the weights.

    The adapter is `loaded` if given, else the one that `config.base` names (`part` given), else a new one.
    """
    if part is not None and loaded is None:
        loaded = stored_adapter(config)
    if lora is None:
        assert loaded is not None
        apply = open_gate if "gate" in lm.record else add_adapter
        apply(lm.model, loaded, config.base)
        lm.record = {key: value for key, value in lm.record.items() if key != "adapter"}
        return
    if loaded is not None and lora.gate != lm.gated:
        has, wanted = ("a gated", "true") if lm.gated else ("an ungated", "false")
        raise UsageError(f"'{config.base}' has {has} adapter; set lora.gate to {wanted}")
    if loaded is not None and lora.gate and lora.causal_groups != lm.record["gate"]["causal"]:
        raise UsageError(
            f"'{config.base}': set lora.causal_groups to {str(not lora.causal_groups).lower()}, as in its training"
        )
    if loaded is not None and (loaded.rank, loaded.scaling) != (lora.rank, lora.scaling):
        raise UsageError(
            f"adapter '{config.base}' has rank {loaded.rank} and alpha {loaded.rank * loaded.scaling:g}; set lora.rank and "
            "lora.alpha to these values, or make a full checkpoint of it with 'hildanext merge-topk --full'"
        )
    if lora.gate:
        targets = inject_gated(lm.model, lora, lm.mask_token_id, seed)
    else:
        targets = inject(lm.model, lora, lm.mask_token_id, seed, lm.edit_ids)
    lm.adapter = Injected(lora, targets)
    if loaded is not None:
        set_adapter(lm, values_of(lm.model, loaded, config.base))
    else:
        if lora.gate:
            lm.record["gate"] = {"causal": lora.causal_groups, "draft_head": lora.draft_head, "edits": False}
        base = str(Path(config.base).resolve()) if Path(config.base).exists() else config.base
        part = {"base": base, "revision": config.revision, "fingerprint": fingerprint_weights(config), "seed": seed}
        lm.record["adapter"] = part


@torch.no_grad()
def set_adapter(lm: DiffusionLM, values: dict[str, Tensor]) -> None:
    """Copy tensors, named as by `weights_of`, into the adapter that is being trained."""
    for name, parameter in trained_parameters(lm.model).items():
        parameter.copy_(values[name])


def _assemble(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_id: int, block: int | None, record: dict[str, Any]
) -> DiffusionLM:
    return DiffusionLM(
        model, tokenizer, mask_token_id=mask_id, block_size=block, convention=record["convention"], record=record
    )


def weights_of(lm: DiffusionLM) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores, by name: those of the adapter in training, or else all weights."""
    return trained_parameters(lm.model) if lm.adapter is not None else lm.model.state_dict()


def save_diffusion_lm(lm: DiffusionLM, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder (safetensors) that `AutoModelForCausalLM` loads. The write is not atomic.

    With an adapter in training, the folder holds the adapter in peft's format instead of the weights. config.json gets
    block_size, mask_token_id, the ids of DELETE and INSERT, the section `hilda`, and both `rope_theta` and `rope_parameters`.
    weights: unsharded tensors, named as by `weights_of`; by default the model's own.
    """
    config = lm.model.config
    config.block_size = lm.block_size
    config.mask_token_id = lm.mask_token_id
    if lm.edit_tokens is not None:  # by SGLang's names
        config.delete_token_id, config.split_token_id = lm.edit_ids
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
        known, (lora, targets) = lm.record["adapter"], lm.adapter
        settings = peft_settings(lm.model, targets, lora.dropout, known["base"], known["revision"])
        write_adapter(folder, collect(lm.model, weights or weights_of(lm), lora.scaling), settings)
    lm.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.pop("quantization_config", None)  # of this training only; the adapter also fits the unquantized base
    rope = stored.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has parameters for each kind of layer
    if "rope_theta" in rope:
        # transformers 5 writes rope_parameters only. Other readers would fall back to a rope_theta of 10,000.
        stored["rope_theta"] = rope["rope_theta"]
    write_json(path, stored)


@contextlib.contextmanager
def _folder_in(place: Path) -> Iterator[str]:
    """A temporary folder in `place`, which is removed as well if it did not exist."""
    is_new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=place) as folder:
            yield folder
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # another process put something there
                place.rmdir()


def check_loadable(lm: DiffusionLM, config: ModelConfig, place: Path) -> None:
    """Save a model that is to be trained, without weights, and read it back as a checkpoint is read.

    config: what `lm` was loaded from. place: a folder for the temporary files; it need not exist. Raises ModelError
    if that fails or gives another tokenizer or other shapes.
    """
    with _folder_in(place) as folder:
        source = config.model_copy(update={"base": folder, "revision": None})
        try:
            save_diffusion_lm(lm, Path(folder), {})
            stored = read_config_dict(source)
            _check_tokenizer(source, load_tokenizer(source), stored, stored["hilda"], lm.model)
            found = weight_shapes(source) if lm.adapter is None else {}
        except (HildaError, ValueError) as error:  # ValueError: transformers refuses to save its generation config
            reason = str(error).replace(folder, config.base).splitlines()[0]
            raise ModelError(
                f"model '{config.base}': its checkpoints could not be loaded after training: {reason}"
            ) from None
    own = {name: weight.shape for name, weight in lm.model.state_dict().items()} if lm.adapter is None else {}
    if odd := sorted(name for name in {*own, *found} if own.get(name) != found.get(name)):
        raise ModelError(
            f"model '{config.base}': its checkpoints could not be loaded after training: '{odd[0]}' would have the shape "
            f"{found.get(odd[0])} instead of {own.get(odd[0])}"
        )
