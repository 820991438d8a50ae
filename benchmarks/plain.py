"""A plain implementation of block-diffusion training and rows to train on: the reference of train.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hildanext.config import Config
from hildanext.data.packing import pack
from hildanext.data.rows import write_meta
from hildanext.data.shards import compact, write_shard
from hildanext.data.synthetic import synthetic_stories
from hildanext.data.tokenizer import fingerprint, pad_id
from hildanext.diffusion.masks import additive, training_mask
from hildanext.diffusion.noise import Noisy, block_ids
from hildanext.model.diffusion_lm import Batch, DiffusionLM

IGNORED = -100


def plain_loss(
    lm: DiffusionLM, config: Config, batch: Batch, noisy: Noisy, block_size: int, n_tokens: int, dtype: torch.dtype
) -> Tensor:
    """The loss of `hildanext.diffusion.objective`, computed plainly, for the convention `shifted`.

    A dense additive mask [B, 1, 2L, 2L] for transformers' own SDPA, logits of all 2L positions in fp32, cross-entropy
    at labelled positions. A token's label is one position before it; for the first token of a block, in the clean stream.
    """
    loss = config.loss
    length = batch.input_ids.shape[1]
    mask = additive(training_mask(batch.doc_ids, block_ids(batch.position_ids, block_size)), dtype)
    logits = lm.model(
        input_ids=torch.cat([noisy.noisy_ids, batch.input_ids], dim=1),
        attention_mask=mask,
        position_ids=batch.position_ids.repeat(1, 2),
        use_cache=False,
    ).logits.float()
    right = batch.allowed & ~noisy.masked & ~noisy.corrupted
    weight = loss.w_m2t * noisy.masked / noisy.t + loss.w_t2t * (noisy.corrupted + loss.keep * right)
    wanted = weight > 0
    labels = torch.full((*batch.input_ids.shape[:1], 2 * length), IGNORED)
    weights = torch.zeros(labels.shape)
    row, column = wanted.nonzero(as_tuple=True)
    opens_block = batch.position_ids[wanted] % block_size == 0
    place = column - 1 + length * opens_block
    labels[row, place] = batch.input_ids[wanted]
    weights[row, place] = weight[wanted]
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return (ce * weights.flatten()).sum() / n_tokens


def stories(tokenizer: PreTrainedTokenizerBase, path: Path | None) -> Iterator[list[int]]:
    """Token ids of stories from a JSONL file, or of synthetic stories joined to a similar length."""
    if path is not None:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        return
    texts = list(synthetic_stories(3000, seed=0))
    for i in range(0, len(texts), 3):
        yield tokenizer(" ".join(texts[i : i + 3]), add_special_tokens=False)["input_ids"]


def write_rows(
    folder: Path, tokenizer: PreTrainedTokenizerBase, seq_len: int, n: int, path: Path | None, packed: bool
) -> dict[str, Any]:
    """Write `n` packed rows of complete stories, or rows of one document each. Returns a description for the page."""
    texts = list(stories(tokenizer, path))
    documents = [np.array(ids[:seq_len], dtype=np.int32) for ids in texts]
    if not packed:
        joined = np.concatenate(documents)
        documents = [joined[i : i + seq_len] for i in range(0, len(joined) - seq_len, seq_len)]
    rows = pack(((ids, np.ones(len(ids), dtype=bool)) for ids in documents), seq_len, pad_id(tokenizer))
    folder.mkdir(parents=True)
    record = write_shard(folder, 0, compact(islice(rows, n), seq_len), {})
    write_meta(folder, {"seq_len": seq_len, "tokenizer": fingerprint(tokenizer), "block_size": 32}, [record])
    return {"tokens": float(np.mean([len(ids) for ids in documents])), "real": path is not None, "packed": packed}
