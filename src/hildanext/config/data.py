"""Data sources, and how their documents become packed rows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hildanext.config.decoding import Temperature
from hildanext.config.section import Section


class SourceConfig(Section):
    """One source of documents."""

    kind: Literal["dolma", "text", "pretokenized", "tinystories", "instruct", "self"] = Field(
        description="Format of the source. 'dolma': .jsonl[.gz|.zst] files with 'text'; 'text': a column of "
        "parquet, Arrow, Feather or JSON files, or plain text files; 'pretokenized': dolma token shards or JSONL with "
        "'input_ids'; 'tinystories': text, JSONL or parquet; 'instruct': chat messages, Alpaca or GSM8K records in JSON, "
        "parquet or Arrow files; 'self': prompts that prepare-data lets the base model answer (results in data/self)."
    )
    path: str | None = Field(
        None,
        description="File, folder, glob pattern (** matches folders at any depth) or fsspec URL such as "
        "hf://datasets/..., s3:// or https://. Required except for 'tinystories', where null generates synthetic "
        "stories and 'hub' downloads the data set.",
    )
    column: str = Field(
        "text",
        min_length=1,
        description="Column or key that holds the text, nested ones by path, for example 'meta.text' or 'pages.0.text' "
        "(of the first page). Applies to 'text'.",
    )
    max_documents: int | None = Field(
        None, ge=1, description="Maximum number of documents read from this source. null reads all of them."
    )
    into: list[Literal["train", "sft"]] | None = Field(
        None,
        min_length=1,
        description="Splits that receive the documents: 'train' (conversion, every token supervised) and 'sft' (only "
        "responses supervised). null means ['sft'] for 'instruct' and ['train'] for other kinds.",
    )
    weight: float | None = Field(
        None,
        gt=0.0,
        description="Share of this source in the split's text (UTF-8 bytes), relative to the weights of the other "
        "sources. Set it for all sources of a split or for none; null reads each source once, completely.",
    )
    max_epochs: int = Field(
        1,
        ge=1,
        description="Maximum number of times a source with a weight is read. The split ends when one of its sources "
        "is used up.",
    )
    documents: int = Field(
        2000, ge=1, description="Number of synthetic stories to generate. Applies to 'tinystories' without a path."
    )
    dtype: Literal["uint16", "uint32"] = Field(
        "uint16", description="Integer type of the token ids in .npy shards. Applies to 'pretokenized'."
    )
    max_new_tokens: int = Field(
        256, ge=1, description="Maximum length of a generated answer in tokens. Applies to 'self'."
    )
    temperature: Temperature = Field(
        0.0,
        description="Sampling temperature of the generated answers; 0 is greedy. Small models learn fastest from "
        "greedy answers. Applies to 'self'.",
    )
    cut_repeats: int | None = Field(
        None,
        ge=2,
        description="Truncate an answer at the first repeated sequence of this many tokens; null keeps repetitions. "
        "Useful with greedy answers. Applies to 'self'.",
    )
    batch: int = Field(32, ge=1, description="Number of prompts answered at the same time. Applies to 'self'.")

    @model_validator(mode="after")
    def _needs_path(self) -> SourceConfig:
        if self.path is None and self.kind != "tinystories":
            raise ValueError(f"'path': a '{self.kind}' source needs 'path'; set it to a file, folder, glob or URL")
        if self.into is not None and "sft" in self.into and self.kind not in ("instruct", "self"):
            raise ValueError(f"'into': a '{self.kind}' source has no responses to supervise; use ['train']")
        if self.max_epochs > 1 and self.weight is None:
            raise ValueError("'max_epochs': values above 1 need a weight; set 'weight'")
        return self

    @model_serializer(mode="wrap")
    def _without_column(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave 'column' out for other kinds, so that records of runs and rows equal those from before it existed."""
        fields: dict[str, Any] = dump(self)
        return fields if self.kind == "text" else {key: value for key, value in fields.items() if key != "column"}

    @property
    def splits(self) -> list[Literal["train", "sft"]]:
        """The splits this source feeds, the default of its kind resolved."""
        return self.into or (["sft"] if self.kind == "instruct" else ["train"])


class DataConfig(Section):
    """Data sources, row length and held-out documents."""

    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(kind="tinystories")],
        min_length=1,
        description="List of document sources.",
    )
    mode: Literal["copy", "direct", "stream"] = Field(
        "copy",
        description="Path of the training text. 'copy': prepare-data copies it to data/processed; 'direct': tokenize "
        "reads the sources; 'stream': training reads the sources and writes no rows. Held-out text is copied in every "
        "mode.",
    )
    shard_mb: float = Field(
        32.0,
        gt=0.0,
        le=256.0,
        description="Megabytes of text packed together: the size of a shard, or of the shuffle window of a stream. "
        "Larger values shuffle a stream better and use more memory.",
    )
    json_lines: bool | None = Field(
        None,
        description="Write rows as JSON lines (SPLIT.jsonl) in addition to SPLIT.rows. null writes them up to 50 "
        "million tokens.",
    )
    seq_len: int = Field(
        256,
        ge=8,
        le=1_048_576,
        description="Row length in tokens. Memory and compute of a step grow with it; run tokenize again after a "
        "change.",
    )
    eval_share: float = Field(
        0.02,
        ge=0.0,
        le=0.5,
        description="Share of documents held out for evaluation, chosen by a hash of their text. 0 holds out none.",
    )
    max_eval_documents: int = Field(
        2000,
        ge=1,
        description="Maximum number of held-out documents kept per source. Held-out documents beyond it are "
        "discarded, not trained on.",
    )
    max_reject_share: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="prepare-data fails when a larger share of records is unreadable. Raise it only for sources with "
        "known defects.",
    )
    foreign_ids: Literal["error", "unk", "retokenize"] = Field(
        "error",
        description="Handling of pretokenized ids that are not in the tokenizer: 'error' stops, 'unk' replaces them, "
        "'retokenize' decodes them with source_tokenizer and encodes the text again.",
    )
    source_tokenizer: str | None = Field(
        None,
        description="Folder or hub name of the tokenizer that produced the ids. Required by foreign_ids 'retokenize'.",
    )
    max_unk_share: float = Field(
        0.001,
        ge=0.0,
        le=1.0,
        description="With foreign_ids 'unk', tokenize fails when a larger share of ids is replaced.",
    )
    workers: int = Field(1, ge=1, le=256, description="Number of tokenizer processes, for tokenize and for streams.")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for use in ("train", "sft"):
            feeding = [source for source in self.sources if use in source.splits]
            if len({source.weight is None for source in feeding}) > 1:
                raise ValueError(
                    f"'sources': some sources of '{use}' have a weight and others do not; give each of them a weight, "
                    "or none of them"
                )
        if self.foreign_ids == "retokenize" and self.source_tokenizer is None:
            raise ValueError("'source_tokenizer': required by foreign_ids 'retokenize'; set a folder or hub name")
        return self
