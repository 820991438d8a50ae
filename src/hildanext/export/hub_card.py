"""A folder for the Hugging Face hub: the checkpoint, and a card made of the run's own records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from hildanext.config import ModelConfig
from hildanext.config.model import is_hub_name
from hildanext.errors import HildaError, ModelError, UsageError
from hildanext.export.source import Checkpoint, copy_files, other_files, require_space
from hildanext.files import atomic_open, new_folder, write_json
from hildanext.model.pretrained import base_of, find_file, fingerprint_weights

LAST_EVALUATION = ("eval_loss", "eval_accuracy")
SOURCE_KEYS = ("kind", "path", "weight")  # of a source of data, for the card


class Run(NamedTuple):
    """The records of the run that wrote a checkpoint."""

    folder: Path
    record: dict[str, Any]  # config.json of the run
    metrics: list[dict[str, Any]]


def export_hub_card(
    checkpoint: Checkpoint, out: Path, licence: str | None = None, reports: list[Path] | None = None
) -> dict[str, Any]:
    """Write the new folder `out` atomically: the checkpoint without its training state, and README.md.

    licence: its identifier on the hub; None reads it from the base's README. reports: folders of `hildanext evaluate`.
    Raises UsageError for a report about other weights, WriteError if there is no room.
    """
    indices = sorted(checkpoint.folder.glob("*.index.json"))
    files = [*checkpoint.weight_files(), *indices, *other_files(checkpoint, ("README.md", "config.json"))]
    measured = [_report(checkpoint, path) for path in reports or []]
    run = find_run(checkpoint.folder)
    text = card(checkpoint, run, licence or base_licence(checkpoint), measured)
    require_space(out, sum(path.stat().st_size for path in files))
    with new_folder(out) as folder:
        copy_files(files, checkpoint.folder, folder)
        write_json(folder / "config.json", _without_paths(checkpoint.config))
        if run is not None:
            write_json(folder / "training.json", _without_paths(run.record))
        with atomic_open(folder / "README.md") as file:
            file.write(text)
    return {"out": str(out), "files": listed(out)}


def listed(folder: Path) -> dict[str, int]:
    """Size in bytes of each file of a folder, by its path in the folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def push(folder: Path, repository: str, api: HfApi | None = None) -> str:
    """Upload a folder to a repository on the hub, which is created, private, if it does not exist. Returns its URL.

    Raises HildaError, in one line, if the hub refuses or cannot be reached.
    """
    api = api or HfApi()
    try:
        created = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from HildaNext")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, httpx2.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HildaError(
            f"--push {repository}: {reason}; the folder {folder} is complete and can be pushed again"
        ) from None
    return str(created)


def find_run(checkpoint: Path) -> Run | None:
    """The run in whose folder a checkpoint lies (RUN/checkpoints/step-N or RUN/merged), None if it lies elsewhere."""
    for folder in list(checkpoint.resolve().parents)[:2]:
        record, metrics = folder / "config.json", folder / "metrics.jsonl"
        if record.is_file() and metrics.is_file():
            stored = json.loads(record.read_text(encoding="utf-8"))
            if "command" in stored:
                rows = [
                    json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")
                ]
                return Run(folder, stored, rows)
    return None


def base_licence(checkpoint: Checkpoint) -> str | None:
    """The licence that the README of the base names; None if it names none or there is no base."""
    try:
        readme = find_file(base_of(ModelConfig(base=str(checkpoint.folder)), checkpoint.record), "README.md")
    except (UsageError, ModelError):
        return None
    lines = readme.read_text(encoding="utf-8").splitlines() if readme else []
    head = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    return next((line.partition(":")[2].strip() for line in head if line.startswith("license:")), None)


