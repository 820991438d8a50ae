"""Training data that the base writes: its own answers to prompts, instead of human answers.

This is sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947). A prompt has many human answers, but only
one most likely answer of the base, which is easier to learn, and training on it keeps what the base knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.config import Config, ModelConfig, SourceConfig
from hildanext.data.documents import Rejects
from hildanext.data.sources.self_answers import ASKED, until_repeat, written_file
from hildanext.errors import DataError, UsageError
from hildanext.files import sha256_of, write_json
from hildanext.model.ar_generate import ar_complete_batch
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import base_of, fingerprint_weights, load_causal_lm, read_record
from hildanext.model.prompts import read_asked
from hildanext.progress import progress, say


def write_answers(config: Config) -> None:
    """Let the base answer the prompts of every 'self' source and write the answers into data/self.

    Answers from an earlier run are kept. A killed run resumes at its last complete batch, and its file ends up the
    same as that of an uninterrupted run. Raises UsageError or DataError for missing or unusable prompts, and for a
    file that another model wrote or that belongs to other prompts.
    """
    for source in config.data.sources:
        if source.kind == "self":
            _write(config, source)


def _write(config: Config, source: SourceConfig) -> None:
    """Check the settings that a file of answers was begun with, then write or complete the file."""
    assert source.path is not None
    prompts_file, path = Path(source.path), written_file(config.paths.data, source)
    sys.audit("hildanext.path", source.path)
    if not prompts_file.is_file():
        raise UsageError(f"data.sources: '{source.path}' is not a file of prompts")
    record = read_record(config.model)
    base_config = config.model if record is None else base_of(config.model, record)
    settings = {
        "base": base_config.base,
        "weights": fingerprint_weights(base_config),
        "prompts": sha256_of(prompts_file),
        **{key: getattr(source, key) for key in ASKED},
        "seed": config.train.seed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    settings_file = path.with_suffix(".json")
    if not settings_file.exists():
        write_json(settings_file, settings)
    elif (stored := json.loads(settings_file.read_text(encoding="utf-8"))) != settings:
        key = next(key for key in settings if stored.get(key) != settings[key])
        raise DataError(
            f"{path}: written with another value of {key}; delete it and {settings_file.name} to write it again"
        )
    with open(path, "ab+") as file:
        _AnswerFile(config, source, base_config, file).write()


class _AnswerFile:
    """A file of answers, with a line for each prompt. It is appended to batch by batch."""

    def __init__(self, config: Config, source: SourceConfig, base_config: ModelConfig, file: IO[bytes]) -> None:
        self.config, self.source, self.base_config, self.file = config, source, base_config, file
        self.seen: set[bytes] = set()  # hashes of the answers so far
        self.tokens = self.duplicates = self.repeated = 0

    def write(self) -> None:
        """Answer the prompts that have no line yet."""
        policy = choose_policy(self.config.model.device, self.config.model.dtype)
        base, tokenizer = load_causal_lm(self.base_config, policy, policy.compute)
        base.eval()
        asked = self._prompts(tokenizer)
        prompts = [list(ids) for ids in asked]
        size = self.source.batch
        done = self._resume(len(prompts))
        title = f"self: {self.base_config.base}"
        with progress(title, len(prompts), "answers", done) as advance:
            for start in range(done, len(prompts), size):
                batch = prompts[start : start + size]
                texts = [asked[tuple(ids)] for ids in batch]
                self._append(start, batch, texts, self._answers(base, tokenizer, batch, start))
                advance(start + len(batch), f"{self.tokens} tokens")
        if self.duplicates:
            left_out = f"{self.duplicates} of {len(prompts)} answers"
            say(f"{self.file.name}: {left_out} are empty or duplicates and are left out")
        if self.repeated:
            say(f"{self.file.name}: {self.repeated} of {self.tokens} tokens repeat earlier text and are left out")

    def _prompts(self, tokenizer: PreTrainedTokenizerBase) -> dict[tuple[int, ...], str]:
        """Map each distinct prompt to its text, the shortest first: prompts of similar length need less padding."""
        assert self.source.path is not None
        rejects = Rejects()
        prompts = read_asked(Path(self.source.path), tokenizer, rejects)
        rejects.check(len(prompts), self.config.data.max_reject_share)
        if rejects.total:
            say(f"self: {rejects.total} prompts rejected: {rejects}")
        prompts = prompts[: self.source.max_documents]
        asked = {tuple(ids): text for ids, text in prompts}
        return {ids: asked[ids] for ids in sorted(asked, key=lambda ids: (len(ids), ids))}

    def _answers(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], start: int
    ) -> Iterator[tuple[list[int], str]]:
        completions = ar_complete_batch(
            base,
            tokenizer,
            prompts,
            self.source.max_new_tokens,
            temperature=self.source.temperature,
            seed=self.config.train.seed + start,
        )
        return ((completion.token_ids, completion.text) for completion in completions)

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
        """Whether an answer is not empty and not seen before, ignoring case and spacing. Counts and remembers it."""
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
        """Number of prompts with an answer. An incomplete last batch, left by a killed run, is cut off the file."""
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        complete = len(lines) if not lines or lines[-1].endswith(b"\n") else len(lines) - 1
        done = complete if complete == n_prompts else complete - complete % self.source.batch
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
