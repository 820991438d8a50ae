"""The command line as a stranger meets it: exit codes, one clean line for each mistake, one JSON object for `--json`."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hildanext import files
from hildanext.cli import main
from hildanext.config import Config, load_config
from hildanext.data.synthetic import synthetic_instructions
from hildanext.model.tiny import story_tokenizer, tiny_llama
from support import forked

COMMANDS = [
    "init", "prepare-data", "tokenize", "convert-wsd", "sft", "merge-topk",
    "generate", "chat", "benchmark", "serve", "export", "smoke-test", "demo",
]  # fmt: skip
HEAVY = ("torch", "transformers", "fastapi", "pydantic", "numpy", "matplotlib", "accelerate")


class Answer(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The last line of stderr: what went wrong."""
        return self.stderr.strip().splitlines()[-1]

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; anything beside it fails to parse."""
        return json.loads(self.stdout)


def run(*argv: object) -> Answer:
    """A command in this process, with what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


class Way(NamedTuple):
    """A tiny model taken down the whole way by the commands."""

    folder: Path
    config: Path
    answers: dict[str, Answer]
    checkpoint: Path


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    folder = tmp_path_factory.mktemp("way")
    tokenizer = story_tokenizer()
    tiny_llama(tokenizer, hidden=32, layers=2, context=256, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [json.dumps(one) + "\n" for one in synthetic_instructions(40, seed=2)]
    (folder / "instructions.jsonl").write_text("".join(lines), encoding="utf-8")
    raw = {
        "paths": {"data": str(folder / "data"), "runs": str(folder / "runs")},
        "model": {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"},
        "data": {
            "sources": [
                {"kind": "tinystories", "documents": 60},
                {"kind": "instruct", "path": str(folder / "instructions.jsonl")},
            ],
            "seq_len": 96,
            "eval_share": 0.2,
        },
        "wsd": {"warmup_steps": 0, "stable_steps": 2, "decay_steps": 0, "peak_block": 8, "final_block": 8},
        "train": {"rows_per_step": 2, "micro_batch": 2, "eval_rows": 2, "eval_every": 1, "save_every": 1},
        "sft": {"steps": 1},
        "decode": {"max_new_tokens": 24},
    }
    config = folder / "hildanext.json"
    config.write_text(json.dumps(raw), encoding="utf-8")
    shared = ("--config", config, "--json")
    merged = folder / "runs" / "convert" / "merged"
    answers = {
        "prepare-data": run("prepare-data", *shared),
        "tokenize": run("tokenize", *shared),
        "convert-wsd": run("convert-wsd", *shared),
        "merge-topk": run("merge-topk", *shared, "--k", 2),
        "sft": run("sft", *shared, "--model", merged),
    }
    return Way(folder, config, answers, merged)


@pytest.fixture
def copied(way: Way, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(way.checkpoint, tmp_path / "checkpoint"))


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom hildanext.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert re.search(rf"^    {command}\b", done.stdout, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command: str):
    answer = run(command, "--help")
    assert answer.code == 0
    for option in ("--config", "--set", "--json"):
        assert option in answer.stdout


def test_each_step_prints_one_object(way: Way):
    for command, answer in way.answers.items():
        assert answer.code == 0, (command, answer.stderr)
        assert isinstance(answer.json, dict), command
    assert (way.folder / "runs" / "convert" / "curves.png").is_file()
    merged = way.answers["merge-topk"].json
    assert Path(merged["out"]) == way.checkpoint
    assert merged["eval_loss"] > 0
    assert len(merged["merged"]) == 2


def test_progress_is_on_stderr(way: Way):
    assert "steps" in way.answers["convert-wsd"].stderr


def test_generate_reports_what_it_did(way: Way, tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    answer = run("generate", "Tell a story about Mia.", "--config", way.config, "--model", way.checkpoint, "--json",
                 "--trace", trace, "--set", "decode.mode=S_MODE")  # fmt: skip
    assert answer.code == 0, answer.stderr
    found = answer.json
    assert {
        "text",
        "token_ids",
        "finish_reason",
        "engine",
        "engine_reasons",
        "mode",
        "tau_mask",
        "tau_edit",
        "stats",
    } <= set(found)
    assert {"forwards", "tokens_per_forward", "mask_ratio", "drafts", "edits", "tokens_per_second"} <= set(
        found["stats"]
    )
    assert (found["engine"], found["mode"], found["tau_mask"], found["tau_edit"]) == (
        "transformers",
        "S_MODE",
        0.5,
        0.0,
    )
    assert "dinfer" in found["engine_reasons"]
    steps = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert [step["mask_ratio"] for step in steps] == found["stats"]["mask_ratio"]
    assert sum(len(step["drafted"]) for step in steps) == found["stats"]["drafts"]
    assert sum(len(step["edited"]) for step in steps) == found["stats"]["edits"]
    again = run("generate", "Tell a story about Mia.", "--config", way.config, "--model", way.checkpoint, "--json",
                "--set", "decode.mode=S_MODE")  # fmt: skip
    assert again.json["token_ids"] == found["token_ids"]


def test_generate_tells_the_seed_that_it_drew(way: Way):
    shared = (
        "generate",
        "Once upon",
        "--raw",
        "--config",
        way.config,
        "--model",
        way.checkpoint,
        "--set",
        "decode.temperature=2",
    )
    first, other = (run(*shared, "--json").json for _ in range(2))
    assert first["text"] != other["text"]
    again = run(*shared, "--json", "--set", f"decode.seed={first['stats']['seed']}").json
    assert (again["text"], again["stats"]["seed"]) == (first["text"], first["stats"]["seed"])
    assert re.search(r", seed \d+, ", run(*shared).stderr)


def test_generate_for_people_prints_the_text_alone(way: Way):
    answer = run("generate", "Once upon a time", "--raw", "--config", way.config, "--model", way.checkpoint)
    assert answer.code == 0
    assert "forwards" in answer.stderr
    assert "forwards" not in answer.stdout


def test_generate_reads_stdin(way: Way, monkeypatch: pytest.MonkeyPatch):
    shared = ("--config", way.config, "--model", way.checkpoint, "--json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell a story about Mia."))
    assert (
        run("generate", "-", *shared).json["token_ids"]
        == run("generate", "Tell a story about Mia.", *shared).json["token_ids"]
    )


def test_smoke_test_prints_ok(tmp_path: Path):
    done = forked.run(["smoke-test"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OK")
    assert len(done.stdout.splitlines()) == 1


# Configuration


def test_init_writes_defaults_and_a_schema_that_explains_every_key(tmp_path: Path):
    target = tmp_path / "mine.json"
    assert run("init", target).code == 0
    assert load_config(target) == Config()
    schema = json.loads((tmp_path / "hildanext.schema.json").read_text(encoding="utf-8"))
    assert json.loads(target.read_text(encoding="utf-8"))["$schema"] == "./hildanext.schema.json"
    sections = {name: one for name, one in schema["$defs"].items() if one["type"] == "object"}
    assert len(sections) == len(Config.model_fields) + 1  # and a source
    for name, section in sections.items():
        assert section["additionalProperties"] is False, name
        for key, entry in section["properties"].items():
            assert entry.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("preset", ["demo", "smollm2-135m", "qwen3-0.6b-gtx1080", "qwen3-1.7b-h100"])
def test_init_from_a_preset(tmp_path: Path, preset: str):
    target = tmp_path / "mine.json"
    assert run("init", target, "--preset", preset).code == 0
    ready = Path(__file__).parents[1] / "src" / "hildanext" / "configs" / f"{preset}.json"
    assert load_config(target) == load_config(ready)


def test_init_never_overwrites_unasked(tmp_path: Path):
    target = tmp_path / "mine.json"
    target.write_text("precious", encoding="utf-8")
    answer = run("init", target)
    assert (answer.code, target.read_text(encoding="utf-8")) == (2, "precious")
    assert run("init", target, "--preset", "nonsense", "--force").code == 2
    assert target.read_text(encoding="utf-8") == "precious"
    assert run("init", target, "--force").code == 0
    assert load_config(target) == Config()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("decode.tau_mask=1.5", "tau_mask"),
        ("decode.tau_edit=-0.1", "tau_edit"),
        ("decode.block_size=0", "decode.block_size"),
        ("wsd.final_block=0", "wsd.final_block"),
        ("decode.temperature=-1", "decode.temperature"),
        ("train.lr=0", "train.lr"),
        ("train.lr=fast", "train.lr"),
        ("train.micro_batch=3", "micro_batch"),
        ("train.sede=1", "train.sede"),
        ("trian.seed=1", "trian"),
        ("data.sources=[]", "data.sources"),
        ('data.sources=[{"kind":"dolma"}]', "path"),
        ("noise.t_min=0", "noise.t_min"),
        ("model.convention=sideways", "model.convention"),
        ("engine.order=[]", "engine.order"),
        ("server.port=70000", "server.port"),
        ("decode", "section.key=value"),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_one_line_that_names_it(setting: str, named: str):
    answer = run("convert-wsd", "--set", setting)
    assert answer.code == 2
    assert len(answer.stderr.strip().splitlines()) == 1
    assert named in answer.error
    assert answer.stdout == ""


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "No such file"), ("{", "not valid JSON"), ("[1]", "JSON object"), ("\xff\xfe", "JSON"), ('{"wsd": 3}', "'wsd'")],
)  # fmt: skip
def test_a_configuration_file_that_cannot_be_used(tmp_path: Path, content: str | None, named: str):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    answer = run("tokenize", "--config", path)
    assert answer.code == 2
    assert str(path) in answer.error
    assert named in answer.error


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["generate"], ["convert-wsd", "--nonsense"], ["merge-topk", "--k", "x"]]
)
def test_wrong_arguments_exit_2(argv: list[str]):
    assert run(*argv).code == 2


