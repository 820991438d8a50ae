"""EXACT decoding: its ids are those of transformers' `generate` of the base, whatever is drafted."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, product
from operator import mul
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hildanext.config import DecodeConfig
from hildanext.decoding.drafter import LEAST_REACH, GroupDrafter
from hildanext.decoding.exact import ExactSequence
from hildanext.decoding.plan import Plan, plan_rows
from hildanext.decoding.rule import largest, repeated_pairs, verify_step
from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.scheduler import Scheduler
from hildanext.decoding.settings import Settings, resolve
from hildanext.decoding.span import Vocabulary
from hildanext.model.adapter_file import Adapter, LoraFactors
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.draft_head import find_draft_head
from hildanext.model.gate import open_gate
from hildanext.model.lora import linear_layers

VOCABULARY, MASK, EOS = 24, 23, 22
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
KV = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, **KV)),
    "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **KV, query_pre_attn_scalar=8, sliding_window=96)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
}


class Tokenizer:
    """As much of a tokenizer as a DiffusionLM of ids needs."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    all_special_ids = (MASK, EOS)

    def __len__(self) -> int:
        return VOCABULARY

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY)}


def gated(family: str, seed: int, k: int) -> tuple[DiffusionLM, PreTrainedModel]:
    """A random model with a random gated adapter, and the same model alone. Neither proposes the mask token."""
    torch.manual_seed(seed)
    base = FAMILIES[family]().eval()
    with torch.no_grad():
        base.get_output_embeddings().weight[MASK] = 0  # its logit is 0: never the largest of many random ones
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    model.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    layers = {name: model.get_submodule(name) for name in linear_layers(model)}
    pairs = {
        name: LoraFactors(draw(2, layer.in_features), draw(layer.out_features, 2)) for name, layer in layers.items()
    }
    head = {"down.weight": draw(8, 32), "up.weight": draw(16, 8), "recur.weight": draw(8, 8)}
    open_gate(model, Adapter(1.5, pairs, "unused", {MASK: torch.zeros(16)}, VOCABULARY, head), "random")
    lm = DiffusionLM(
        model, Tokenizer(), mask_token_id=MASK, block_size=k, convention="shifted", record={"gate": {"causal": False}}
    )
    return lm, base


class Oracle:
    """Drafts that are right with probability `skill`, whatever the mask rows say."""

    def __init__(self, truth: list[int], k: int, skill: float, seed: int) -> None:
        self.truth, self.skill, self.rng, self.fresh = truth, skill, random.Random(seed), [skill] * k
        self.sequence: ExactSequence | None = None

    def drafts(
        self, hidden: Tensor, logits: Tensor, before: int, settings: Settings, noise: Tensor | None, constraint: None
    ) -> tuple[list[int], list[float]]:
        assert self.sequence is not None
        at, n = len(self.sequence.tokens), len(hidden)
        right = (self.truth[at : at + n] + [0] * n)[:n]
        tokens = [t if self.rng.random() < self.skill else self.rng.randrange(MASK) for t in right]
        return tokens, [self.rng.random() for _ in tokens]


def decode(
    lm: DiffusionLM, prompts: list[list[int]], drafters: list[Any], slots: int = 3, runtime: Any = None, **changes: Any
) -> list[ExactSequence]:
    """Complete the prompts side by side."""
    config = DecodeConfig.model_validate({"max_new_tokens": 20} | changes)
    chosen = resolve(config, lm.block_size or 1, kind="gated")
    scheduler = Scheduler(runtime or EagerRuntime(lm.model), slots, 80, prefill_chunk=7, scratch=32)
    vocabulary = Vocabulary(VOCABULARY, MASK, (EOS,), shifted=True, gated=True)
    sequences = []
    for prompt, drafter in zip(prompts, drafters, strict=True):
        sequences.append(ExactSequence(prompt, chosen, vocabulary, lambda ids: "x" * len(ids), drafter))
        if isinstance(drafter, Oracle):
            drafter.sequence = sequences[-1]
        scheduler.submit(sequences[-1])
    while not scheduler.is_idle:
        scheduler.step()
    return sequences


