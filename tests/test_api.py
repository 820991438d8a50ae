"""HildaNext from Python. The truth beside it: transformers' `generate` and log-softmax, and the server's own stream."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import hildanext
from hildanext.config import SHIPPED_MODEL, Config
from hildanext.config.names import SECTIONS
from hildanext.errors import ConfigError, ContextError, UsageError
from hildanext.evaluate.likelihood import score
from hildanext.model.loading import load_diffusion_lm
from support import serving
from support.models import write_converted, write_gated

PROMPTS = ["Once upon a time", "Mia has a kite. It", "x"]
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32", "runtime": "eager"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated checkpoint; its base is in the folder beside it."""
    config: Config = write_gated(tmp_path_factory.mktemp("gated"))
    return Path(config.model.base)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[hildanext.Model]:
    with hildanext.load(folder, **ON_CPU, max_new_tokens=16) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder.parent / "base").eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder.parent / "base")


def truth(base: Any, tokenizer: Any, prompt: str, n: int = 16) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return base.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :].tolist()


def test_a_schema_holds_for_every_text(model: hildanext.Model) -> None:
    schema = {"enum": ["red", "grey", 7]}
    for done in model.generate(PROMPTS, raw=True, json_schema=schema, temperature=1.0, seed=1):
        assert json.loads(done.text) in schema["enum"]
    *_, done = model.stream("x", json_schema=schema)
    assert json.loads(done.text) in schema["enum"]
    with pytest.raises(UsageError, match="uses 'not'"):
        model.generate("x", json_schema={"not": {}})
    assert model.generate("x", raw=True).text == model.generate("x", raw=True, json_schema=None).text


def test_a_text_is_continued_as_the_base_does(model: hildanext.Model, base: Any, tokenizer: Any) -> None:
    for prompt in PROMPTS:
        done = model.generate(prompt, raw=True)
        expected = truth(base, tokenizer, prompt)
        assert (done.mode, done.token_ids) == ("EXACT", expected)
        assert done.text == str(done) == tokenizer.decode(expected, skip_special_tokens=True)
        assert done.finish_reason in ("stop", "length")
        assert done.steps is None
        assert done.stats.tokens_per_forward == len(expected) / done.stats.forwards


