"""lm-eval with our models: likelihoods and completions against the AR base's own, tasks from local files, what is refused."""

from __future__ import annotations

import copy
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra 'eval')")

from hildanext.config import Config
from hildanext.decoding.engines import Request
from hildanext.errors import DataError, NonFiniteLogitsError, UsageError
from hildanext.evaluate import command, harness
from hildanext.evaluate.intervals import Figure, plain
from hildanext.evaluate.report import averages
from hildanext.evaluate.ways import Models, Outcome, Way, ways
from hildanext.model.loading import load_diffusion_lm
from support.evaluate import changed

CHOICES = [
    {"question": "Once upon a time there was a", "choices": ["red kite", "blue dog", "tree"], "answer": 0},
    {"question": "Mia had a", "choices": ["ball", "small green ball"], "answer": 1},
    {"question": "One day", "choices": ["Leo lost it", "it", "she found the red ball"], "answer": 2},
]
TEXTS = ["Once upon a time there was a red kite. Mia had it.", "Leo found a dog.", "One day " * 40]
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`datasets` copies what it reads: not into the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("local")
    questions = [{"question": f"{a}+1?", "answer": f"#### {a + 1}"} for a in range(3)]
    files = {
        "local_multiple_choice": CHOICES,
        "local_rolling": [{"text": text} for text in TEXTS],
        "local_gsm8k": questions,
    }
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in files}


@pytest.fixture(scope="module")
def small(converted: Config, data: dict[str, str]) -> Config:
    """Greedy answers of a few tokens; a window of 32 tokens, so that the last text needs several."""
    return changed(
        converted, evaluate={"data": data, "answer_tokens": 6, "chat": False}, engine={"slots": 2, "context": 32}
    )


@pytest.fixture(scope="module")
def models(small: Config) -> Models:
    return command.open_models(small, None)[0]


def outcomes(small: Config, models: Models, name: str) -> dict[str, Any]:
    (task,) = harness.open_tasks(name, small.evaluate.data[name])
    plan = harness.ways_of(task, ways(small, models), [4])
    return {way.name: harness.evaluate(small, models, task, way, block) for way, block in plan}


@pytest.fixture(scope="module")
def choices(small: Config, models: Models) -> dict[str, Any]:
    return outcomes(small, models, "local_multiple_choice")


def log_p(models: Models, context: str, continuation: str) -> float:
    """What the AR base gives a continuation, through its own forward."""
    tokenizer = models.lm.tokenizer
    n = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        scores = models.base(ids).logits[0].log_softmax(-1)
    return sum(scores[i - 1, ids[0, i]].item() for i in range(n, ids.shape[1]))


def test_multiple_choice_is_the_likeliest_choice(choices: dict[str, Any], models: Models) -> None:
    """The checkpoint holds its base's weights, `shifted`: exact and AR are one and the same, and both are plain sums."""
    assert list(choices) == ["ar", "exact, block 1", "bound, block 4"]
    right = []
    for one in CHOICES:
        scores = [log_p(models, str(one["question"]), f" {choice}") for choice in one["choices"]]  # type: ignore[attr-defined]
        right.append(scores.index(max(scores)) == one["answer"])
    for name in ("ar", "exact, block 1"):
        figure = choices[name].figures["acc"]
        assert figure.value == pytest.approx(sum(right) / 3)
        assert (figure.n, figure.interval) == (3, "wilson")
    assert choices["exact, block 1"].figures["monte_carlo_error"].value == 0
    assert choices["bound, block 4"].figures["monte_carlo_error"].value > 0


