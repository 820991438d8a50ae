"""Properties of a tokenizer: its end-of-text, padding and leading ids, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-text id. Raises DataError for a tokenizer without one, or one that is not fast."""
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' is not a fast tokenizer; use one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' has no end-of-text token; set its eos_token")
    return int(tokenizer.eos_token_id)


def token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Sorted ids of all tokens. There may be ids without a token between them, so their number says nothing of the last."""
    return sorted(set(tokenizer.get_vocab().values()))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the normalizer, pre-tokenizer, model, end-of-text id and padding id.

    Added tokens are excluded, so that adding a mask token does not change the fingerprint. A missing padding id counts
    as the end-of-text id (see `pad_id`).
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: parts[key] for key in ("normalizer", "pre_tokenizer", "model")}
    kept["ids"] = [eos_id(tokenizer), pad_id(tokenizer)]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads rows: the padding token, or the end-of-text token if there is no padding token."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before a text: the begin-of-text token of Llama and Gemma, often none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