def test_a_prompt_is_a_users_message(model: hildanext.Model, base: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Tell a story."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = truth(base, tokenizer, rendered)
    assert model.generate("Tell a story.").token_ids == model.generate(messages).token_ids == expected


def test_a_list_of_prompts_is_one_batch_in_order(model: hildanext.Model, base: Any, tokenizer: Any) -> None:
    done = model.generate([*PROMPTS, *PROMPTS], raw=True, max_new_tokens=9)
    assert [one.token_ids for one in done] == [truth(base, tokenizer, prompt, 9) for prompt in [*PROMPTS, *PROMPTS]]
    talks = [[{"role": "user", "content": text}] for text in PROMPTS]
    assert [one.token_ids for one in model.generate(talks)] == [model.generate(talk).token_ids for talk in talks]
    assert len(model.generate(["x"])) == 1


def test_sampled_texts_of_a_batch_have_seeds_of_their_own(model: hildanext.Model) -> None:
    one, two = model.generate(["Once", "Once"], temperature=1.5, seed=7)
    assert (one.stats.seed, two.stats.seed) == (7, 8)
    assert one.token_ids != two.token_ids
    assert model.generate("Once", temperature=1.5, seed=8).token_ids == two.token_ids
    drawn = {tuple(done.token_ids) for done in model.generate(["Once"] * 4, temperature=1.5)}
    assert len(drawn) > 1


def test_a_stream_yields_what_the_page_gets(model: hildanext.Model, folder: Path) -> None:
    events = list(model.stream(PROMPTS[0], raw=True))
    config = hildanext.load(folder, **ON_CPU, max_new_tokens=16).config
    with serving.client(config) as client:
        answer = client.post("/generate", json={"prompt": PROMPTS[0], "stream": True}).text
    sent = [re.match(r"event: (\w+)\ndata: (.*)", part) for part in answer.strip().split("\n\n")]
    named = [(found[1], json.loads(found[2])) for found in sent if found][1:]  # without `start`
    kinds = {hildanext.Step: "step", hildanext.Finished: "block"}
    assert [kinds.get(type(event), "done") for event in events] == [name for name, _ in named]
    for event, (name, data) in zip(events, named, strict=True):
        if name != "done":
            data = {key: value for key, value in data.items() if key not in ("pieces", "dropped")}
            assert json.loads(json.dumps(event._asdict())) == data
    assert isinstance(events[-1], hildanext.Completion)
    assert events[-1].token_ids == named[-1][1]["token_ids"]
    assert "".join(event.text for event in events if isinstance(event, hildanext.Finished)) == events[-1].text


def test_a_stream_may_stay_open_or_be_left(model: hildanext.Model) -> None:
    expected = [model.generate(prompt).token_ids for prompt in PROMPTS]
    opened = model.stream(PROMPTS[0])
    next(opened)
    left = model.stream(PROMPTS[1])
    next(left)
    assert model.generate(PROMPTS[2]).token_ids == expected[2]
    left.close()
    assert [*opened][-1].token_ids == expected[0]
    assert model.generate(PROMPTS).__len__() == 3
    assert not model._news  # nothing is kept of requests that ended


def test_threads_share_a_model(model: hildanext.Model) -> None:
    expected = {prompt: model.generate(prompt).token_ids for prompt in PROMPTS}
    found: list[tuple[str, list[int]]] = []

    def ask(prompt: str) -> None:
        for _ in range(3):
            found.append((prompt, model.generate(prompt).token_ids))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(token_ids == expected[prompt] for prompt, token_ids in found)


def test_a_completion_with_its_passes_shows_a_picture(model: hildanext.Model, tmp_path: Path) -> None:
    done = model.generate("Once <b>", steps=True, raw=True)
    assert done.steps == [event for event in model.stream("Once <b>", raw=True) if isinstance(event, hildanext.Step)]
    png = done._repr_png_()
    assert png is not None
    (tmp_path / "shown.png").write_bytes(png)
    done.picture(tmp_path / "drawn.png")
    with Image.open(tmp_path / "shown.png") as shown, Image.open(tmp_path / "drawn.png") as drawn:
        assert shown.size == drawn.size
        assert shown.tobytes() == drawn.tobytes()
    assert 'src="data:image/png;base64,' in done._repr_html_()
    written = json.loads(json.dumps(done.as_dict()))
    assert len(written["steps"]) == len(done.steps or []) == done.stats.forwards
    assert written["text"] == done.text


def test_a_completion_without_passes_is_small_html_without_markup_of_the_text(model: hildanext.Model) -> None:
    done = model.generate("x")
    evil = hildanext.Completion(**{**done.__dict__, "text": "<script>alert('&')</script>"})
    html = evil._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in html
    assert f"{done.stats.forwards} forwards" in html
    assert evil._repr_png_() is None
    with pytest.raises(UsageError, match="steps=True"):
        evil.picture("out.png")


def log_p(base: Any, context: list[int], target: list[int]) -> float:
    with torch.no_grad():
        logits = base(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())


def test_the_log_probability_is_the_bases(model: hildanext.Model, base: Any, tokenizer: Any) -> None:
    text, prompt = " there was a red kite.", "Once upon a time"
    ids, context = (tokenizer(part)["input_ids"] for part in (prompt + text, prompt))
    found = model.logprob(text, prompt, raw=True)
    assert (found.kind, found.standard_error, found.n_tokens) == ("exact", 0.0, len(ids) - len(context))
    assert found.log_p == pytest.approx(log_p(base, context, ids[len(context) :]), rel=1e-5)
    alone = model.logprob(text)  # behind the end-of-text token: this tokenizer has no begin of text
    assert alone.log_p == pytest.approx(log_p(base, [tokenizer.eos_token_id], tokenizer(text)["input_ids"]), rel=1e-5)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    asked = model.logprob(text, prompt)
    assert asked.log_p == pytest.approx(
        log_p(base, tokenizer(rendered)["input_ids"], tokenizer(text)["input_ids"]), rel=1e-5
    )
    assert model.generate(PROMPTS[0], raw=True).token_ids == truth(base, tokenizer, PROMPTS[0])  # as before


def test_an_unconverted_base_decodes_exactly_and_scores(folder: Path, base: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="not a converted checkpoint"):
        hildanext.load(folder.parent / "base", **ON_CPU)
    with hildanext.load(folder.parent / "base", mode="EXACT", lookup=2, **ON_CPU) as plain:
        done = plain.generate(PROMPTS[1], raw=True, max_new_tokens=16)
        assert done.token_ids == truth(base, tokenizer, PROMPTS[1])
        ids = tokenizer("a kite")["input_ids"]
        found = plain.logprob("a kite", "x", raw=True)
        both = tokenizer("xa kite")["input_ids"]
        assert found.log_p == pytest.approx(log_p(base, both[:1], both[1:]), rel=1e-5)
        assert len(ids) >= found.n_tokens - 1


def test_a_block_checkpoint_gives_the_bound_of_evaluate(tmp_path: Path) -> None:
    config = write_converted(tmp_path, context=64)
    names = {"evaluate.draws": 64, "evaluate.seed": 3}
    with hildanext.load(config.model.base, **ON_CPU, **names, max_new_tokens=8) as blocks:
        found = blocks.logprob("Mia has a kite.")
        lm, _ = load_diffusion_lm(config.model)
        pair = ([lm.tokenizer.eos_token_id], lm.tokenizer("Mia has a kite.")["input_ids"])
        (bound,) = score(lm, [pair], "bound", block_size=4, draws=64, seed=3)
        assert (found.kind, found.n_tokens) == ("bound", len(pair[1]))
        assert (found.log_p, found.standard_error) == pytest.approx((bound.log_p, bound.standard_error), rel=1e-4)
        assert found.standard_error > 0
        done = blocks.generate("Mia has", steps=True)
        assert done.mode == "Q_MODE"
        assert done.decode is not None
        assert not done.decode.verifies
        assert blocks.generate("Mia has", mode="S_MODE").tau_mask == 0.5


def test_settings_have_the_names_of_the_file(folder: Path, tmp_path: Path) -> None:
    keys = [key for section in SECTIONS.values() for key in section.model_fields]
    assert len(keys) == len(set(keys))
    file = tmp_path / "hildanext.json"
    file.write_text(json.dumps({"decode": {"max_new_tokens": 5, "rows": 4}, "engine": {"slots": 2}}))
    names = {"engine.slots": 3, "server.port": 9999}
    with hildanext.load(folder, config=file, rows=6, stop=["."], **ON_CPU, **names) as model:
        config = model.config
        assert (config.model.base, config.decode.max_new_tokens, config.decode.rows) == (str(folder), 5, 6)
        assert (config.engine.slots, config.server.port, config.decode.stop) == (3, 9999, ["."])
        assert len(model.generate("Once", stop=[]).token_ids) == 5
        assert len(model.generate("Once", **{"decode.max_new_tokens": 3}, stop=[]).token_ids) == 3
        assert config.decode.max_new_tokens == 5


def test_a_mode_brings_its_own_values(model: hildanext.Model) -> None:
    assert model.generate("x", mode="S_MODE").tau_mask == 0.5
    assert model.generate("x", mode="S_MODE", tau_accept=None).stats.rows == 0  # blocks are edited


BAD_LOADS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 5}, r"^unknown setting 'max_tokens': did you mean 'max_new_tokens'\?$"),
    ({"qqq": 5}, r"^unknown setting 'qqq': give a key of the sections decode, engine or model, or any other as "),
    ({"engine.slot": 5}, r"unknown key 'engine\.slot'"),
    ({"temperature": 3.0}, r"^config: 'decode\.temperature': must be less than or equal to 2, got 3\.0$"),
    ({"dtype": torch.float32}, r"^'dtype': torch\.float32 cannot stand in a configuration file"),
    ({"slots": 0}, r"'engine\.slots'"),
    ({"config": "no-such.json"}, r"^no-such\.json: cannot read the configuration"),
    ({"model": "./no-such-folder"}, r"^model '\./no-such-folder': no such folder$"),
]


