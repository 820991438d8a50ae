"""Compares gated adapters at an equal number of mask rows, one change at a time, on SmolLM2-135M.

    python benchmarks/gated.py                                   # every variant, seed 0
    python benchmarks/gated.py --only base "rank 8" --seeds 0 1 2
    python benchmarks/gated.py --human stories.jsonl             # also the variant that learns from human text
    python benchmarks/gated.py --time                            # times passes with the stored runs' adapters

All variants share prompts, held-out rows and anchors. Training text are the base's greedy answers of the recipe of
hilda-smollm2-135m. Then each decodes 12 unseen prompts x 96 tokens with EXACT in fp32. --time: OpenVINO with int8 weights
times its passes beside those of the base alone, on a machine without other work. Results are stored in
docs/benchmarks/gated.json, a stored run is not repeated, and docs/benchmarks/gated.md is generated from them.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from results import machine, machines_line, spread, stored_runs
from trained_keys import trained_keys

from hildanext.config import Config, ModelConfig, load_config
from hildanext.data.prepare import prepare_data
from hildanext.data.tokenize import tokenize_data
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.runtimes.protocol import GroupRows, pad_batch
from hildanext.files import write_json
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import load_tokenizer
from hildanext.model.self_answers import write_answers
from hildanext.training.convert import sft

RECIPE = Path(__file__).parents[1] / "recipes" / "hilda-smollm2-135m"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "gated"
MASK_ROWS = 150_000
ANCHORS, K, ROWS = 64, 4, 4  # groups in a row, rows in a group, rows a step
FULL, FEW = 25, 8  # rows of a pass: a group behind every draft, and what costs little on a CPU
CONTEXT = 200  # cached tokens while passes are timed
PASSES = 80  # timed of each side

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OUTPUTS = ["o_proj", "down_proj"]
UPPER = [f"layers.{layer}.{part}" for layer in range(15, 30) for part in ("self_attn.o_proj", "mlp.down_proj")]
UPPER_ALL = [
    f"layers.{layer}.{part}"
    for layer in range(15, 30)
    for part in (*(f"self_attn.{name}" for name in ATTENTION), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]
# Name -> changes to "base".
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "attention only": {"lora.targets": ATTENTION},
    "output projections only": {"lora.targets": OUTPUTS},
    "output projections, rank 64": {"lora.targets": OUTPUTS, "lora.rank": 64},
    "down projections only": {"lora.targets": ["down_proj"]},
    "down projections, rank 64": {"lora.targets": ["down_proj"], "lora.rank": 64},
    "upper half, all": {"lora.targets": UPPER_ALL},
    "upper half, output projections": {"lora.targets": UPPER},
    "rank 8": {"lora.rank": 8},
    "rank 32": {"lora.rank": 32},
    "k 3": {"sft.block_size": 3},
    "k 6": {"sft.block_size": 6},
    "k 8": {"sft.block_size": 8},
    "causal groups": {"lora.causal_groups": True},
    "base's distribution as target": {"loss.distill": 1.0},
    "half distribution, half token": {"loss.distill": 0.5},
    "far offsets dropped, 0.7": {"noise.offset_keep": 0.7},
    "no draft head": {"lora.draft_head": None},
    "draft head 64": {"lora.draft_head": 64},
    "draft head 1024": {"lora.draft_head": 1024},
    "lr 1e-3": {"sft.lr": 1e-3},
    "lr 4e-3": {"sft.lr": 4e-3},
    "128 anchors a row": {"noise.anchors": 128},
    "32 anchors a row": {"noise.anchors": 32},
    "16 trained keys a layer, no adapter": {"keys": 16, "lora.rank": 1, "lora.targets": ["layers.29.mlp.down_proj"]},
    "16 trained keys a layer besides": {"keys": 16},
    "sampled answers": {"text": "sampled"},
    "human text": {"text": "human"},
}


def sources(text: str, out: Path, human: Path | None) -> list[dict[str, Any]]:
    if text == "human":
        assert human is not None
        return [{"kind": "text", "path": str(human), "into": ["sft"]}]
    temperature = {"temperature": 0.7, "max_documents": 1000} if text == "sampled" else {}
    shared = {"kind": "self", "into": ["sft"], "max_new_tokens": 200, "batch": 64, "cut_repeats": 8} | temperature
    return [shared | {"path": str(out / name)} for name in ("prompts.txt", "wide.txt")]


def settings(variant: dict[str, Any], out: Path, human: Path | None, seed: int, mask_rows: int) -> Config:
    text = variant.get("text", "greedy")
    keys: dict[str, Any] = {
        "paths.data": str(out / f"data-{text}"),
        "paths.runs": str(out / "runs"),
        "model.base": "smollm2-135m",
        "model.convention": "shifted",
        "model.device": "cpu",
        "data.sources": sources(text, out, human),
        "data.seq_len": 256,
        "data.eval_share": 0.04,
        "noise.anchors": ANCHORS,
        "loss.weighting": "uniform",
        "lora.rank": 16,
        "lora.gate": True,
        "lora.draft_head": 256,
        "sft.block_size": K,
        "sft.lr": 2e-3,
        "sft.lr_warmup_steps": 5,
        "sft.lr_decay_share": 0.5,
        "train.lr_final_ratio": 0.05,
        "train.rows_per_step": ROWS,
        "train.micro_batch": 2,
        "train.seed": seed,
        "train.eval_every": 0,
        "train.eval_rows": 48,
        "train.save_every": 10_000,
        "train.keep_best": 0,
        "train.keep_last": 1,
        "decode.max_new_tokens": 96,
    }
    keys |= {key: value for key, value in variant.items() if key not in ("text", "keys")}
    keys["sft.steps"] = -(-mask_rows // (ROWS * keys["noise.anchors"] * keys["sft.block_size"]))
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in keys.items()])


def prepare(config: Config, out: Path, text: str) -> None:
    """Prepare the rows of one kind of text, once. The recipe's stored answers are used where they fit."""
    folder = Path(config.paths.data)
    if (folder / "ready").exists():
        return
    ship = runpy.run_path(str(RECIPE / "ship.py"))
    ship["write_prompts"](out)
    if text == "greedy":
        ship["place_answers"](config)
    write_answers(config)
    prepare_data(config)
    tokenize_data(config, load_tokenizer(config.model))
    (folder / "ready").touch()


