"""tokenize: data/processed into packed rows, as JSON lines to read and as memory maps to train on."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hildanext import __version__
from hildanext.chunks import Job, encode_file
from hildanext.config import Config
from hildanext.documents import Encoded, Rejects, fingerprint, pad_id
from hildanext.errors import DataError, UsageError
from hildanext.files import atomic_open, replace_together, sha256_of, workspace, write_json
from hildanext.packing import Row, pack
from hildanext.prepare import SPLITS
from hildanext.progress import progress, say
from hildanext.rows import RowWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write `{paths.data}/tokenized/SPLIT.jsonl` and `SPLIT.rows/` for each split of data/processed, and `manifest.json`.

    A JSON line holds a row's `input_ids`, `doc_ids` and, for SFT, `response_mask`; `SPLIT.rows` (see `rows`) holds the
    same and a `meta.json`. The files are the same for any number of workers. Returns the manifest with every meta.
    Raises UsageError without processed files; DataError for foreign ids, too many rejected documents, or no document;
    then, as after any other failure, what stood there before still stands.
    """
    data = Path(config.paths.data)
    found = {split: data / "processed" / f"{split}.jsonl" for split in SPLITS}
    sources = {split: path for split, path in found.items() if path.is_file()}
    if not sources:
        raise UsageError(f"{data / 'processed'}: no processed files; run 'hildanext prepare-data' first")
    named = {"tokenizer": fingerprint(tokenizer), "tokenizer_name": tokenizer.name_or_path}
    source_tokenizer = _source_tokenizer(config)
    metas: dict[str, Any] = {}
    with workspace(data, "tokenize") as folder:
        for split, path in sources.items():
            job = _job(config, split, tokenizer, source_tokenizer)
            with RowWriter(folder / f"{split}.rows") as rows:
                meta = _write_rows(path, job, config, folder / f"{split}.jsonl", rows)
                metas[split] = named | meta
                rows.finish(metas[split])
        if not any(meta["documents"] for meta in metas.values()):
            raise DataError(f"{data / 'processed'}: no document in any split; run 'hildanext prepare-data' again")
        manifest = {"version": __version__, "splits": metas}
        write_json(folder / "manifest.json", manifest)
        target = data / "tokenized"
        target.mkdir(exist_ok=True)
        names = [f"{split}.{form}" for split in sources for form in ("jsonl", "rows")]
        replace_together([(folder / name, target / name) for name in [*names, "manifest.json"]])
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """The manifest in a line a split, for people."""
    return "\n".join(
        f"{split}: {meta['rows']} rows of {meta['seq_len']} tokens ({meta['padding_share']:.1%} padding), {meta['tokens']} tokens "
        f"({meta['supervised']} supervised), {meta['documents']} documents ({meta['cut_documents']} longer than a row)"
        for split, meta in manifest["splits"].items()
    )


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


def _job(
    config: Config, split: str, tokenizer: PreTrainedTokenizerBase, source_tokenizer: PreTrainedTokenizerBase | None
) -> Job:
    """Conversion supervises every token; SFT the responses, filled to whole blocks."""
    sft = split.startswith("sft_")
    return Job(
        tokenizer,
        all_tokens=not sft,
        seq_len=config.data.seq_len,
        block_size=(config.sft.block_size or config.wsd.final_block) if sft else None,
        foreign_ids=config.data.foreign_ids,
        source_tokenizer=source_tokenizer,
    )


@dataclass
class Tally:
    """What a split's documents came to."""

    rejects: Rejects = field(default_factory=Rejects)
    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: int = 0  # documents longer than a row
    given_ids: int = 0
    unknown_ids: int = 0
    tools_as_text: int = 0


def _encode(path: Path, job: Job, workers: int, tally: Tally) -> Generator[Encoded, None, None]:
    """The encoded documents of a processed file in its order, counted in `tally` as they come."""
    lines = 0
    with progress(f"tokenize {path.stem}", path.stat().st_size / 1e6, "MB") as advance:
        for chunk in encode_file(path, job, workers):
            for reason, line in chunk.rejects:
                tally.rejects.add(reason, path, lines + line)
            lines += chunk.lines
            tally.documents += len(chunk.lengths)
            tally.tokens += len(chunk.input_ids)
            tally.supervised += int(chunk.loss_mask.sum())
            tally.cut += int((chunk.lengths > job.seq_len).sum())
            tally.given_ids += chunk.given_ids
            tally.unknown_ids += chunk.unknown_ids
            tally.tools_as_text += chunk.tools_as_text
            yield from chunk.documents()
            advance((chunk.span.offset + chunk.span.size) / 1e6)


def _write_rows(path: Path, job: Job, config: Config, jsonl: Path, rows: RowWriter) -> dict[str, Any]:
    """Encode, pack and write one split in both forms; returns its meta. Raises DataError above the allowed shares."""
    tally = Tally()
    with (
        closing(_encode(path, job, config.data.workers, tally)) as documents,
        atomic_open(jsonl) as file,
    ):
        for row in pack(documents, job.seq_len, pad_id(job.tokenizer)):
            rows.write(row)
            file.write(_line(row, with_mask=not job.all_tokens))
    tally.rejects.check(tally.documents, config.data.max_reject_share)
    if tally.unknown_ids > config.data.max_unk_share * tally.given_ids:
        raise DataError(
            f"{path}: {tally.unknown_ids} of {tally.given_ids} pretokenized ids are not in the tokenizer, above "
            f"data.max_unk_share {config.data.max_unk_share:g}; set data.foreign_ids to 'retokenize'"
        )
    _warn(path, tally)
    return {
        "rows": rows.count,
        "seq_len": job.seq_len,
        "documents": tally.documents,
        "tokens": tally.tokens,
        "supervised": tally.supervised,
        "padding_share": rows.padding / max(rows.count * job.seq_len, 1),
        "cut_documents": tally.cut,
        "block_size": job.block_size,
        "foreign_ids": job.foreign_ids,
        "unknown_ids": tally.unknown_ids,
        "tools_as_text": tally.tools_as_text,
        "rejects": tally.rejects.to_dict(),
        "source_sha256": sha256_of(path),
    }


def _line(row: Row, with_mask: bool) -> str:
    mask = f',"response_mask":{_runs(row.loss_mask)}' if with_mask else ""
    ids = json.dumps(row.input_ids.tolist(), separators=(",", ":"))
    return f'{{"input_ids":{ids},"doc_ids":{_runs(row.doc_ids)}{mask}}}\n'


def _runs(values: np.ndarray) -> str:
    """An array of few long runs as a JSON list of integers; formatting each number would take longer than packing."""
    starts = np.flatnonzero(np.diff(values, prepend=values[0])).tolist()
    ends = zip([0, *starts], [*starts, len(values)], strict=True)
    return f"[{''.join(f'{int(values[start])},' * (end - start) for start, end in ends)[:-1]}]"


def _warn(path: Path, tally: Tally) -> None:
    """Say what was accepted but is worth knowing."""
    if tally.rejects.total:
        say(f"tokenize: {tally.rejects.total} documents rejected: {tally.rejects}")
    if tally.unknown_ids:
        say(f"tokenize: {path}: {tally.unknown_ids} of {tally.given_ids} ids replaced by the unknown token")
    if tally.tools_as_text:
        say(
            f"tokenize: {path}: the chat template knows no tools; {tally.tools_as_text} conversations have them as text"
        )
