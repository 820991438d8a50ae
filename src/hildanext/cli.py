"""The command line. Heavy imports live inside the commands, so that `--help` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong use. Progress and notes go to stderr; stdout carries the result only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from hildanext import __version__
from hildanext.errors import HildaError, UsageError

Result = dict[str, Any]
LESS_MEMORY = "Lower train.micro_batch or data.seq_len, or set train.gradient_checkpointing (training); shorten the prompt (decoding)."


def _config(args: argparse.Namespace, base: str | None = None) -> Any:
    from hildanext.config import load_config

    overrides = list(args.set)
    if args.model is not None:
        overrides.append(f"model.base={json.dumps(args.model)}")
    return load_config(args.config, overrides, base)


def _to_decode(args: argparse.Namespace) -> Any:
    """The configuration of a command that needs a converted model, and has one where none is named."""
    from hildanext.config import SHIPPED_MODEL

    return _config(args, SHIPPED_MODEL)


def _init(args: argparse.Namespace) -> Result:
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
            raise UsageError(f"no preset '{args.preset}'; there are: {known}")
        raw = json.loads(source.read_text(encoding="utf-8"))
    write_json(beside, schema())
    write_json(target, {"$schema": f"./{beside.name}"} | raw)
    return {"config": str(target), "schema": str(beside)}


def _prepare_data(args: argparse.Namespace) -> Result:
    from hildanext.data.prepare import prepare_data, summary

    config = _config(args)
    if any(source.kind == "self" for source in config.data.sources):
        from hildanext.model.self_answers import write_answers  # loads torch, which other sources do without

        write_answers(config)
    manifest = prepare_data(config)
    return manifest | {"stdout": summary(manifest)}


def _tokenize(args: argparse.Namespace) -> Result:
    from hildanext.data import verify
    from hildanext.data.tokenize import summary, tokenize_data
    from hildanext.model.pretrained import load_tokenizer

    config = _config(args)
    if args.verify:
        found = verify.verify_data(config, load_tokenizer(config.model))
        return found | {"stdout": verify.summary(found)}
    manifest = tokenize_data(config, load_tokenizer(config.model))
    return manifest | {"stdout": summary(manifest)}


def _convert_wsd(args: argparse.Namespace) -> Result:
    from hildanext.training.convert import convert_wsd

    return convert_wsd(_config(args), args.run, args.resume)


def _sft(args: argparse.Namespace) -> Result:
    from hildanext.training.convert import sft

    return sft(_config(args), args.run, args.resume)


def _dpo(args: argparse.Namespace) -> Result:
    from hildanext.training.dpo import dpo

    return dpo(_config(args), args.run, args.resume)


def _preflight(args: argparse.Namespace) -> Result:
    from hildanext.training.preflight import preflight

    return preflight(_config(args), args.command_for, args.card, args.memory, args.measure)


def _merge_topk(args: argparse.Namespace) -> Result:
    from hildanext.training.convert import evaluate_checkpoint
    from hildanext.training.merge import best_checkpoints, merge
    from hildanext.training.run_folder import run_path

    config = _config(args)
    run = run_path(config, args.run)
    folders = [Path(folder) for folder in args.checkpoints] or best_checkpoints(run, args.k)
    out = Path(args.out) if args.out else run / "merged"
    result = merge(folders, out, rank=args.rank, half=args.half, full=config.model if args.full else None)
    return result | evaluate_checkpoint(config, Path(result["out"]), args.split)


def _generate(args: argparse.Namespace) -> Result:
    from hildanext.terminal.generate import generate

    config = _to_decode(args)
    return generate(config, args.prompt, raw=args.raw, trace=args.trace, live=not args.json, picture=args.picture)


def _chat(args: argparse.Namespace) -> Result:
    if args.json:
        raise UsageError("a conversation is not one JSON object; use 'generate --json', or /save FILE.json in the chat")
    from hildanext.terminal.chat import chat

    chat(_to_decode(args), args.system)
    return {}


def _benchmark(args: argparse.Namespace) -> Result:
    from hildanext.evaluate.benchmark import benchmark

    return benchmark(_config(args), args.base, Path(args.out))


def _calibrate(args: argparse.Namespace) -> Result:
    from hildanext.evaluate.calibrate import calibrate

    return calibrate(_config(args), args.prompts, args.base, Path(args.out))


def _evaluate(args: argparse.Namespace) -> Result:
    from hildanext.evaluate.command import evaluate

    if args.limit is not None:
        args.set.append(f"evaluate.limit={args.limit}")
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise UsageError("--tasks is empty; give humaneval, gsm8k, stories, infilling or tasks of lm-eval")
    return evaluate(
        _config(args),
        tasks,
        args.data,
        args.base,
        Path(args.out),
        allow_code=args.allow_code_execution,
        resume=args.resume,
    )


def _serve(args: argparse.Namespace) -> Result:
    from hildanext.server import serve

    return serve(_to_decode(args))


def _smoke_test(args: argparse.Namespace) -> Result:
    from hildanext.smoke import smoke_test

    return smoke_test(_config(args) if args.model is not None else None)


def _demo(args: argparse.Namespace) -> Result:
    from hildanext.demo import demo

    return demo(args.config, list(args.set))


Add = Callable[[str, Callable[[argparse.Namespace], Result], str], argparse.ArgumentParser]


def _add_decoding(add: Add) -> None:
    """The commands that decode, and those that run everything."""
    generate = add("generate", _generate, "Complete a prompt with a converted checkpoint.")
    generate.add_argument("prompt", help="the prompt ('-' reads stdin)")
    generate.add_argument(
        "--raw", action="store_true", help="continue the text as it stands, without the chat template"
    )
    generate.add_argument("--trace", metavar="FILE.jsonl", help="write every denoising step")
    generate.add_argument(
        "--picture", metavar="FILE", help="draw every denoising step: .png or .svg in rows, .gif animated"
    )
    chat = add("chat", _chat, "Talk with a converted checkpoint in the terminal.")
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    benchmark = add("benchmark", _benchmark, "Measure a converted checkpoint beside its autoregressive base.")
    benchmark.add_argument("--base", metavar="NAME", help="the base model (default: the one the checkpoint records)")
    benchmark.add_argument(
        "--out", default="runs/benchmark.json", metavar="FILE.json", help="report (default: %(default)s)"
    )
    calibrate = add("calibrate", _calibrate, "Find S_MODE and Q_MODE for a checkpoint and write them into it.")
    calibrate.add_argument(
        "--prompts", metavar="FILE", help="your prompts: .jsonl, or a line of text each (default: held-out text)"
    )
    calibrate.add_argument("--base", metavar="NAME", help="the base model (default: the one the checkpoint records)")
    calibrate.add_argument(
        "--out", default="runs/calibrate", metavar="FOLDER", help="report and picture (default: %(default)s)"
    )
    _add_evaluate(add)
    add("serve", _serve, "Answer over HTTP: /generate, OpenAI's API, /health, /metrics.")
    add("smoke-test", _smoke_test, "One conversion step, one SFT step and one generation; prints OK.")
    add("demo", _demo, "The whole way on synthetic stories, offline, in minutes.")


def _add_evaluate(add: Add) -> None:
    evaluate = add("evaluate", _evaluate, "Quality against speed: AR base, Q_MODE and S_MODE, editing on and off.")
    evaluate.add_argument(
        "--tasks",
        required=True,
        metavar="A,B",
        help="humaneval, gsm8k, stories, infilling; else tasks of lm-eval, or YAML files of such tasks",
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    evaluate.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE", help="data file of a task; repeatable"
    )
    evaluate.add_argument("--base", metavar="NAME", help="the base model (default: the one the checkpoint records)")
    evaluate.add_argument(
        "--out", default="runs/evaluate", metavar="FOLDER", help="report and samples (default: %(default)s)"
    )
    evaluate.add_argument(
        "--resume", action="store_true", help="take over what an interrupted evaluation left in --out"
    )
    evaluate.add_argument(
        "--allow-code-execution", action="store_true", help="let humaneval run what the model wrote, in a sandbox"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hildanext", description="Autoregressive language models in, editable block-diffusion language models out."
    )
    parser.add_argument("--version", action="version", version=f"hildanext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", metavar="FILE.json", help="configuration file (default: the built-in defaults)")
    shared.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; repeatable"
    )
    shared.add_argument("--model", metavar="NAME", help="short for --set model.base=NAME")
    shared.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    def add(name: str, call: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[shared], help=text, description=text)
        command.set_defaults(call=call)
        return command

    init = add("init", _init, "Write a configuration file and its JSON Schema.")
    init.add_argument("path", nargs="?", default="hildanext.json", help="file to write (default: hildanext.json)")
    init.add_argument("--preset", metavar="NAME", help="start from a ready-made configuration (configs/NAME.json)")
    init.add_argument("--force", action="store_true", help="overwrite the file")
    add("prepare-data", _prepare_data, "Read the sources into data/processed, training and held-out documents apart.")
    tokenize = add("tokenize", _tokenize, "Pack documents into rows of tokens in data/tokenized.")
    tokenize.add_argument(
        "--verify", action="store_true", help="check every shard's checksum; make damaged ones again, alone"
    )
    convert = add(
        "convert-wsd", _convert_wsd, "Convert an autoregressive model by continued pre-training on the WSD schedule."
    )
    tune = add("sft", _sft, "Fine-tune a converted checkpoint on instructions.")
    prefer = add("dpo", _dpo, "Tune a converted checkpoint on preference pairs.")
    merge = add("merge-topk", _merge_topk, "Average the best checkpoints of a run, or the given folders.")
    for command, run in ((convert, "convert"), (tune, "sft"), (prefer, "dpo"), (merge, "convert")):
        command.add_argument("--run", default=run, metavar="NAME", help=f"name of the run's folder (default: {run})")
    for command in (convert, tune, prefer):
        command.add_argument("--resume", action="store_true", help="continue an interrupted run where it was")
    fits = add(
        "preflight", _preflight, "Predict the peak memory of a training step; say what to change to make it fit."
    )
    fits.add_argument(
        "--for", dest="command_for", choices=["convert-wsd", "sft", "dpo"], default="convert-wsd", help="which training"
    )
    fits.add_argument("--card", metavar="sm_XY", help="a GPU that is not here, by its compute capability (sm_61)")
    fits.add_argument("--memory", type=float, metavar="GB", help="memory to fit into (default: what is here)")
    fits.add_argument("--measure", action="store_true", help="also run three steps on random weights and measure them")
    merge.add_argument("checkpoints", nargs="*", metavar="FOLDER", help="checkpoint folders (default: the run's best)")
    merge.add_argument("--k", type=int, default=3, help="how many of the run's best (default: 3)")
    merge.add_argument("--out", metavar="FOLDER", help="result (default: RUN/merged)")
    merge.add_argument(
        "--full", action="store_true", help="adapters: add their mean to the base and write whole weights"
    )
    merge.add_argument("--rank", type=int, help="adapters: cut the mean to this rank (default: all of it)")
    merge.add_argument("--half", action="store_true", help="adapters: store the mean in float16, half the size")
    merge.add_argument(
        "--split", choices=["eval", "sft_eval"], default="eval", help="held-out rows that judge the result"
    )
    _add_decoding(add)
    return parser


def _show(result: Result) -> None:
    """A result for people: the printed text if it has one, else a line a key."""
    if "stdout" in result:
        print(result["stdout"])
        return
    for key, value in result.items():
        print(f"{key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value}")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    args = build_parser().parse_args(argv)
    # Kept quiet for people: weights load in a blink here, and progress has its own place.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Of several processes (torchrun, accelerate launch) the first one speaks; an error of any of them is heard.
    if os.environ.get("RANK", "0") == "0":
        return _run(args, sys.stderr)
    errors = sys.stderr
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return _run(args, errors)


def _run(args: argparse.Namespace, errors: TextIO) -> int:
    def complain(line: object) -> None:
        # One write: lines of several unbuffered processes must not run into each other.
        errors.write(f"hildanext {args.command}: {line}\n")

    try:
        result = args.call(args)
    except HildaError as error:
        complain(error)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        complain((f"{error.filename}: " if error.filename else "") + (error.strerror or str(error)))
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; it is not imported for this
            raise
        complain(f"out of GPU memory: {str(error).splitlines()[0]} {LESS_MEMORY}")
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    if args.json:
        print(json.dumps({key: value for key, value in result.items() if key != "stdout"}, ensure_ascii=False))
    else:
        _show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