def unseen() -> list[str]:
    make = runpy.run_path(str(RECIPE / "prompts.py"))
    return make["unseen"]("story")[:6] + make["unseen"]("instruction")[:6]


def exact_model(config: Config, base: str) -> ModelConfig:
    """A checkpoint or the base in fp32, whatever the training computed in."""
    return config.model.model_copy(update={"base": base, "convention": None, "dtype": "float32"})


def decode(config: Config, checkpoint: str, rows: int) -> dict[str, float]:
    """Tokens per forward over the unseen prompts, stories and instructions apart."""
    changes = {"model": exact_model(config, checkpoint)}
    changes["engine"] = config.engine.model_copy(update={"runtime": "eager", "slots": 12})
    changes["decode"] = config.decode.model_copy(update={"rows": rows})
    engine = TransformersEngine(config.model_copy(update=changes), {})
    requests = [
        Request(engine.encode([{"role": "user", "content": text}]), engine.settings(config.model_copy(update=changes)))
        for text in unseen()
    ]
    done = engine.generate_batch(requests)
    found = {}
    for name, part in (("stories", done[:6]), ("instructions", done[6:])):
        tokens = sum(len(completion.token_ids) for completion in part)
        found[name] = tokens / sum(completion.stats.forwards for completion in part)
    return found


def runtime_and_batch(config: Config, checkpoint: str, width: int) -> tuple[Any, Any]:
    """OpenVINO with int8 weights, and a pass of `width` rows behind cached text: four clean rows, then masked ones."""
    from hildanext.decoding.runtimes.openvino import OpenVinoRuntime

    lm, _ = load_diffusion_lm(exact_model(config, checkpoint))
    runtime = OpenVinoRuntime(lm.model, (width,), "int8")
    runtime.allocate(1, CONTEXT + width)
    runtime.body(pad_batch([([5] * CONTEXT, 0, list(range(1, CONTEXT + 1)))], 0))
    rows = GroupRows(list(range(CONTEXT, CONTEXT + width)), [(0, 0)] * width, [i > 3 for i in range(width)])
    return runtime, pad_batch([([5] * width, CONTEXT, list(range(CONTEXT + 1, CONTEXT + 1 + width)))], 0, [rows])