def test_exact_likelihoods_are_hflms(models: Models, small: Config) -> None:
    """Request by request, contexts that are empty or end in a space among them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("Once upon", " a time"), ("", "Mia had a ball"), ("Leo ", "found it"), ("a " * 60, "dog")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    theirs = HFLM(pretrained=models.base, tokenizer=models.lm.tokenizer, max_length=32).loglikelihood(
        requests, disable_tqdm=True
    )
    way = ways(small, models)[1]
    lm = harness.HarnessModel(models, small.evaluate, way, None, greedy=True)
    ours = lm.loglikelihood(requests, disable_tqdm=True)
    # HFLM cuts a long context one token shorter: it does not feed the last continuation token.
    for (a, greedy_a), (b, greedy_b) in zip(ours[:3], theirs[:3], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert greedy_a is bool(greedy_b)
    assert math.isfinite(ours[3][0])


def test_nan_logits_of_the_base_are_an_error(small: Config, models: Models) -> None:
    damaged = copy.deepcopy(models.base)
    damaged.base_model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteLogitsError, match="likelihood of the AR base on 'local_rolling'"):
        outcomes(small, models._replace(base=damaged), "local_rolling")


def test_rolling_perplexity(small: Config, models: Models) -> None:
    found = outcomes(small, models, "local_rolling")
    ar, exact, bound = (found[name].figures for name in ("ar", "exact, block 1", "bound, block 4"))
    assert exact["bits_per_byte"].value == pytest.approx(
        ar["bits_per_byte"].value, rel=0.02
    )  # windows end one token apart
    short = [one for one in TEXTS if len(models.lm.tokenizer(one)["input_ids"]) < 31]
    assert len(short) == 2
    for figures in (ar, exact, bound):
        for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            figure = figures[metric]
            assert figure.low <= figure.value <= figure.high, metric
        assert figures["byte_perplexity"].value == pytest.approx(2 ** figures["bits_per_byte"].value)
    assert bound["monte_carlo_error"].value > 0


def test_every_token_of_a_long_text_counts_once(models: Models, small: Config) -> None:
    from lm_eval.api.instance import Instance

    seen: list[list[int]] = []
    lm = harness.HarnessModel(models, small.evaluate, ways(small, models)[1], None, greedy=False)
    lm._score = lambda pairs: (
        seen.extend(target for _, target in pairs)
        or [  # type: ignore[method-assign, func-returns-value]
            harness.Score(-1.0, 0.0, False) for _ in pairs
        ]
    )
    totals = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS])
    tokens = [models.lm.tokenizer(text)["input_ids"] for text in TEXTS]
    assert [i for target in seen for i in target] == [i for ids in tokens for i in ids]
    assert totals == [-1.0, -1.0, -float(len(seen) - 2)]


@pytest.fixture
def asked(models: Models, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the engine is given."""
    found: list[Request] = []
    submit = models.engine.submit
    monkeypatch.setattr(models.engine, "submit", lambda request: found.append(request) or submit(request))
    return found


def test_generation_goes_through_the_scheduler(small: Config, models: Models, asked: list[Request]) -> None:
    """All requests at once, with the task's stop strings; every way, AR among them, says what it cost."""
    found = outcomes(small, models, "local_gsm8k")
    assert list(found) == ["ar", "q_mode", "q_mode_no_edit", "s_mode", "s_mode_no_edit"]
    requests = [request for request in asked if request.settings.max_new_tokens > 1]  # the others are warm-ups
    assert len(requests) == 3 * 4
    assert all(request.settings.stop == ("Question:",) for request in requests)
    for outcome in found.values():
        assert {"exact_match (strict-match)", "exact_match (flexible-extract)"} <= set(outcome.figures)
        assert outcome.figures["tokens_per_second"].value > 0
        assert 0 < outcome.figures["tokens"].value <= 3 * 6
    assert found["ar"].figures["tokens_per_forward"].value == 1
    shown = found["q_mode"].samples[0]["filtered_resps"]
    assert len(shown) == 1


def test_completions_of_ar_are_hflms(small: Config, models: Models) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    how = {"until": ["dog"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, how), 0) for text in ("Once upon a time", "Mia", "Leo found a")]
    theirs = HFLM(pretrained=models.base, tokenizer=models.lm.tokenizer, max_length=32).generate_until(
        requests, disable_tqdm=True
    )
    ours = harness.HarnessModel(models, small.evaluate, ways(small, models)[0], None, greedy=False)
    assert ours.generate_until(requests) == theirs


def test_likelihoods_at_every_block_size_asked_for(small: Config, models: Models) -> None:
    config = changed(small, evaluate={"block_sizes": [2, 8], "limit": 1})
    (task,) = harness.open_tasks("local_multiple_choice", small.evaluate.data["local_multiple_choice"])
    by_way = command.runs(config, models, "local_multiple_choice", [task])["local_multiple_choice"]
    assert list(by_way) == ["ar", "exact, block 1", "bound, block 2", "bound, block 8"]
    plan = harness.ways_of(task, ways(config, models), [2, 8])
    assert [size for _, size in plan] == [None, None, 2, 8]
    assert [way.settings.block_size for way, size in plan if way.settings and size] == [2, 8]
    assert by_way["bound, block 8"]().figures["monte_carlo_error"].value > 0


def test_a_window_that_is_no_whole_number_of_blocks(small: Config, models: Models) -> None:
    """Decoding needs whole blocks: 32 tokens are 30 in blocks of 5, and longer contexts are cut to that."""
    from lm_eval.api.instance import Instance

    settings = ways(small, models)[1].settings
    assert settings is not None
    way = Way("q", settings._replace(block_size=5))
    lm = harness.HarnessModel(models, small.evaluate, way, 5, greedy=True)
    assert lm.max_length == 32
    long = list(range(5, 60))
    assert len(lm._loglikelihood_tokens([(("", ""), long, [7])])) == 1
    how = {"until": ["dog"], "max_gen_toks": 6, "do_sample": False}
    assert len(lm.generate_until([Instance("generate_until", {}, ("a " * 60, how), 0)])) == 1


