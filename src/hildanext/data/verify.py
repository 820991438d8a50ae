"""tokenize --verify: checks every shard against its checksum and rebuilds damaged shards."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hildanext.config import Config
from hildanext.data.pipeline import read_groups
from hildanext.data.rows import read_meta
from hildanext.data.shards import damaged, shard_path, write_shard
from hildanext.data.tokenize import Split, find_splits
from hildanext.errors import DataError, UsageError
from hildanext.progress import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def verify_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Check the shards of `{paths.data}/tokenized` and rebuild damaged ones.

    Returns per split the number of shards and the paths of those rebuilt. Raises UsageError without tokenized rows, and
    DataError naming a damaged shard that cannot be rebuilt because the input or the settings changed.
    """
    tokenized = Path(config.paths.data) / "tokenized"
    folders = sorted(tokenized.glob("*.rows"))
    if not folders:
        raise UsageError(f"{tokenized}: no tokenized rows; run 'hildanext tokenize' first")
    result: dict[str, Any] = {}
    for folder in folders:
        meta = read_meta(folder)
        with progress(f"verify {folder.stem}", len(meta["shards"]), "shards") as advance:
            bad = damaged(folder, meta["shards"], advance)
        for number in bad:
            say(f"{shard_path(folder, number)}: damaged; rebuilding it")
            _rebuild(folder, number, meta, _find_split(folder, meta, config, tokenizer), config)
        result[folder.stem] = {
            "shards": len(meta["shards"]),
            "rebuilt": [str(shard_path(folder, number)) for number in bad],
        }
    return result


def summary(result: dict[str, Any]) -> str:
    """A readable summary of the result, one line per split."""
    return "\n".join(
        f"{split}: {checked['shards']} shards, "
        + (f"rebuilt: {', '.join(checked['rebuilt'])}" if checked["rebuilt"] else "all intact")
        for split, checked in result.items()
    )


def _find_split(folder: Path, meta: dict[str, Any], config: Config, tokenizer: PreTrainedTokenizerBase) -> Split:
    for split in find_splits(config, tokenizer):
        if split.name == folder.stem and split.plan == meta["plan"]:
            return split
    raise DataError(
        f"{folder}: a shard is damaged and cannot be rebuilt, because the input or the settings changed; "
        "restore them or run 'hildanext tokenize' again"
    )


def _rebuild(folder: Path, number: int, meta: dict[str, Any], split: Split, config: Config) -> None:
    """Write shard `number` again, from the state at the end of the previous shard."""
    mix = split.open_mix()
    if number:
        record = shard_path(folder, number - 1).with_suffix(".json")
        try:
            mix.restore(json.loads(record.read_text(encoding="utf-8"))["end"])
        except (OSError, ValueError, KeyError):
            raise DataError(f"{record}: missing or damaged; run 'hildanext tokenize' again") from None
    with closing(read_groups(mix, split.keep, split.encoding, config.data, workers=1)) as groups:
        group = next(groups)
    path = shard_path(folder, number)
    written = write_shard(folder, number, group.rows, {"end": group.end, "tally": group.tally.to_dict()})
    if written["sha256"] != meta["shards"][number]["sha256"]:
        raise DataError(f"{path}: the rebuilt shard differs from the original; run 'hildanext tokenize' again")
