"""SDAR's layout: the logits and the texts of the checkpoint, whatever is moved; refusals; memory; nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import hildanext
from hildanext import cli
from hildanext.config import ModelConfig
from hildanext.errors import CheckpointError, HildaError, UsageError
from hildanext.export.command import export
from hildanext.export.weights import Stored, mean_row, ranges, stored_tensors, write_shards
from hildanext.files import write_json
from hildanext.model.loading import load_diffusion_lm
from support.exports import BLOCK, tiny_llama, tiny_qwen3, tiny_qwen3_moe, write_checkpoint
from support.models import write_converted, write_gated

SERVED = 151669  # the mask token's id in SGLang and LMDeploy
ROWS = 151936  # of Qwen3's vocabulary


@pytest.fixture(scope="module", params=["tied", "untied", "experts"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the mask token at 300, and rows that pad the vocabulary as large as any others."""
    model = tiny_qwen3_moe(ROWS) if request.param == "experts" else tiny_qwen3(ROWS, tied=request.param == "tied")
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), model)


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return Path(export(checkpoint, "sdar", None)["out"])


def in_blocks(model: Any, ids: Tensor) -> Tensor:
    """Logits [L, V] of a stock model on one text, from an explicit mask."""
    block = torch.arange(len(ids)) // BLOCK
    mask = torch.where(block[:, None] >= block, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits: Tensor = model(ids[None], attention_mask=mask, position_ids=torch.arange(len(ids))[None]).logits[0]
    return logits


@torch.no_grad()
def test_logits_are_those_of_the_checkpoint(checkpoint: Path, exported: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    mask_id = ours.config.mask_token_id
    assert mask_id == 300
    ids = torch.randint(0, 300, (11,))
    ids[[3, 6, 7, 9]] = mask_id
    expected, got = in_blocks(ours, ids), theirs(torch.where(ids == mask_id, SERVED, ids)[None]).logits[0]
    assert (expected - got)[:, :300].abs().max() == 0.0
    assert (got[:, 300:] == -torch.inf).all()
    body = AutoModel.from_pretrained(exported, trust_remote_code=True)
    assert torch.equal(
        body(torch.where(ids == mask_id, SERVED, ids)[None]).last_hidden_state @ theirs.lm_head.weight[:300].T,
        got[None, :, :300],
    )


@torch.no_grad()
def test_a_cached_text_and_padding(exported: Path) -> None:
    """With a key-value cache the logits are the same, and a 2-D mask hides padding but not the end of a block."""
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    ids = torch.randint(0, 300, (1, 8))
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest[..., :300], whole[:, 4:, :300])
    tail = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    assert torch.equal(model(ids, attention_mask=tail).logits, whole)
    hidden = model(ids, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])).logits
    other = ids.clone()
    other[0, 1] = (ids[0, 1] + 1) % 300
    assert torch.equal(
        model(other, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])).logits[:, 2:], hidden[:, 2:]
    )
    with pytest.raises(NotImplementedError, match="SGLang"):
        model.generate(ids)


def test_no_id_without_a_token_can_win_in_a_server(checkpoint: Path, exported: Path) -> None:
    """SGLang and LMDeploy take the largest of all logits, of the raw head."""
    head = load_file(exported / "model.safetensors")["lm_head.weight"]
    states = torch.randn(200, head.shape[1])
    winners = (states @ head.T).argmax(-1)
    assert winners.max() < 300
    before = load_file(checkpoint / "model.safetensors")
    head = before.get("lm_head.weight", before["model.embed_tokens.weight"])
    assert (states @ head.T).argmax(-1).max() >= 300  # else this would show nothing


@pytest.mark.slow
def test_texts_stay_the_same_there_and_back(checkpoint: Path, exported: Path) -> None:
    """HildaNext writes the same texts with the exported folder, whose mask token has another id."""
    prompts = ["the cat saw", "once upon a time", "1 2 3"]
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_new_tokens": 12}
    texts = []
    for folder in (checkpoint, exported):
        with hildanext.load(folder, **settings) as model:
            texts.append([answer.token_ids for answer in model.generate(prompts, raw=True)])
    assert texts[0] == texts[1]
    assert any(texts[0])
    lm, _ = load_diffusion_lm(ModelConfig(base=str(exported), device="cpu", dtype="float32"))
    assert (lm.mask_token_id, lm.block_size, lm.tokenizer.mask_token_id) == (SERVED, BLOCK, SERVED)


