"""The revision of the source code: the package's own, whatever repository lies around it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hildanext import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's repository with a commit, and the module in a folder of it, as installed by pip."""
    installed = tmp_path / ".venv" / "hildanext"
    installed.mkdir(parents=True)
    shutil.copy(provenance.__file__, installed)
    (tmp_path / "paper.tex").write_text("x")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "paper.tex")
    git(tmp_path, "commit", "-qm", "A paper")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_repository_around_an_installed_package_is_not_its_own(repository: Path) -> None:
    assert provenance.git_revision() is None


def test_a_checkout_has_its_revision_and_says_when_it_was_changed(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(repository, "add", "-f", ".venv/hildanext/provenance.py")
    git(repository, "commit", "-qm", "The package")
    head = git(repository, "rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert provenance.git_revision() == head
    (repository / "paper.tex").write_text("y")
    assert provenance.git_revision() == f"{head}-dirty"


def test_no_repository_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_revision() is None
