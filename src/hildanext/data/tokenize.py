"""The tokenize command: packs documents into rows, written as shards for training and, for small data, as JSON lines.

A shard is one independently packed group of documents. Its record stores the reader state after the group, so an
interrupted run continues with the next shard and a damaged shard can be rebuilt alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hildanext import __version__
from hildanext.config import Config
from hildanext.data.corpus import PARTS, Use, find_sources, is_held_out, listing_sha256, written_order
from hildanext.data.documents import Document, numbered_documents
from hildanext.data.mixing import Mix, Reader
from hildanext.data.pipeline import Tally, read_groups
from hildanext.data.prepare import SPLITS
from hildanext.data.rows import Rows, write_meta
from hildanext.data.shards import read_records, write_shard
from hildanext.data.tokenizer import fingerprint, leading_ids
from hildanext.data.workers import Encoding
from hildanext.errors import DataError, UsageError
from hildanext.files import atomic_open, replace_together, sha256_of, write_json
from hildanext.progress import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Up to this many tokens, rows are also written as JSON lines (about 10 bytes per token).
JSON_LINES_TOKENS = 50_000_000


@dataclass(frozen=True)
class Split:
    """A split to tokenize. `plan` (JSON) holds everything its rows depend on: equal plans give equal rows."""

    name: str
    encoding: Encoding
    open_mix: Callable[[], Mix]
    keep: Callable[[Document], bool]
    origin: str  # path of the processed file or of the sources, for messages
    size: int | None  # bytes of text; None if unknown
    plan: dict[str, Any]


def tokenize_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write the rows of every split to `{paths.data}/tokenized`: `SPLIT.rows/`, `SPLIT.jsonl` and `manifest.json`.

    A JSON line holds a row's `input_ids`, `doc_ids` and, for SFT, `response_mask`; large splits have no JSON lines. The
    files do not depend on the number of workers. Shards of an interrupted run are reused if its input and settings are
    the same. Returns the manifest with the meta of every split. Raises UsageError without processed files, and
    DataError for foreign ids, too many rejected documents or no documents. On failure, existing output is left
    untouched.
    """
    data = Path(config.paths.data)
    work = data / ".tokenize"
    splits = find_splits(config, tokenizer)
    if (manifest := _complete(work, splits)) is not None:
        say(f"tokenize: an earlier run was interrupted while moving its files; moving the files of {work} now")
        _publish(work, data / "tokenized", manifest["splits"])
        return manifest
    try:
        metas = {split.name: _write_split(split, config, work / f"{split.name}.rows") for split in splits}
        if not any(meta["documents"] for meta in metas.values()):
            raise DataError(f"{', '.join(split.origin for split in splits)}: no documents in any split")
        manifest = {"version": __version__, "splits": metas}
        write_json(work / "manifest.json", manifest)
        _publish(work, data / "tokenized", metas)
    finally:
        if not any(work.rglob("shard-*.json")):
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def _complete(work: Path, splits: Sequence[Split]) -> dict[str, Any] | None:
    """The manifest of an interrupted run with the same plans that had only its files left to move; None otherwise."""
    if not (work / "manifest.json").is_file():
        return None
    manifest: dict[str, Any] = json.loads((work / "manifest.json").read_text(encoding="utf-8"))
    plans = {name: meta["plan"] for name, meta in manifest["splits"].items()}
    return manifest if plans == {split.name: split.plan for split in splits} else None


def _publish(work: Path, target: Path, metas: dict[str, Any]) -> None:
    """Move the finished files to `target`, all or none. After a kill in between, the next run completes the move."""
    target.mkdir(exist_ok=True)
    names = [f"{split}.{form}" for split in metas for form in ("rows", "jsonl")]
    moves = [(work / name, target / name) for name in [*names, "manifest.json"] if (work / name).exists()]
    replace_together(moves)
    for split, meta in metas.items():
        if not meta["json_lines"]:  # remove the JSON lines of earlier rows
            (target / f"{split}.jsonl").unlink(missing_ok=True)
    shutil.rmtree(work)


def summary(manifest: dict[str, Any]) -> str:
    """A readable summary of the manifest, one line per split."""
    return "\n".join(
        f"{split}: {meta['rows']} rows of {meta['seq_len']} tokens ({meta['padding_share']:.1%} padding), "
        f"{meta['tokens']} tokens ({meta['supervised']} supervised), "
        f"{meta['documents']} documents ({meta['cut_documents']} longer than a row), "
        f"{len(meta['shards'])} shards{'' if meta['json_lines'] else ', no JSON lines (data.json_lines)'}"
        for split, meta in manifest["splits"].items()
    )


