"""What the data side asks of a tokenizer: its end-of-text, padding and leading ids, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from hildanext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-text id. Raises DataError for a tokenizer that has none, or that is not a fast one."""
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' is not a fast tokenizer; use one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer '{tokenizer.name_or_path}' has no end-of-text token; set its eos_token")
    return int(tokenizer.eos_token_id)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what turns ordinary text into ids: normalizer, pre-tokenizer, model, end-of-text and padding ids.

    Added tokens stay out, so that a tokenizer that gained a mask token is still the one that wrote the rows. A missing
    padding token counts as the end-of-text token, which stands in for it.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: parts[key] for key in ("normalizer", "pre_tokenizer", "model")}
    kept["ids"] = [eos_id(tokenizer), pad_id(tokenizer)]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows: the padding token, or the end-of-text token where there is none."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer itself puts before a text: Llama's and Gemma's begin-of-text token; most newer ones none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
