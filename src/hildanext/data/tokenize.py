"""tokenize: documents into packed rows, in shards to train on and, while they are few, as JSON lines to read.

A shard is a group of documents, packed by itself; it notes where its documents end. So a killed run goes on with the
next shard, and a damaged shard is made again alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hildanext import __version__
from hildanext.config import Config
from hildanext.data.corpus import PARTS, Use, find_sources, is_held_out, listing_sha256, written_order
from hildanext.data.documents import Document, Rejects, numbered_documents
from hildanext.data.mixing import Mix, Reader
from hildanext.data.packing import Row
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

# Row tokens up to which rows are also written as JSON lines (some 10 bytes a token).
JSON_LINES_TOKENS = 50_000_000


@dataclass(frozen=True)
class Split:
    """A split to be tokenized. `plan` (JSON) is all that its rows depend on: with the same plan they come out the same."""

    name: str
    job: Encoding
    open_mix: Callable[[], Mix]
    keep: Callable[[Document], bool]
    origin: str  # the processed file, or what stands for the sources
    size: int | None  # bytes of text, where that is known
    plan: dict[str, Any]


def tokenize_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write `{paths.data}/tokenized/SPLIT.rows/` (see `shards`) for each split, `SPLIT.jsonl` while it is small, `manifest.json`.

    A JSON line holds a row's `input_ids`, `doc_ids` and, for SFT, `response_mask`. The files are the same for any number
    of workers. Finished shards of an interrupted run are used when they were made from the same input with the same
    settings. Returns the manifest with every meta. Raises UsageError without processed files; DataError for foreign ids,
    too many rejected documents, or no document; then, as after any other failure, what stood there before still stands.
    """
    data = Path(config.paths.data)
    work = data / ".tokenize"
    splits = find_splits(config, tokenizer)
    if (manifest := _complete(work, splits)) is not None:
        say(f"tokenize: {work} is complete; an earlier run was ended while it put its files in their place")
        _publish(work, data / "tokenized", manifest["splits"])
        return manifest
    try:
        metas = {split.name: _write_split(split, config, work / f"{split.name}.rows") for split in splits}
        if not any(meta["documents"] for meta in metas.values()):
            raise DataError(f"{', '.join(split.origin for split in splits)}: no document in any split")
        manifest = {"version": __version__, "splits": metas}
        write_json(work / "manifest.json", manifest)
        _publish(work, data / "tokenized", metas)
    finally:
        if not any(work.rglob("shard-*.json")):
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def _complete(work: Path, splits: Sequence[Split]) -> dict[str, Any] | None:
    """The manifest of an earlier run of the same plans that had nothing left to do but to move its files."""
    if not (work / "manifest.json").is_file():
        return None
    manifest: dict[str, Any] = json.loads((work / "manifest.json").read_text(encoding="utf-8"))
    plans = {name: meta["plan"] for name, meta in manifest["splits"].items()}
    return manifest if plans == {split.name: split.plan for split in splits} else None


def _publish(work: Path, target: Path, metas: dict[str, Any]) -> None:
    """Move what is complete to its place, all or nothing; a run killed in the middle is finished by the next one."""
    target.mkdir(exist_ok=True)
    names = [f"{split}.{form}" for split in metas for form in ("rows", "jsonl")]
    moves = [(work / name, target / name) for name in [*names, "manifest.json"] if (work / name).exists()]
    replace_together(moves)
    for split, meta in metas.items():
        if not meta["json_lines"]:  # those of earlier rows
            (target / f"{split}.jsonl").unlink(missing_ok=True)
    shutil.rmtree(work)


def summary(manifest: dict[str, Any]) -> str:
    """The manifest in a line a split, for people."""
    return "\n".join(
        f"{split}: {meta['rows']} rows of {meta['seq_len']} tokens ({meta['padding_share']:.1%} padding), {meta['tokens']} tokens "
        f"({meta['supervised']} supervised), {meta['documents']} documents ({meta['cut_documents']} longer than a row), "
        f"{len(meta['shards'])} shards{'' if meta['json_lines'] else ', no JSON lines (data.json_lines)'}"
        for split, meta in manifest["splits"].items()
    )


