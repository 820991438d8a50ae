"""Export in SDAR's layout, which SGLang and LMDeploy load: a Qwen3 that predicts in place, dense or with experts.

Both servers take the mask token's id from their own code, 151669, and the block size from their options. Neither keeps
ids without a token out of a text, so each such id gets the mean row of the head: its logit is then the mean of the
others, which is never above the largest of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hildanext.config import Mode, ModelConfig
from hildanext.data.tokenizer import fingerprint, token_ids
from hildanext.decoding.settings import Settings
from hildanext.errors import ModelError, UsageError
from hildanext.export.source import (
    EDIT_TOKENS,
    Checkpoint,
    copy_files,
    never_decoded,
    other_files,
    require_servable,
    require_space,
)
from hildanext.export.weights import CHUNK, Rows, Stored, by_file, mean_row, read_rows, write_shards
from hildanext.files import atomic_open, new_folder, write_json
from hildanext.model.pretrained import load_tokenizer

TARGET = "SGLang and LMDeploy"
SERVED_MASK_ID = 151669  # in SGLang's dllm/config.py and LMDeploy's configurations/sdar.py
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
REMOTE = Path(__file__).parent / "remote"


class Layout(NamedTuple):
    """What the servers and the exported code call an architecture."""

    model_type: str
    prefix: str  # of the classes


LAYOUTS = {"Qwen3ForCausalLM": Layout("sdar", "SDAR"), "Qwen3MoeForCausalLM": Layout("sdar_moe", "SDARMoe")}
MODES: tuple[Mode, ...] = ("Q_MODE", "S_MODE")
COPIED = (  # keys of a Qwen3's config.json that the servers read
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("attention_bias", "attention_dropout"),
)
COPIED_IF_THERE = (  # the first one of a dense Qwen3, the others of one with experts
    *("max_window_layers", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"),
    *("mlp_only_layers", "output_router_logits", "router_aux_loss_coef"),
)


def export_sdar(checkpoint: Checkpoint, out: Path, served_mask_id: int = SERVED_MASK_ID) -> dict[str, Any]:
    """Write the new folder `out` atomically. Returns what was written: shards, bytes, and where the mask token went.

    served_mask_id: the id that the servers give the mask token. Raises UsageError for a model that they cannot serve and
    for an id that another token has, WriteError if there is no room.
    """
    require_servable(checkpoint, TARGET)
    config, mask_id = checkpoint.config, checkpoint.mask_token_id
    _require_qwen3(checkpoint)
    _require_free(checkpoint, served_mask_id)
    tensors = checkpoint.tensors()
    _require_tensors(checkpoint, tensors)
    shards = _shards(tensors)
    n_bytes = sum(stored.n_bytes for shard in shards for stored in shard.values())
    require_space(out, n_bytes + sum(path.stat().st_size for path in other_files(checkpoint)))
    with new_folder(out) as folder:
        copy_files(other_files(checkpoint, ("config.json", "README.md")), checkpoint.folder, folder)
        if mask_id != served_mask_id:
            _move_token(folder / "tokenizer.json", checkpoint.tokenizer, served_mask_id)
        tokenizer = load_tokenizer(_written(folder, config))
        hidden = never_decoded(tokenizer, served_mask_id, config["vocab_size"])
        write_shards(folder, shards, list(_changed(tensors, mask_id, served_mask_id, hidden)))
        copy_files([REMOTE / name for name in code_of(checkpoint)], REMOTE, folder)
        write_json(folder / "config.json", sdar_config(checkpoint, tokenizer, served_mask_id, hidden, tensors))
        eos = list(checkpoint.end_ids)
        write_json(folder / "generation_config.json", checkpoint.generation | {"eos_token_id": eos})
        for mode in MODES:
            with atomic_open(folder / yaml_name(mode)) as file:
                file.write(sglang_yaml(checkpoint.settings(mode)))
        with atomic_open(folder / "README.md") as file:
            file.write(card(checkpoint, out.name))
    return {"out": str(out), "shards": len(shards), "bytes": n_bytes, "mask_token_id": [mask_id, served_mask_id]}


def _require_qwen3(checkpoint: Checkpoint) -> None:
    """Raise UsageError unless SDAR's modelling code computes what the checkpoint's does."""
    config = checkpoint.config
    if checkpoint.architecture not in LAYOUTS:
        raise UsageError(
            f"'{checkpoint.folder}' is a {checkpoint.architecture}; {TARGET} serve block diffusion on Qwen3 only: "
            "convert a Qwen3 base, or use --to diffusers"
        )
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    for key, value, wanted in (
        ("hidden_act", config["hidden_act"], "silu"),
        ("use_sliding_window", config.get("use_sliding_window", False), False),
        ("rope_parameters.rope_type", rope, "default"),
        ("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1),
        ("mlp_only_layers", config.get("mlp_only_layers", []), []),
    ):
        if value != wanted:
            raise UsageError(
                f"'{checkpoint.folder}': {key} is {value!r}, which SDAR's layout does not have; only {wanted!r} can be served"
            )


def code_of(checkpoint: Checkpoint) -> list[str]:
    """The modelling code that travels with the weights."""
    kind = LAYOUTS[checkpoint.architecture].model_type
    return ["block_diffusion.py", f"configuration_{kind}.py", f"modeling_{kind}.py"]


def _require_free(checkpoint: Checkpoint, served_mask_id: int) -> None:
    """Raise UsageError if the mask token cannot have the id that the servers give it."""
    n_rows = checkpoint.config["vocab_size"]
    if checkpoint.mask_token_id == served_mask_id:
        return
    if served_mask_id >= n_rows:
        raise UsageError(
            f"'{checkpoint.folder}': {TARGET} fix the mask token at id {served_mask_id}, and the vocabulary has {n_rows} "
            "rows; convert a base with Qwen3's vocabulary"
        )
    if served_mask_id in token_ids(checkpoint.tokenizer):
        token = checkpoint.tokenizer.convert_ids_to_tokens(served_mask_id)
        raise UsageError(
            f"'{checkpoint.folder}': {TARGET} fix the mask token at id {served_mask_id}, which is the token {token!r} here; "
            "convert a base whose tokenizer leaves that id free"
        )


def _require_tensors(checkpoint: Checkpoint, tensors: dict[str, Stored]) -> None:
    """Raise ModelError unless the folder has the tensors that the servers look up."""
    tied = checkpoint.config.get("tie_word_embeddings", False)
    missing = [name for name in (EMBEDDING, "model.norm.weight") if name not in tensors]
    if not tied and HEAD not in tensors:
        missing.append(HEAD)
    if missing:
        raise ModelError(f"'{checkpoint.folder}': no tensor '{missing[0]}'; restore the checkpoint")


def _shards(tensors: dict[str, Stored]) -> list[dict[str, Stored]]:
    """The tensors of each file. A tied head becomes a copy of the embedding: SGLang looks `lm_head.weight` up."""
    shards = by_file(tensors)
    if HEAD not in tensors:
        shards[tensors[EMBEDDING].file][HEAD] = tensors[EMBEDDING]
    return list(shards.values())


def _changed(
    tensors: dict[str, Stored], mask_id: int, served_mask_id: int, hidden: list[tuple[int, int]]
) -> Iterator[Rows]:
    """The mask token's row at its new id, and the head's mean row at ids that no text may contain."""
    embedding = tensors[EMBEDDING]
    if mask_id != served_mask_id:
        yield Rows(EMBEDDING, served_mask_id, read_rows(embedding, mask_id, 1))
        yield Rows(EMBEDDING, mask_id, read_rows(embedding, served_mask_id, 1))
    head = tensors.get(HEAD, embedding)
    skipped = {mask_id, served_mask_id} | {i for start, stop in hidden for i in range(start, stop)}
    mean = mean_row(head, (i for i in range(head.shape[0]) if i not in skipped))
    step = max(1, CHUNK // head.row_bytes)
    for start, stop in hidden:
        for first in range(start, stop, step):
            yield Rows(HEAD, first, mean.float().expand(min(step, stop - first), -1))


def _move_token(path: Path, tokenizer: PreTrainedTokenizerBase, new_id: int) -> None:
    """Give the mask token another id in tokenizer.json."""
    content, parts = str(tokenizer.mask_token), json.loads(path.read_text(encoding="utf-8"))
    for token in parts["added_tokens"]:
        if token["content"] == content:
            token["id"] = new_id
    # An added token gets the next free id, whatever its entry says, unless the model's vocabulary lists it.
    parts["model"]["vocab"][content] = new_id
    write_json(path, parts)
    settings = path.with_name("tokenizer_config.json")
    stored = json.loads(settings.read_text(encoding="utf-8"))
    if stored.pop("added_tokens_decoder", None) is not None:  # tokenizer.json says the same
        write_json(settings, stored)


def _written(folder: Path, config: dict[str, Any]) -> ModelConfig:
    """The new folder as a model, for its tokenizer."""
    write_json(folder / "config.json", {"model_type": config["model_type"]})
    return ModelConfig(base=str(folder))


def sdar_config(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    served_mask_id: int,
    hidden: list[tuple[int, int]],
    tensors: dict[str, Stored],
) -> dict[str, Any]:
    """config.json of the exported folder."""
    config = checkpoint.config
    rope = config.get("rope_parameters") or {}
    dtype = str({"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}[tensors[EMBEDDING].dtype])
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    kind, prefix = LAYOUTS[checkpoint.architecture]
    experts = {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
    return {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": kind,
        "auto_map": {
            "AutoConfig": f"configuration_{kind}.{prefix}Config",
            "AutoModel": f"modeling_{kind}.{prefix}Model",
            "AutoModelForCausalLM": f"modeling_{kind}.{prefix}ForCausalLM",
        },
        **{key: config[key] for key in COPIED},
        **{key: config[key] for key in COPIED_IF_THERE if key in config},
        **experts,
        "rope_theta": rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"],
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "block_size": config["block_size"],
        "mask_token_id": served_mask_id,
        "never_decoded": hidden,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
        **{key: config[key] for key in EDIT_TOKENS if key in config},
        "tie_word_embeddings": False,
        "fuse_cross_entropy": True,
        "use_cache": True,
        "torch_dtype": dtype,
        "hilda": checkpoint.record | {"tokenizer": fingerprint(tokenizer)},
    }


def yaml_name(mode: Mode) -> str:
    return f"sglang-{mode.lower()}.yaml"


def sglang_yaml(settings: Settings) -> str:
    """Settings of SGLang's algorithm `JointThreshold`, which also `JointThresholdInDel` reads.

    SGLang edits with every change above `edit_threshold`; 0 takes every change, as tau_edit 0. Without editing
    (tau_edit null) there are no editing passes, and no probability is above 1.
    """
    editing = settings.tau_edit is not None
    return (
        f"block_size: {settings.block_size}\n"
        f"threshold: {settings.tau_mask}\n"
        f"edit_threshold: {settings.tau_edit if editing else 1.0}\n"
        f"max_post_edit_steps: {settings.max_post_steps if editing else 0}\n"
    )


def launch_commands(checkpoint: Checkpoint, folder: str, mode: Mode) -> list[str]:
    """The commands that start the servers on an exported folder: SGLang's, then LMDeploy's if it has the model's rule."""
    settings = checkpoint.settings(mode)
    algorithm = "JointThresholdInDel" if checkpoint.has_indels else "JointThreshold"
    sglang = (
        f"python -m sglang.launch_server --model-path {folder} --trust-remote-code --dtype bfloat16 "
        f"--dllm-algorithm {algorithm} --dllm-algorithm-config {folder}/{yaml_name(mode)}"
    )
    lmdeploy = (
        f"lmdeploy serve api_server {folder} --backend pytorch --trust-remote-code --dtype bfloat16 "
        f"--dllm-block-length {settings.block_size} --dllm-unmasking-strategy low_confidence_dynamic "
        f"--dllm-confidence-threshold {settings.tau_mask}"
    )
    return [sglang] if checkpoint.has_indels else [sglang, lmdeploy]


