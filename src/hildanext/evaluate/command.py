"""The `evaluate` command: runs every task in every way and writes one report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.errors import UsageError
from hildanext.evaluate import gsm8k, humaneval, infilling, stories
from hildanext.evaluate.records import text_path, token_pieces
from hildanext.evaluate.report import OURS, draw, hardware, markdown, read_results, write_report
from hildanext.evaluate.sandbox import require_sandbox
from hildanext.evaluate.ways import Models, Outcome, require_chat_template, ways
from hildanext.files import sha256_of
from hildanext.model.loading import load_with_base
from hildanext.model.pretrained import fingerprint_weights
from hildanext.progress import say
from hildanext.provenance import git_revision, versions

Run = Callable[[], Outcome]


def with_data(config: Config, given: list[str], tasks: list[str]) -> Config:
    """The configuration with the `--data TASK=FILE` items added. Raises UsageError for an item that no task reads."""
    data = dict(config.evaluate.data)
    for item in given:
        key, equals, path = item.partition("=")
        if not equals or not path:
            raise UsageError(f"--data {item}: expected TASK=FILE")
        if key not in (*tasks, "gsm8k_shots"):
            raise UsageError(f"--data {item}: no task '{key}' among --tasks {','.join(tasks)}")
        data[key] = path
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"data": data})})


def open_inputs(config: Config, tasks: list[str], allow_code: bool) -> dict[str, Any]:
    """The input data of each task. Runs before weights are loaded, so a wrong name or a missing file fails at once."""
    found: dict[str, Any] = {}
    for name in tasks:
        if name == humaneval.NAME:
            if not allow_code:
                raise UsageError(
                    "the task 'humaneval' runs code written by a model; allow it with --allow-code-execution"
                )
            require_sandbox()
            found[name] = humaneval.read(config)
        elif name == gsm8k.NAME:
            found[name] = gsm8k.Problems(config)
        elif name in (stories.NAME, infilling.NAME):
            found[name] = text_path(config, name)
        else:
            found[name] = _harness_tasks(name, config.evaluate.data.get(name))
    return found


def _harness_tasks(name: str, data: str | None) -> list[Any]:
    try:
        from hildanext.evaluate.harness import open_tasks
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the task '{name}' is not one of {', '.join(OURS)}; all others need lm-eval ({error.name} is missing): "
            'pip install "hildanext[eval]"'
        ) from None
    return open_tasks(name, data)


def runs(config: Config, models: Models, name: str, data: Any) -> dict[str, dict[str, Run]]:
    """The runs of a task: reported task name -> way -> run. A group of lm-eval has several task names."""
    options, all_ways = config.evaluate, ways(config, models)
    tokenizer = models.lm.tokenizer
    if name == humaneval.NAME:
        return {name: {way.name: partial(humaneval.evaluate, config, models, data, way) for way in all_ways}}
    if name == gsm8k.NAME:
        if options.chat:
            require_chat_template(config, tokenizer, name)
        return {name: {way.name: partial(gsm8k.evaluate, config, models, data, way) for way in all_ways}}
    if name == stories.NAME:
        prompts = [ids[:-1] for ids in token_pieces(data, tokenizer, options.prompt_tokens + 1, options.limit)]
        return {name: {way.name: partial(stories.evaluate, config, models, prompts, way) for way in all_ways}}
    if name == infilling.NAME:
        if models.lm.gated:
            raise UsageError(
                "the task 'infilling': a gated model writes from left to right and fills no gaps; leave it out"
            )
        texts = token_pieces(data, tokenizer, options.infill_tokens, options.limit)
        # Infilling does not use the decode block size, so each mode runs once, under its name without "/SIZE".
        by_mode = {way.name.partition("/")[0]: way for way in reversed(all_ways)}
        fillers = [way._replace(name=mode) for mode, way in reversed(by_mode.items())]
        return {name: {way.name: partial(infilling.evaluate, config, models, texts, way) for way in fillers}}
    from hildanext.evaluate import harness

    assert models.lm.block_size is not None
    bounds = options.block_sizes or [config.decode.block_size or models.lm.block_size]
    return {
        task.task_name: {
            way.name: partial(harness.evaluate, config, models, task, way, block)
            for way, block in harness.ways_of(task, all_ways, bounds, models.lm.gated)
        }
        for task in data
    }


def open_models(config: Config, base_name: str | None) -> tuple[Models, dict[str, Any]]:
    """The models and their description for the report. Raises UsageError for a model that is not converted."""
    loaded = load_with_base(config.model, base_name)
    lm, policy = loaded.lm, loaded.policy
    engine = TransformersEngine(config, {}, lm)
    about = {
        "model": config.model.base,
        "base": loaded.base_config.base,
        "convention": lm.convention,
        "block_size": loaded.block_size,
        "tokens_trained": lm.record["tokens_trained"],
        "schedule": lm.record.get("schedule"),
        "dtype": str(policy.compute).removeprefix("torch."),
        "hardware": hardware(policy.device),
        "weights": fingerprint_weights(config.model),
        "runtime": engine.runtime.name,
        "slots": engine.slots,
        "seed": config.evaluate.seed,
        "evaluate": config.evaluate.model_dump(mode="json", exclude={"data"}),
        "decode": config.decode.model_dump(mode="json"),
        "versions": versions(),
        "git": git_revision(),
    }
    return Models(lm, engine, loaded.base), about


def _data_files(config: Config, tasks: list[str]) -> dict[str, dict[str, str] | None]:
    """Path and SHA-256 of each task's configured data file; None if the task uses its default data."""
    given = {name: config.evaluate.data.get(name) for name in (*tasks, "gsm8k_shots")}
    return {name: {"path": path, "sha256": sha256_of(Path(path))} if path else None for name, path in given.items()}


def evaluate(
    config: Config,
    tasks: list[str],
    data: list[str],
    base_name: str | None,
    out: Path,
    *,
    allow_code: bool,
    resume: bool = False,
) -> dict[str, Any]:
    """Run the tasks in every way; rewrite the report in `out` after each run, and return it.

    resume: keep the results already in `out`, also those of other tasks. Models, settings and data files must match.
    """
    tasks = list(dict.fromkeys(tasks))
    config = with_data(config, data, tasks)
    inputs = open_inputs(config, tasks, allow_code)
    models, about = open_models(config, base_name)
    about["data"] = _data_files(config, tasks)
    about["ways"] = {way.name: way.settings and way.settings.as_dict() | {"stop": []} for way in ways(config, models)}
    try:
        done = read_results(about, out) if resume else {}
        planned = [runs(config, models, name, inputs[name]) for name in tasks]  # may fail: before the first run
        for by_task in planned:
            for name, by_way in by_task.items():
                outcomes = done.setdefault(name, [])
                for way, run in by_way.items():
                    if way not in [outcome.way for outcome in outcomes]:
                        outcomes.append(run())
                        write_report(about, done, out)
                say(f"{name}: done; report so far in {out / 'report.md'}")
        report = write_report(about, done, out)
    finally:
        models.engine.close()
    draw(done, out / "report.png")
    return report | {"out": str(out), "stdout": markdown(about, done)}