def find_splits(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Split]:
    """The splits that data.mode has tokenized. Raises UsageError without processed files."""
    processed = Path(config.paths.data) / "processed"
    base = make_job(config, "train", tokenizer)
    known = _tokenizers(base)
    splits = []
    for use, (train, held_out) in PARTS.items():
        for name in (train, held_out):
            job = _for_split(base, config, name)
            plan = known | _settings(job, config)
            if name == held_out or config.data.mode == "copy":
                if (path := processed / f"{name}.jsonl").is_file():
                    splits.append(_processed_split(name, path, job, plan))
            elif config.data.mode == "direct":
                splits.append(_direct_split(name, use, job, plan, config))
    if not any(split.size is not None for split in splits):
        raise UsageError(f"{processed}: no processed files; run 'hildanext prepare-data' first")
    return sorted(splits, key=lambda split: SPLITS.index(split.name))


def _processed_split(name: str, path: Path, job: Encoding, plan: dict[str, Any]) -> Split:
    plan = plan | {"origin": {"file": path.name, "sha256": sha256_of(path)}}
    return Split(name, job, partial(_file_mix, str(path)), _keep_all, str(path), path.stat().st_size, plan)


def _file_mix(path: str) -> Mix:
    return Mix([Reader(numbered_documents, [path])], None)


def _keep_all(doc: Document) -> bool:
    return True


def _direct_split(name: str, use: Use, job: Encoding, plan: dict[str, Any], config: Config) -> Split:
    found = find_sources(config, use)
    share = config.data.eval_share
    origin = {
        "sources": [one.source.model_dump(mode="json") for one in found],
        "files_sha256": listing_sha256(found),
        "seed": config.train.seed,
        "eval_share": share,
    }
    return Split(
        name,
        job,
        lambda: written_order(found, config.train.seed),
        lambda doc: not is_held_out(doc, share),
        ", ".join(str(one.source.path) for one in found),
        None,
        plan | {"origin": origin},
    )


def _tokenizers(job: Encoding) -> dict[str, Any]:
    """The part of a plan that names the tokenizers; it takes a second for a large vocabulary."""
    tokenizer = job.tokenizer
    special = [tokenizer.mask_token_id, tokenizer.unk_token_id, leading_ids(tokenizer), tokenizer.chat_template]
    return {
        "version": __version__,
        "tokenizer": fingerprint(tokenizer),
        "special_sha256": hashlib.sha256(json.dumps(special).encode()).hexdigest(),
        "source_tokenizer": None if job.source_tokenizer is None else fingerprint(job.source_tokenizer),
    }


def _settings(job: Encoding, config: Config) -> dict[str, Any]:
    return {
        "all_tokens": job.all_tokens,
        "seq_len": job.seq_len,
        "block_size": job.block_size,
        "foreign_ids": job.foreign_ids,
        "shard_mb": config.data.shard_mb,
    }


def _source_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    name = config.data.source_tokenizer
    if config.data.foreign_ids != "retokenize" or name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"data.source_tokenizer '{name}' cannot be loaded: {reason}") from None


