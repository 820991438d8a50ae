"""What the README, docs/, the recipe and the model's card tell a user to type, to set and to open exists."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import hildanext
from hildanext.cli import build_parser
from hildanext.config import Config, apply_overrides, parse_config
from hildanext.config.names import SECTION_OF

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    [README, *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md"), *(ROOT / "src").rglob("*.md")]
)
GUIDE = [page for page in PAGES if page.name != "LOG.md"]  # the log keeps names of its day
SECTIONS = "|".join(Config.model_fields)
LAUNCHED = re.compile(r"^(?:torchrun|accelerate launch) .* hildanext\.cli ")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_page_of_the_guide = pytest.mark.parametrize("page", GUIDE, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page: Path, kind: str = r"\w*") -> list[str]:
    """The fenced code blocks of a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline(page: Path) -> list[str]:
    """What stands between backticks outside the code blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def typed(page: Path) -> Iterator[list[str]]:
    """Every `hildanext ...` and `make ...` line of a page's code blocks, as the shell splits it."""
    for block in fenced(page):
        for line in block.replace("\\\n", " ").splitlines():
            line = LAUNCHED.sub("hildanext ", line)
            if line.startswith(("hildanext ", "make ")) and "[OPTIONS]" not in line:
                yield shlex.split(line, comments=True)


def targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def subcommands() -> set[str]:
    (choices,) = [action.choices for action in build_parser()._actions if action.dest == "command"]
    return set(choices)


@each_page
def test_every_command_can_be_typed(page: Path):
    for name, *arguments in typed(page):
        if name == "make":
            assert arguments[0] in targets()
            continue
        args = build_parser().parse_args(arguments)
        parse_config(apply_overrides({}, args.set))
        if getattr(args, "preset", None):
            assert (ROOT / "configs" / f"{args.preset}.json").is_file()


@each_page_of_the_guide
def test_every_command_in_the_text_exists(page: Path):
    for words in map(str.split, inline(page)):
        if words[0] == "make" and len(words) > 1:
            assert words[1].rstrip("*") in targets()
        if words[0] == "hildanext" and len(words) > 1 and words[1].islower() and not words[1].startswith("-"):
            assert words[1] in subcommands()


@each_page_of_the_guide
def test_every_key_in_the_text_exists(page: Path):
    for text in inline(page):
        for section, key in re.findall(rf"(?<![\w./])({SECTIONS})\.(\w+)(?![\w/]*\()", text):
            if key not in ("json", "py", "rows", "key"):
                assert key in Config.model_fields[section].annotation.model_fields, f"{section}.{key}"


@each_page
def test_every_configuration_in_a_code_block_is_valid(page: Path):
    for block in fenced(page, "json"):
        parse_config(json.loads(block))


@each_page
def test_python_in_a_code_block_uses_names_that_exist(page: Path):
    """Attributes of the package, and settings of `load`, `generate` and `stream` by their names."""
    own = {"config", "raw", "steps", "json_schema"}
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hildanext":
                assert node.attr in hildanext.__all__
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "hildanext.load",
                "model.generate",
                "model.stream",
            ):
                assert {word.arg for word in node.keywords} - {None, *own} <= set(SECTION_OF), ast.unparse(node)


@each_page
def test_what_is_linked_and_named_exists(page: Path):
    text = prose(page)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    folders = "benchmarks|configs|deploy|docs|examples|recipes|src|tests|tools"
    for file in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        if "NAME" not in file and file != "deploy/api-keys":
            assert (ROOT / file).exists(), file


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and code hosts make them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M):
        plain = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(re.sub(r"[-\s]+", "-", plain))
    return found


@each_page
def test_every_anchor_exists(page: Path):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", prose(page)):
        assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140


def test_the_quick_start_is_the_whole_way():
    commands = [arguments[0] for name, *arguments in typed(README) if name == "hildanext"]
    assert commands == ["chat", "init", "prepare-data", "tokenize", "sft", "generate"]


def test_the_table_of_commands_is_complete():
    table = re.findall(r"^\| `([\w-]+)[^|]*\|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert subcommands() <= set(table)


def test_the_map_of_packages_is_complete():
    rows = re.findall(r"^\| `(\w+)/` \|.*\| `([\w.]+)` \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    source = ROOT / "src" / "hildanext"
    assert {package for package, _ in rows} == {path.parent.name for path in source.glob("*/__init__.py")}
    for package, first in rows:
        assert (source / package / first).is_file()