def card(checkpoint: Checkpoint, folder: str) -> str:
    """README.md of the exported folder."""
    commands = "\n\n".join(f"```\n{command}\n```" for command in launch_commands(checkpoint, folder, "Q_MODE"))
    code = " and ".join(f"`{name}`" for name in code_of(checkpoint)[1:]) + " and `block_diffusion.py`"
    lmdeploy = (
        "LMDeploy must not serve it: it would write the tokens that stand for insertions and deletions."
        if checkpoint.has_indels
        else "LMDeploy drafts only: it has no editing, and fills a mask whose probability equals the threshold, too."
    )
    editing = ", ".join(
        f"{mode}: threshold {found.tau_mask}, "
        + (
            "no editing"
            if found.tau_edit is None
            else f"edit threshold {found.tau_edit}, {found.max_post_steps} passes"
        )
        for mode, found in ((mode, checkpoint.settings(mode)) for mode in MODES)
    )
    return f"""# {checkpoint.base} as a block-diffusion model, in SDAR's layout

Converted and exported by HildaNext {checkpoint.record["version"]}. Blocks of {checkpoint.config["block_size"]} tokens, the
logits at a position predict the token at that position, mask token {SERVED_MASK_ID}.

{commands}

SGLang drafts and edits ({editing}). {lmdeploy} The block size must be the one above: the servers would take 4 otherwise.
Start the commands in the folder that contains this one.

In Python, `AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)` gives the logits of whole blocks.
{code} need torch and transformers 5.
"""
