"""tools/clients.py: the table says what the tests found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

REPORT = """<testsuites><testsuite>
<testcase classname="tests.clients.test_llm" name="test_chat"/>
<testcase classname="tests.clients.test_litellm" name="test_chat[a]"/>
<testcase classname="tests.clients.test_litellm" name="test_chat[b]"><failure message="E | 1&#10;more"/></testcase>
<testcase classname="tests.clients.test_litellm" name="test_n"><skipped message="litellm is not installed"/></testcase>
<testcase classname="tests.clients.test_table" name="test_chat"/>
</testsuite></testsuites>"""


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    import clients

    return clients


def test_the_table(clients: Any, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT, encoding="utf-8")
    lines = clients.make_table(clients.read_outcomes(tmp_path / "report.xml")).splitlines()
    assert lines == [
        "| client | chat | `n` |",
        "|---|---|---|",
        "| `litellm` | E \\| 1 | litellm is not installed |",
        "| `llm` | works | – |",
    ]


def test_every_client_and_feature_is_known(clients: Any) -> None:
    """A test that is in no column, or a file that is in no row, would be left out of the table."""
    here = Path(__file__).parent
    files = {path.stem for path in here.glob("test_*.py")} - {Path(__file__).stem}
    tests = {
        line[4:].partition("(")[0]
        for name in files
        for line in (here / f"{name}.py").read_text(encoding="utf-8").splitlines()
        if line.startswith("def test_")
    }
    assert files <= set(clients.CLIENTS)
    assert tests <= set(clients.FEATURES)
