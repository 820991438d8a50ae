"""Write the table of clients and features in docs/serving.md from a run of tests/clients.

A test of the same name in several files is a feature, a file is a client. A feature works where all tests of its name pass;
where they are skipped or fail, the table gives the reason.

    python tools/clients.py            run the tests and write the table
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- Made by tools/clients.py. Do not edit. -->\n", "<!-- End of what tools/clients.py makes. -->\n"
CLIENTS = {
    "test_openai_client": "`openai`",
    "test_litellm": "`litellm`",
    "test_langchain_openai": "`langchain-openai`",
    "test_instructor": "`instructor`",
    "test_llm": "`llm`",
    "test_open_webui": "Open WebUI",
}
FEATURES = {
    "test_models": "list of models",
    "test_chat": "chat",
    "test_stream": "stream",
    "test_async": "async",
    "test_completions": "plain completions",
    "test_n": "`n`",
    "test_logprobs": "`logprobs`",
    "test_penalties": "penalties",
    "test_structured": "structured output",
    "test_tools": "tools",
    "test_a_text_too_long": "context error",
}
NOT_ASKED = "–"  # the client does not offer it


def run_tests(report: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/clients"]
    subprocess.run(command, cwd=ROOT, check=False)  # a failure is a cell of the table


def read_outcomes(report: Path) -> dict[tuple[str, str], str]:
    """For each (file, test): 'works', or the reason why it does not."""
    found: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        place = case.get("classname", "").rsplit(".", 1)[-1], case.get("name", "").partition("[")[0]
        trouble = next(
            (case.find(kind) for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None
        )
        reason = "works" if trouble is None else (trouble.get("message") or trouble.tag).splitlines()[0]
        if found.get(place, "works") == "works":
            found[place] = reason
    return found


def make_table(outcomes: dict[tuple[str, str], str]) -> str:
    """The table in Markdown, with the clients and features of which there are tests."""
    clients = [name for name in CLIENTS if any(file == name for file, _ in outcomes)]
    features = [name for name in FEATURES if any(test == name for _, test in outcomes)]
    lines = ["| client | " + " | ".join(FEATURES[name] for name in features) + " |", "|---" * (len(features) + 1) + "|"]
    for client in clients:
        cells = [outcomes.get((client, feature), NOT_ASKED).replace("|", "\\|") for feature in features]
        lines.append(f"| {CLIENTS[client]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run_tests(report)
        table = make_table(read_outcomes(report))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
