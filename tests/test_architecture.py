"""The rules of the house (DESIGN section 1), as far as a test can see them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hildanext"
FILES = sorted(SOURCE.rglob("*.py"))
PURE = ["noise", "masks", "objective"]
# Where the environment, exits and broad exceptions may live; threads that must outlive whatever happens are there too.
EDGE = {"cli", "jobs.watcher", "server", "server.guard", "server.worker"}


def room(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


ROOMS = {room(path) for path in FILES}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Rooms of ours that a file imports ('model', 'engines.dummy', ...)."""
    nodes = tree(path).body if top_level_only else list(ast.walk(tree(path)))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hildanext"):
            module = (node.module or "").removeprefix("hildanext").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found.add(inner if inner in ROOMS or not module else module)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("hildanext.") for alias in node.names if alias.name.startswith("hildanext.")
            }
    return found


@pytest.mark.parametrize("path", FILES, ids=room)
def test_sizes(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"


def test_names_that_say_nothing_do_not_exist():
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc", "manager", "registry"}
    classes = [node.name for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if name.endswith(("Manager", "Registry", "Helper", "Util"))]


@pytest.mark.parametrize("path", FILES, ids=room)
def test_no_broad_except_no_silent_defaults_no_environment(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler) and room(path) not in EDGE:
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"(bare)"}
            assert not names & {"Exception", "(bare)"}, f"line {node.lineno}: except {names}"
            if "BaseException" in names:  # only to tidy up and raise again
                assert isinstance(node.body[-1], ast.Raise), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            assert len(node.args) < 3, f"line {node.lineno}: getattr with a default hides a missing key"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and room(path) not in EDGE:
            raise AssertionError(f"line {node.lineno}: the environment is read at the edge only")
        assert not isinstance(node, ast.Global), f"line {node.lineno}: module state that changes"


def test_imports_form_no_circle():
    graph = {room(path): imports(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", PURE)
def test_the_mathematics_imports_torch_and_nothing_of_ours(name):
    path = SOURCE / f"{name}.py"
    assert imports(path) == set()
    allowed = {"torch", "hashlib", "collections", "typing", "__future__"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in allowed


def test_the_schedule_and_the_decode_rule_know_no_model():
    assert imports(SOURCE / "schedule.py") == {"config"}
    assert imports(SOURCE / "decode.py") <= {"config", "errors", "noise"}


def test_the_server_knows_engines_and_schemas_only():
    allowed = {"", "__version__", "config", "errors", "engines", "decode", "progress", "signals"}
    for path in (SOURCE / "server").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed | {"server", "jobs", "files"}


def test_the_command_line_starts_without_heavy_imports():
    heavy = {"torch", "transformers", "numpy", "fastapi", "matplotlib", "pydantic"}
    for node in tree(SOURCE / "cli.py").body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & heavy
    assert imports(SOURCE / "cli.py", top_level_only=True) <= {"__version__", "errors"}


def test_no_pickle_and_no_remote_code_by_default():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text
        assert "torch.load(" not in text
        assert "torch.save(" not in text
    from hildanext.config import Config

    assert Config().model.trust_remote_code is False


def test_all_names_what_it_exports():
    import hildanext

    assert all(hasattr(hildanext, name) for name in hildanext.__all__)
    assert sys.modules["hildanext"].__doc__
