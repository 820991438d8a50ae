"""What the README and docs tell a user to type and to open is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hildanext.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def typed(page: Path) -> list[list[str]]:
    """Every `hildanext ...` and `make ...` line of a page's code blocks, as the shell splits it."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("hildanext ", "make "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_typed(page: Path):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, *arguments in typed(page):
        if name == "make":
            assert arguments[0] in targets
        else:
            args = build_parser().parse_args(arguments)
            if getattr(args, "preset", None):
                assert (ROOT / "configs" / f"{args.preset}.json").is_file()


def test_the_quick_start_is_the_whole_way():
    commands = [arguments[0] for name, *arguments in typed(ROOT / "README.md") if name == "hildanext"]
    assert commands == [
        "chat",
        "generate",
        "init",
        "prepare-data",
        "tokenize",
        "convert-wsd",
        "merge-topk",
        "generate",
        "benchmark",
        "chat",
        "evaluate",
        "evaluate",
        "serve",
        "preflight",
    ]


def test_the_table_of_commands_is_complete():
    table = re.findall(r"^\| `([\w-]+)[^|]*\|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    (subcommands,) = [action.choices for action in build_parser()._actions if action.dest == "command"]
    assert set(subcommands) <= set(table)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_linked_and_named_exists(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for file in re.findall(r"`((?:configs|benchmarks|src|docs|tests)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), file
