"""The serve command: addresses, keys and ports that are refused, and a whole life."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path

import httpx2
import pytest

from hildanext.config import Config, parse_config
from hildanext.decoding.engines.dummy import NOTICE
from hildanext.errors import ConfigError
from hildanext.server import command
from hildanext.server.command import serve
from support import serving
from support.serving import dummy


def refused(monkeypatch: pytest.MonkeyPatch, config: Config, match: str) -> None:
    """`serve` refuses before anything loads."""
    monkeypatch.setattr(command.engines, "open_engine", lambda config, **how: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=match):
        serve(config)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_no_other_address_without_keys(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    refused(monkeypatch, dummy(host=host), "'server.host': .* set server.api_key_file")


def test_key_files_that_hold_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n  \n")
    refused(monkeypatch, dummy(host="0.0.0.0", api_key_file=str(tmp_path / "empty")), "empty contains no key")
    refused(monkeypatch, dummy(api_key_file=str(tmp_path / "none")), "'server.api_key_file': cannot read .*none")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(monkeypatch, dummy(port=taken.getsockname()[1]), "'server.port': cannot listen on 127.0.0.1:")


def test_the_socket_lets_asyncio_turn_nagle_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with command.bind(dummy(port=port).server) as sock:
        assert sock.proto == socket.IPPROTO_TCP


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM does not exist there")
def test_the_command_answers_and_stops_with_0(tmp_path: Path) -> None:
    config = parse_config({"engine": {"order": ["dummy"]}})
    with serving.process(config, tmp_path) as (url, process):
        assert httpx2.get(f"{url}/health").json()["engine"] == "dummy"
        assert httpx2.post(f"{url}/generate", json={"prompt": "hi"}).json()["text"] == NOTICE + "hi"
        process.send_signal(signal.SIGTERM)
        done = process.wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"url": url, "engine": "dummy", "stopped_by": "SIGTERM"}
    assert "Traceback" not in done.stderr
