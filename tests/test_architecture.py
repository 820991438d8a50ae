"""The rules of the house, as far as a test can see them: which package may import which, and what no file may hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hildanext
from hildanext.config import Config

SOURCE = Path(__file__).parents[1] / "src" / "hildanext"

# Each package or module at the top: its level, and what it must not import although that is on an earlier level. A
# package imports only from earlier levels, never from its own.
PACKAGES: dict[str, tuple[int, set[str]]] = {
    "environment": (1, set()),
    "errors": (1, set()),
    "progress": (1, set()),
    "provenance": (1, set()),
    "config": (2, set()),
    "files": (2, set()),
    "diffusion": (3, {"errors", "progress", "provenance", "files"}),
    "data": (3, set()),
    "plots": (3, set()),
    "jobs": (3, set()),
    "model": (4, set()),
    "training": (5, set()),
    "decoding": (5, set()),
    "evaluate": (6, set()),
    "terminal": (6, {"training"}),
    "server": (6, {"data", "model", "training"}),
    "export": (6, set()),
    "api": (7, set()),
    "smoke": (7, set()),
    "demo_repair": (7, set()),
    "demo": (8, set()),
    "commands": (9, set()),
    "cli": (10, set()),
    "__init__": (11, set()),  # imports at the first use of a name, or for type checkers alone
}
# The mathematics imports torch and nothing of ours.
PURE = {"diffusion.noise", "diffusion.masks", "diffusion.objective", "diffusion.edits"}
PURE_IMPORTS = {"torch", "hashlib", "collections", "typing", "__future__"}
# Where the environment, exits and broad exceptions may live; what must survive any error of others is there too.
EDGE = {"cli", "environment", "jobs.watcher", "server.command", "server.guard", "server.worker", "training.trackers"}
HEAVY = {"torch", "transformers", "numpy", "fastapi", "matplotlib", "pydantic"}


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


TREES = {module(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def imports(name: str, top_level_only: bool = False) -> set[str]:
    """Modules of ours that a module imports ('config', 'decoding.engines.dummy', ...)."""
    found = set()
    for node in TREES[name].body if top_level_only else ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hildanext":
            parent = (node.module or "").removeprefix("hildanext").lstrip(".")
            for alias in node.names:
                inner = f"{parent}.{alias.name}".lstrip(".")
                found.add(inner if inner in TREES or not parent else parent)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("hildanext.") for alias in node.names if "hildanext." in alias.name}
    return found - {"__version__"}


IMPORTS = {name: imports(name) for name in TREES}


def package(name: str) -> str:
    return name.partition(".")[0]


def test_a_package_imports_only_from_packages_before_it():
    assert {package(name) for name in TREES} == set(PACKAGES)
    for name, others in IMPORTS.items():
        own = package(name)
        for other in {package(other) for other in others} - {own}:
            assert PACKAGES[other][0] < PACKAGES[own][0], f"{name} imports {other}"
            assert other not in PACKAGES[own][1], f"{name} imports {other}"


def test_imports_form_no_circle():
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in IMPORTS.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_mathematics_imports_torch_and_only_the_mathematics(name: str):
    assert IMPORTS[name] <= {"diffusion.noise"}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= PURE_IMPORTS
        elif isinstance(node, ast.ImportFrom):
            assert node.module == "hildanext.diffusion.noise" or (node.module or "").split(".")[0] in PURE_IMPORTS


def test_the_decode_rule_knows_no_model():
    assert IMPORTS["decoding.rule"] == {"decoding.events", "decoding.settings", "diffusion.edits"}
    assert IMPORTS["decoding.settings"] <= {"config", "errors"}


def test_the_command_line_starts_without_heavy_imports():
    for node in (*TREES["cli"].body, *TREES["commands"].body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & HEAVY
    assert imports("cli", top_level_only=True) <= {"commands", "environment", "errors"}
    assert imports("commands", top_level_only=True) <= {"errors"}


def test_the_package_itself_is_imported_without_the_libraries():
    """In a process of its own: `import hildanext` and the names it offers, not what they import at their first use."""
    script = "import sys, hildanext; dir(hildanext); print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert set(hildanext.__all__) <= set(dir(hildanext))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        hildanext.lode  # noqa: B018


def test_sizes():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} is longer than 60 lines"


def test_names_that_say_nothing_do_not_exist():
    modules = {name.rpartition(".")[2] for name in TREES}
    assert not modules & {"utils", "util", "common", "helpers", "misc", "manager", "registry"}
    classes = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(("Manager", "Registry", "Helper", "Util"))]


def test_no_broad_except_no_silent_defaults_no_environment():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            line = f"{name}, line {node.lineno}" if hasattr(node, "lineno") else name
            if isinstance(node, ast.ExceptHandler) and name not in EDGE:
                caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"(bare)"}
                assert not caught & {"Exception", "(bare)"}, f"{line}: except {caught}"
                if "BaseException" in caught:  # only to clean up and raise again
                    assert isinstance(node.body[-1], ast.Raise), line
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                assert len(node.args) < 3, f"{line}: getattr with a default hides a missing key"
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                assert name in EDGE, f"{line}: the environment is read at the edge only"
            assert not isinstance(node, ast.Global), f"{line}: module state that changes"


def test_no_pickle_and_no_remote_code_by_default():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for forbidden in ("import pickle", "torch.load(", "torch.save("):
            assert forbidden not in text, path
    assert Config().model.trust_remote_code is False


def test_all_names_what_it_exports():
    assert all(hasattr(hildanext, name) for name in hildanext.__all__)
    assert sys.modules["hildanext"].__doc__