def _report(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """report.json of an evaluation. Raises UsageError if it is not there or is about other weights."""
    path = folder / "report.json"
    if not path.is_file():
        raise UsageError(f"--report {folder}: no report.json; give the --out folder of 'hildanext evaluate'")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if report.get("weights") != fingerprint_weights(ModelConfig(base=str(checkpoint.folder))):
        raise UsageError(
            f"--report {folder}: is about other weights ('{report.get('model')}'); evaluate this checkpoint"
        )
    return report


def card(checkpoint: Checkpoint, run: Run | None, licence: str | None, reports: list[dict[str, Any]]) -> str:
    """README.md: what the records say, and nothing that they do not say."""
    record, config = checkpoint.record, checkpoint.config
    base, is_public = checkpoint.base, is_hub_name(str(record["base_model"]))
    lines = [
        "---",
        *([f"license: {licence}"] if licence else []),
        *([f"base_model: {base}"] if is_public else []),
        "library_name: hildanext",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {base}, block diffusion",
        "",
        f"A {checkpoint.architecture} that fills and edits blocks of {config['block_size']} tokens, made from "
        f"{base} by HildaNext {record['version']}.",
        "",
        f"- **Licence:** {licence or 'not recorded; that of the base applies'}",
        f"- **Base:** {base}" + (f", revision {record['base_revision']}" if record.get("base_revision") else ""),
        f"- **Convention:** {record['convention']}. **Tokens trained:** {record['tokens_trained']:,}",
        *_data(run),
        "",
        "## Measured",
        "",
        *_measured(checkpoint, run, reports),
        "",
        "## Make it again",
        "",
        *_reproduction(run),
        "",
        "## Use it",
        "",
        "```",
        'hildanext generate "Hello" --model FOLDER',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _name(base: str) -> str:
    """The name of a model; of a local folder the last part only."""
    return Path(base).name if Path(base).exists() else base


def _data(run: Run | None) -> list[str]:
    sources = run.record["config"]["data"]["sources"] if run is not None else []
    described = []
    for source in sources:
        shown = {key: source[key] for key in SOURCE_KEYS if source.get(key) is not None}
        if "path" in shown:
            shown["path"] = _name(str(shown["path"]))
        described.append(", ".join(f"{key} {value}" for key, value in shown.items()))
    return [f"- **Data:** {'; '.join(described) or 'not recorded'}"]


def _measured(checkpoint: Checkpoint, run: Run | None, reports: list[dict[str, Any]]) -> list[str]:
    step = checkpoint.folder.name.removeprefix("step-")
    rows = [row for row in (run.metrics if run else []) if "eval_loss" in row and str(row["step"]) == step]
    lines = [
        f"Step {row['step']}: " + ", ".join(f"{key} {row[key]:.4f}" for key in LAST_EVALUATION if key in row)
        for row in rows
    ]
    for report in reports:
        lines += ["", f"{report['dtype']}, runtime {report['runtime']}, on {report['hardware']}:", ""]
        lines += ["| task | way | figure | value | items |", "|---|---|---|---|---|"]
        for task, ways in report["tasks"].items():
            for way, figures in ways.items():
                lines += [
                    f"| {task} | {way} | {name} | {figure['value']:.4g}{_interval(figure)} | {figure['n']} |"
                    for name, figure in figures.items()
                    if figure["value"] is not None
                ]
    return lines or ["Nothing is recorded."]


def _interval(figure: dict[str, Any]) -> str:
    return "" if figure["low"] is None or figure["high"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"


def _reproduction(run: Run | None) -> list[str]:
    if run is None:
        return ["The run's records were not beside the checkpoint."]
    command, versions = run.record["command"], run.record["versions"]
    return [
        "`training.json` has the whole configuration. Seed "
        f"{run.record['seed']}, source {run.record['git'] or 'not from a checkout'}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "```",
        "python -c \"import json; json.dump(json.load(open('training.json'))['config'], open('hildanext.json', 'w'))\"",
        "hildanext prepare-data --config hildanext.json",
        "hildanext tokenize --config hildanext.json",
        f"hildanext {command} --config hildanext.json --run {run.folder.name}",
        "```",
    ]


def _without_paths(value: Any) -> Any:
    """A record without the folders of the machine that wrote it: of an absolute path the last part is kept."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") and Path(value).exists() else value
