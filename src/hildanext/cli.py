"""The command line: its options, its exit codes, its errors.

Exit codes: 0 done, 1 failed, 2 wrong use. Progress and notes go to stderr, only the result goes to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from hildanext import __version__, commands, environment
from hildanext.commands import Result
from hildanext.errors import HildaError, UsageError

LESS_MEMORY = "Lower train.micro_batch or data.seq_len, set train.gradient_checkpointing, or shorten the prompt."
DESCRIPTION = "Convert an autoregressive language model into an editable block-diffusion model, tune it and run it."
ORDER = """\
The usual order:
  init                      write a configuration file
  prepare-data, tokenize    read the sources, pack them into rows of tokens
  preflight                 check that the training fits into memory
  convert-wsd, merge-topk   convert the model, average the best checkpoints
  sft, dpo                  fine-tune it on instructions, then on preference pairs (optional)
  calibrate                 choose its decoding thresholds (optional)
  benchmark, evaluate       measure speed and quality against the base model
  generate, chat, serve     use it
  export                    give it to SGLang, LMDeploy, diffusers or the hub

'generate', 'chat' and 'serve' use a small converted model that comes with the package if none is named.
'demo' runs all main steps on a tiny model, offline, in minutes."""


Call = Callable[[argparse.Namespace], Result]
Add = Callable[[str, Call, str], argparse.ArgumentParser]


def _add_preparing(add: Add) -> None:
    init = add("init", commands.init, "Write a configuration file and its JSON Schema.")
    init.add_argument("path", nargs="?", default="hildanext.json", help="file to write (default: %(default)s)")
    init.add_argument(
        "--preset", metavar="NAME", help="start from a configuration that comes with the package (configs/NAME.json)"
    )
    init.add_argument("--force", action="store_true", help="overwrite an existing file")
    text = "Read the data sources and write training and held-out documents to data/processed."
    add("prepare-data", commands.prepare_data, text)
    tokenize = add(
        "tokenize", commands.tokenize, "Tokenize the documents and pack them into rows of tokens in data/tokenized."
    )
    tokenize.add_argument(
        "--verify", action="store_true", help="check the checksum of every shard and rebuild only damaged shards"
    )


def _add_training(add: Add) -> None:
    text = "Predict the peak memory of a training step, and suggest changes if it does not fit."
    fits = add("preflight", commands.preflight, text)
    fits.add_argument(
        "--for",
        dest="command_for",
        choices=["convert-wsd", "sft", "dpo"],
        default="convert-wsd",
        help="training command to predict (default: %(default)s)",
    )
    fits.add_argument(
        "--card", metavar="sm_XY", help="predict for another GPU, given by its compute capability, for example sm_61"
    )
    fits.add_argument("--memory", type=float, metavar="GB", help="available memory (default: that of this machine)")
    fits.add_argument("--measure", action="store_true", help="also measure three steps with random weights")
    text = "Convert an autoregressive model by continued pre-training with the WSD schedule."
    convert = add("convert-wsd", commands.convert_wsd, text)
    text = "Average the best checkpoints of a run, or the given checkpoints, into one model."
    merge = add("merge-topk", commands.merge_topk, text)
    tune = add("sft", commands.sft, "Fine-tune a converted model on instructions.")
    prefer = add("dpo", commands.dpo, "Fine-tune a converted model on preference pairs (DPO).")
    for command, run in ((convert, "convert"), (tune, "sft"), (prefer, "dpo"), (merge, "convert")):
        text = f"name of the run, a folder in paths.runs (default: {run})"
        command.add_argument("--run", default=run, metavar="NAME", help=text)
    for command in (convert, tune, prefer):
        text = "continue an interrupted run from its last checkpoint"
        command.add_argument("--resume", action="store_true", help=text)
    text = "checkpoint folders to average (default: the run's best)"
    merge.add_argument("checkpoints", nargs="*", metavar="FOLDER", help=text)
    merge.add_argument("--k", type=int, default=3, help="number of the run's best checkpoints (default: %(default)s)")
    merge.add_argument("--out", metavar="FOLDER", help="folder for the result (default: RUN/merged)")
    text = "adapters: add their mean to the base and save complete weights"
    merge.add_argument("--full", action="store_true", help=text)
    merge.add_argument("--rank", type=int, help="adapters: reduce the mean to this rank (default: full rank)")
    merge.add_argument("--half", action="store_true", help="adapters: save the mean in float16, at half the size")
    text = "held-out rows to evaluate the result on (default: %(default)s)"
    merge.add_argument("--split", choices=["eval", "sft_eval"], default="eval", help=text)


def _add_measuring(add: Add) -> None:
    text = "Find the S_MODE and Q_MODE thresholds of a converted model and write them into its checkpoint."
    calibrate = add("calibrate", commands.calibrate, text)
    calibrate.add_argument(
        "--prompts", metavar="FILE", help="file of prompts: .jsonl, or one prompt per line (default: held-out text)"
    )
    text = "Compare speed and likelihood of a converted model with its autoregressive base."
    benchmark = add("benchmark", commands.benchmark, text)
    text = "Measure task quality and speed of the AR base, Q_MODE and S_MODE, with and without editing."
    evaluate = add("evaluate", commands.evaluate, text)
    evaluate.add_argument(
        "--tasks",
        required=True,
        metavar="A,B",
        help="comma-separated: humaneval, gsm8k, stories, infilling, names of lm-eval tasks, YAML files of such tasks",
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="number of items per task (default: all)")
    evaluate.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE", help="data file of a task; may be repeated"
    )
    evaluate.add_argument(
        "--resume", action="store_true", help="continue an interrupted evaluation from the samples in --out"
    )
    evaluate.add_argument(
        "--allow-code-execution", action="store_true", help="humaneval: run code written by the model, in a sandbox"
    )
    for command, kind, out, what in (
        (calibrate, "FOLDER", "runs/calibrate", "folder for the report and its plot"),
        (benchmark, "FILE.json", "runs/benchmark.json", "report file"),
        (evaluate, "FOLDER", "runs/evaluate", "folder for the report and samples"),
    ):
        command.add_argument("--base", metavar="NAME", help="base model (default: the one recorded in the checkpoint)")
        command.add_argument("--out", default=out, metavar=kind, help=f"{what} (default: %(default)s)")


def _add_using(add: Add) -> None:
    generate = add("generate", commands.generate, "Complete a prompt with a converted model.")
    generate.add_argument("prompt", help="prompt text; '-' reads it from stdin")
    generate.add_argument("--raw", action="store_true", help="continue the text without the chat template")
    generate.add_argument("--trace", metavar="FILE.jsonl", help="write every denoising pass as one JSON line")
    generate.add_argument(
        "--picture", metavar="FILE", help="draw every denoising pass: as rows (.png, .svg) or as an animation (.gif)"
    )
    chat = add("chat", commands.chat, "Chat with a converted model in the terminal.")
    chat.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    text = "Serve a converted model over HTTP: web page, /generate, OpenAI's API, jobs, /health, /metrics."
    add("serve", commands.serve, text)
    text = "Export a converted checkpoint for SGLang and LMDeploy, for diffusers, or for the Hugging Face hub."
    export = add("export", commands.export, text)
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the converted checkpoint")
    export.add_argument(
        "--to", required=True, choices=["sdar", "diffusers", "hub-card"], help="layout of the new folder"
    )
    export.add_argument("--out", metavar="FOLDER", help="the new folder (default: CHECKPOINT-TO)")
    export.add_argument("--licence", metavar="ID", help="hub-card: the licence (default: the one in the base's README)")
    text = "hub-card: folder of an evaluation of this checkpoint; may be repeated"
    export.add_argument("--report", action="append", default=[], metavar="FOLDER", help=text)
    export.add_argument("--push", metavar="REPOSITORY", help="hub-card: upload the folder to the Hugging Face hub")
    export.add_argument("--dry-run", action="store_true", help="hub-card: show what --push would upload")
    text = "Check the installation: one conversion step, one SFT step and one generation; prints OK."
    add("smoke-test", commands.smoke_test, text)
    add("demo", commands.demo, "Run all main steps on synthetic stories with a tiny model: offline, in minutes.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. `--help` lists the commands in the order in which they are usually run."""
    parser = argparse.ArgumentParser(
        prog="hildanext", description=DESCRIPTION, epilog=ORDER, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"hildanext {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", metavar="FILE.json", help="configuration file (default: the built-in defaults)")
    shared.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one configuration key; may be repeated",
    )
    shared.add_argument("--model", metavar="NAME", help="model to load; short for --set model.base=NAME")
    shared.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    shared.add_argument("--confine", metavar="FILE", help=argparse.SUPPRESS)  # of a job, see `jobs.reach`

    def add(name: str, call: Call, text: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, parents=[shared], help=text, description=text)
        command.set_defaults(call=call)
        return command

    _add_preparing(add)
    _add_training(add)
    _add_measuring(add)
    _add_using(add)
    return parser


def _show(result: Result) -> None:
    """Print a result for reading: its text if it has one, else one line per key."""
    if "stdout" in result:
        print(result["stdout"])
        return
    for key, value in result.items():
        print(f"{key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value}")


def main(argv: list[str] | None = None) -> int:
    """Run a command. Entry point of the console script; returns the exit code."""
    args = build_parser().parse_args(argv)
    environment.prepare()  # before the command imports its libraries
    # With several processes (torchrun, accelerate launch) only rank 0 prints; errors of every rank are printed.
    if os.environ.get("RANK", "0") == "0":
        return _run(args, sys.stderr)
    errors = sys.stderr
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return _run(args, errors)


def _run(args: argparse.Namespace, errors: TextIO) -> int:
    def complain(line: object) -> None:
        # A single write keeps the lines of several processes apart.
        errors.write(f"hildanext {args.command}: {line}\n")

    try:
        if args.confine is not None:
            from hildanext.jobs.reach import confine

            confine(Path(args.confine))
        result = args.call(args)
    except HildaError as error:
        complain(error)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        complain((f"{error.filename}: " if error.filename else "") + (error.strerror or str(error)))
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's class, compared by name to avoid the import
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
