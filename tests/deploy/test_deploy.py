"""The files in deploy/ against the code they start: nothing in them is only a name. No engine is needed."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hildanext.cli import build_parser, main
from hildanext.config import Config, load_config, parse_config
from hildanext.decoding.engines import open_engine
from hildanext.server.app import make_app
from hildanext.server.guard import OPEN_PATHS
from hildanext.server.keys import KEYS_VARIABLE, read_keys
from support import serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.name != "api-keys")
STATE = "/var/lib/hildanext"


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, value) in order; comments gone, continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, FROM included; what is before the first one belongs to none."""
    found: list[list[tuple[str, str]]] = []
    for name, value in dockerfile():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, value))
    return found


def only(instructions: list[tuple[str, str]], name: str) -> str:
    (value,) = [value for found, value in instructions if found == name]
    return value


def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(DEPLOY / "hildanext.service")
    return found


def image_command() -> list[str]:
    return [*json.loads(only(stages()[-1], "ENTRYPOINT")), *json.loads(only(stages()[-1], "CMD"))]


def started(command: list[str]) -> Config:
    """The configuration that a `hildanext serve` line gives."""
    assert command[0].rpartition("/")[2] == "hildanext"
    args = build_parser().parse_args(command[1:])
    assert args.command == "serve"
    overrides = args.set + ([f"model.base={json.dumps(args.model)}"] if args.model else [])
    return load_config(args.config, overrides)


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


# --- The image


def test_the_image_is_made_of_files_that_are_there_and_let_in() -> None:
    build, _ = stages()
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in allowed
    for name, value in build:
        if name == "COPY":
            for source in value.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in allowed
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    (named,) = re.findall(r"EXTRAS=\[(\w+)\]", "\n".join(value for name, value in build if name == "ARG"))
    assert re.search(rf"^{named} = \[", extras, re.MULTILINE)


def test_the_last_stage_runs_as_nobody_and_holds_no_tools() -> None:
    (base,) = [value for name, value in dockerfile() if value.startswith("BASE=")]
    assert base == "BASE=python:3.11-slim"
    build, last = stages()
    assert only(build, "FROM") == "${BASE} AS build"
    assert only(last, "FROM") == "${BASE}"
    installed = " ".join(value for name, value in last if name == "RUN")
    assert not re.search(r"\b(gcc|g\+\+|build-essential|git|python3-pip|python3-dev|curl)\b", installed)
    assert "--without-pip" in " ".join(value for _, value in build)
    names = [name for name, _ in last]
    assert int(only(last, "USER")) > 0
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert only(last, "WORKDIR") == only(last, "VOLUME") == STATE


def test_the_image_serves_on_the_port_it_exposes(tmp_path: Path) -> None:
    server = started(image_command()).server
    assert (server.host, server.port) == ("0.0.0.0", int(only(stages()[-1], "EXPOSE")))
    with pytest.raises(Exception, match="api_key_file"):  # not without its secret
        read_keys(server, {})
    (tmp_path / "keys").write_text("one\ntwo\n")
    assert read_keys(server.model_copy(update={"api_key_file": str(tmp_path / "keys")}), {}) == [b"one", b"two"]
    without = started([*image_command(), "--set", "server.api_key_file=null"]).server  # as docs/deploying.md says
    assert read_keys(without, {KEYS_VARIABLE: "three"}) == [b"three"]


def test_the_health_check_tells_a_server_that_is_ready_from_one_that_is_not() -> None:
    command = json.loads(only(stages()[-1], "HEALTHCHECK").partition("CMD ")[2])
    port = started(image_command()).server.port
    (path,) = re.findall(rf"http://127\.0\.0\.1:{port}(/[\w/]+)'", command[-1])
    assert path in OPEN_PATHS  # it has no key
    config = parse_config({"engine": {"order": ["dummy"]}})
    with serving.running(config, keys=[b"secret"]) as (url, worker):
        here = [sys.executable, *command[1:-1], command[-1].replace(f"http://127.0.0.1:{port}", url)]
        assert subprocess.run(here, capture_output=True).returncode == 0
        worker.state = "failing"
        assert subprocess.run(here, capture_output=True).returncode == 1
        worker.state = "ready"


# --- Compose


@pytest.mark.parametrize("name", ["hildanext", "hildanext-gpu"])
def test_a_service_fits_its_image(name: str) -> None:
    found = compose()
    service, last = found["services"][name], stages()[-1]
    config = started([*json.loads(only(last, "ENTRYPOINT")), *service["command"]])
    assert service["ports"] == [f"127.0.0.1:{config.server.port}:{only(last, 'EXPOSE')}"]
    (secret,) = service["secrets"]
    assert config.server.api_key_file == f"/run/secrets/{secret}"
    assert found["secrets"][secret] == {"file": "./api-keys"}
    assert "/deploy/api-keys" in (ROOT / ".gitignore").read_text().splitlines()
    (volume,) = service["volumes"]
    assert volume == f"{next(iter(found['volumes']))}:{STATE}"
    assert seconds(service["stop_grace_period"]) > config.server.drain_s
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    arguments = {value.partition("=")[0] for instruction, value in dockerfile() if instruction == "ARG"}
    assert set(service["build"].get("args", {})) <= arguments
    assert ("profiles" in service) == ("deploy" in service) == (name == "hildanext-gpu")


# --- systemd


def test_the_unit_starts_what_there_is(tmp_path: Path) -> None:
    service = unit()["Service"]
    assert main(["init", str(tmp_path / "hildanext.json")]) == 0
    line = service["ExecStart"].replace("/etc/hildanext/hildanext.json", str(tmp_path / "hildanext.json"))
    name, _, source = service["LoadCredential"].partition(":")
    config = started(shlex.split(line.replace("${CREDENTIALS_DIRECTORY}", str(tmp_path))))
    assert config.server.api_key_file == str(tmp_path / name)
    assert f"install -D -m 600 api-keys {source}" in (DEPLOY / "hildanext.service").read_text()
    assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}" == STATE
    assert float(service["TimeoutStopSec"]) > config.server.drain_s
    assert service["User"] != "root"
    assert service["RestartPreventExitStatus"] == "2"  # what the command line means by it: see its docstring


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    text = (DEPLOY / "hildanext.service").read_text()
    # The command must be there to be verified, and on this machine it is not.
    (tmp_path / "hildanext.service").write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "hildanext.service")], capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")


# --- All of them


def test_names_mean_something() -> None:
    paths = set(make_app(Config(), open_engine, []).openapi()["paths"])
    for file in FILES:
        text = file.read_text()
        assert set(re.findall(r"HILDANEXT_\w+", text)) <= {KEYS_VARIABLE}
        assert set(re.findall(r"/health/\w+", text)) <= paths
        for key in re.findall(r"\b(?:server|jobs|engine|model)\.[a-z_]+\b", text):
            section, _, name = key.partition(".")
            assert name in type(getattr(Config(), section)).model_fields, key
    drain = Config().server.drain_s
    for file in ("compose.yaml", "hildanext.service"):
        assert f"server.drain_s is {drain}" in (DEPLOY / file).read_text()


def test_the_page_names_the_same_files_and_commands() -> None:
    page = (ROOT / "docs" / "deploying.md").read_text()
    named = set(re.findall(r"`(deploy/[\w.-]+)`", page)) - {"deploy/api-keys"}
    assert named == {f"deploy/{file.name}" for file in FILES if file.suffix != ".dockerignore"}
    for command in re.findall(r"^docker .*", page, re.MULTILINE):
        assert any(command in file.read_text() for file in FILES), command
    assert KEYS_VARIABLE in page
    assert STATE in page