def make_job(config: Config, split: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """How documents of a split become tokens. Raises UsageError for a source tokenizer that cannot be loaded."""
    source_tokenizer = _source_tokenizer(config)
    job = Encoding(tokenizer, True, config.data.seq_len, None, config.data.foreign_ids, source_tokenizer)
    return _for_split(job, config, split)


def _for_split(job: Encoding, config: Config, split: str) -> Encoding:
    """Conversion supervises every token; SFT the responses, filled to whole blocks."""
    sft = split.startswith("sft_")
    block_size = (config.sft.block_size or config.wsd.final_block) if sft else None
    return replace(job, all_tokens=not sft, block_size=block_size)


def group_bytes(config: Config) -> int:
    """Text of a group in bytes."""
    return round(config.data.shard_mb * 1e6)


def _write_split(split: Split, config: Config, folder: Path) -> dict[str, Any]:
    """Write the shards of a split that are not there yet, its meta and its JSON lines; returns the meta."""
    records, mix = _begin(split, folder)
    done = sum(record["tally"]["size"] for record in records) / 1e6
    total = None if split.size is None else split.size / 1e6
    with (
        progress(f"tokenize {split.name}", total, "MB", done) as advance,
        closing(read_groups(mix, split.keep, split.job, group_bytes(config), config.data.workers)) as groups,
    ):
        for group in groups:
            record = {"end": group.end, "tally": group.tally.to_dict()}
            records.append(write_shard(folder, len(records), group.rows, record))
            done += group.tally.size / 1e6
            advance(done)
        advance(total or done)
    meta = write_meta(folder, _meta(split, mix, records, config), records)
    if meta["json_lines"]:
        _write_json_lines(folder, with_mask=not split.job.all_tokens)
    return meta


def _begin(split: Split, folder: Path) -> tuple[list[dict[str, Any]], Mix]:
    """Records of the shards that an interrupted run left for the same plan, and the mix where they end."""
    mix, records = split.open_mix(), []
    plan = folder / "plan.json"
    if plan.is_file():
        if json.loads(plan.read_text(encoding="utf-8")) == split.plan:
            records = read_records(folder)
        else:
            say(f"tokenize {split.name}: the input or the settings changed; what {folder} holds is not used")
    if records:
        say(f"tokenize {split.name}: {len(records)} finished shards in {folder}; going on after them")
        mix.restore(records[-1]["end"])
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(plan, split.plan)
    return records, mix


def _meta(split: Split, mix: Mix, records: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    """What the documents of a split came to. Raises DataError above the allowed shares."""
    tally, read = Tally(), Rejects()
    for record in records:
        tally.merge(record["tally"])
    for reader in mix.readers:
        read.merge(reader.rejects.to_dict())
    # Held-out documents were read as well.
    accepted = sum(reader.documents for reader in mix.readers) - tally.rejects.total
    tally.rejects.merge(read.to_dict())
    tally.rejects.check(accepted, config.data.max_reject_share)
    if tally.unknown_ids > config.data.max_unk_share * tally.given_ids:
        raise DataError(
            f"{split.origin}: {tally.unknown_ids} of {tally.given_ids} pretokenized ids are not in the tokenizer, above "
            f"data.max_unk_share {config.data.max_unk_share:g}; set data.foreign_ids to 'retokenize'"
        )
    _warn(split.origin, tally)
    job = split.job
    row_tokens = sum(record["rows"] for record in records) * job.seq_len
    json_lines = config.data.json_lines
    return {
        "tokenizer": split.plan["tokenizer"],
        "tokenizer_name": job.tokenizer.name_or_path,
        "seq_len": job.seq_len,
        "documents": tally.documents,
        "tokens": tally.tokens,
        "supervised": tally.supervised,
        "padding_share": 1 - tally.tokens / max(row_tokens, 1) if row_tokens else 0.0,
        "cut_documents": tally.cut,
        "block_size": job.block_size,
        "foreign_ids": job.foreign_ids,
        "unknown_ids": tally.unknown_ids,
        "tools_as_text": tally.tools_as_text,
        "rejects": tally.rejects.to_dict(),
        "json_lines": row_tokens <= JSON_LINES_TOKENS if json_lines is None else json_lines,
        "plan": split.plan,
    }


def _write_json_lines(folder: Path, with_mask: bool) -> None:
    """The rows of a folder as `SPLIT.jsonl` beside it."""
    rows = Rows.open(folder)
    with atomic_open(folder.with_suffix(".jsonl")) as file:
        file.writelines(_line(rows.row(index), with_mask) for index in range(len(rows)))


def _line(row: Row, with_mask: bool) -> str:
    mask = f',"response_mask":{_runs(row.loss_mask)}' if with_mask else ""
    ids = json.dumps(row.input_ids.tolist(), separators=(",", ":"))
    return f'{{"input_ids":{ids},"doc_ids":{_runs(row.doc_ids)}{mask}}}\n'


def _runs(values: np.ndarray) -> str:
    """An array of few long runs as a JSON list of integers; formatting each number would take longer than packing."""
    starts = np.flatnonzero(np.diff(values, prepend=values[0])).tolist()
    ends = zip([0, *starts], [*starts, len(values)], strict=True)
    return f"[{''.join(f'{int(values[start])},' * (end - start) for start, end in ends)[:-1]}]"


def _warn(origin: str, tally: Tally) -> None:
    """Say what was accepted but is worth knowing."""
    if tally.rejects.total:
        say(f"tokenize: {tally.rejects.total} documents rejected: {tally.rejects}")
    if tally.unknown_ids:
        say(f"tokenize: {origin}: {tally.unknown_ids} of {tally.given_ids} ids replaced by the unknown token")
    if tally.tools_as_text:
        say(
            f"tokenize: {origin}: the chat template knows no tools; {tally.tools_as_text} conversations have them as text"
        )