# Bad input, everywhere: (command line behind --config, exit code, what the line must name)


def bad_commands(way: Way, checkpoint: Path) -> Iterator[tuple[list[object], int, str]]:
    story = ["generate", "Tell a story.", "--model"]
    yield ["generate", "", "--model", checkpoint], 2, "prompt is empty"
    yield ["generate", "  \n", "--model", checkpoint], 2, "prompt is empty"
    yield ["generate", "the cat " * 300, "--model", checkpoint], 2, "context of 256"
    yield [*story, checkpoint, "--set", "decode.max_new_tokens=300"], 2, "max_new_tokens"
    yield [*story, way.folder / "nowhere"], 2, "no such folder"
    yield [*story, way.folder / "nowhere.gguf"], 2, "no such GGUF file"
    yield [*story, way.folder / "data"], 2, "no config.json"
    yield [*story, way.folder / "base"], 2, "run 'hildanext convert-wsd' first"
    yield [*story, checkpoint, "--set", "model.convention=in_place"], 2, "model.convention"
    yield [*story, checkpoint, "--trace", way.config / "t.jsonl"], 1, "File exists"
    yield ["benchmark", "--model", way.folder / "base"], 2, "not a converted checkpoint"
    yield ["benchmark", "--model", checkpoint, "--set", f"paths.data={way.folder / 'void'}"], 1, "tokenize"
    yield ["tokenize", "--set", f"paths.data={way.folder / 'void'}"], 2, "prepare-data"
    yield ["convert-wsd", "--set", f"paths.data={way.folder / 'void'}", "--run", "other"], 1, "tokenize"
    yield ["convert-wsd"], 2, "--resume"
    yield ["convert-wsd", "--resume", "--run", "never"], 2, "no run"
    yield ["convert-wsd", "--resume", "--set", "train.lr=0.5"], 2, "train.lr"
    yield ["sft", "--model", way.folder / "base", "--run", "other"], 2, "is not converted"
    yield ["merge-topk", "--run", "never"], 2, "no checkpoints"
    yield ["merge-topk", "--k", 99], 2, "--k"
    yield ["merge-topk", "--k", 0], 2, "--k"
    yield ["merge-topk", "--k", -1], 2, "--k"
    yield ["merge-topk", "--run", "../runs/convert"], 2, "--run '../runs/convert'"
    yield ["convert-wsd", "--run", "../elsewhere"], 2, "--run '../elsewhere'"
    yield ["sft", "--run", ""], 2, "--run ''"
    yield [*story, checkpoint / "config.json"], 2, "is a file"
    yield ["merge-topk", way.folder / "nowhere", "--out", way.folder / "new"], 2, "not a checkpoint folder"
    yield ["merge-topk", "--k", 2], 2, "exists"
    yield ["prepare-data", "--set", 'data.sources=[{"kind":"dolma","path":"/no/where"}]'], 2, "/no/where"
    yield ["serve", "--set", "server.host=0.0.0.0", "--model", checkpoint], 2, "api_key_file"


