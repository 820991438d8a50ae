from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hildanext import cli
from hildanext.config import Config, load_config, parse_config, schema
from hildanext.data.prepare import prepare_data
from hildanext.data.tokenize import tokenize_data
from hildanext.diffusion.schedule import sft_point, total_steps, wsd_point
from hildanext.errors import ConfigError
from hildanext.model.pretrained import load_tokenizer
from hildanext.model.self_answers import write_answers
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.training import trainer
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.run_folder import RunFolder

FOLDER = Path(cli.__file__).parent / "configs"
FILES = sorted(FOLDER.glob("*.json"))
# The demo makes its own models, and has its own test.
READY = [path for path in FILES if not path.stem.startswith("demo")]


def tiny_qwen3(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config).eval()


def write_sources(config: Config) -> None:
    """A little data of every source's kind where its path says."""
    for source in config.data.sources:
        assert source.path is not None
        path = Path(source.path)
        if source.kind == "self":
            path.write_text("".join(f"What is {n} plus one?\n" for n in range(60)))
            continue
        if source.kind == "dolma":
            path.mkdir(parents=True)
            path = path / "part.jsonl"
            records = [{"text": f"{n} birds sat in the old tree and sang. " * 4} for n in range(60)]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            records = [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}."} for n in range(60)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def small(path: Path, folder: Path) -> Config:
    """The configuration as it stands but for the machine: paths, model, device and format; rows cut to be quick."""
    raw = load_config(path).model_dump(mode="json")
    raw["paths"] = {"data": str(folder / "data"), "runs": str(folder / "runs")}
    raw["model"] |= {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"}
    for source in raw["data"]["sources"]:
        source["path"] = str(folder / source["path"])
        source |= {"max_new_tokens": 8, "temperature": 2.0}  # a random model repeats its likeliest answer
    raw["lora"]["base"] = "native"
    raw["data"] |= {"seq_len": 64, "workers": 1}
    raw["train"]["rows_per_step"] = 2 * raw["train"]["micro_batch"]
    return parse_config(raw)


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run stops after two steps, as on a signal."""

    @contextlib.contextmanager
    def after_two() -> Iterator[Callable[[], str | None]]:
        answers = iter([None, "SIGTERM"])
        yield lambda: next(answers)

    monkeypatch.setattr(trainer, "stop_on_signals", after_two)


@pytest.mark.usefixtures("two_steps")
@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_two_steps_and_a_resume(tmp_path: Path, path: Path) -> None:
    config = small(path, tmp_path)
    tokenizer = story_tokenizer(400)
    model = tiny_qwen3(tokenizer) if "qwen3" in path.stem else tiny_llama(tokenizer, 32, 2, context=128, seed=0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_sources(config)
    write_answers(config)
    prepare_data(config)
    tokenize_data(config, load_tokenizer(config.model))
    is_tuning = all(source.into == ["sft"] for source in config.data.sources)
    train, block = (sft, config.sft.block_size) if is_tuning else (convert_wsd, config.wsd.final_block)
    first = train(config)
    assert (first["steps"], first["finished"]) == (2, False)
    second = train(config, resume=True)
    assert second["steps"] == 4
    metrics = RunFolder(Path(second["run"])).read_metrics()
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    points = [wsd_point(step, config.wsd, config.train, config.data.seq_len) for step in range(4)]
    if is_tuning:
        assert block is not None
        points = [sft_point(step, config.sft, config.train.lr_final_ratio, block) for step in range(4)]
    assert [(row["block_size"], row["lr"]) for row in metrics] == [(point.block_size, point.lr) for point in points]
    stored = json.loads((Path(second["checkpoint"]) / "config.json").read_text())
    assert stored["architectures"] == [type(model).__name__]
    assert stored["block_size"] == block
    assert stored["hilda"]["convention"] == config.model.convention


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_valid_and_a_preset(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(path)
    point = wsd_point(total_steps(config.wsd) - 1, config.wsd, config.train, config.data.seq_len)
    assert point.block_size == config.wsd.final_block  # what is decoded with is what was trained last
    assert cli.main(["init", "--preset", path.stem, str(tmp_path / "mine.json")]) == 0
    assert load_config(tmp_path / "mine.json") == config
    assert json.loads((tmp_path / "hildanext.schema.json").read_text()) == schema()
    capsys.readouterr()


def described(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The properties of a schema's node, through a reference or a list's items."""
    for part in (node, node.get("items", {})):
        if "$ref" in part:
            return definitions[part["$ref"].rpartition("/")[2]]["properties"]
    return node.get("properties", {})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_stands_in_the_schema(path: Path) -> None:
    known = schema()

    def check(value: Any, node: dict[str, Any]) -> None:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                properties = described(node, known["$defs"])
                assert set(one) <= set(properties)
                for key, inner in one.items():
                    check(inner, properties[key])

    check(json.loads(path.read_text()), known)


def test_the_files_name_no_machine() -> None:
    for path in FILES:
        assert not re.search(r'"(/|~|[A-Za-z]:\\)|https?:', path.read_text()), path.name


@pytest.mark.parametrize(("idle", "needed"), [("embed_std", "embed_steps"), ("embed_steps", "embed_std")])
def test_half_of_the_embedding_noise_is_refused(idle: str, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"'noise\.{idle}': has no effect while {needed} is 0; set noise\.{needed}"):
        parse_config({"noise": {idle: 1}})
    parse_config({"noise": {idle: 1, needed: 1}})