def test_the_average_over_the_tasks_of_lm_eval(small: Config, tmp_path: Path) -> None:
    tasks = ["local_multiple_choice", "local_gsm8k"]
    config = changed(small, evaluate={"limit": 2})
    found = command.evaluate(config, tasks, [], None, tmp_path, allow_code=False)
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["lm_eval_average"]
    assert stored == found["lm_eval_average"]
    assert stored["ar"]["tasks"] == tasks
    scores = [
        found["tasks"][task]["ar"][name]["value"]
        for task, name in zip(tasks, ("acc_norm", "exact_match (strict-match)"), strict=True)
    ]
    assert stored["ar"]["average"] == pytest.approx(sum(scores) / 2)
    exact = stored["exact, block 1"]
    assert (exact["tasks"], exact["ar"]) == (tasks[:1], pytest.approx(scores[0]))
    assert "## Average over lm-eval's tasks" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.png").is_file()  # the generation task has a speed


def score(value: float, **others: float) -> dict[str, Figure]:
    return {name: plain(x, 10) for name, x in {"acc": value, **others}.items()}


def test_averages_by_hand() -> None:
    """acc_norm before acc, tasks of ours left out, the ratio over the tasks that both have."""
    tasks = {
        "a": [Outcome("ar", score(0.5, acc_norm=0.6), []), Outcome("q", score(0.9, acc_norm=0.3), [])],
        "b": [Outcome("ar", score(0.2), [])],
        "infilling": [Outcome("ar", {"exact_match": plain(1.0, 10)}, [])],
    }
    found = averages(tasks)
    assert found["ar"] == {"tasks": ["a", "b"], "average": pytest.approx(0.4), "ar": pytest.approx(0.4), "ratio": 1}
    assert found["q"] == {"tasks": ["a"], "average": 0.3, "ar": 0.6, "ratio": pytest.approx(0.5)}
    assert averages({"stories": tasks["infilling"]}) == {}


def test_greedy_is_what_decoding_gives(models: Models, small: Config) -> None:
    """Where only a bound is known, a continuation counts as greedy when the engine writes it."""
    way = ways(small, models)[1]
    assert way.settings is not None
    context = models.lm.tokenizer("Once upon a")["input_ids"]
    done = models.engine.generate(Request(context, way.settings._replace(max_new_tokens=3)))
    lm = harness.HarnessModel(models, small.evaluate, way, 4, greedy=True)
    other = [*done.token_ids[:-1], done.token_ids[-1] - 1]
    found = lm._loglikelihood_tokens([(("", ""), context, done.token_ids), (("", ""), context, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_a_yaml_of_the_users(small: Config, models: Models, tmp_path: Path, data: dict[str, str]) -> None:
    """A task file with its own local data, and the same with other data."""
    path = tmp_path / "mine.yaml"
    text = (harness.SHIPPED / "local_multiple_choice.yaml").read_text(encoding="utf-8")
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data['local_multiple_choice']}\n"
    path.write_text(
        text.replace("task: local_multiple_choice", "task: mine").replace("dataset_path: json\n", source),
        encoding="utf-8",
    )
    (task,) = harness.open_tasks(str(path), None)
    assert task.task_name == "mine"
    assert len(list(task.test_docs())) == 3
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(CHOICES[0]) + "\n", encoding="utf-8")
    (task,) = harness.open_tasks(str(path), str(one))
    assert len(list(task.test_docs())) == 1


def test_the_chat_template_of_generation(
    small: Config, models: Models, monkeypatch: pytest.MonkeyPatch, asked: list[Request]
) -> None:
    (task,) = harness.open_tasks("local_gsm8k", small.evaluate.data["local_gsm8k"])
    config = changed(small, evaluate={"chat": True, "limit": 1})
    harness.evaluate(config, models, task, ways(config, models)[1], None)
    expected = models.lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Question: 0+1?\nAnswer:"}], tokenize=False, add_generation_prompt=True
    )
    shown = models.lm.tokenizer.decode(asked[-1].prompt_ids)
    assert expected.endswith(shown)
    monkeypatch.setattr(models.lm.tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match="has no chat template"):
        harness.evaluate(config, models, task, ways(config, models)[1], None)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("local_rolling", None, "needs a file: give --data local_rolling=FILE"),
        ("local_rolling", "nowhere.jsonl", "no data file nowhere.jsonl"),
        ("nowhere.yaml", None, "no such file"),
    ],
)
def test_missing_files(name: str, file: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        harness.open_tasks(name, file)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hubby(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A task 'hubby' in the harness's index, its data on the hub."""
    # lm-eval's index is some 13,000 files: a few of the same form stand for it.
    (tmp_path / "hubby.yaml").write_text(
        (harness.SHIPPED / "local_multiple_choice.yaml")
        .read_text(encoding="utf-8")
        .replace("task: local_multiple_choice", "task: hubby")
        .replace("dataset_path: json", "dataset_path: nobody/has_this_data"),
        encoding="utf-8",
    )
    real = harness.TaskManager
    monkeypatch.setattr(
        harness,
        "TaskManager",
        lambda include_path, include_defaults: real(include_path=[*include_path, tmp_path], include_defaults=False),
    )


def set_offline(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", value)


@pytest.mark.parametrize("dead", ["names", "connections"])
def test_a_dead_network_is_one_line(monkeypatch: pytest.MonkeyPatch, hubby: None, dead: str) -> None:
    """Nothing says that the hub is out of reach: asking shows it."""
    set_offline(monkeypatch, False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the libraries' tries

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise (
            socket.gaierror(-3, "Temporary failure in name resolution")
            if dead == "names"
            else OSError(101, "Network is unreachable")
        )

    if dead == "names":
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
    else:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 443))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UsageError, match=r"task 'hubby' cannot be opened: .*--data hubby=FILE") as caught:
        harness.open_tasks("hubby", None)
    assert "\n" not in str(caught.value)


def test_names_of_the_harness(monkeypatch: pytest.MonkeyPatch, hubby: None, data: dict[str, str]) -> None:
    """A name that nobody knows; a task whose data is on a hub out of reach; the same task with a local file."""
    set_offline(monkeypatch, True)
    with pytest.raises(UsageError, match="unknown task 'nonsense'; choose one of humaneval") as caught:
        harness.open_tasks("nonsense", None)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"task 'hubby' cannot be opened: .*--data hubby=FILE") as caught:
        harness.open_tasks("hubby", None)
    assert "\n" not in str(caught.value)
    (task,) = harness.open_tasks("hubby", data["local_multiple_choice"])
    assert len(list(task.test_docs())) == 3


