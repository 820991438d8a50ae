"""Every runtime against the eager one: hidden states within a tolerance, and the same tokens where it is exact."""

import gc
import random
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.jit._recursive import concrete_type_store

from hildanext.config import parse_config
from hildanext.decoding import runtimes
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.runtimes.compiled import CompiledRuntime
from hildanext.decoding.runtimes.cudagraphs import graph_length
from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.runtimes.protocol import pad_batch, widen
from hildanext.decoding.settings import Settings
from hildanext.errors import ConfigError, ModelError
from hildanext.model.diffusion_lm import DiffusionLM
from support.models import random_llama

MASK, BLOCK, SLOTS, CONTEXT = 299, 4, 3, 64


def model(dtype=torch.float32):
    return random_llama(initializer_range=0.35, num_key_value_heads=1).to(dtype)


def tokens(rng, n):
    return [rng.randrange(4, 299) for _ in range(n)]


def forwards(seed=0):
    """Batches as the scheduler makes them: prompts, blocks, storing passes, sequences side by side, slots that sit out."""
    rng = random.Random(seed)
    sees = [(p // BLOCK + 1) * BLOCK for p in range(CONTEXT)]
    wanted = [
        (1, [(0, 12)]),  # a prompt into slot 1
        (1, [(12, 4)]),
        (1, [(12, 4)]),  # the same block once more, other tokens
        (0, [(0, 8), (16, 4), None]),
        (0, [(8, 4), (16, 8), (0, 4)]),
        (0, [(8, 4)]),
        (2, [(4, 4)]),
        (1, [(24, 4), (4, 4)]),
    ]
    for slot, spans in wanted:
        yield pad_batch(
            [
                ([], 0, []) if span is None else (tokens(rng, span[1]), span[0], sees[span[0] : sum(span)])
                for span in spans
            ],
            slot,
        )


@torch.inference_mode()
def differences(one, other):
    """Largest difference of the hidden states of each forward, padding aside, and of the logits; their scale is one."""
    for runtime in (one, other):
        runtime.allocate(SLOTS, CONTEXT)
    for batch in forwards():
        real = torch.cat([torch.arange(batch.ids.shape[1]) < width for width in batch.widths])
        a, b = (runtime.body(batch).flatten(0, 1)[real] for runtime in (one, other))
        assert a.shape == b.shape
        yield (a.float() - b.float()).abs().max().item()
        yield (one.head(a).float() - other.head(b).float()).abs().max().item()
    one.copy(1, 0, 12)
    other.copy(1, 0, 12)
    after = pad_batch([([5] * BLOCK, 12, [16] * BLOCK)], 0)
    yield (one.body(after).float() - other.body(after).float()).abs().max().item()
    one.swap(0, 2, 16)
    other.swap(0, 2, 16)
    after = pad_batch(
        [([5] * BLOCK, 12, [16] * BLOCK), ([6] * BLOCK, 8, [12] * BLOCK), ([7] * BLOCK, 4, [8] * BLOCK)], 0
    )
    yield (one.body(after).float() - other.body(after).float()).abs().max().item()
    one.erase(1)
    other.erase(1)
    after = pad_batch([([8] * BLOCK, 12, [16] * BLOCK)], 1)  # reads twelve keys of zeros
    yield (one.body(after).float() - other.body(after).float()).abs().max().item()


@pytest.fixture
def openvino():
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from hildanext.decoding.runtimes.openvino import OpenVinoRuntime

    opened = []

    def make(lm, weights="native", later=()):
        opened.append(OpenVinoRuntime(lm, (BLOCK, 2 * BLOCK), weights, later))
        return opened[-1]

    yield make
    for runtime in opened:
        runtime.close()


def test_openvino_computes_what_eager_does(openvino):
    lm, exported = model(), model()
    assert max(differences(EagerRuntime(lm), openvino(exported))) < 1e-4
    assert exported.config._attn_implementation == "sdpa"  # the model is left as it was


def test_openvino_makes_a_graph_for_other_widths_with_the_first_request_and_drops_it_at_rest(openvino):
    eager, runtime = EagerRuntime(model()), openvino(model(), later=(BLOCK, 12, 16))
    for one in (eager, runtime):
        one.allocate(1, 32)
    passes = [pad_batch([([*range(start, start + n)], start, [start + n] * n)], 0) for start, n in ((0, 12), (12, 10))]
    assert runtime.fixed == [BLOCK, 2 * BLOCK]
    runtime.prepare(12)
    runtime.prepare(9)  # of no mode
    assert runtime.fixed == [BLOCK, 2 * BLOCK, 12]
    for batch in passes:
        assert torch.allclose(eager.body(batch), runtime.body(batch), atol=1e-4)
    runtime.rest([22])
    assert runtime.fixed == [BLOCK, 2 * BLOCK]
    runtime.prepare(12)
    batch = pad_batch([([5] * 10, 22, [32] * 10)], 0)
    assert torch.allclose(eager.body(batch), runtime.body(batch), atol=1e-4)
    assert runtime.requests[12] is not runtime.requests[-1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_openvino_keeps_no_traces_but_those_of_others(openvino):
    """torch keeps every traced module; ours are dropped, unless that would take the methods of another one."""
    openvino(model())
    assert not concrete_type_store.type_store
    other = torch.jit.script(torch.nn.Linear(2, 3))
    openvino(model())
    assert other(torch.zeros(1, 2)).shape == (1, 3)
    concrete_type_store.type_store.clear()


def test_openvino_in_bf16_is_as_near_to_the_truth_as_eager_in_bf16(openvino):
    truth, lm = EagerRuntime(model()), model(torch.bfloat16)
    errors = [list(differences(truth, runtime)) for runtime in (EagerRuntime(lm), openvino(lm))]
    eager, ours = (sum(one) / len(one) for one in errors)
    assert 0.01 < ours < 1.5 * eager
    assert lm.dtype == torch.bfloat16


def test_int8_weights_are_integers_with_a_scale_for_each_row(openvino):
    """Against the weights rounded by hand and run eagerly: what remains is the rounding of activations."""
    rounded = model()
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2:
                scale = parameter.abs().amax(-1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    errors = list(differences(EagerRuntime(rounded), openvino(model(), "int8")))
    assert 0 < sum(errors) / len(errors) < 0.15


@torch.inference_mode()
def test_openvino_frees_the_model_and_at_rest_all_but_what_it_is_told_to_keep(openvino):
    lm = model()
    ours, eager, loaded = openvino(lm), EagerRuntime(model()), weakref.ref(lm)
    del lm
    gc.collect()
    assert loaded() is None
    for runtime in (ours, eager):
        runtime.allocate(SLOTS, 400)
        for batch in forwards():
            runtime.body(batch)
        runtime.body(pad_batch([(tokens(random.Random(1), 300), 0, [300] * 300)], 0))
    assert ours.room == 384
    ours.rest([0, 16, 8])
    assert ours.room == 0
    assert [part.shape[2] for part in ours.packed] == [0, 16, 8]
    assert not list(ours.folder.glob("*"))  # the weights' files are mapped, but deleted
    after = pad_batch([([5] * BLOCK, 16, [20] * BLOCK), ([6] * BLOCK, 8, [12] * BLOCK)], 1)
    for _ in range(2):
        difference = (ours.body(after) - eager.body(after)).abs().max()
        assert difference < 1e-4
    hidden = ours.body(after).flatten(0, 1)
    assert (ours.head(hidden) - eager.head(hidden)).abs().max() < 1e-4


def test_openvino_refuses_layers_that_keep_different_things(openvino):
    lm = model()
    real = lm.base_model.forward

    def odd(*args, **kwargs):
        output = real(*args, **kwargs)
        output.past_key_values.layers[0].keys = output.past_key_values.layers[0].keys[..., :3]
        return output

    lm.base_model.forward = odd
    with pytest.raises(ModelError, match=r"layers cache keys of different shapes; use engine.runtime 'eager'"):
        openvino(lm)


@pytest.mark.parametrize("wrong", ["asks for more", "leaves something out"])
def test_openvino_refuses_what_it_would_compute_wrongly(openvino, monkeypatch, wrong):
    from hildanext.decoding.runtimes import openvino as room

    real = room.split_attention
    if wrong == "asks for more":
        changed = lambda *args, **kwargs: real(*args, **kwargs, softcap=30.0)  # noqa: E731
        message = "LlamaAttention needs 'softcap', which OpenVINO does not support here"
    else:
        changed = lambda module, query, *args, **kwargs: real(module, -query, *args, **kwargs)  # noqa: E731
        message = "LlamaForCausalLM: the hidden states of OpenVINO differ from the model's"
    monkeypatch.setattr(room, "split_attention", changed)
    with pytest.raises(ModelError, match=f"{message}.*use engine.runtime 'eager'"):
        openvino(model())


def engine(tiny_tokenizer, runtime, **options):
    lm = DiffusionLM(
        model(),
        tiny_tokenizer,
        mask_token_id=MASK,
        block_size=BLOCK,
        convention="shifted",
        record={"base_model": "tiny"},
    )
    raw = {"runtime": runtime, "slots": SLOTS, "context": CONTEXT, "prefill_chunk": 16, **options}
    return TransformersEngine(parse_config({"engine": raw}), {}, lm)


def requests(n=12):
    rng = random.Random(5)
    for _ in range(n):
        wanted = Settings("Q_MODE", 0.4, rng.choice([None, 0.0, 0.2]), 4, BLOCK, rng.randint(4, 20), 0.0, 0)
        yield Request(tokens(rng, rng.randint(1, 40)), wanted)


def test_openvino_gives_the_same_tokens(monkeypatch, tiny_tokenizer):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setattr(runtimes, "has_openvino", lambda: True)
    wanted = list(requests())
    expected = [done.token_ids for done in engine(tiny_tokenizer, "eager").generate_batch(wanted)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    found = engine(tiny_tokenizer, "auto")
    assert found.runtime.name == "openvino"
    seen, head = [], found.runtime.head
    monkeypatch.setattr(found.runtime, "head", lambda hidden: seen.append(torch.get_num_threads()) or head(hidden))
    assert torch.get_num_threads() == 2  # whoever computes beside the engine, an AR base say, has them all
    assert [done.token_ids for done in found.generate_batch(wanted)] == expected
    assert set(seen) == {1}  # torch's own would take the cores from it
    assert torch.get_num_threads() == 2
    found.close()
    torch.set_num_threads(threads)


@pytest.fixture
def compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler here")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_gives_the_same_tokens_and_compiles_nothing_after_the_warm_up(
    compiler, tiny_tokenizer, monkeypatch, backend
):
    """Graphs are traced alike by every backend; the one that generates code takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    wanted = list(requests())
    expected = [done.token_ids for done in engine(tiny_tokenizer, "eager").generate_batch(wanted)]
    found = engine(tiny_tokenizer, "compiled")
    counters.clear()
    list(found.stream(wanted[0]))  # allocates and warms up
    warm = counters["stats"]["unique_graphs"]
    assert warm == 4
    assert [done.token_ids for done in found.generate_batch(wanted)] == expected
    assert counters["stats"]["unique_graphs"] == warm
    assert max(differences(EagerRuntime(model()), CompiledRuntime(model(), (BLOCK, 2 * BLOCK)))) < 1e-4


def test_compile_that_cannot_work_is_one_line(monkeypatch, tiny_tokenizer):
    from torch._dynamo.exc import TorchDynamoException

    found = engine(tiny_tokenizer, "compiled")

    def broken(*args):
        raise TorchDynamoException("no\ncompiler\n\nSet TORCH_LOGS")

    monkeypatch.setattr(found.runtime, "compiled", broken)
    with pytest.raises(
        ModelError, match=r"^torch.compile does not work here: no compiler; use engine.runtime 'eager'$"
    ):
        found.generate(next(requests()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_graphs_give_the_same_tokens(tiny_tokenizer):
    from hildanext.decoding.runtimes.cudagraphs import CudaGraphRuntime

    lm = model().cuda()
    assert max(differences(EagerRuntime(lm), CudaGraphRuntime(lm, (BLOCK, 2 * BLOCK)))) < 1e-4


@given(length=st.integers(1, 5000), context=st.integers(1, 6000))
def test_a_graph_reads_enough_keys_and_there_are_few_graphs(length, context):
    length = min(length, context)
    found = graph_length(length, context)
    assert length <= found <= context
    assert found == context or (found % 256 == 0 and found < max(512, 2 * length))
    assert found in {context, *(256 << k for k in range(5))}


@given(
    widths=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
    slot=st.integers(0, 2),
    extra=st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_widening_adds_padding_only(widths, slot, extra):
    starts = [10 * row for row in range(len(widths))]
    spans = [([7 + row] * w, s, [s + w] * w) for row, (w, s) in enumerate(zip(widths, starts, strict=True))]
    batch = pad_batch(spans, slot)
    slots = slot + len(widths) + extra
    wide = widen(batch, slots, max(widths) + extra)
    assert wide.ids.shape == wide.positions.shape == wide.visible.shape == (slots, max(widths) + extra)
    assert wide.widths == [0] * slot + widths + [0] * extra
    for part in ("ids", "positions", "visible"):
        inner = wide._asdict()[part][slot : slot + len(widths), : max(widths)]
        assert torch.equal(inner, batch._asdict()[part])
    columns = wide.columns(99)
    for row, width in enumerate(wide.widths):
        assert (columns[row, width:] == 99).all()
        assert (wide.visible[row, width:] >= 1).all()


def test_the_runtime_is_chosen_by_hardware(subtests: pytest.Subtests):
    for wanted, device, installed, expected in [
        ("auto", "cuda", True, "cudagraphs"),
        ("auto", "cpu", True, "openvino"),
        ("auto", "cpu", False, "eager"),
        ("auto", "mps", True, "eager"),
        ("eager", "cuda", True, "eager"),
        ("compiled", "cpu", False, "compiled"),
        ("openvino", "cpu", True, "openvino"),
    ]:
        with subtests.test(wanted=wanted, device=device, installed=installed, expected=expected):
            name, reason = runtimes.choose_runtime(wanted, device, installed)
            assert name == expected
            assert (reason == "set in the configuration") == (wanted != "auto")


def test_a_runtime_that_cannot_run_is_an_error(subtests: pytest.Subtests):
    for wanted, device, installed, message in [
        ("openvino", "cpu", False, r"openvino is not installed; pip install 'hildanext\[cpu\]'"),
        ("openvino", "cuda", True, "openvino runs on CPUs, the model is on cuda"),
        ("cudagraphs", "cpu", True, "cudagraphs needs a CUDA GPU, the model is on cpu"),
    ]:
        with subtests.test(wanted=wanted, device=device, installed=installed, message=message):
            with pytest.raises(ConfigError, match=f"^'engine.runtime': {message}"):
                runtimes.choose_runtime(wanted, device, installed)


def test_small_weights_need_openvino_and_the_choice_is_said(tiny_tokenizer, capsys):
    with pytest.raises(
        ConfigError, match=r"'engine.weights': the eager runtime supports 'native' only; 'int8' needs 'openvino'"
    ):
        engine(tiny_tokenizer, "auto", weights="int8")
    engine(tiny_tokenizer, "auto")
    assert "runtime eager: OpenVINO is not installed (extra 'cpu')" in capsys.readouterr().err
