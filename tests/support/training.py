"""Material of the training tests: a tiny Llama's folder, packed rows of random documents, a configuration for both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hildanext.config import Config, parse_config
from hildanext.data.packing import pack
from hildanext.data.rows import ShuffledRows, open_rows, write_meta
from hildanext.data.shards import compact, write_shard
from hildanext.data.tokenizer import fingerprint, pad_id
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.files import atomic_open
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.training import parallel
from hildanext.training.denoising import DenoisingTask, Recipe
from hildanext.training.run_folder import RunFolder
from hildanext.training.trainer import Trainer, TrainingJob

SEQ_LEN = 24
# A split's documents: lengths on and off the border of a block of 4, one that fills a row, one of a single token.
LENGTHS = [7, 12, 5, 24, 1, 9, 16, 3, 20, 8, 13, 10]


def write_base(folder: Path, context: int = 64) -> None:
    """A tiny random Llama with its tokenizer, large enough weights for its outputs to differ."""
    tokenizer = story_tokenizer(300)
    model = tiny_llama(tokenizer, hidden=32, layers=2, context=context, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, lengths: list[int], *, seed: int, response_share: float = 1.0) -> None:
    """Random documents, packed; the last `response_share` of each is supervised."""
    tokenizer = story_tokenizer(300)
    rng = random.Random(seed)
    ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    docs = []
    for length in lengths:
        ids = np.array(rng.choices(ordinary, k=length), dtype=np.int32)
        docs.append((ids, np.arange(length) >= round(length * (1 - response_share))))
    folder.mkdir(parents=True)
    record = write_shard(folder, 0, compact(pack(docs, SEQ_LEN, pad_id(tokenizer)), SEQ_LEN), {})
    write_meta(folder, {"seq_len": SEQ_LEN, "tokenizer": fingerprint(tokenizer), "block_size": 4}, [record])


def material(folder: Path, base: Path, **sections: dict[str, Any]) -> Config:
    """Rows of every split in `folder` and a configuration that trains on them: 6 steps of 4 rows, block 4."""
    for number, split in enumerate(("train", "eval", "sft_train", "sft_eval")):
        path = folder / "data" / "tokenized" / f"{split}.rows"
        if not path.exists():
            write_rows(path, LENGTHS, seed=number, response_share=0.6 if "sft" in split else 1.0)
    raw: dict[str, dict[str, Any]] = {
        "paths": {"data": str(folder / "data"), "runs": str(folder / "runs")},
        "model": {"base": str(base), "device": "cpu", "dtype": "float32"},
        "data": {"seq_len": SEQ_LEN},
        "wsd": {"warmup_steps": 2, "stable_steps": 2, "decay_steps": 2, "final_block": 4},
        "train": {
            "rows_per_step": 4,
            "micro_batch": 2,
            "lr": 0.003,
            "lr_warmup_steps": 2,
            "eval_rows": 4,
            "eval_every": 2,
            "save_every": 2,
        },
        "sft": {"steps": 6, "lr": 0.003, "lr_warmup_steps": 2},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return parse_config(raw)


def plain_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """In place of `draw_curves`: a file that begins as a PNG. Drawing takes four times as long as a tiny run's steps."""
    with atomic_open(path, "wb") as file:
        file.write(b"\x89PNG" + f"{title}: {len(rows)} rows".encode())


def trainer_for(config: Config, job: TrainingJob, recipe: Recipe, split: str = "train") -> tuple[Trainer, DiffusionLM]:
    """A trainer outside any run folder."""
    edits = config.noise.edits == "levenshtein"
    lm, policy = load_diffusion_lm(config.model, training=True, seed=config.train.seed, lora=config.lora, edits=edits)
    rows = open_rows(config, split, lm.tokenizer)
    assert rows is not None
    accelerator = parallel.start(policy, config.train)
    source = ShuffledRows(rows, config.train.seed)
    task = DenoisingTask(config, lm, accelerator, recipe, source, None, job.eval_block)
    return Trainer(config, lm, policy, accelerator, job, task, RunFolder(Path(config.paths.runs) / "unused")), lm


# The loss of a row from docs/design.md sections 3 and 5: one document and one block at a time, with the stock model


def predictions(lm: DiffusionLM, clean: Tensor, noisy: Tensor, block: int, start: int, end: int) -> dict[int, Tensor]:
    """Logits [V] that predict each position of [start, end), a block of one document: the clean blocks before it, then it."""
    ids = torch.cat([clean[:start], noisy[start:end]])
    b = torch.arange(end) // block
    hidden = torch.zeros(end, end).masked_fill(b[:, None] < b[None, :], torch.finfo(torch.float32).min)
    logits = lm.model(
        input_ids=ids[None], position_ids=torch.arange(end)[None], attention_mask=hidden[None, None]
    ).logits[0]
    if lm.convention == "in_place":
        return {i: logits[i] for i in range(start, end)}
    return {i: logits[i - 1] for i in range(max(start, 1), end)}


def row_loss(
    config: Config,
    lm: DiffusionLM,
    ids: Tensor,
    doc_ids: Tensor,
    allowed: Tensor,
    noisy_ids: Tensor,
    masked: Tensor,
    t: Tensor,
    block: int,
    cap_weight: float = 0.0,
) -> tuple[float, Tensor]:
    """Summed loss of a row's allowed tokens (all [L]), not yet divided; and the row with its masks filled greedily."""
    weights, total, drafts = config.loss, 0.0, noisy_ids.clone()
    for doc in range(int(doc_ids.max()) + 1):
        where = (doc_ids == doc).nonzero()[:, 0]
        clean, x_t = ids[where], noisy_ids[where]
        for start in range(0, len(where), block):
            end = min(start + block, len(where))
            for i, logits in predictions(lm, clean, x_t, block, start, end).items():
                at = where[i]
                if not allowed[at]:
                    continue
                log_p = logits.log_softmax(-1)
                ce = -log_p[clean[i]].item()
                if masked[at]:
                    total += weights.w_m2t * ce / (t[at].item() if weights.weighting == "elbo" else 1.0)
                    if logits.argmax() == clean[i]:
                        total += cap_weight * -(log_p.exp() * log_p).sum().item()
                    drafts[at] = logits.index_fill(0, torch.tensor(lm.mask_token_id), -torch.inf).argmax()
                else:
                    right = x_t[i] == clean[i]
                    total += weights.w_t2t * ce * (weights.keep if right else 1.0)
    return total, drafts


class Trained(NamedTuple):
    config: Config
    run: RunFolder


WORDS = ["the cat", "a dog", "one bird", "the old tree", "a red house", "my friend", "the sun", "a small boat"]


def pair(number: int) -> dict[str, Any]:
    """Every answer that is chosen ends in a sun, every rejected one in a boat."""
    who = WORDS[number % 6]
    return {"prompt": f"{who} {number}?", "chosen": f"{who} saw the sun", "rejected": f"{who} saw a small boat {who}"}


def write_pairs(path: Path, n: int = 12) -> Path:
    path.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(n)))
    return path


def job(block: int, lr: float = 0.003) -> TrainingJob:
    return TrainingJob("test", 4, lambda step: SchedulePoint("stable", block, lr), block)


CONVERT = Recipe(turns=1, complementary=False, t_min=0.05, t_max=1.0, cap_weight=0.0)
MULTI_TURN = Recipe(turns=2, complementary=True, t_min=0.3, t_max=0.8, cap_weight=0.1)


def assert_same(one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-4, atol=1e-5)