def find_splits(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Split]:
    """The splits to tokenize under data.mode. Raises UsageError without processed files."""
    processed = Path(config.paths.data) / "processed"
    recorded = _recorded_hashes(processed / "manifest.json")
    source_tokenizer = _source_tokenizer(config)
    tokenizers = _tokenizer_plan(tokenizer, source_tokenizer)
    splits = []
    for use, (train, held_out) in PARTS.items():
        for name in (train, held_out):
            encoding = _encoding(config, name, tokenizer, source_tokenizer)
            plan = tokenizers | {
                "all_tokens": encoding.all_tokens,
                "seq_len": encoding.seq_len,
                "block_size": encoding.block_size,
                "foreign_ids": encoding.foreign_ids,
                "shard_mb": config.data.shard_mb,
            }
            if name == held_out or config.data.mode == "copy":
                if (path := processed / f"{name}.jsonl").is_file():
                    splits.append(_processed_split(name, path, encoding, plan, recorded))
            elif config.data.mode == "direct":
                splits.append(_direct_split(name, use, encoding, plan, config))
    if not any(split.size is not None for split in splits):
        raise UsageError(f"{processed}: no processed files; run 'hildanext prepare-data' first")
    return sorted(splits, key=lambda split: SPLITS.index(split.name))


def _recorded_hashes(manifest: Path) -> dict[str, str]:
    """SHA-256 of the processed files by name, as prepare-data recorded them; {} without a manifest."""
    if not manifest.is_file():
        return {}
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{manifest}: damaged; run 'hildanext prepare-data' again") from None


def _processed_split(
    name: str, path: Path, encoding: Encoding, plan: dict[str, Any], recorded: dict[str, str]
) -> Split:
    """The split of a processed file. Raises DataError when the file is not the one that prepare-data recorded."""
    digest = sha256_of(path)
    if recorded.get(path.name, digest) != digest:
        raise DataError(
            f"{path}: differs from the SHA-256 in manifest.json; run 'hildanext prepare-data' again, or delete "
            "manifest.json to use the file as it is"
        )
    return Split(
        name,
        encoding,
        open_mix=lambda: Mix([Reader(numbered_documents, [str(path)])], None),
        keep=lambda doc: True,
        origin=str(path),
        size=path.stat().st_size,
        plan=plan | {"origin": {"file": path.name, "sha256": digest}},
    )


def _direct_split(name: str, use: Use, encoding: Encoding, plan: dict[str, Any], config: Config) -> Split:
    sources = find_sources(config, use)
    share = config.data.eval_share
    origin = {
        "sources": [files.source.model_dump(mode="json") for files in sources],
        "files_sha256": listing_sha256(sources),
        "seed": config.train.seed,
        "eval_share": share,
    }
    return Split(
        name,
        encoding,
        open_mix=lambda: written_order(sources, config.train.seed),
        keep=lambda doc: not is_held_out(doc, share),
        origin=", ".join(str(files.source.path) for files in sources),
        size=None,
        plan=plan | {"origin": origin},
    )