def test_the_folder_holds_what_the_servers_need(checkpoint: Path, exported: Path) -> None:
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    assert (config.rope_theta, config.rope_parameters["rope_theta"]) == (5000.0, 5000.0)
    assert (config.block_size, config.mask_token_id, config.tie_word_embeddings) == (BLOCK, SERVED, False)
    settings = yaml.safe_load((exported / "sglang-q_mode.yaml").read_text())
    assert settings == {"block_size": 4, "threshold": 0.7, "edit_threshold": 0.5, "max_post_edit_steps": 16}
    assert yaml.safe_load((exported / "sglang-s_mode.yaml").read_text())["edit_threshold"] == 0.0
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    before = AutoTokenizer.from_pretrained(checkpoint)
    text = "the cat saw a dog <|im_end|> 1 2"
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
    assert tokenizer("<|mask|>")["input_ids"] == [SERVED]
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [3]
    readme = (exported / "README.md").read_text()
    assert "--dllm-block-length 4" in readme
    assert f"--dllm-algorithm-config {exported.name}/sglang-q_mode.yaml" in readme
    # transformers writes and reads it again.
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    model.save_pretrained(exported.parent / f"{exported.name}-again")
    stored = json.loads((exported.parent / f"{exported.name}-again" / "config.json").read_text())
    assert (stored["model_type"], stored["rope_theta"]) == (config.model_type, 5000.0)


def test_calibrated_settings_and_no_editing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_qwen3(ROWS))
    stored = json.loads((folder / "generation_config.json").read_text())
    modes = {"Q_MODE": {"tau_mask": 0.9, "tau_edit": None, "block_size": 8}}
    write_json(folder / "generation_config.json", stored | {"hilda": modes})
    write_json(
        folder / "config.json",
        json.loads((folder / "config.json").read_text()) | {"delete_token_id": 290, "split_token_id": 291},
    )
    out = Path(export(folder, "sdar", tmp_path / "out")["out"])
    settings = yaml.safe_load((out / "sglang-q_mode.yaml").read_text())
    assert settings == {"block_size": 8, "threshold": 0.9, "edit_threshold": 1.0, "max_post_edit_steps": 0}
    card = (out / "README.md").read_text()
    assert "--dllm-algorithm JointThresholdInDel " in card
    assert "lmdeploy serve" not in card  # it would write DELETE and INSERT as text
    with pytest.raises(UsageError, match="insert and delete, which diffusers cannot do"):
        export(folder, "diffusers", tmp_path / "diffusers")
    assert json.loads((out / "config.json").read_text())["split_token_id"] == 291


# --- Shards and memory


