"""Text that the base model writes itself: answers to prompts, to learn from in place of the answers of people.

A student that learns from its parent's own answers has one right continuation to learn where human text has many
(sequence-level distillation, Kim and Rush 2016, arXiv 1606.07947), and nothing of what the parent knew is unlearned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.config import Config, ModelConfig, SourceConfig
from hildanext.data.sources.self_answers import ASKED, until_repeat, written_file
from hildanext.errors import DataError, UsageError
from hildanext.files import sha256_of, write_json
from hildanext.model.ar_generate import ar_complete_batch
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import base_of, fingerprint_weights, load_causal_lm, read_record
from hildanext.model.prompts import read_asked
from hildanext.progress import progress, say


def write_answers(config: Config) -> None:
    """Let the base answer the prompts of every 'self' source, into data/self; what stands there already is kept.

    A killed run goes on with the batch it was in, and ends with the file of an undisturbed one. Raises UsageError or
    DataError for prompts that are not there or not usable, and for a file written by another model or from other prompts.
    """
    for source in config.data.sources:
        if source.kind == "self":
            _write(config, source)


def _write(config: Config, source: SourceConfig) -> None:
    assert source.path is not None
    prompts_file, path = Path(source.path), written_file(config.paths.data, source)
    if not prompts_file.is_file():
        raise UsageError(f"data.sources: '{source.path}' is no file of prompts")
    model = _writer(config.model)
    settings = {
        "base": model.base,
        "weights": fingerprint_weights(model),
        "prompts": sha256_of(prompts_file),
        **{key: getattr(source, key) for key in ASKED},
        "seed": config.train.seed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json")
    if not beside.exists():
        write_json(beside, settings)
    elif (stored := json.loads(beside.read_text(encoding="utf-8"))) != settings:
        other = next(key for key in settings if stored.get(key) != settings[key])
        raise DataError(f"{path}: written with another {other}; delete it and {beside.name} to have it written again")
    with open(path, "ab+") as file:
        _Writing(config, source, model, file).run()


def _writer(model: ModelConfig) -> ModelConfig:
    """The AR model: `model.base` itself, or what a converted checkpoint was made of."""
    record = read_record(model)
    return model if record is None else base_of(model, record)


class _Writing:
    """One file of answers, a line a prompt, appended batch by batch."""

    def __init__(self, config: Config, source: SourceConfig, model: ModelConfig, file: IO[bytes]) -> None:
        self.config, self.source, self.model, self.file = config, source, model, file
        self.seen: set[bytes] = set()  # hashes of the answers so far
        self.tokens = self.duplicates = self.repeated = 0

    def run(self) -> None:
        policy = choose_policy(self.config.model.device, self.config.model.dtype)
        base, tokenizer = load_causal_lm(self.model, policy, policy.compute)
        base.eval()
        asked = self._prompts(tokenizer)
        prompts = [list(ids) for ids in asked]
        size = self.source.batch
        done = self._resume(len(prompts))
        title = f"self: {self.model.base}"
        with progress(title, len(prompts), "answers", done) as advance:
            for start in range(done, len(prompts), size):
                batch = prompts[start : start + size]
                texts = [asked[tuple(ids)] for ids in batch]
                self._append(start, batch, texts, self._answers(base, tokenizer, batch, start))
                advance(start + len(batch), f"{self.tokens} tokens")
        if self.duplicates:
            say(f"{self.file.name}: {self.duplicates} of {len(prompts)} answers stood there already and are left out")
        if self.repeated:
            say(
                f"{self.file.name}: {self.repeated} of {self.tokens} tokens repeat what stands before them and are left out"
            )

    def _prompts(self, tokenizer: PreTrainedTokenizerBase) -> dict[tuple[int, ...], str]:
        """Each prompt once, the shortest first (those of like length are padded less side by side), with what was asked."""
        assert self.source.path is not None
        prompts = read_asked(Path(self.source.path), tokenizer)[: self.source.max_documents]
        asked = {tuple(ids): text for ids, text in prompts}
        return {ids: asked[ids] for ids in sorted(asked, key=lambda ids: (len(ids), ids))}

    def _answers(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], start: int
    ) -> Iterator[tuple[list[int], str]]:
        done = ar_complete_batch(
            base,
            tokenizer,
            prompts,
            self.source.max_new_tokens,
            temperature=self.source.temperature,
            seed=self.config.train.seed + start,
        )
        return ((one.token_ids, one.text) for one in done)

    def _append(
        self, start: int, prompts: list[list[int]], asked: list[str], answers: Iterator[tuple[list[int], str]]
    ) -> None:
        lines = []
        for number, (prompt, said, (ids, text)) in enumerate(zip(prompts, asked, answers, strict=True), start + 1):
            record: dict[str, Any] = {"id": f"self:{number}"}
            if self._is_new(text):
                record |= {"n_prompt": len(prompt), "input_ids": prompt + ids, "asked": said, "text": text}
                self._count(ids)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.write("".join(lines).encode("utf-8"))
        self.file.flush()
        os.fsync(self.file.fileno())

    def _is_new(self, text: str) -> bool:
        """Whether an answer has not been given before, case and spacing aside; empty ones never are."""
        key = " ".join(text.lower().split())
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if not key or digest in self.seen:
            self.duplicates += 1
            return False
        self.seen.add(digest)
        return True

    def _count(self, answer: list[int]) -> None:
        self.tokens += len(answer)
        self.repeated += len(answer) - until_repeat(answer, self.source.cut_repeats)

    def _resume(self, n_prompts: int) -> int:
        """How many prompts are done: whole batches only; what a kill left of one is cut off."""
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        whole = len(lines) if not lines or lines[-1].endswith(b"\n") else len(lines) - 1
        done = whole if whole == n_prompts else whole - whole % self.source.batch
        self.file.truncate(sum(map(len, lines[:done])))
        self.file.seek(0, os.SEEK_END)
        for line in lines[:done]:
            record = json.loads(line)
            if "text" in record:
                self._is_new(record["text"])
                self._count(record["input_ids"][record["n_prompt"] :])
            else:
                self.duplicates += 1
        return done
