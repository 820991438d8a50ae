"""What each command does: `cli.py` calls these functions with the parsed arguments and prints what they return.

Heavy imports are inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hildanext.errors import UsageError

Result = dict[str, Any]


def _config(args: argparse.Namespace, base: str | None = None) -> Any:
    from hildanext.config import load_config

    overrides = list(args.set)
    if args.model is not None:
        overrides.append(f"model.base={json.dumps(args.model)}")
    return load_config(args.config, overrides, base)


def _to_decode(args: argparse.Namespace) -> Any:
    """Load the configuration of a command that needs a converted model; the default is the shipped model."""
    from hildanext.config import SHIPPED_MODEL

    return _config(args, SHIPPED_MODEL)


def init(args: argparse.Namespace) -> Result:
    from hildanext.config import Config, schema
    from hildanext.files import write_json

    ready = Path(__file__).parent / "configs"
    target, beside = Path(args.path), Path(args.path).with_name("hildanext.schema.json")
    if target.exists() and not args.force:
        raise UsageError(f"{target} exists; choose another path or use --force")
    if args.preset is None:
        raw = Config().model_dump(mode="json")
    else:
        source = ready / f"{args.preset}.json"
        if not source.is_file():
            known = ", ".join(sorted(path.stem for path in ready.glob("*.json")))
            raise UsageError(f"no preset '{args.preset}'; available: {known}")
        raw = json.loads(source.read_text(encoding="utf-8"))
    write_json(beside, schema())
    write_json(target, {"$schema": f"./{beside.name}"} | raw)
    return {"config": str(target), "schema": str(beside)}


def prepare_data(args: argparse.Namespace) -> Result:
    from hildanext.data.prepare import prepare_data, summary

    config = _config(args)
    if any(source.kind == "self" for source in config.data.sources):
        from hildanext.model.self_answers import write_answers  # imports torch, which the other sources do not need

        write_answers(config)
    manifest = prepare_data(config)
    return manifest | {"stdout": summary(manifest)}


def tokenize(args: argparse.Namespace) -> Result:
    from hildanext.data import verify
    from hildanext.data.tokenize import summary, tokenize_data
    from hildanext.model.pretrained import load_tokenizer

    config = _config(args)
    if args.verify:
        found = verify.verify_data(config, load_tokenizer(config.model))
        return found | {"stdout": verify.summary(found)}
    manifest = tokenize_data(config, load_tokenizer(config.model))
    return manifest | {"stdout": summary(manifest)}


def convert_wsd(args: argparse.Namespace) -> Result:
    from hildanext.training.convert import convert_wsd

    return convert_wsd(_config(args), args.run, args.resume)


def sft(args: argparse.Namespace) -> Result:
    from hildanext.training.convert import sft

    return sft(_config(args), args.run, args.resume)


def dpo(args: argparse.Namespace) -> Result:
    from hildanext.training.dpo import dpo

    return dpo(_config(args), args.run, args.resume)


def preflight(args: argparse.Namespace) -> Result:
    from hildanext.training.preflight import preflight

    return preflight(_config(args), args.command_for, args.card, args.memory, args.measure)


def merge_topk(args: argparse.Namespace) -> Result:
    from hildanext.training.convert import evaluate_checkpoint
    from hildanext.training.merge import best_checkpoints, merge
    from hildanext.training.run_folder import run_path

    config = _config(args)
    run = run_path(config, args.run)
    folders = [Path(folder) for folder in args.checkpoints] or best_checkpoints(run, args.k)
    out = Path(args.out) if args.out else run / "merged"
    result = merge(folders, out, rank=args.rank, half=args.half, full=config.model if args.full else None)
    return result | evaluate_checkpoint(config, Path(result["out"]), args.split)


def generate(args: argparse.Namespace) -> Result:
    from hildanext.terminal.generate import generate

    config = _to_decode(args)
    return generate(config, args.prompt, raw=args.raw, trace=args.trace, live=not args.json, picture=args.picture)


def chat(args: argparse.Namespace) -> Result:
    if args.json:
        raise UsageError("chat does not support --json; use 'generate --json', or /save FILE.json in the chat")
    from hildanext.terminal.chat import chat

    chat(_to_decode(args), args.system)
    return {}


def benchmark(args: argparse.Namespace) -> Result:
    from hildanext.evaluate.benchmark import benchmark

    return benchmark(_config(args), args.base, Path(args.out))


def calibrate(args: argparse.Namespace) -> Result:
    from hildanext.evaluate.calibrate import calibrate

    return calibrate(_config(args), args.prompts, args.base, Path(args.out))


def evaluate(args: argparse.Namespace) -> Result:
    from hildanext.evaluate.command import evaluate

    if args.limit is not None:
        args.set.append(f"evaluate.limit={args.limit}")
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise UsageError("--tasks is empty; give humaneval, gsm8k, stories, infilling or lm-eval tasks")
    return evaluate(
        _config(args),
        tasks,
        args.data,
        args.base,
        Path(args.out),
        allow_code=args.allow_code_execution,
        resume=args.resume,
    )


def serve(args: argparse.Namespace) -> Result:
    from hildanext.server.command import serve

    return serve(_to_decode(args))


def export(args: argparse.Namespace) -> Result:
    from hildanext.export.command import export

    return export(
        Path(args.checkpoint),
        args.to,
        Path(args.out) if args.out else None,
        licence=args.licence,
        reports=[Path(report) for report in args.report],
        repository=args.push,
        dry_run=args.dry_run,
    )


def smoke_test(args: argparse.Namespace) -> Result:
    from hildanext.smoke import smoke_test

    return smoke_test(_config(args) if args.model is not None else None)


def demo(args: argparse.Namespace) -> Result:
    from hildanext.demo import demo

    return demo(args.config, list(args.set))
