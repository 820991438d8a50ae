"""What a job may open: checked in its own process, at the moment of opening, whatever was true when it was asked for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from hildanext.config import Config, parse_config
from hildanext.data.sources.opening import list_files
from hildanext.data.tokenize import make_encoding
from hildanext.errors import ConfigError, UsageError
from hildanext.files import write_json
from hildanext.jobs.kinds import job_config
from hildanext.jobs.reach import Hook, reach_of
from hildanext.model.pretrained import base_of, load_tokenizer, locate, read_record
from support import forked

REPLY = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the workspace."""
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server's folder; it is also the current one."""
    (tmp_path / "workspace").mkdir()
    monkeypatch.chdir(tmp_path / "workspace")
    return tmp_path / "workspace"


def server(**sections: Any) -> Config:
    return parse_config(sections)


def confined(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """The packages' own audit events are judged as in a job of this server; a real hook could not be removed."""
    hook = Hook(reach_of(config, Path.cwd()))
    monkeypatch.setattr(sys, "audit", lambda event, *args: hook(event, args))


def prepare(workspace: Path, path: str, config: Config, kind: str = "instruct") -> tuple[int, str]:
    """Exit code and stderr of prepare-data as a job over `path`, in a process of its own."""
    job = job_config(config, {"data": {"sources": [{"kind": kind, "path": path}], "eval_share": 0}}, workspace)
    write_json("config.json", job.model_dump(mode="json"))
    write_json("reach.json", reach_of(config, workspace)._asdict())
    done = forked.run(["prepare-data", "--config", "config.json", "--confine", "reach.json"], workspace)
    return done.returncode, done.stderr


def test_globs_folders_and_links_do_not_leave_the_workspace(workspace: Path, outside: Path) -> None:
    (outside / "secret.jsonl").write_text(json.dumps(REPLY))
    (workspace / "texts").mkdir()
    (workspace / "texts" / "good.jsonl").write_text(json.dumps(REPLY))
    assert prepare(workspace, "texts/*.jsonl", server())[0] == 0
    shutil.rmtree("data")
    (workspace / "texts" / "leak.jsonl").symlink_to(outside / "secret.jsonl")
    for path in ("texts/*.jsonl", "texts", "**/*.jsonl"):
        code, line = prepare(workspace, path, server())
        assert (code, "texts/leak.jsonl: is outside the workspace" in line) == (2, True), line
        assert not Path("data/processed").exists()
    with pytest.raises(ConfigError, match="is outside the workspace"):
        prepare(workspace, "texts/../*/../../outside/*.jsonl", server())


def test_a_folder_that_becomes_a_link_after_the_request(workspace: Path, outside: Path) -> None:
    (outside / "secret.jsonl").write_text(json.dumps(REPLY))
    (workspace / "texts").mkdir()
    asked = {"data": {"sources": [{"kind": "instruct", "path": "texts"}]}}
    job_config(server(), asked, workspace)
    (workspace / "texts").rmdir()
    (workspace / "texts").symlink_to(outside)
    with pytest.raises(ConfigError, match="texts is outside the workspace"):
        job_config(server(), asked, workspace)
    named = server(data=asked["data"])  # the operator may keep it elsewhere
    assert prepare(workspace, "texts", named)[0] == 0


def test_every_file_that_python_opens_in_a_job_is_checked(workspace: Path, outside: Path) -> None:
    """A configuration names none of these: the split files of `data`, written through a link."""
    (workspace / "texts.jsonl").write_text(json.dumps(REPLY))
    (workspace / "data").mkdir()
    reach = reach_of(server(), workspace)  # before the link: `data` itself may lie elsewhere
    assert reach.roots == [str(workspace), str(workspace / "data"), str(workspace / "runs")]
    hook = Hook(reach)
    (workspace / "data" / "processed").symlink_to(outside)
    for path in ("data/processed/train.jsonl", b"data/processed/train.jsonl", str(workspace / "data/processed/x")):
        with pytest.raises(UsageError, match="is outside the workspace"):
            hook("open", (path, "wb", 0))
    hook("open", ("data/train.jsonl", "wb", 0))
    hook("open", (str(outside / "library.so"), "rb", 0))  # files of libraries are not named through the workspace
    hook("open", (3, "rb", 0))


def test_models_are_local_and_complete(
    workspace: Path, outside: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    shutil.copytree(tiny_base, outside / "base")
    shutil.copytree(tiny_base, workspace / "good")
    shutil.copytree(tiny_base, workspace / "linked")
    (workspace / "linked" / "tokenizer.json").unlink()
    (workspace / "linked" / "tokenizer.json").symlink_to(outside / "base" / "tokenizer.json")
    shutil.copytree(tiny_base, workspace / "adapter")
    write_json("adapter/adapter_config.json", {"base_model_name_or_path": str(outside / "base")})
    shutil.copytree(tiny_base, workspace / "hub-adapter")
    write_json("hub-adapter/adapter_config.json", {"base_model_name_or_path": "owner/name"})
    (workspace / "alias").symlink_to(outside / "base")
    confined(monkeypatch, server())
    locate("good")
    locate("smollm2-135m")
    for name, reason in [
        ("linked", "linked/tokenizer.json: is outside the workspace"),
        ("adapter", "outside/base: is outside the workspace"),
        ("hub-adapter", "model 'owner/name': a job may open only URLs and hub models of the server's configuration"),
        ("alias", "alias: is outside the workspace"),
        (str(outside / "base"), "is outside the workspace"),
        ("owner/name", "model 'owner/name': a job may open only URLs and hub models"),
    ]:
        with subtests.test(name=name):
            with pytest.raises(UsageError, match=reason):
                load_tokenizer(server(model={"base": name}).model)
            tokenizer = server(data={"foreign_ids": "retokenize", "source_tokenizer": name})
            with pytest.raises(UsageError, match=reason):
                make_encoding(tokenizer, "train", load_tokenizer(server(model={"base": "good"}).model))


def referring(folder: Path, base: str) -> Config:
    """A checkpoint that says what it was converted from."""
    write_json(folder / "config.json", {"hilda": {"base_model": base}})
    return server(model={"base": str(folder)})


def test_the_base_of_a_checkpoint_follows_the_same_rule(
    workspace: Path, outside: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base, outside / "base")
    foreign = referring(workspace / "foreign", str(outside / "base"))

    def open_base(config: Config) -> None:
        record = read_record(config.model)
        assert record is not None
        locate(base_of(config.model, record).base)

    with monkeypatch.context() as patch:
        confined(patch, server())
        with pytest.raises(UsageError, match="outside/base: is outside the workspace"):
            open_base(foreign)
    with monkeypatch.context() as patch:
        confined(patch, foreign)  # the server's own model was made from it
        open_base(foreign)
    hub = referring(outside / "converted", "owner/name")
    with monkeypatch.context() as patch:
        confined(patch, hub)
        open_base(hub)
        with pytest.raises(UsageError, match="'owner/other'"):
            locate("owner/other")


def test_urls_and_hubs_are_those_of_the_server(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    plain = server(model={"base": "owner/name", "revision": "v1"})
    for asked, line in [
        ({"model": {"base": "owner/other"}}, "'config.model.base': a job may open only URLs and hub models"),
        ({"model": {"revision": "refs/pr/1"}}, "'config.model.revision'"),
        ({"data": {"source_tokenizer": "gpt2"}}, "'config.data.source_tokenizer': a job may open only URLs"),
        ({"data": {"sources": [{"kind": "tinystories", "path": "hub"}]}}, "'config.data.sources.0.path'"),
        ({"data": {"sources": [{"kind": "dolma", "path": "hf://datasets/a/b"}]}}, "'config.data.sources.0.path'"),
    ]:
        with subtests.test(asked=asked), pytest.raises(ConfigError, match=line):
            job_config(plain, asked, workspace)
    stories = {"kind": "tinystories", "path": "hub"}
    for named in ({"kind": "dolma", "path": "memory://a/*.jsonl"}, stories):
        config = server(data={"sources": [named]})
        job_config(config, {"data": {"sources": [named]}}, workspace)
    confined(monkeypatch, server(data={"sources": [{"kind": "dolma", "path": "memory://a/*.jsonl"}]}))
    with pytest.raises(UsageError, match=r"memory://b/x\.jsonl: a job may open only URLs"):
        list_files("memory://b/x.jsonl", (".jsonl",))


def test_without_such_a_name_the_network_is_closed(workspace: Path) -> None:
    closed = Hook(reach_of(server(), workspace))
    for event, args in (("socket.getaddrinfo", ("example.org", 443)), ("socket.connect", (None, ("10.0.0.1", 80)))):
        with pytest.raises(UsageError, match="the network is closed to this job"):
            closed(event, args)
    closed("socket.connect", (None, "/run/worker.sock"))
    Hook(reach_of(server(model={"base": "owner/name"}), workspace))("socket.getaddrinfo", ("example.org", 443))


def test_a_pattern_at_the_root_does_not_open_the_disk(workspace: Path) -> None:
    reach = reach_of(server(data={"sources": [{"kind": "dolma", "path": "/*.jsonl"}]}), workspace)
    assert "/" not in reach.roots


def test_runs_stay_in_their_folder(workspace: Path, outside: Path) -> None:
    (workspace / "texts.jsonl").write_text(json.dumps(REPLY))
    (workspace / "runs").mkdir()
    (workspace / "runs" / "link").symlink_to(outside)
    (workspace / "runs" / "file").touch()
    write_json("reach.json", reach_of(server(), workspace)._asdict())
    for name, reason in (("link", "runs/link: is outside the workspace"), ("file", "runs/file is a file")):
        done = forked.run(["merge-topk", "--run", name, "--confine", "reach.json"], workspace)
        assert (done.returncode, reason in done.stderr) == (2, True), done.stderr


def test_trackers_on_a_server_are_those_of_the_server(workspace: Path) -> None:
    asked = {"train": {"trackers": ["tensorboard", "wandb"]}}
    with pytest.raises(ConfigError, match=r"'config\.train\.trackers': a job may use only trackers .*, not 'wandb'"):
        job_config(server(), asked, workspace)
    job_config(server(), {"train": {"trackers": ["tensorboard"]}}, workspace)
    assert reach_of(server(train={"trackers": ["tensorboard"]}), workspace).names == []
    named = server(train={"trackers": ["wandb"]})
    job_config(named, asked, workspace)
    Hook(reach_of(named, workspace))("socket.getaddrinfo", ("example.org", 443))


def test_tables_do_not_leave_the_workspace(workspace: Path, outside: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), outside / "secret.parquet")
    feather.write_feather(pa.table({"text": ["a"]}), str(outside / "secret.feather"))
    (workspace / "texts").mkdir()
    for name in ("secret.parquet", "secret.feather"):
        (workspace / "texts" / name).symlink_to(outside / name)
        for path in ("texts", f"texts/*{Path(name).suffix}"):
            code, line = prepare(workspace, path, server(), kind="text")
            assert (code, f"texts/{name}: is outside the workspace" in line) == (2, True), line
        (workspace / "texts" / name).unlink()
        shutil.copy(outside / name, workspace / "texts" / name)
        assert prepare(workspace, "texts", server(), kind="text")[0] == 0