@pytest.mark.parametrize("number", range(30))
def test_bad_input_is_one_line_and_destroys_nothing(way: Way, copied: Path, number: int):
    cases = list(bad_commands(way, copied))
    assert len(cases) == 30
    argv, code, named = cases[number]
    before = {path: path.stat().st_mtime_ns for path in way.folder.rglob("*") if path.is_file()}
    answer = run(*argv, "--config", way.config, "--json")
    assert answer.code == code, answer.stderr
    assert named in answer.error
    assert answer.error.startswith(f"hildanext {argv[0]}: ")
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in way.folder.rglob("*") if path.is_file()} == before


def assert_refused(way: Way, checkpoint: Path, named: str) -> None:
    """Neither generated with nor merged, for the named reason, and nothing is left of the merge."""
    for command in (
        ["generate", "Hello", "--model", checkpoint],
        ["merge-topk", way.checkpoint, checkpoint, "--out", checkpoint.parent / "m"],
    ):
        answer = run(*command, "--config", way.config)
        assert answer.code == 1
        assert named in answer.error
    assert not (checkpoint.parent / "m").exists()


def test_damaged_weights(way: Way, copied: Path):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(way, copied, "damaged safetensors")


def test_a_checkpoint_with_another_tokenizer(way: Way, copied: Path, tiny_tokenizer: PreTrainedTokenizerFast):
    tiny_tokenizer.save_pretrained(copied)
    assert_refused(way, copied, "tokenizer")


