"""The folder for the hub: a card that says what the run's records say, and an upload to a hub of this test's own."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM

from hildanext import cli
from hildanext.config import ModelConfig
from hildanext.errors import HildaError, UsageError
from hildanext.export.command import export
from hildanext.export.hub_card import export_hub_card, find_run, push
from hildanext.export.source import open_checkpoint
from hildanext.files import write_json
from hildanext.model.pretrained import fingerprint_weights
from hildanext.training.convert import convert_wsd
from support.models import write_gated
from support.training import material


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The folder of a finished run. Its base names a licence."""
    folder = tmp_path_factory.mktemp("run")
    base = Path(shutil.copytree(tiny_base, folder / "tiny-base"))
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A base\n")
    convert_wsd(material(folder, base, train={"seed": 7}))
    return folder / "runs" / "convert"


def test_the_card_says_what_the_records_say(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-6"
    report = {
        "model": "m", "weights": fingerprint_weights(ModelConfig(base=str(checkpoint))), "dtype": "float32",
        "runtime": "eager", "hardware": "CPU x", "tasks": {"stories": {"q_mode": {
            "distinct_2": {"value": 0.4321, "low": None, "high": None, "n": 12},
            "tokens_per_forward": {"value": 1.5, "low": 1.4, "high": 1.6, "n": 12},
            "nothing": {"value": None, "low": None, "high": None, "n": 12}}}},
    }  # fmt: skip
    write_json(tmp_path / "report" / "report.json", report)
    out = tmp_path / "out"
    export(checkpoint, "hub-card", out, reports=[tmp_path / "report"])
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "hildanext")
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"Step 6: eval_loss {last['eval_loss']:.4f}, eval_accuracy {last['eval_accuracy']:.4f}" in card.text
    assert "| stories | q_mode | distinct_2 | 0.4321 | 12 |" in card.text
    assert "| stories | q_mode | tokens_per_forward | 1.5 [1.4, 1.6] | 12 |" in card.text
    assert "nothing" not in card.text
    assert "Seed 7" in card.text
    assert "hildanext convert-wsd --config hildanext.json --run convert" in card.text
    assert str(tmp_path.parent) not in card.text  # no path of this machine
    training = json.loads((out / "training.json").read_text())
    assert training["config"]["model"]["base"] == "tiny-base"
    assert not list(out.glob("trainer.*"))
    AutoModelForCausalLM.from_pretrained(out)
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_what_is_not_recorded_is_said_to_be_missing(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "checkpoints" / "step-6", tmp_path / "alone"))
    assert find_run(alone) is None
    checkpoint = open_checkpoint(alone)
    checkpoint.record["base_model"] = "/absent/base"
    export_hub_card(checkpoint, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for missing in ("Nothing is recorded.", "not recorded; that of the base applies", "**Data:** not recorded"):
        assert missing in text
    assert "license:" not in text
    export_hub_card(checkpoint, tmp_path / "named", licence="mit")
    assert "license: mit" in (tmp_path / "named" / "README.md").read_text()


def test_a_gated_adapter_can_go_too(tmp_path: Path) -> None:
    folder = Path(write_gated(tmp_path).model.base)
    found = export(folder, "hub-card", tmp_path / "out")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= found["files"].keys()


def test_a_report_about_other_weights_is_refused(run: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "report" / "report.json", {"model": "other", "weights": "0"})
    for report, says in ((tmp_path / "report", "other weights"), (tmp_path, "no report.json")):
        with pytest.raises(UsageError, match=says):
            export(run / "checkpoints" / "step-6", "hub-card", tmp_path / "out", reports=[report])
        assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    received: dict[str, bytes]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.refuses and "/commit/" in self.path:
            self.send_error(403, "no right to write")
            return
        if self.path == "/api/repos/create":
            answer = {"url": "https://huggingface.co/me/model"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.received[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/me/model/commit/1", "commitOid": "1"}
        self._send(answer)

    def do_GET(self) -> None:
        self._send({"id": "me/model", "siblings": [], "sha": "0" * 40})

    def _send(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(refuses: bool = False) -> Iterator[tuple[HfApi, dict[str, bytes]]]:
    received: dict[str, bytes] = {}
    server = HTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"received": received, "refuses": refuses}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_test"), received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_push_uploads_what_a_dry_run_shows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["export", str(run / "checkpoints" / "step-6"), "--to", "hub-card", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", None)  # a dry run that uploaded would fail
        assert cli.main([*words, "--push", "me/model", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["would_push"]
    assert shown["repository"] == "me/model"
    with hub() as (api, received):
        assert push(tmp_path / "out", "me/model", api).endswith("me/model")
    assert {name: len(content) for name, content in received.items()} == shown["files"]
    assert received["README.md"] == (tmp_path / "out" / "README.md").read_bytes()


def test_a_refused_upload_is_one_line_and_keeps_the_folder(run: Path, tmp_path: Path) -> None:
    export(run / "checkpoints" / "step-6", "hub-card", tmp_path / "out")
    with hub(refuses=True) as (api, received), pytest.raises(HildaError, match="can be pushed again") as caught:
        push(tmp_path / "out", "me/model", api)
    assert "\n" not in str(caught.value)
    assert not received
    with pytest.raises(HildaError, match="--push"):
        push(tmp_path / "out", "not a name", api)
