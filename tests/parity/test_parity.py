"""Every decoder against the golden tokens, and the traps between them, each by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hildanext
from hildanext.config import parse_config
from hildanext.decoding import runtimes
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.settings import Settings as OurSettings
from hildanext.export.diffusers import call_arguments
from hildanext.files import write_json
from parity import kit
from parity.loops import cut, paper_loop, served_loop

Case = dict[str, Any]
Decoder = Callable[[Case], list[int]]
CASES = kit.cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit's models."""
    path = tmp_path_factory.mktemp("parity")
    kit.write_models(path)
    return path


def of(name: str) -> list[Case]:
    return [case for case in CASES if case["model"] == name]


def assert_golden(decode: Decoder, cases: list[Case]) -> None:
    """40 of 40."""
    wrong = [case["settings"] for case in cases if decode(case) != case["completion"]]
    assert (len(cases), wrong) == (40, [])


def settings_of(case: Case) -> OurSettings:
    found = kit.SETTINGS[case["settings"]]
    mode = "S_MODE" if found.tau_edit == 0.0 else "Q_MODE"
    return OurSettings(
        mode, found.tau_mask, found.tau_edit, found.max_post_steps, kit.BLOCK, kit.NEW, temperature=0.0, seed=0
    )


def hildanext_answers(path: Path, runtime: str, cases: list[Case]) -> list[list[int]]:
    config = parse_config(
        {
            "model": {"base": str(path), "device": "cpu", "dtype": "float32"},
            "engine": {"runtime": runtime, "slots": 4},
        }
    )
    engine = TransformersEngine(config, {})
    try:
        done = engine.generate_batch([Request(case["prompt"], settings_of(case)) for case in cases])
        assert engine.runtime.name == runtime
    finally:
        engine.close()
    return [completion.token_ids for completion in done]


def test_the_cases_are_what_the_page_says() -> None:
    for name in kit.MODELS:
        cases = of(name)
        assert [len(case["prompt"]) for case in cases] == list(range(1, 41))
        assert {case["settings"] for case in cases} == set(kit.SETTINGS)
        on_border = {case["settings"] for case in cases if len(case["prompt"]) % kit.BLOCK == 0}
        assert len(on_border) >= 4
        ends = [case for case in cases if case["completion"][-1] == kit.EOS]
        inside = [case for case in ends if (len(case["prompt"]) + len(case["completion"])) % kit.BLOCK]
        assert len(ends) < 40
        assert len(inside) >= 10
        assert len({tuple(case["completion"]) for case in cases}) > 25


@pytest.mark.parametrize("name", kit.MODELS)
def test_the_papers_equations(name: str) -> None:
    """The loop that wrote the golden tokens in float64 writes them in float32, too."""
    model = kit.build(name)

    def decode(case: Case) -> list[int]:
        settings = kit.SETTINGS[case["settings"]]
        return paper_loop(model, case["prompt"], settings, kit.BLOCK, kit.NEW, kit.MASK, kit.EOS).tokens

    assert_golden(decode, of(name))


@pytest.mark.parametrize("name", [*kit.MODELS, "qwen3-sdar"])
def test_hildanext_eager(folder: Path, name: str) -> None:
    """Also on the exported folder, read back."""
    cases = of(name.partition("-")[0])
    assert hildanext_answers(folder / name, "eager", cases) == [case["completion"] for case in cases]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("runtime", ["openvino", "compiled"])