def _tokenizer_plan(
    tokenizer: PreTrainedTokenizerBase, source_tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The part of a plan that identifies the tokenizers. Takes about a second for a large vocabulary."""
    special = [tokenizer.mask_token_id, tokenizer.unk_token_id, leading_ids(tokenizer), tokenizer.chat_template]
    return {
        "version": __version__,
        "tokenizer": fingerprint(tokenizer),
        "special_sha256": hashlib.sha256(json.dumps(special).encode()).hexdigest(),
        "source_tokenizer": None if source_tokenizer is None else fingerprint(source_tokenizer),
    }


def _source_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    name = config.data.source_tokenizer
    if config.data.foreign_ids != "retokenize" or name is None:
        return None
    from transformers import AutoTokenizer

    sys.audit("hildanext.model", name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"data.source_tokenizer '{name}' cannot be loaded: {reason}") from None


def make_encoding(config: Config, split: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """How to tokenize a split. Raises UsageError for a data.source_tokenizer that cannot be loaded."""
    return _encoding(config, split, tokenizer, _source_tokenizer(config))


def _encoding(
    config: Config,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer: PreTrainedTokenizerBase | None,
) -> Encoding:
    """Conversion supervises every token. SFT supervises responses and pads them to whole blocks."""
    sft = split.startswith("sft_")
    block_size = (config.sft.block_size or config.wsd.final_block) if sft else None
    data = config.data
    return Encoding(tokenizer, not sft, data.seq_len, block_size, data.foreign_ids, source_tokenizer)


def _write_split(split: Split, config: Config, folder: Path) -> dict[str, Any]:
    """Write the missing shards of a split, its meta and its JSON lines. Returns the meta."""
    records, mix = _resume(split, folder)
    done = sum(record["tally"]["size"] for record in records) / 1e6
    total = None if split.size is None else split.size / 1e6
    with (
        progress(f"tokenize {split.name}", total, "MB", done) as advance,
        closing(read_groups(mix, split.keep, split.encoding, config.data)) as groups,
    ):
        for group in groups:
            record = {"end": group.end, "tally": group.tally.to_dict()}
            records.append(write_shard(folder, len(records), group.rows, record))
            done += group.tally.size / 1e6
            advance(done)
        advance(total or done)
    meta = write_meta(folder, _meta(split, mix, records, config), records)
    if meta["json_lines"]:
        _write_json_lines(folder, with_mask=not split.encoding.all_tokens)
    return meta


def _resume(split: Split, folder: Path) -> tuple[list[dict[str, Any]], Mix]:
    """The records of shards that an interrupted run with the same plan left, and the mix, positioned after them."""
    mix, records = split.open_mix(), []
    plan = folder / "plan.json"
    if plan.is_file():
        if json.loads(plan.read_text(encoding="utf-8")) == split.plan:
            records = read_records(folder)
        else:
            say(f"tokenize {split.name}: the input or the settings changed; ignoring the shards in {folder}")
    if records:
        say(f"tokenize {split.name}: resuming after {len(records)} finished shards in {folder}")
        mix.restore(records[-1]["end"])
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(plan, split.plan)
    return records, mix


def _meta(split: Split, mix: Mix, records: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    """The `meta.json` of a split. Raises DataError for too many rejected documents or replaced ids."""
    tally = Tally()
    for record in records:
        tally.merge(record["tally"])
    # The readers also count held-out documents.
    accepted = sum(reader.documents for reader in mix.readers) - tally.rejects.total
    for reader in mix.readers:
        tally.rejects.merge(reader.rejects.to_dict())
    tally.rejects.check(accepted, config.data.max_reject_share)
    tally.check_unknown_ids(config.data.max_unk_share, split.origin)
    _warn(split.origin, tally)
    encoding = split.encoding
    row_tokens = sum(record["rows"] for record in records) * encoding.seq_len
    json_lines = config.data.json_lines
    return {
        "tokenizer": split.plan["tokenizer"],
        "tokenizer_name": encoding.tokenizer.name_or_path,
        "seq_len": encoding.seq_len,
        "documents": tally.documents,
        "tokens": tally.tokens,
        "supervised": tally.supervised,
        "padding_share": 1 - tally.tokens / max(row_tokens, 1) if row_tokens else 0.0,
        "cut_documents": tally.cut,
        "block_size": encoding.block_size,
        "foreign_ids": encoding.foreign_ids,
        "unknown_ids": tally.unknown_ids,
        "tools_as_text": tally.tools_as_text,
        "unread_fields": dict(tally.unread_fields),
        "rejects": tally.rejects.to_dict(),
        "json_lines": row_tokens <= JSON_LINES_TOKENS if json_lines is None else json_lines,
        "plan": split.plan,
    }


def _write_json_lines(folder: Path, with_mask: bool) -> None:
    """Write the rows of `SPLIT.rows` to `SPLIT.jsonl` beside it."""
    rows = Rows.open(folder)
    with atomic_open(folder.with_suffix(".jsonl")) as file:
        for index in range(len(rows)):
            row = rows.row(index)
            ids = json.dumps(row.input_ids.tolist(), separators=(",", ":"))
            mask = f',"response_mask":{_json_runs(row.loss_mask)}' if with_mask else ""
            file.write(f'{{"input_ids":{ids},"doc_ids":{_json_runs(row.doc_ids)}{mask}}}\n')


def _json_runs(values: np.ndarray) -> str:
    """An array of few long runs as a JSON list of integers. Formatting each run once is faster than each element."""
    starts = np.flatnonzero(np.diff(values, prepend=values[0])).tolist()
    ends = zip([0, *starts], [*starts, len(values)], strict=True)
    return f"[{''.join(f'{int(values[start])},' * (end - start) for start, end in ends)[:-1]}]"


def _warn(origin: str, tally: Tally) -> None:
    """Report rejected documents, replaced ids, tools written as text and fields that are not written."""
    if tally.rejects.total:
        say(f"tokenize: {tally.rejects.total} documents rejected: {tally.rejects}")
    if tally.unknown_ids:
        say(f"tokenize: {origin}: {tally.unknown_ids} of {tally.given_ids} ids replaced by the unknown token")
    if tally.tools_as_text:
        say(
            f"tokenize: {origin}: the chat template does not support tools; {tally.tools_as_text} conversations "
            "contain them as text"
        )
    if tally.unread_fields:
        fields = ", ".join(f"'{field}' of {count} conversations" for field, count in tally.unread_fields.most_common())
        say(f"tokenize: {origin}: the chat template does not write {fields}")