def test_bad_settings_of_load_are_one_line(subtests: Any) -> None:
    for changes, match in BAD_LOADS:
        with subtests.test(match), pytest.raises(UsageError, match=match) as error:
            hildanext.load(**{"model": SHIPPED_MODEL, **changes})
        assert "\n" not in str(error.value)


BAD_CALLS: list[tuple[Any, dict[str, Any], str]] = [
    ("x", {"max_token": 5}, r"^unknown setting 'max_token': did you mean 'max_new_tokens'"),
    ("x", {"slots": 5}, r"^'slots' is set when the model is loaded: hildanext\.load\(\.\.\., slots=\.\.\.\)$"),
    ("x", {"engine.runtime": "eager"}, r"^'engine\.runtime' is set when the model is loaded"),
    ("x", {"decode.tau": 1}, r"^unknown setting 'decode\.tau': did you mean 'decode\.tau_"),
    ("x", {"top_p": 0.0}, r"^settings: 'decode\.top_p': must be greater than 0, got 0\.0$"),
    ("x", {"mode": "FAST"}, r"^settings: 'decode\.mode'"),
    ("", {}, r"^the prompt is empty"),
    ([], {}, r"^the prompt must be a text, a list of messages"),
    (7, {}, r"^the prompt must be a text"),
    (["x", {"role": "user", "content": "x"}], {}, r"^the prompt must be a text"),
    ([{"role": "user"}], {}, r"^message 0: must be"),
    ([{"role": "user", "content": None}], {}, r"^message 0: must be"),
    ([{"role": "user", "content": "x"}], {"raw": True}, r"^raw=True continues a text"),
    ("x", {"max_new_tokens": 1000}, r"exceed the model's context of 64"),
]