@pytest.mark.parametrize("command", ["prepare-data", "tokenize", "init"])
def test_a_full_disk_leaves_what_was_there(way: Way, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch):
    data = Path(shutil.copytree(way.folder / "data", tmp_path / "data"))
    target = tmp_path / "hildanext.json"
    target.write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # Data reaches the disk with fsync at the latest: the moment before a new file takes the old one's name.
    monkeypatch.setattr(files.os, "fsync", full)
    shared = ["--config", way.config, "--set", f"paths.data={data}"]
    answer = run(command, *([target, "--force"] if command == "init" else shared))
    assert answer.code == 1
    assert "No space left on device" in answer.error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_out_of_gpu_memory_is_one_line_with_remedies(monkeypatch: pytest.MonkeyPatch):
    def greedy(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice")

    monkeypatch.setattr("hildanext.smoke.smoke_test", greedy)
    answer = run("smoke-test")
    assert answer.code == 1
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "2.00 GiB" in answer.error
    assert "train.micro_batch" in answer.error


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch):
    """What is no user's mistake keeps its traceback: a report needs it."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hildanext.smoke.smoke_test", broken)
    with pytest.raises(ZeroDivisionError):
        main(["smoke-test"])


def test_data_commands_tell_people_what_they_wrote(way: Way, tmp_path: Path):
    shared = ["--config", way.config, "--set", f"paths.data={tmp_path / 'data'}"]
    prepared = run("prepare-data", *shared)
    counts = way.answers["prepare-data"].json["documents"]
    assert prepared.stdout.splitlines() == [
        *(f"{split}: {count} documents" for split, count in counts.items()),
        "100 records read, 0 rejected",
    ]
    lines = run("tokenize", *shared).stdout.splitlines()
    splits = way.answers["tokenize"].json["splits"]
    assert len(lines) == len(splits) == 4
    for line, (split, meta) in zip(lines, splits.items(), strict=True):
        assert line.startswith(f"{split}: {meta['rows']} rows of 96 tokens (")
        assert f"{meta['tokens']} tokens ({meta['supervised']} supervised)" in line