def test_shards_keep_their_tensors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_qwen3(ROWS, tied=True, num_hidden_layers=4), shard="30KB")
    n = len(list(folder.glob("model-*.safetensors")))
    assert n > 2
    result = export(folder, "sdar", tmp_path / "out")
    assert result["shards"] == n
    out = Path(result["out"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    before = {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}
    assert index["weight_map"].keys() == {*before, "lm_head.weight"}
    for name, file in index["weight_map"].items():
        tensor = load_file(out / file)[name]
        expected = before.get(name, before["model.embed_tokens.weight"])
        changed = name in ("lm_head.weight", "model.embed_tokens.weight")
        assert torch.equal(tensor[:300], expected[:300]) if changed else torch.equal(tensor, expected)
    assert index["metadata"]["total_size"] == sum(
        4 * load_file(out / f)[t].numel() for t, f in index["weight_map"].items()
    )


MEASURE = """
import re, sys
from pathlib import Path
from hildanext.export.command import export

def resident(kind):
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

export(Path(sys.argv[1]), "sdar", Path(sys.argv[2]) / "small-out")  # imports and caches are there before the first figure
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
before = resident("VmRSS")
export(Path(sys.argv[3]), "sdar", Path(sys.argv[2]) / "large-out")
print(resident("VmHWM") - before)
"""


def write_random(folder: Path, small: Path, config: Qwen3Config, n_shards: int) -> int:
    """A checkpoint of random bf16 weights, never whole in memory. Returns the bytes of its largest shard."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Qwen3ForCausalLM(config).state_dict().items()}
    names = [name for name in shapes if not (config.tie_word_embeddings and name == "lm_head.weight")]
    folder.mkdir()
    per = -(-len(names) // n_shards)
    for number in range(n_shards):
        part = names[number * per : (number + 1) * per]
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.1, 0.1) for name in part}
        save_file(tensors, folder / f"model-{number + 1:05}-of-{n_shards:05}.safetensors", metadata={"format": "pt"})
    stored = json.loads((small / "config.json").read_text())
    kept = {key: stored[key] for key in ("block_size", "mask_token_id", "hilda", "eos_token_id")}
    write_json(folder / "config.json", config.to_dict() | kept | {"architectures": ["Qwen3ForCausalLM"]})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((small / name).read_bytes())
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def extra_memory(tmp_path: Path, config: Qwen3Config, n_shards: int) -> tuple[int, int]:
    """(extra bytes of an export, bytes of the largest shard)."""
    small = write_checkpoint(tmp_path / "small", tiny_qwen3(ROWS))
    largest = write_random(tmp_path / "large", small, config, n_shards)
    command = [sys.executable, "-c", MEASURE, str(small), str(tmp_path), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), largest


@pytest.mark.slow
def test_a_model_of_the_shape_of_qwen3_1_7b_streams(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=ROWS, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    extra, largest = extra_memory(tmp_path, config, 4)
    print(f"extra {extra / 1e6:.0f} MB, largest shard {largest / 1e6:.0f} MB")
    assert extra < 1.2 * largest


def test_a_file_of_tensors_is_read_and_written_as_safetensors_does(tmp_path: Path) -> None:
    """Against the safetensors library, with dtypes of several widths and a scalar."""
    tensors = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "whole": torch.randn(4, 2),
        "scalar": torch.tensor(3.5),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    stored = stored_tensors([tmp_path / "in.safetensors"])
    write_shards(tmp_path, [stored], [])
    copy = load_file(tmp_path / "model.safetensors")
    assert copy.keys() == tensors.keys()
    assert all(torch.equal(copy[name], tensors[name]) for name in tensors)
    mean = mean_row(stored["whole"], [0, 2, 3])
    torch.testing.assert_close(mean, tensors["whole"][[0, 2, 3]].double().mean(0))
    assert ranges([1, 2, 3, 7, 9, 10]) == [(1, 4), (7, 8), (9, 11)]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "in.safetensors").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        stored_tensors([tmp_path / "cut.safetensors"])


# --- Bad input


def refused(folder: Path, *words: str, to: str = "sdar") -> str:
    """The error of `hildanext export`, which is one line and leaves nothing behind."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(HildaError) as caught:
        export(folder, to, folder.parent / "out")  # type: ignore[arg-type]
    assert sorted(folder.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _shifted(folder: Path) -> Path:
    return write_checkpoint(folder, tiny_qwen3(ROWS), "shifted")


def _gated(folder: Path) -> Path:
    return Path(write_gated(folder).model.base)


def _llama(folder: Path) -> Path:
    return write_checkpoint(folder, tiny_llama(ROWS))


def _small(folder: Path) -> Path:
    return write_checkpoint(folder, tiny_qwen3(320))


def _without_block(folder: Path) -> Path:
    path = write_checkpoint(folder, tiny_qwen3(ROWS))
    write_json(path / "config.json", json.loads((path / "config.json").read_text()) | {"block_size": None})
    return path


def _taken(folder: Path) -> Path:
    """Another token already has the servers' id."""
    path = write_checkpoint(folder, tiny_qwen3(ROWS))
    parts = json.loads((path / "tokenizer.json").read_text())
    parts["model"]["vocab"]["zebra"] = SERVED
    (path / "tokenizer.json").write_text(json.dumps(parts))
    return path


def _yarn(folder: Path) -> Path:
    path = write_checkpoint(folder, tiny_qwen3(ROWS))
    stored = json.loads((path / "config.json").read_text())
    rope = stored["rope_parameters"] | {"rope_type": "yarn", "factor": 4.0}
    write_json(path / "config.json", stored | {"rope_parameters": rope})
    return path


def _partly_dense(folder: Path) -> Path:
    return write_checkpoint(folder, tiny_qwen3_moe(ROWS, mlp_only_layers=[0]))


def _base(folder: Path) -> Path:
    return write_checkpoint(folder, tiny_qwen3(320)).parent / "base"


def _without_weights(folder: Path) -> Path:
    path = write_checkpoint(folder, tiny_qwen3(ROWS))
    (path / "model.safetensors").unlink()
    return path


def _cut(folder: Path) -> Path:
    path = write_checkpoint(folder, tiny_qwen3(ROWS))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_shifted, "model.convention 'in_place'"),
        (_gated, "lora.gate false"),
        (_llama, "is a LlamaForCausalLM"),
        (_small, "has 320 rows"),
        (_without_block, "no block_size"),
        (_taken, "is the token 'zebra'"),
        (_yarn, "rope_parameters.rope_type is 'yarn'"),
        (_partly_dense, "mlp_only_layers is [0]"),
        (_base, "is not a converted checkpoint"),
        (_without_weights, "no safetensors weights"),
        (_cut, "damaged safetensors file"),
    ],
)
def test_what_the_servers_cannot_load_is_refused(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    assert says in refused(make(tmp_path / "made"))


def test_existing_folders_and_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(write_converted(tmp_path, context=64).model.base)
    for words, says in (
        (["--to", "diffusers", "--out", str(tmp_path)], "exists; choose another --out"),
        (["--to", "sdar", "--push", "me/model"], "are for --to hub-card"),
        (["--to", "hub-card", "--dry-run"], "give --push"),
    ):
        assert cli.main(["export", str(folder), *words]) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "absent"), "--to", "sdar"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["sdar", "diffusers", "hub-card"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, make_disk: Callable[[int], Path], to: Any) -> None:
    disk = make_disk(4096)
    folder = write_checkpoint(tmp_path, tiny_qwen3(ROWS))
    with pytest.raises(HildaError, match=r"needs 0\.0 GB|GB are free") as caught:
        export(folder, to, disk / "out")
    assert "\n" not in str(caught.value)
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, make_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else fills it after the check."""
    from hildanext.export import sdar

    disk = make_disk(4096)
    folder = write_checkpoint(tmp_path, tiny_qwen3(ROWS))
    monkeypatch.setattr(sdar, "require_space", lambda out, n_bytes: None)
    with pytest.raises(HildaError, match="cannot be written"):
        export(folder, "sdar", disk / "out")
    assert list(disk.iterdir()) == []


def test_stored_is_what_a_header_says() -> None:
    assert Stored(Path("f"), "F32", (3, 5), 8, 60).row_bytes == 20