GOOD = '{"question": "a", "choices": ["b", "c"], "answer": 1}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("local_rolling", '{"text": "a"}\n{broken\n', "bad.jsonl:2: not valid JSON"),
        ("local_rolling", '{"text": "a"}\n{"txt": "b"}\n', "bad.jsonl:2: no text 'text'"),
        ("local_rolling", "\n", "bad.jsonl: no records in it"),
        ("local_gsm8k", '{"question": "a", "answer": 3}\n', "bad.jsonl:1: no text 'answer'"),
        ("local_multiple_choice", GOOD + '{"choices": ["b", "c"], "answer": 1}\n', "bad.jsonl:2: no text 'question'"),
        ("local_multiple_choice", GOOD + GOOD.replace("1", "2"), "record 2: 'answer' is 2, not the index of a choice"),
        ("local_multiple_choice", GOOD + GOOD.replace("1", "-1"), "record 2: 'answer' is -1"),
        ("local_multiple_choice", GOOD.replace("1", '"c"'), "record 1: 'answer' is 'c'"),
        ("local_multiple_choice", GOOD.replace('"b", "c"', '"b"'), "record 1: 'choices' is not a list of two texts"),
    ],
)
def test_broken_data_of_a_task(tmp_path: Path, name: str, text: str, message: str) -> None:
    """Every record, not the first: the harness counts what it does not understand as wrong."""
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        harness.open_tasks(name, str(path))
    assert "\n" not in str(caught.value)


def test_broken_data_of_a_task_of_the_harness(hubby: None, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"words": "x"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot be opened: .*; check .*bad.jsonl$") as caught:
        harness.open_tasks("hubby", str(path))
    assert "\n" not in str(caught.value)


def test_a_broken_task_file(tmp_path: Path, data: dict[str, str]) -> None:
    path = tmp_path / "mine.yaml"
    text = (harness.SHIPPED / "local_multiple_choice.yaml").read_text(encoding="utf-8")
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data['local_multiple_choice']}\n"
    text = text.replace("dataset_path: json\n", source).replace("output_type: multiple_choice", "output_type: guess")
    path.write_text(text.replace("task: local_multiple_choice", "task: mine"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot be opened: .*; check .*mine.yaml$") as caught:
        harness.open_tasks(str(path), None)
    assert "\n" not in str(caught.value)


def test_without_lm_eval_its_tasks_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "hildanext.evaluate.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    with pytest.raises(UsageError, match=r"hildanext\[eval\]"):
        command._harness_tasks("arc_easy", None)


def test_the_checkpoint_is_shifted(small: Config) -> None:
    assert load_diffusion_lm(small.model)[0].convention == "shifted"