@pytest.mark.parametrize("name", kit.MODELS)
def test_hildanext_with_another_runtime(folder: Path, name: str, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
        monkeypatch.setattr(runtimes, "has_openvino", lambda: True)
    cases = of(name)
    assert hildanext_answers(folder / name, runtime, cases) == [case["completion"] for case in cases]


def test_the_exported_modelling_file(folder: Path) -> None:
    """Loaded as any repository with code of its own, and driven by a plain loop that only calls it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3-sdar", trust_remote_code=True)

    def decode(case: Case) -> list[int]:
        settings, n_prompt = kit.SETTINGS[case["settings"]], len(case["prompt"])
        text = torch.tensor([case["prompt"]])
        while text.shape[1] < n_prompt + kit.NEW and kit.EOS not in text[0, n_prompt:]:
            masks = torch.full((1, kit.BLOCK - text.shape[1] % kit.BLOCK), kit.SERVED_MASK)
            text, post = torch.cat([text, masks], 1), 0
            block = slice(text.shape[1] - kit.BLOCK, text.shape[1])
            may_change = torch.arange(block.start, block.stop) >= n_prompt
            while True:
                with torch.inference_mode():
                    sure, choice = model(text).logits[0, block].softmax(-1).max(-1)
                now = text[0, block]
                masked = now == kit.SERVED_MASK
                if not masked.any() and (settings.tau_edit is None or post == settings.max_post_steps):
                    break
                post += int(not masked.any())
                change = masked & (sure > settings.tau_mask)
                if masked.any() and not change.any():
                    change[sure.masked_fill(~masked, -1).argmax()] = True
                if settings.tau_edit is not None:
                    change |= ~masked & may_change & (choice != now) & (sure > settings.tau_edit)
                if not change.any():
                    break
                text[0, block] = torch.where(change, choice, now)
        return cut(text[0, n_prompt:].tolist(), kit.NEW, kit.EOS)

    assert_golden(decode, of("qwen3"))


def test_the_exported_weights_under_a_servers_rule(folder: Path) -> None:
    """SGLang leaves nothing out of the softmax. Its rule on the raw weights gives the golden tokens all the same."""
    model = kit.served_model(folder)

    def decode(case: Case) -> list[int]:
        settings = kit.SETTINGS[case["settings"]]
        return served_loop(model, case["prompt"], settings, kit.BLOCK, kit.NEW, kit.SERVED_MASK, kit.EOS)

    assert_golden(decode, of("qwen3"))


def pipeline(path: Path) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    pipe = diffusers.LLaDA2Pipeline(
        model=AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True),
        scheduler=diffusers.BlockRefinementScheduler.from_pretrained(path),
        tokenizer=AutoTokenizer.from_pretrained(path, trust_remote_code=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_diffusers(pipe: Any, case: Case, **changes: Any) -> list[int]:
    arguments = call_arguments(settings_of(case)) | {"gen_length": kit.NEW, "output_type": "seq"} | changes
    found = pipe(input_ids=torch.tensor([case["prompt"]]), use_chat_template=False, return_dict=False, **arguments)
    return cut(found[0][0].tolist(), kit.NEW, kit.EOS)


@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.slow), "llama"])
def test_diffusers_own_pipeline(folder: Path, name: str) -> None:
    """Unmodified, with the arguments that the exported folder's card gives."""
    pipe = pipeline(folder / f"{name}-diffusers")
    assert_golden(lambda case: in_diffusers(pipe, case), of(name))


def test_another_project_runs_the_kit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """write, decode, check: JSON in and JSON out, as docs/parity.md shows it."""
    assert kit.main(["write", str(tmp_path / "kit")]) == 0
    asked = json.loads((tmp_path / "kit" / "cases.json").read_text())
    assert not any("completion" in case for case in asked["cases"])
    for weights in ("qwen3/model.safetensors", "llama/model.safetensors"):  # the same weights every time
        assert (tmp_path / "kit" / weights).read_bytes() == (folder / weights).read_bytes()
    answers = []
    for name in kit.MODELS:
        cases = [case for case in asked["cases"] if case["model"] == name]
        texts = hildanext_answers(tmp_path / "kit" / name, "eager", cases)
        answers += [{"case": case["case"], "completion": text} for case, text in zip(cases, texts, strict=True)]
    capsys.readouterr()
    write_json(tmp_path / "answers.json", answers)
    assert kit.main(["check", str(tmp_path / "answers.json")]) == 0
    assert capsys.readouterr().out == "80 of 80 texts are the golden ones\n"
    answers[3]["completion"] = [1, 2]
    write_json(tmp_path / "answers.json", answers[:-1])
    assert kit.main(["check", str(tmp_path / "answers.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["case 3 (qwen3, capped, prompt of 4 tokens)", "case 79"]
    assert lines[-1] == "78 of 80 texts are the golden ones"
    assert kit.main(["compare"]) == 2


# --- Traps


def test_trap_edit_threshold_0_means_all_in_sglang_and_off_in_diffusers(folder: Path) -> None:
    pipe = pipeline(folder / "llama-diffusers")
    model, differ = kit.build("llama"), 0
    for case in [case for case in of("llama") if case["settings"] == "S"]:
        off = kit.SETTINGS["S"]._replace(tau_edit=None)
        unedited = paper_loop(model, case["prompt"], off, kit.BLOCK, kit.NEW, kit.MASK, kit.EOS).tokens
        assert in_diffusers(pipe, case, editing_threshold=0.0) == unedited
        differ += unedited != case["completion"]
        served = served_loop(
            _without_padding(model), case["prompt"], kit.SETTINGS["S"], kit.BLOCK, kit.NEW, kit.MASK, kit.EOS
        )
        assert served == case["completion"]  # 0 took every change
    assert differ > 3


def _without_padding(model: Any) -> Any:
    """A model whose padding rows cannot win, as an export writes it."""
    changed = kit.build("llama")
    with torch.no_grad():
        changed.lm_head.weight[kit.MASK :] = -1e4 * changed.lm_head.weight[:1].sign()
    changed.lm_head.register_forward_hook(lambda _, __, logits: logits[..., : kit.MASK])
    return changed


def test_trap_diffusers_makes_one_pass_more(folder: Path) -> None:
    """max_post_steps p is p + 1 correcting passes: with p the capped texts differ, with p - 1 they do not."""
    pipe = pipeline(folder / "llama-diffusers")
    capped = [case for case in of("llama") if case["settings"] == "capped"]
    more = [in_diffusers(pipe, case, max_post_steps=kit.SETTINGS["capped"].max_post_steps) for case in capped]
    assert sum(text != case["completion"] for text, case in zip(more, capped, strict=True)) > 2


def test_trap_no_editing_threshold_is_the_schedulers_own_in_diffusers(folder: Path) -> None:
    """None takes the value in scheduler_config.json: written tokens change while masks remain."""
    pipe = pipeline(folder / "llama-diffusers")
    cases = [case for case in of("llama") if case["settings"] == "off"]
    assert any(in_diffusers(pipe, case, editing_threshold=None) != case["completion"] for case in cases)


def test_trap_diffusers_ends_a_block_at_the_end_of_text_before_its_corrections(folder: Path) -> None:
    pipe = pipeline(folder / "llama-diffusers")
    cases = [case for case in of("llama") if case["settings"] == "S"]
    assert any(in_diffusers(pipe, case, eos_early_stop=True) != case["completion"] for case in cases)


def test_trap_max_post_steps_counts_passes_without_masks() -> None:
    """Passes that still fill masks are not counted, here or in SGLang; each editing pass more can change the text."""
    model = kit.build("llama")
    texts = []
    for most in (0, 1, 2, 3):
        settings = kit.SETTINGS["S"]._replace(max_post_steps=most)
        ours = [
            paper_loop(model, case["prompt"], settings, kit.BLOCK, kit.NEW, kit.MASK, kit.EOS).tokens
            for case in of("llama")[:8]
        ]
        theirs = [
            served_loop(_without_padding(model), case["prompt"], settings, kit.BLOCK, kit.NEW, kit.MASK, kit.EOS)
            for case in of("llama")[:8]
        ]
        assert ours == theirs
        texts.append(ours)
    assert all(a != b for a, b in itertools.pairwise(texts))


def test_trap_rows_that_pad_the_vocabulary(folder: Path) -> None:
    """Decoded with all rows of the checkpoint's own head, padding rows win and other texts come out."""
    model, differ = kit.build("qwen3"), 0
    for case in of("qwen3")[:8]:
        settings = kit.SETTINGS[case["settings"]]
        text = served_loop(model, case["prompt"], settings, kit.BLOCK, kit.NEW, kit.MASK, kit.EOS)
        differ += text != case["completion"]
    assert differ > 4


def test_trap_tied_heads(folder: Path) -> None:
    """SGLang and LMDeploy with tensor parallelism look `lm_head.weight` up: a tied checkpoint gets a copy."""
    from safetensors.torch import load_file

    before = load_file(folder / "qwen3" / "model.safetensors")
    after = load_file(folder / "qwen3-sdar" / "model.safetensors")
    assert "lm_head.weight" not in before
    assert torch.equal(after["lm_head.weight"][: kit.MASK], before["model.embed_tokens.weight"][: kit.MASK])
    stored = json.loads((folder / "qwen3-sdar" / "config.json").read_text())
    assert stored["tie_word_embeddings"] is False


def test_trap_rope_theta(folder: Path) -> None:
    """A reader that finds no top-level rope_theta takes 10,000 and writes other texts."""
    stored = json.loads((folder / "qwen3-sdar" / "config.json").read_text())
    assert stored["rope_theta"] == kit.ROPE_THETA["qwen3"]
    wrong = kit.build("qwen3")
    wrong.config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    again = type(wrong)(wrong.config).eval()
    again.load_state_dict(wrong.state_dict())
    case = of("qwen3")[1]
    settings = kit.SETTINGS[case["settings"]]
    text = paper_loop(again, case["prompt"], settings, kit.BLOCK, kit.NEW, kit.MASK, kit.EOS).tokens
    assert text != case["completion"]


def test_trap_a_gen_length_below_the_block_in_diffusers(folder: Path) -> None:
    """It lowers num_inference_steps, and then a pass must fill several masks, however unsure."""
    pipe = pipeline(folder / "llama-diffusers")
    cases = [case for case in of("llama") if case["settings"] == "off"]
    short = [in_diffusers(pipe, case, gen_length=4)[:4] for case in cases]
    assert any(text != case["completion"][: len(text)] for text, case in zip(short, cases, strict=True))


def test_the_package_and_the_loops_share_no_code() -> None:
    text = (Path(__file__).parent / "loops.py").read_text()
    assert "hildanext" not in text
    assert hildanext.__name__ not in text
