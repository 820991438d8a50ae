"""Where documents come from and how they become rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hildanext.config.section import Section


class SourceConfig(Section):
    kind: Literal["dolma", "pretokenized", "tinystories", "instruct", "self"] = Field(
        description="dolma: a tree of .jsonl[.gz|.zst] with 'text'; pretokenized: 'dolma tokens' shards or JSONL with "
        "'input_ids'; tinystories: text, JSONL or parquet; instruct: messages, Alpaca or GSM8K shapes; self: prompts that "
        "the base model answers or continues (prepare-data writes its text to data/self)."
    )
    path: str | None = Field(
        None,
        description="File, folder, glob (** for any depth) or URL of these: hf://datasets/OWNER/NAME/..., s3://, gs://, "
        "https:// or another that fsspec opens. tinystories also takes null (the seeded synthetic stories) or 'hub' (a download).",
    )
    max_documents: int | None = Field(None, ge=1, description="Read at most this many documents; null reads all.")
    into: list[Literal["train", "sft"]] | None = Field(
        None,
        min_length=1,
        description="Splits it feeds: 'train' (conversion; every token supervised), 'sft' (responses supervised). null: instruct feeds sft, the rest train.",
    )
    weight: float | None = Field(
        None,
        gt=0.0,
        description="Share of this source in the text of a split (in bytes of UTF-8), relative to the other sources' weights; "
        "the split ends where a source runs dry. All sources of a split have one, or none has: then each is read to its end.",
    )
    max_epochs: int = Field(1, ge=1, description="With a weight: how often the source is read before it counts as dry.")
    documents: int = Field(2000, ge=1, description="How many synthetic stories to write when tinystories has no path.")
    dtype: Literal["uint16", "uint32"] = Field("uint16", description="Integer type of pretokenized .npy shards.")
    max_new_tokens: int = Field(256, ge=1, description="self: tokens of an answer at most.")
    temperature: float = Field(0.0, ge=0.0, description="self: 0 is greedy, which a small model learns from fastest.")
    cut_repeats: int | None = Field(
        None,
        ge=2,
        description="self: cut an answer where it begins to say as many tokens again as it has said before; greedy models go round in circles.",
    )
    batch: int = Field(32, ge=1, description="self: prompts answered side by side.")

    @model_validator(mode="after")
    def _needs_path(self) -> SourceConfig:
        if self.path is None and self.kind != "tinystories":
            raise ValueError(f"a '{self.kind}' source needs 'path'")
        if self.into is not None and "sft" in self.into and self.kind not in ("instruct", "self"):
            raise ValueError(f"a '{self.kind}' source has no responses to supervise; 'into' can only be ['train']")
        if self.max_epochs > 1 and self.weight is None:
            raise ValueError("'max_epochs' needs 'weight'")
        return self

    @property
    def splits(self) -> list[Literal["train", "sft"]]:
        """The splits this source feeds, the default of its kind resolved."""
        return self.into or (["sft"] if self.kind == "instruct" else ["train"])


class DataConfig(Section):
    """Sources, row length, what is held out."""

    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(kind="tinystories")],
        min_length=1,
        description="Where documents come from.",
    )
    mode: Literal["copy", "direct", "stream"] = Field(
        "copy",
        description="What reads the training text. copy: prepare-data, into data/processed. direct: tokenize, straight from "
        "the sources. stream: the training itself, straight from the sources; no row is written. Held-out text is always copied.",
    )
    shard_mb: float = Field(
        32.0,
        gt=0.0,
        le=256.0,
        description="Text packed together, in MB: a shard of tokenize, or the window in which a stream is shuffled. Memory grows with it.",
    )
    json_lines: bool | None = Field(
        None,
        description="Whether tokenize writes SPLIT.jsonl beside SPLIT.rows; null: up to 50 million tokens of rows.",
    )
    seq_len: int = Field(256, ge=8, le=1_048_576, description="Row length L in tokens.")
    eval_share: float = Field(
        0.02, ge=0.0, le=0.5, description="Share of documents held out, chosen by a hash of their text."
    )
    max_eval_documents: int = Field(
        2000,
        ge=1,
        description="At most this many held-out documents of each source are kept; the others are left out of training all the same.",
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
    workers: int = Field(1, ge=1, le=256, description="Processes that tokenize, also for a stream.")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for use in ("train", "sft"):
            feeding = [source for source in self.sources if use in source.splits]
            if len({source.weight is None for source in feeding}) > 1:
                raise ValueError(f"give each source that feeds '{use}' a weight, or none of them")
        if self.foreign_ids == "retokenize" and self.source_tokenizer is None:
            raise ValueError("foreign_ids 'retokenize' needs 'source_tokenizer'")
        return self
