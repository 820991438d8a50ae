"""EleutherAI's lm-evaluation-harness: our models as its models, and its tasks, also with local data files.

The AR base's likelihoods use the harness's own `HFLM`; everything else uses `HarnessModel`. Needs the extra `eval`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from jinja2 import UndefinedError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hildanext.config import Config, EvaluateConfig
from hildanext.errors import DataError, NonFiniteLogitsError, UsageError
from hildanext.evaluate.intervals import Figure, mean, plain, ratio, share
from hildanext.evaluate.likelihood import Pair, Score, score
from hildanext.evaluate.records import check_local
from hildanext.evaluate.ways import (
    Models,
    Outcome,
    Question,
    TimedAnswer,
    Way,
    complete,
    cost,
    require_chat_template,
)

SHIPPED = Path(__file__).parent / "tasks"
# Metrics of a rolling task as functions of the log-likelihood per unit; applied to the value and to the interval.
ROLLING = {
    "word_perplexity": lambda x: math.exp(-x),
    "byte_perplexity": lambda x: math.exp(-x),
    "bits_per_byte": lambda x: -x / math.log(2),
}

BUDGETS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}  # tasks use any of these keys


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings and retry messages on stderr; errors still arrive as exceptions."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class HarnessModel(TemplateLM):
    """A `Way` as a model of the harness: completions in that way, and likelihoods of the converted model.

    `scores` keeps every likelihood with its standard error, `answers` every completion, in the order of the requests.
    """

    def __init__(self, models: Models, options: EvaluateConfig, way: Way, block_size: int | None, greedy: bool) -> None:
        """block_size None: exact likelihoods at block size 1; else the bound at that block size.

        greedy: with a bound, decode each context to tell whether the continuation is the model's own greedy text, which
        the accuracy of loglikelihood tasks needs.
        """
        super().__init__()
        self.models, self.options, self.way, self.block_size, self.greedy = models, options, way, block_size, greedy
        self.tokenizer = models.lm.tokenizer
        self.scores: list[Score] = []
        self.answers: list[TimedAnswer] = []

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context: the begin-of-text token, else the end-of-text token, as in HFLM."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.models.engine.scheduler.context

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = bos is None or not string.startswith(bos)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _score(self, pairs: list[Pair]) -> list[Score]:
        options = self.options
        kind = "exact" if self.block_size is None else f"bound, block {self.block_size}"
        found = score(
            self.models.lm,
            pairs,
            f"likelihood ({kind})",
            block_size=self.block_size,
            draws=options.draws,
            seed=options.seed,
        )
        self.scores += found
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Contexts are cut on the left to fit the model's context, or its whole blocks if they are decoded."""
        is_decoded = self.greedy and self.block_size is not None
        limit = whole_blocks(self.max_length, self.block_size) if self.block_size and is_decoded else self.max_length
        pairs = []
        for (_, continuation), context, target in requests:
            if len(target) >= limit:
                raise DataError(
                    f"a continuation of {len(target)} tokens does not fit into {limit}: {continuation[:40]!r}..."
                )
            pairs.append((context[-(limit - len(target)) :], target))
        found = self._score(pairs)
        decoded = [False] * len(pairs)
        if is_decoded:
            questions = [Question(context, len(target)) for context, target in pairs]
            answers = complete(self.models, self.way, questions, "greedy continuations")
            decoded = [answer.token_ids == target for answer, (_, target) in zip(answers, pairs, strict=True)]
        return [
            (result.log_p, is_own if result.is_greedy is None else result.is_greedy)
            for result, is_own in zip(found, decoded, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores each text in HFLM's windows: every token once, after the prefix token or as much text as fits."""
        pairs: list[Pair] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, result in zip(owner, self._score(pairs), strict=True):
            totals[index] += result.log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions of all requests, `engine.slots` at a time. A prompt that does not fit is cut on the left."""
        block, questions = 1 if self.way.settings is None else self.way.settings.block_size, []
        for number, request in enumerate(requests):
            text, task_options = request.args
            generation = normalize_gen_kwargs(task_options, default_max_gen_toks=self.options.answer_tokens)
            budget = generation["max_gen_toks"]
            room = whole_blocks(self.max_length, block) - budget
            if room < 1:
                raise UsageError(
                    f"'engine.context' of {self.max_length} leaves no room for {budget} new tokens; raise it"
                )
            questions.append(
                Question(
                    self.tok_encode(text)[-room:],
                    budget,
                    tuple(stop for stop in generation["until"] if stop),
                    float(generation.get("temperature", 0.0)) if generation["do_sample"] else 0.0,
                    self.options.seed + number,
                )
            )
        found = complete(self.models, self.way, questions, "completions")
        self.answers += found
        return [answer.text for answer in found]


def whole_blocks(n_tokens: int, block_size: int) -> int:
    """`n_tokens` rounded down to whole blocks: the part of a context that decoding can use."""
    return n_tokens // block_size * block_size


# --- tasks ------------------------------------------------------------------------------------------------------------


@quiet()
def open_tasks(name: str, data: str | None) -> list[Task]:
    """The harness's tasks with that name (a task, a group, a tag or a YAML file) and their data.

    `data`: a JSON or JSON-lines file to use in place of the task's own data. Raises UsageError for an unknown name, a
    missing file or unreachable data, DataError for a malformed record.
    """
    if data is not None and not Path(data).is_file():
        raise UsageError(f"task '{name}': no data file {data}")
    local = name.endswith((".yaml", ".yml"))
    if local and not Path(name).is_file():
        raise UsageError(f"task '{name}': no such file")
    shipped = (SHIPPED / f"{name}.yaml").is_file()
    if shipped and data is None:
        raise UsageError(f"task '{name}' needs a file: give --data {name}=FILE.jsonl")
    if shipped and data is not None:
        check_local(name, Path(data))
    # The harness's own index has thousands of files; it is read only if one of its names is requested.
    folders = [str(SHIPPED), *([str(Path(name).resolve().parent)] if local else [])]
    manager = TaskManager(include_path=folders, include_defaults=not (shipped or local))
    known = _known_name(manager, name) if local else name
    if known not in manager.task_index:
        raise UsageError(
            f"unknown task '{name}'; choose one of humaneval, gsm8k, stories, infilling, "
            f"{', '.join(sorted(path.stem for path in SHIPPED.glob('*.yaml')))}, a task of lm-eval or a YAML file"
        )
    return _load(manager, name, known, data)


def _known_name(manager: TaskManager, path: str) -> str:
    for known, entry in manager.task_index.items():
        if entry.yaml_path is not None and Path(entry.yaml_path).resolve() == Path(path).resolve():
            return known
    raise UsageError(f"task '{path}': the file defines no task")


def _load(manager: TaskManager, name: str, known: str, data: str | None) -> list[Task]:
    spec: Any = known
    if data is not None:
        # Overrides in the format that a group's file uses for its tasks.
        from_file = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(Path(data).resolve())}},
            "training_split": None,
            "validation_split": None,
            "fewshot_split": None,
            "test_split": "test",
        }
        spec = {"group": f"{known}_from_file", "task": [{"task": known, **from_file}]}
    try:
        tasks = list(manager.load([spec])["tasks"].values())
        for task in tasks:  # fail now if the first record lacks a field that the task reads
            first = next(iter(task.eval_docs))
            task.doc_to_text(first), task.doc_to_target(first)
    except (DatasetsError, UndefinedError, OSError, ValueError, KeyError, ImportError, StopIteration) as error:
        cause = str(error.__cause__ or error).strip()
        reason = cause.splitlines()[0] if cause else type(error).__name__
        unreachable = data is None and isinstance(error, (DatasetsError, OSError))
        remedy = f"to use a local file give --data {name}=FILE.jsonl" if unreachable else f"check {data or name}"
        raise UsageError(f"task '{name}' cannot be opened: {reason}; {remedy}") from None
    for task in tasks:
        if "UNSAFE_CODE" in dir(task) and task.UNSAFE_CODE:
            raise UsageError(f"task '{name}' runs generated code outside the sandbox; use 'humaneval'")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return tasks


def ways_of(task: Task, ways: list[Way], sizes: list[int], gated: bool = False) -> list[tuple[Way, int | None]]:
    """The ways to run a task, each with the block size of its likelihood bound (None: no bound).

    Generation tasks run in every way. Likelihood tasks run on the AR base, exactly at block size 1, and with the bound
    at each of `sizes`. A gated model has its base's likelihood, exactly: they run on the AR base and EXACT.
    """
    if task.OUTPUT_TYPE == "generate_until":
        return [(way, None) for way in ways]
    if gated:
        return [(way, None) for way in ways if way.name in ("ar", "exact")]
    careful = next(way.settings for way in ways if way.settings is not None)
    bounds = [(Way(f"bound, block {size}", careful._replace(block_size=size)), size) for size in sizes]
    return [(ways[0], None), (Way("exact, block 1", careful), None), *bounds]


@quiet()
def evaluate(config: Config, models: Models, task: Task, way: Way, block_size: int | None) -> Outcome:
    """Run one task in one way. Figures are the task's own, with intervals over its items."""
    options = config.evaluate
    chat = options.chat and task.OUTPUT_TYPE == "generate_until"
    if chat:
        require_chat_template(config, models.lm.tokenizer, task.task_name)
    if task.OUTPUT_TYPE == "generate_until" and not BUDGETS & set(task.config.generation_kwargs):
        # Replaces the harness's own default budget.
        task.set_config(key="generation_kwargs", value={"max_gen_toks": options.answer_tokens}, update=True)
    lm: Any
    if (way.settings is None or models.lm.gated) and task.OUTPUT_TYPE != "generate_until":
        lm = HFLM(
            pretrained=models.base,
            tokenizer=models.lm.tokenizer,
            batch_size=models.engine.slots,
            max_length=models.engine.scheduler.context,
        )
    else:
        lm = HarnessModel(models, options, way, block_size, greedy=task.OUTPUT_TYPE == "loglikelihood")
    found = harness_evaluate(
        lm=lm,
        task_dict={"tasks": {task.task_name: task}},
        limit=options.limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    records = found["samples"][task.task_name]
    if isinstance(lm, HFLM) and any(map(_has_nan, records)):
        raise NonFiniteLogitsError(f"likelihood of the AR base on '{task.task_name}'")
    figures = _figures(records, found["results"][task.task_name], options)
    if isinstance(lm, HarnessModel) and lm.scores:
        errors = [result.standard_error for result in lm.scores]
        figures["monte_carlo_error"] = plain(sum(errors) / len(errors), len(errors))
    if isinstance(lm, HarnessModel) and lm.answers:
        figures |= cost(lm.answers, options.resamples, options.seed)
    kept = ("doc_id", "target", "filter", "filtered_resps")
    return Outcome(way.name, figures, [{key: record[key] for key in kept} for record in records])


def _has_nan(record: dict[str, Any]) -> bool:
    """Whether a log-likelihood in a record of the harness is NaN. The harness's own models do not check their logits."""
    values: list[Any] = [record["resps"]]
    while values:
        value = values.pop()
        if isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, float) and math.isnan(value):
            return True
    return False


def _figures(records: list[dict[str, Any]], results: dict[str, Any], options: EvaluateConfig) -> dict[str, Figure]:
    """The harness's figures, with intervals from its records for means, shares and perplexities."""
    figures = {}
    for key, value in results.items():
        metric, _, name = key.partition(",")
        if not name or not isinstance(value, (int, float)) or metric.endswith("_stderr"):
            continue
        items = [record[metric] for record in records if record["filter"] == name and metric in record]
        label = metric if name == "none" else f"{metric} ({name})"
        figures[label] = _interval(metric, float(value), items, options)
    return figures


def _interval(metric: str, value: float, items: list[Any], options: EvaluateConfig) -> Figure:
    if metric in ROLLING and all(isinstance(item, tuple) for item in items):
        log_p, counts = [item[0] for item in items], [item[1] for item in items]
        per_unit = ratio(log_p, counts, options.resamples, options.seed)
        ends = sorted(ROLLING[metric](x) for x in (per_unit.low, per_unit.high) if x is not None)
        return per_unit._replace(value=value, low=ends[0], high=ends[-1])
    if not items or not all(isinstance(item, (int, float)) for item in items):
        return plain(value, len(items))
    yes_or_no = all(item in (0, 1) for item in items)
    found = share([bool(item) for item in items]) if yes_or_no else mean(items, options.resamples, options.seed)
    # If the figure is not the mean over items, keep the harness's value without an interval.
    return found if math.isclose(found.value, value, rel_tol=1e-6, abs_tol=1e-9) else plain(value, len(items))
