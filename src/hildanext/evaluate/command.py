"""The `evaluate` command: tasks times ways, one report."""

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
from hildanext.evaluate.report import OURS, draw, hardware, markdown, take_over, write_report
from hildanext.evaluate.sandbox import require_sandbox
from hildanext.evaluate.ways import Models, Outcome, ways
from hildanext.files import sha256_of
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import base_of, fingerprint_weights, load_causal_lm
from hildanext.progress import say
from hildanext.provenance import git_revision, versions

Run = Callable[[], Outcome]


def with_data(config: Config, given: list[str], tasks: list[str]) -> Config:
    """The configuration with `--data KEY=FILE` items. Raises UsageError for one that no task would read."""
    data = dict(config.evaluate.data)
    for item in given:
        key, equals, path = item.partition("=")
        if not equals or not path:
            raise UsageError(f"--data {item}: expected TASK=FILE")
        if key not in (*tasks, "gsm8k_shots"):
            raise UsageError(f"--data {item}: no task '{key}' among --tasks {','.join(tasks)}")
        data[key] = path
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"data": data})})


def materials(config: Config, tasks: list[str], allow_code: bool) -> dict[str, Any]:
    """What each task reads, found before any weights are: a wrong name or a missing file costs no time."""
    found: dict[str, Any] = {}
    for name in tasks:
        if name == humaneval.NAME:
            if not allow_code:
                raise UsageError(
                    "the task 'humaneval' runs code that a model wrote; allow it with --allow-code-execution"
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
            f"the task '{name}' is not one of {', '.join(OURS)}; others need lm-eval ({error.name} is missing): "
            'pip install "hildanext[eval]"'
        ) from None
    return open_tasks(name, data)


def runs(config: Config, models: Models, name: str, material: Any) -> dict[str, dict[str, Run]]:
    """The runs of a task, by way, by the name it is reported under (a group of lm-eval's has several)."""
    how, everyone = config.evaluate, ways(config, models)
    tokenizer = models.lm.tokenizer
    if name == humaneval.NAME:
        return {name: {way.name: partial(humaneval.evaluate, config, models, material, way) for way in everyone}}
    if name == gsm8k.NAME:
        if how.chat and tokenizer.chat_template is None:
            raise UsageError(
                f"the task 'gsm8k': '{config.model.base}' has no chat template; set evaluate.chat=false for plain prompts"
            )
        return {name: {way.name: partial(gsm8k.evaluate, config, models, material, way) for way in everyone}}
    if name == stories.NAME:
        prompts = [ids[:-1] for ids in token_pieces(material, tokenizer, how.prompt_tokens + 1, how.limit)]
        return {name: {way.name: partial(stories.evaluate, config, models, prompts, way) for way in everyone}}
    if name == infilling.NAME:
        texts = token_pieces(material, tokenizer, how.infill_tokens, how.limit)
        # Blocks play no part in it: one size is enough.
        sizes = {way.name.partition("/")[0]: way for way in reversed(everyone)}
        fillers = [way._replace(name=short) for short, way in reversed(sizes.items())]
        return {name: {way.name: partial(infilling.evaluate, config, models, texts, way) for way in fillers}}
    from hildanext.evaluate import harness

    assert models.lm.block_size is not None
    bounds = how.block_sizes or [config.decode.block_size or models.lm.block_size]
    return {
        task.task_name: {
            way.name: partial(harness.evaluate, config, models, task, way, block)
            for way, block in harness.ways_of(task, everyone, bounds)
        }
        for task in material
    }


def open_models(config: Config, base_name: str | None) -> tuple[Models, dict[str, Any]]:
    """The models, and what a report says of them. Raises UsageError for a model that is not converted."""
    lm, policy = load_diffusion_lm(config.model)
    if lm.block_size is None:
        raise UsageError(f"'{config.model.base}' is not a converted checkpoint; run 'hildanext convert-wsd' first")
    base_config = base_of(config.model, lm.record, base_name)
    base = load_causal_lm(base_config, policy, policy.compute)[0].eval()
    engine = TransformersEngine(config, {}, lm)
    about = {
        "model": config.model.base,
        "base": base_config.base,
        "convention": lm.convention,
        "block_size": lm.block_size,
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
    return Models(lm, engine, base), about


def _data_files(config: Config, tasks: list[str]) -> dict[str, dict[str, str] | None]:
    """What each task was given to read. None: its own data."""
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
    """Run the tasks in every way; write the report into `out` after each of them, and return it.

    resume: what stands in `out` already is taken over, tasks that are not named among them, if it is of the same models,
    settings and data.
    """
    tasks = list(dict.fromkeys(tasks))
    config = with_data(config, data, tasks)
    found = materials(config, tasks, allow_code)
    models, about = open_models(config, base_name)
    about["data"] = _data_files(config, tasks)
    about["ways"] = {way.name: way.settings and way.settings._asdict() | {"stop": []} for way in ways(config, models)}
    try:
        done = take_over(about, out) if resume else {}
        planned = {name: runs(config, models, name, found[name]) for name in tasks}
        for several in planned.values():
            for name, by_way in several.items():
                kept = done.setdefault(name, [])
                for way, run in by_way.items():
                    if way not in [outcome.way for outcome in kept]:
                        kept.append(run())
                        write_report(about, done, out)
                say(f"{name}: done; report so far in {out / 'report.md'}")
        report = write_report(about, done, out)
    finally:
        models.engine.close()
    draw(done, out / "report.png")
    return report | {"out": str(out), "stdout": markdown(about, done)}