def pass_ms(config: Config, checkpoint: str) -> dict[str, float]:
    """Median milliseconds of the base's pass of one row and of the checkpoint's of FEW rows, in turn."""
    sides = {
        "base": runtime_and_batch(config, "smollm2-135m", 1),
        "gated": runtime_and_batch(config, checkpoint, FEW),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the engine does beside OpenVINO
    for _ in range(PASSES):
        for name, (runtime, batch) in sides.items():
            began = time.perf_counter()
            runtime.head(runtime.body(batch)[0])
            times[name].append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def time_passes(out: Path) -> None:
    """Time a pass with the adapter of each stored run, after one step of training: more does not change its time."""
    runs, found = stored_runs(PAGE), dict[str, dict[str, Any]]()
    for name in dict.fromkeys(run["name"] for run in runs if "keys" not in VARIANTS[run["name"]]):
        layers = {key: value for key, value in VARIANTS[name].items() if key in ("lora.targets", "lora.rank")}
        if str(layers) not in found:
            config = settings(layers | {"train.eval_rows": 1}, out, None, 0, 1)
            prepare(config, out, "greedy")
            run = f"one-step-{list(VARIANTS).index(name)}"
            checkpoint = sft(config, run, resume=(out / "runs" / run).exists())["checkpoint"]
            found[str(layers)] = {"pass_ms": pass_ms(config, checkpoint), "timed_on": machine()}
            print(f"{name}: {found[str(layers)]['pass_ms']}", flush=True)
        runs = [stored | found[str(layers)] if stored["name"] == name else stored for stored in runs]
    write_json(PAGE.with_suffix(".json"), runs)
    write_page(runs)


def measure(name: str, out: Path, human: Path | None, seed: int, mask_rows: int) -> dict[str, Any]:
    variant = VARIANTS[name]
    config = settings(variant, out, human, seed, mask_rows)
    prepare(config, out, variant.get("text", "greedy"))
    began = time.perf_counter()
    run = f"{list(VARIANTS).index(name)}-{seed}-{mask_rows}"
    with trained_keys(variant.get("keys", 0)):
        result = sft(config, run, resume=(out / "runs" / run).exists())
    minutes = (time.perf_counter() - began) / 60
    lines = (Path(result["run"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    checkpoint, decodes = result["checkpoint"], "keys" not in variant
    return {
        "name": name,
        "seed": seed,
        "mask_rows": int(sum(json.loads(line)["group_rows"] for line in lines)),
        "budget": mask_rows,
        "run": last["eval_run"],
        "loss": last["eval_loss"],
        "accuracy": [value for key, value in last.items() if key.startswith("eval_accuracy_")],
        "minutes": minutes,
        "tokens_per_forward": {str(rows): decode(config, checkpoint, rows) for rows in (FEW, FULL) if decodes},
        "megabytes": (Path(checkpoint) / "adapter_model.safetensors").stat().st_size / 2e6,
        "machine": machine(),
    }


def speed(runs: list[dict[str, Any]], rows: int, kind: str) -> str:
    return spread([run["tokens_per_forward"][str(rows)][kind] for run in runs], 2)


def per_ms(run: dict[str, Any]) -> float:
    """Tokens per millisecond of a pass of 8 rows, relative to the base token by token."""
    return float(
        statistics.mean(run["tokens_per_forward"][str(FEW)].values()) / run["pass_ms"]["gated"] * run["pass_ms"]["base"]
    )


def write_page(results: list[dict[str, Any]]) -> None:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["budget"], result["name"]), []).append(result)
    page = [
        "# Gated adapters",
        "",
        "Generated by `benchmarks/gated.py`: SmolLM2-135M-Instruct, trained in bf16 where the CPU has it. The variant *base*",
        "adapts all linear layers with rank 16, has groups of 4 rows (bidirectional), 64 anchors a row of 256 tokens, a draft head of width 256, the",
        "base's greedy answers with hard labels, 4 rows a step and a learning rate of 2e-3 that falls over the second half.",
        "Every other variant changes what its name says. Several seeds: mean and range.",
        "",
        "- *accepted run*: mean number of drafts before the first wrong one, on held-out answers, the text before given",
        "- *accuracy*: of rows 1 to k, the same way",
        f"- *tokens per forward*: EXACT over 12 unseen prompts x 96 tokens, passes of {FEW} and {FULL} rows",
        f"- *gain*: tokens per millisecond of a pass of {FEW} rows against the base token by token, the two in turn, OpenVINO int8",
        "  (`--time`, on an idle machine)",
    ]
    for budget in sorted({budget for budget, _ in groups}):
        page += [
            "",
            f"## {budget:,} mask rows",
            "",
            f"| variant | accepted run | accuracy | tokens per forward, {FEW} rows: stories, instructions | {FULL} rows | gain | MB, fp16 | minutes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows = [(name, runs) for (n, name), runs in groups.items() if n == budget]
        for name, runs in sorted(rows, key=lambda row: -statistics.mean(run["run"] for run in row[1])):
            accuracy = " ".join(f"{value:.2f}" for value in runs[0]["accuracy"])
            speeds = [
                f"{speed(runs, rows, 'stories')}, {speed(runs, rows, 'instructions')}"
                if runs[0]["tokens_per_forward"]
                else "not decoded"
                for rows in (FEW, FULL)
            ]
            timed = [run for run in runs if "timed_on" in run]
            gain = spread([per_ms(run) for run in timed], 2) if timed else ""
            page.append(
                f"| {name} | {spread([run['run'] for run in runs], 2)} | {accuracy} | {' | '.join(speeds)} | {gain} "
                f"| {spread([run['megabytes'] for run in runs], 1)} | {spread([run['minutes'] for run in runs], 0)} |"
            )
    page += ["", machines_line(results)]
    PAGE.with_suffix(".md").write_text("\n".join(page) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gated"))
    parser.add_argument("--human", type=Path, help="JSON lines with a text each, for the variant 'human text'")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--mask-rows", type=int, default=MASK_ROWS)
    parser.add_argument("--time", action="store_true", help="time the passes of stored runs instead, with OpenVINO")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.time:
        time_passes(args.out)
        return
    names = args.only or [name for name in VARIANTS if args.human or name != "human text"]
    for seed in args.seeds:
        for name in names:
            if any(
                (run["name"], run["seed"], run["budget"]) == (name, seed, args.mask_rows) for run in stored_runs(PAGE)
            ):
                continue
            result = measure(name, args.out, args.human, seed, args.mask_rows)
            write_json(PAGE.with_suffix(".json"), [*stored_runs(PAGE), result])
            write_page(stored_runs(PAGE))
            print(f"{name}, seed {seed}: accepted run {result['run']:.3f}, {result['tokens_per_forward']}", flush=True)


if __name__ == "__main__":
    main()
