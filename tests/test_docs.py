"""The documentation site: its reference pages are current, it has every page, it builds, and its links hold."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS = ROOT / "zensical.toml"


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_pages_are_current():
    reference = tool("reference")
    for name in ("configuration", "commands"):
        text = (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
        assert text == getattr(reference, name)(), "run 'python tools/reference.py'"


def test_the_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch):
    reference = tool("reference")
    pages = []
    for columns in ("20", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        pages.append((reference.configuration(), reference.commands()))
    assert pages[0] == pages[1]


def test_every_page_is_in_the_navigation():
    named = re.findall(r'"([\w./-]+\.md)"', SETTINGS.read_text(encoding="utf-8"))
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_cited_sections_of_the_design_exist():
    sections = set(re.findall(r"^## (\d+)\.", (DOCS / "design.md").read_text(encoding="utf-8"), re.MULTILINE))
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for numbers in re.findall(r"docs/design\.md,? sections? (\d[\d and,]*)", path.read_text(encoding="utf-8")):
            assert set(re.findall(r"\d+", numbers)) <= sections, path


def test_the_site_builds_and_its_links_hold(tmp_path: Path):
    pytest.importorskip("zensical")
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / SETTINGS.name).write_bytes(SETTINGS.read_bytes())
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "build" / "site"
    assert tool("check_site").problems(site) == []
    assert len(list(site.rglob("*.html"))) == len(list(DOCS.rglob("*.md"))) + 1  # 404.html


BAD_PAGE = """<html><head><link rel="stylesheet" href="https://fonts.example/a.css"><link rel="canonical" href="https://x/">
<script src="//cdn.example/a.js"></script></head><body><h1 id="top">Page</h1><img src="missing.png">
<a href="other.html">no page</a> <a href="#nowhere">no anchor</a> <a href="#top">fine</a> <a href="https://x/">fine</a>
<a href="../../secret.html">outside</a></body></html>"""


def test_the_check_of_a_site_finds_what_is_broken(tmp_path: Path):
    check = tool("check_site")
    site = tmp_path / "site"
    site.mkdir()
    assert check.problems(site) == [f"{site}: no pages"]
    (site / "index.html").write_text(BAD_PAGE, encoding="utf-8")
    (site / "a.css").write_text(
        "@import 'https://x/b.css'; a { background: url(here.png) } b { src: url('//x/f.woff') }"
    )
    assert sorted(check.problems(site)) == [
        "a.css: loads //x/f.woff",
        "a.css: loads https://x/b.css",
        "index.html: #nowhere has no such anchor",
        "index.html: ../../secret.html leads out of the site",
        "index.html: loads //cdn.example/a.js",
        "index.html: loads https://fonts.example/a.css",
        "index.html: missing.png does not exist",
        "index.html: other.html does not exist",
    ]