def generated(base: PreTrainedModel, prompt: list[int], n: int, *processors: LogitsProcessor) -> list[int]:
    out = base.generate(
        torch.tensor([prompt]),
        max_new_tokens=n,
        do_sample=False,
        logits_processor=LogitsProcessorList(processors),
        suppress_tokens=[MASK],
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return out[0, len(prompt) :].tolist()


class Penalties(LogitsProcessor):
    """OpenAI's penalties and bias, counted token by token in the completion."""

    def __init__(self, n_prompt: int, presence: float, frequency: float, bias: dict[int, float]) -> None:
        self.n_prompt, self.presence, self.frequency, self.bias = n_prompt, presence, frequency, bias

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for token, bias in self.bias.items():
            scores[0, token] += bias
        new = input_ids[0, self.n_prompt :].tolist()
        for token in set(new):
            scores[0, token] -= self.presence + self.frequency * new.count(token)
        return scores


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(MASK - 1) for _ in range(rng.randint(1, 25))]


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 60), marks=pytest.mark.slow)], ids=["5", "55"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_the_base(family: str, seeds: range):
    """300 random models in all: drafts of a random adapter, of an oracle of any skill, and from the text."""
    accepted = 0
    for seed in seeds:
        rng, k = random.Random(seed), 1 + seed % 4
        lm, base = gated(family, seed, k)
        prompts = [random_prompt(rng) for _ in range(3)]
        expected = [generated(base, prompt, 20) for prompt in prompts]
        own = GroupDrafter(lm, [rng.random() for _ in range(k)])
        oracles = [
            Oracle(prompt + truth, k, rng.random(), seed)
            for prompt, truth in zip(prompts[1:], expected[1:], strict=True)
        ]
        changes = {"rows": rng.randint(1, 20), "lookup": rng.choice([None, 2, 3])}
        sequences = decode(lm, prompts, [own, *oracles], slots=1 + seed % 3, **changes)
        for sequence, truth in zip(sequences, expected, strict=True):
            assert sequence.stream.token_ids == truth, (family, seed)
            assert sequence.forwards <= len(truth)
            accepted += sum(sequence.right)
    assert accepted > 5 * len(seeds)


def test_penalties_and_bias_give_the_bases_ids_whatever_is_drafted():
    changed = 0
    for seed in range(12):
        rng, k = random.Random(seed), 1 + seed % 4
        lm, base = gated(list(FAMILIES)[seed % len(FAMILIES)], seed, k)
        prompt = random_prompt(rng)
        presence, frequency = rng.choice([0.0, 0.6, -0.4]), rng.choice([0.3, -0.2, 2.0])
        bias = {rng.randrange(MASK): rng.choice([0.5, -100.0]) for _ in range(3)}
        truth = generated(base, prompt, 20, Penalties(len(prompt), presence, frequency, bias))
        changed += truth != generated(base, prompt, 20)
        asked = {"presence_penalty": presence, "frequency_penalty": frequency}
        asked |= {"logit_bias": {str(token): value for token, value in bias.items()}}
        oracle = Oracle(prompt + truth, k, rng.random(), seed)
        for drafter in (oracle, GroupDrafter(lm, [0.5] * k)):
            (sequence,) = decode(lm, [prompt], [drafter], rows=rng.randint(1, 20), lookup=2, **asked)
            assert sequence.stream.token_ids == truth, seed
    assert changed > 6


@torch.no_grad()
def test_logprobs_are_those_of_the_base():
    """Also those of accepted drafts: log softmax of the whole text's logits, whatever temperature and penalties chose."""
    for seed in range(6):
        lm, base = gated("llama", seed, 3)
        prompt = random_prompt(random.Random(seed))
        asked = (
            {"temperature": 0.9, "seed": seed, "presence_penalty": 0.5, "logprobs": 4} if seed % 2 else {"logprobs": 0}
        )
        (plain,) = decode(lm, [prompt], [None], rows=1, **asked)
        truth = plain.stream.token_ids
        (sequence,) = decode(lm, [prompt], [Oracle(prompt + truth, 3, 0.7, seed)], rows=12, **asked)
        assert sequence.stream.token_ids == truth
        logits = base(torch.tensor([prompt + truth])).logits[0, len(prompt) - 1 : -1]
        logits[:, MASK] = -torch.inf
        logp = logits.log_softmax(-1)
        assert sequence.logprobs is not None
        assert [item.token for item in sequence.logprobs] == truth
        for row, item in zip(logp, sequence.logprobs, strict=True):
            assert item.logprob == pytest.approx(float(row[item.token]), abs=1e-4)
            best = row.topk(asked["logprobs"])
            assert [value for _, value in item.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_skilled_draft_saves_passes():
    lm, base = gated("llama", 3, 4)
    prompt = [1, 2, 3, 4, 5]
    truth = generated(base, prompt, 20)
    (sequence,) = decode(lm, [prompt], [Oracle(prompt + truth, 4, 1.0, 0)], rows=25)
    assert sequence.stream.token_ids == truth
    # A pass verifies 4 drafts and adds one token: 20 tokens take the first pass and 4 more at best.
    assert sequence.forwards == 1 + -(-(len(truth) - 1) // 5)


def test_sampled_text_does_not_depend_on_the_drafts_and_repeats_with_its_seed():
    lm, _ = gated("qwen3", 5, 3)
    prompt, sampling = (
        [7, 8, 9],
        {"temperature": 0.8, "seed": 11, "top_p": 0.9, "min_p": 0.02, "frequency_penalty": 0.4},
    )
    (plain,) = decode(lm, [prompt], [None], rows=1, **sampling)
    truth = plain.stream.token_ids
    for skill in (0.0, 0.5, 1.0):
        (sequence,) = decode(lm, [prompt], [Oracle(prompt + truth, 3, skill, 1)], rows=12, **sampling)
        assert sequence.stream.token_ids == truth
    (other,) = decode(lm, [prompt], [None], rows=1, **sampling | {"seed": 12})
    assert other.stream.token_ids != truth


@torch.no_grad()
def test_sampled_tokens_have_the_bases_joint_distribution():
    """Chi-square of 3 tokens over a vocabulary of 7, drafts by the adapter, against products of the base's softmax."""
    lm, base = gated("llama", 9, 2)
    kept = list(range(7))
    with torch.no_grad():
        for model in (lm.model, base):  # all other tokens never occur
            model.get_output_embeddings().weight[7:] = 0
            model.get_output_embeddings().weight[:7] *= 0.3
    vocabulary = Vocabulary(7, MASK, (EOS,), shifted=True, gated=True)
    prompt, n = [1, 2, 3], 3000
    scheduler = Scheduler(EagerRuntime(lm.model), 50, 16, prefill_chunk=8, scratch=8)
    lm_of_seven = GroupDrafter(lm, [0.6, 0.5])
    lm_of_seven.vocab_size = 7
    config = DecodeConfig.model_validate({"max_new_tokens": 3, "temperature": 1.0, "rows": 6})
    chosen = resolve(config, 2, kind="gated")
    sequences = [
        ExactSequence(prompt, chosen._replace(seed=seed), vocabulary, lambda ids: "x" * len(ids), lm_of_seven)
        for seed in range(n)
    ]
    for sequence in sequences:
        scheduler.submit(sequence)
    while not scheduler.is_idle:
        scheduler.step()
    counts: dict[tuple[int, ...], int] = {}
    for sequence in sequences:
        counts[tuple(sequence.stream.token_ids)] = counts.get(tuple(sequence.stream.token_ids), 0) + 1
    expected = {}
    for text in product(kept, repeat=3):
        logits = base(torch.tensor([prompt + list(text)])).logits[0, 2:5, :7]
        expected[text] = float(logits.softmax(-1).gather(1, torch.tensor(text)[:, None]).prod()) * n
    assert sum(expected.values()) == pytest.approx(n, rel=1e-4)
    assert set(counts) <= set(expected)
    large = [text for text in expected if expected[text] >= 5]
    rest = n - sum(expected[text] for text in large), n - sum(counts.get(text, 0) for text in large)
    statistic = sum((counts.get(text, 0) - expected[text]) ** 2 / expected[text] for text in large)
    statistic += (rest[1] - rest[0]) ** 2 / max(rest[0], 1e-9)
    degrees = len(large)
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # about one in 20,000
    assert sum(sum(sequence.right) for sequence in sequences) > n / 20


def test_relaxed_acceptance_keeps_likely_drafts_that_repeat_nothing_and_only_those():
    new = [False] * 3
    assert verify_step([4, 5, 6], [4, 9, 6, 7], [1.0, 0.4, 1.0], new, 0.5) == 1
    assert verify_step([4, 5, 6], [4, 9, 6, 7], [1.0, 0.5, 1.0], new, 0.5) == 3
    assert verify_step([4, 5, 6], [4, 9, 6, 7], [1.0, 0.5, 1.0], [False, True, False], 0.5) == 1
    choices_may_repeat = [True, False, True]
    assert verify_step([4, 5, 6], [4, 9, 6, 7], [1.0, 0.5, 1.0], choices_may_repeat, 0.5) == 3
    assert verify_step([4, 5, 6], [4, 9, 6, 7], [1.0, 1.0, 1.0], new, 1.0) == 1  # equal probability is not the choice
    assert verify_step([], [4], [], [], 1.0) == 0


@given(st.lists(st.integers(0, 2), max_size=7), st.lists(st.integers(0, 2), max_size=5))
def test_repeated_pairs_are_those_that_stand_earlier(text: list[int], drafts: list[int]):
    whole = text + drafts
    expected = [
        any(whole[i - 1 : i + 1] == whole[e - 1 : e + 1] for i in range(1, e)) for e in range(len(text), len(whole))
    ]
    assert repeated_pairs(text, drafts) == expected


def test_a_relaxed_text_repeats_a_pair_of_tokens_only_where_the_base_would():
    """Replays texts of a random model: what is not the base's choice is likely enough, and makes no pair a second time."""
    relaxed = 0
    for seed in range(6):
        lm, base = gated("llama", seed, k=3)
        prompt = random_prompt(random.Random(seed))
        drafter = Oracle(generated(base, prompt, 40), 3, 0.5, seed)
        text = decode(lm, [prompt], [drafter], tau_accept=0.02, max_new_tokens=40)[0].stream.token_ids
        with torch.no_grad():
            logits = base(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1, :VOCABULARY]
        logits[:, MASK] = -torch.inf
        p = logits.softmax(-1)
        for i, token in enumerate(text):
            if token != int(p[i].argmax()):
                relaxed += 1
                assert float(p[i, token] / p[i].max()) > 0.02 - 1e-6
                assert i == 0 or text[i - 1 : i + 1] not in [text[j - 1 : j + 1] for j in range(1, i)]
    assert relaxed > 5


@given(st.lists(st.floats(0, 1), max_size=4), st.lists(st.floats(0, 1), max_size=4), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_plan_is_worth_as_much_as_any_other(chances: list[float], fresh: list[float], rows: int):
    def worth(plan: Plan) -> float:
        total, reach = 0.0, 1.0
        for behind in range(plan.n_drafts + 1):
            stop = reach if behind == plan.n_drafts else reach * (1 - chances[behind])
            gain = 1.0
            for i in range(plan.groups[behind]):
                gain *= fresh[i]
                total += stop * max(gain - 0.1, gain / 1000)  # less the row that verifies it
            if behind < plan.n_drafts:
                reach *= chances[behind]
                total += reach
        return total

    best = 0.0
    for m in range(min(len(chances), rows - 1) + 1):
        for sizes in product(range(len(fresh) + 1), repeat=m + 1):
            if 1 + m + sum(sizes) <= rows:
                best = max(best, worth(Plan(m, list(sizes))))
    plan = plan_rows(chances, fresh, rows)
    assert 1 + plan.n_drafts + sum(plan.groups) <= rows
    assert worth(plan) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_drafts_from_tables_are_those_of_the_draft_head(seed: int):
    """Each draft's chance is the draft head's probability of it, given the drafts before; int8 tables cost 0.01."""
    lm, _ = gated("llama", seed, 4)
    draft_head = find_draft_head(lm.model)
    assert draft_head is not None
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        weight = lm.model.get_output_embeddings().weight
        chosen = resolve(DecodeConfig(mode="EXACT"), 4, kind="gated")
        before = 5
        tokens, chances = GroupDrafter(lm, [0.5] * 4).drafts(hidden, hidden @ weight.T, before, chosen, None)
        state = None
        for token, chance, row in zip(tokens, chances, hidden, strict=False):
            state = draft_head.step(draft_head.read(row, lm.model.get_input_embeddings()(torch.tensor(before))), state)
            p = lm.decodable_logits(draft_head.changed(row, state)[None])[0].softmax(-1)
            assert float(p[token]) >= float(p.max()) - 0.01
            assert chance == pytest.approx(float(p[token]), abs=0.01)
            before = token
    reach = list(accumulate(chances, mul))
    assert all(value >= LEAST_REACH for value in reach[:-1])
    assert len(tokens) == 4 or reach[-1] < LEAST_REACH


def test_largest_takes_the_first_of_equal_scores_and_any_nan():
    scores = torch.tensor([[1.0, 3.0, 3.0], [torch.nan, 9.0, 1.0], [1.0, torch.nan, 9.0], [-torch.inf] * 3])
    assert largest(scores).tolist() == [1, 0, 1, 0] == scores.argmax(-1).tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("name", ["openvino", pytest.param("compiled", marks=pytest.mark.slow)])
def test_every_runtime_gives_the_bases_ids(name: str):
    """With drafts by the adapter's own mask rows, which must see what they saw in training: as many are right as eagerly."""
    if name == "openvino":
        pytest.importorskip("openvino")
        from hildanext.decoding.runtimes.openvino import OpenVinoRuntime as Chosen
    else:
        from hildanext.decoding.runtimes.compiled import CompiledRuntime as Chosen  # type: ignore[assignment]
    lm, base = gated("llama", 4, 3)
    prompts = [random_prompt(random.Random(seed)) for seed in range(4)]
    truths = [generated(base, prompt, 20) for prompt in prompts]
    drafter = GroupDrafter(lm, [0.6, 0.5, 0.4])
    eager = decode(lm, prompts, [drafter] * 4, slots=2, rows=9)
    runtime = Chosen(lm.model, (9,), "native") if name == "openvino" else Chosen(lm.model, (9,))
    found = decode(lm, prompts, [drafter] * 4, slots=2, runtime=runtime, rows=9)
    for sequence, plain, truth in zip(found, eager, truths, strict=True):
        assert sequence.stream.token_ids == truth
        assert sequence.right == plain.right
        assert sequence.forwards == plain.forwards
