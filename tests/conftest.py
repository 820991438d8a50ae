"""Fixtures: a small tokenizer made here, a configuration in a temporary folder, and the real data where it is present."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from httpx2._config import DEFAULT_TIMEOUT_CONFIG
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hildanext import plots
from hildanext.config import Config, parse_config
from hildanext.decoding import runtimes
from hildanext.training import trainer
from support.models import make_tokenizer, write_converted
from support.training import plain_curves, write_base
from support.waiting import LAST_RESORT

# Models in the tests are tiny: a second thread only waits for the first. The variables are for child processes.
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# Clients would give a busy machine 5 seconds for an answer.
for limit in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, limit, LAST_RESORT)


def pytest_sessionfinish() -> None:
    """Keep what coverage measured in this process: xdist kills a worker that takes more than 10 seconds to exit."""
    if (coverage := sys.modules.get("coverage")) is not None and (measured := coverage.Coverage.current()) is not None:
        measured.save()


SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def eager_by_default() -> Iterator[None]:
    """`engine.runtime: auto` is eager in tests, whatever is installed; test_runtimes.py looks at the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "has_openvino", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def without_curves() -> Iterator[None]:
    """Runs draw no curves: see `plain_curves`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_curves", plain_curves)
        yield


@pytest.fixture(scope="session", autouse=True)
def gguf_files_are_parsed_once() -> Iterator[None]:
    """Loading a model parses its GGUF file, which takes seconds; the file of one test is that of the next."""

    @functools.lru_cache(maxsize=2)
    def parsed(path: str, changed: int, size: int) -> gguf.GGUFReader:
        return reader(path)

    def read(path: str) -> gguf.GGUFReader:
        status = os.stat(path)
        return parsed(str(path), status.st_mtime_ns, status.st_size)

    reader = gguf.GGUFReader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", read)
        yield


@pytest.fixture
def with_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of this test draw their curves."""
    monkeypatch.setattr(trainer, "draw_curves", plots.draw_curves)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with a chat template; its end of text is the end of a turn."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama to train, see training.py."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`make_disk(kib)`: an empty disk of that size; the test is skipped where this user may not mount one."""
    folder = tmp_path / "disk"

    def make(kib: int) -> Path:
        folder.mkdir()
        try:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no small disk: {error}")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # weights may still be mapped


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration whose model is a tiny converted checkpoint, random weights."""
    return write_converted(tmp_path_factory.mktemp("converted"), context=64, decode={"max_new_tokens": 8})


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> PreTrainedTokenizerBase:
    """The real Qwen3 tokenizer of a base model: its end of text is not the end of a turn."""
    folder = SHARED / "qwen3-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared(name)`: a file or folder of the real data; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"no {path}")
        return path

    return find


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """`make_config(*sources, **data)`: a configuration with paths in the test's own folder."""

    def make(*sources: dict[str, Any], sft: dict[str, Any] | None = None, **data: Any) -> Config:
        raw: dict[str, Any] = {"paths": {"data": str(tmp_path / "data")}, "data": data, "sft": sft or {}}
        if sources:
            raw["data"]["sources"] = list(sources)
        return parse_config(raw)

    return make