def test_bad_requests_are_one_line_and_leave_nothing(model: hildanext.Model, subtests: Any) -> None:
    for prompt, changes, match in BAD_CALLS:
        with subtests.test(match), pytest.raises(UsageError, match=match) as error:
            model.generate(prompt, **changes)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="did you mean"):
        model.stream("x", max_token=5)  # before the first event
    with pytest.raises(ContextError):  # one of a batch: no request is left behind
        model.generate(["x", "Once upon a time " * 30])
    assert not model._news
    for text, prompt, match in [("", "x", "text is empty"), ("a " * 100, "", "more than the model's context of 64")]:
        with pytest.raises(UsageError, match=match):
            model.logprob(text, prompt)


def test_a_closed_model_says_so(folder: Path) -> None:
    with hildanext.load(folder, **ON_CPU) as model:
        assert "engine transformers, cpu, float32" in repr(model)
        left = model.stream("x", max_new_tokens=20)
        next(left)
    assert "closed" in repr(model)
    for call in (lambda: model.generate("x"), lambda: [*left], lambda: model.logprob("x"), lambda: model.engine):
        with pytest.raises(UsageError, match="is closed; load it again"):
            call()
    model.close()  # twice is once


def test_the_dummy_engine_answers_and_gives_no_likelihood() -> None:
    with hildanext.load(order=["dummy"]) as model:
        done = model.generate(["Hello", "World"], raw=True, steps=True)
        assert [one.engine for one in done] == ["dummy", "dummy"]
        assert done[0].text.endswith("Hello")
        assert done[0]._repr_png_() is None  # it reports no passes
        with pytest.raises(UsageError, match="the dummy engine gives no likelihoods"):
            model.logprob("x")
