"""Compares insertions and deletions with substitution alone: repaired stories of the demo's world, repaired real drafts, cost.

    python benchmarks/edits.py                                         # the demo's world, seeds 0, 1 and 2
    python benchmarks/edits.py --gsm8k path/to/gsm8k/train.jsonl       # SmolLM2-135M on GSM8K besides

Both ways start from the same conversion, and train on the same rows. Results are stored in docs/benchmarks/edits.json, a
stored run is not repeated, and docs/benchmarks/edits.md is generated from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import machine, machines_line, spread, stored_runs

from hildanext.config import Config, load_config
from hildanext.data.prepare import prepare_data
from hildanext.data.rows import ShuffledRows, open_rows
from hildanext.data.synthetic import Faulty, check, faulty_stories, instruction
from hildanext.data.tokenize import tokenize_data
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.demo import make_base, prompts
from hildanext.demo_repair import is_repaired, repair_request
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.files import write_json
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import load_tokenizer
from hildanext.training import parallel
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.denoising import DenoisingTask, Recipe
from hildanext.training.trainer import Sums, TrainingStep

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "edits"
WAYS = ("substitution", "levenshtein")
BLOCK = 8
N_FAULTY = 100
TAU_EDIT = (0.0, 0.3, 0.5, 0.7)  # of repairs
TAU_MASK = (0.1, 0.5, 0.9)  # of stories in S_MODE
SHARED: dict[str, Any] = {
    "model.device": "cpu",
    "loss.weighting": "uniform",
    "noise.turns": 2,
    "wsd.start_block": 1,
    "wsd.peak_block": BLOCK,
    "wsd.final_block": BLOCK,
    "sft.block_size": BLOCK,
    "sft.lr_decay_share": 0.7,
    "train.lr_final_ratio": 0.05,
    "train.rows_per_step": 4,
    "train.eval_every": 0,
    "train.save_every": 300,
    "train.keep_last": 1,
    "train.keep_best": 0,
    "engine.runtime": "eager",
}
WORLD: dict[str, Any] = {
    "model.convention": "in_place",
    "model.dtype": "float32",
    "data.seq_len": 96,
    "data.eval_share": 0.03,
    "train.micro_batch": 4,
    "train.weight_decay": 0.0,
    "train.lr": 3e-3,
    "wsd.warmup_steps": 60,
    "wsd.stable_steps": 0,
    "wsd.decay_steps": 240,
    "sft.lr_warmup_steps": 20,
    "sft.steps": 2400,
    "noise.corrupt_rate": 0.05,
    "noise.deletion_rate": 0.08,
    "noise.insertion_rate": 0.08,
    "decode.max_new_tokens": 128,
    "engine.slots": 8,
}
TUNING: dict[str, Any] = {
    "sft.lr": 5e-3,
    "loss.keep": 0.3,  # most tokens are right: with 1, a fault that the model is half sure of is left alone
}
SMOLLM2: dict[str, Any] = {  # 110 steps x 4 rows x 256 = 112,640 row tokens
    "model.base": "smollm2-135m",
    "model.convention": "shifted",
    "data.seq_len": 256,
    "train.micro_batch": 2,
    "train.save_every": 22,
    "train.lr": 3e-4,
    "wsd.start_block": BLOCK,
    "wsd.warmup_steps": 0,
    "wsd.stable_steps": 77,
    "wsd.decay_steps": 33,
    "engine.slots": 8,
}


def settings(keys: dict[str, Any], out: Path, **changes: Any) -> Config:
    keys = SHARED | keys | {"paths.data": str(out / "data"), "paths.runs": str(out)} | changes
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in keys.items()])


def with_model(config: Config, checkpoint: str) -> Config:
    return config.model_copy(
        update={"model": config.model.model_copy(update={"base": checkpoint, "convention": None, "dtype": "float32"})}
    )


def open_engine(config: Config, checkpoint: str) -> TransformersEngine:
    return TransformersEngine(with_model(config, checkpoint), {})


def decode(engine: TransformersEngine, config: Config, **changes: Any) -> Any:
    return engine.settings(config.model_copy(update={"decode": config.decode.model_copy(update=changes)}))


def training_ratio(config: Config, checkpoint: str, split: str, pairs: int) -> float:
    """Median ratio of a micro-batch's forwards and backwards with and without insertions and deletions, alternating."""
    model = config.model.model_copy(update={"base": checkpoint, "convention": None})
    lm, policy = load_diffusion_lm(model, training=True, edits=True)
    accelerator = parallel.start(policy, config.train)
    found = open_rows(config, split, lm.tokenizer)
    assert found is not None
    rows, recipe, point = ShuffledRows(found, 0), Recipe(2, False, 0.05, 1.0, 0.0), SchedulePoint("decay", BLOCK, 0.0)
    tasks = {}
    for way in WAYS:
        changed = config.model_copy(update={"noise": config.noise.model_copy(update={"edits": way})})
        tasks[way] = DenoisingTask(changed, lm, accelerator, recipe, rows, None, BLOCK)
    ratios = []
    for pair in range(pairs + 1):
        seconds = {}
        for way, task in tasks.items():
            n = config.train.micro_batch
            batch = task.fetch(list(range(pair * n, (pair + 1) * n)))
            began = time.perf_counter()
            task.backward(batch, TrainingStep(0, point, task.counts([batch], BLOCK)[0]), Sums(), sync=True)
            seconds[way] = time.perf_counter() - began
            lm.model.zero_grad()
        ratios.append(seconds["levenshtein"] / seconds["substitution"])
    return statistics.median(ratios[1:])


# --- Stories of the demo's world


def repair(engine: TransformersEngine, config: Config, stories: list[Faulty]) -> list[dict[str, Any]]:
    found = []
    for tau_edit in TAU_EDIT:
        wanted = decode(engine, config, mode="Q_MODE", tau_edit=tau_edit)
        requests = [repair_request(engine, wanted, story) for story in stories]
        done = engine.generate_batch(requests)
        right = [is_repaired(answer, story) for answer, story in zip(done, stories, strict=True)]
        accepted = [
            not check(answer.text, story.slots.name, story.slots.thing)
            for answer, story in zip(done, stories, strict=True)
        ]
        kinds = [story.kind for story in stories]
        found.append(
            {
                "tau_edit": tau_edit,
                "right": statistics.mean(right),
                "accepted": statistics.mean(accepted),
                "of_dropped": statistics.mean(r for r, kind in zip(right, kinds, strict=True) if kind == "dropped"),
                "of_doubled": statistics.mean(r for r, kind in zip(right, kinds, strict=True) if kind == "doubled"),
                "passes": statistics.mean(answer.stats.forwards for answer in done),
            }
        )
    return found


def write_stories(engine: TransformersEngine, config: Config) -> list[dict[str, float]]:
    found = []
    for tau_mask in TAU_MASK:
        wanted = decode(engine, config, mode="S_MODE", tau_mask=tau_mask)
        subjects = prompts(seed=99)
        encoded = [engine.encode([{"role": "user", "content": instruction(slots)}]) for slots in subjects]
        done = engine.generate_batch([Request(ids, wanted) for ids in encoded])
        pairs = zip(done, subjects, strict=True)
        tokens = sum(len(answer.token_ids) for answer in done)
        found.append(
            {
                "tau_mask": tau_mask,
                "accepted": statistics.mean(not check(answer.text, slots.name, slots.thing) for answer, slots in pairs),
                "tokens_per_forward": tokens / sum(answer.stats.forwards for answer in done),
            }
        )
    return found


def pass_ratio(engines: dict[str, TransformersEngine], config: Config, pairs: int = 20) -> float:
    """Median ratio of a pass with and without insertions and deletions: the two write the same story in turn."""
    ratios = []
    for slots in prompts(seed=99)[:pairs]:
        ms = {}
        for way, engine in engines.items():
            engine.scheduler.reset_prefix_cache()
            wanted = decode(engine, config, mode="Q_MODE", max_new_tokens=64)
            ids = engine.encode([{"role": "user", "content": instruction(slots)}])
            began = time.perf_counter()
            done = engine.generate(Request(ids, wanted))
            ms[way] = (time.perf_counter() - began) / done.stats.forwards
        ratios.append(ms["levenshtein"] / ms["substitution"])
    return statistics.median(ratios)


def world(out: Path, seed: int) -> list[dict[str, Any]]:
    source = {"kind": "instruct", "path": str(out / "instructions.jsonl"), "into": ["train", "sft"]}
    sources = {"data.sources": [{"kind": "tinystories", "documents": 3000}, source], "model.base": str(out / "base")}
    config = settings(WORLD | sources, out, **{"train.seed": seed})
    if not (out / "ready").exists():
        out.mkdir(parents=True, exist_ok=True)
        make_base(config, out)
        (out / "ready").touch()
    converted = convert_wsd(config, "convert", resume=(out / "convert").exists())
    found, engines = [], {}
    for way in WAYS:
        tuning = settings(WORLD | TUNING | sources, out, **{"train.seed": seed, "noise.edits": way})
        tuning = tuning.model_copy(
            update={"model": tuning.model.model_copy(update={"base": converted["checkpoint"], "convention": None})}
        )
        result = sft(tuning, way, resume=(out / way).exists())
        engine = engines[way] = open_engine(tuning, result["checkpoint"])
        found.append(
            {
                "part": "world",
                "seed": seed,
                "way": way,
                "tokens": converted["tokens_seen"] + result["tokens_seen"],
                "repairs": repair(engine, tuning, faulty_stories(N_FAULTY, seed=123)),
                "stories": write_stories(engine, tuning),
                "machine": machine(),
            }
        )
    found[-1]["pass_ratio"] = pass_ratio(engines, config)
    found[-1]["training_ratio"] = training_ratio(config, converted["checkpoint"], "sft_train", 40)
    return found


# --- Real drafts of SmolLM2-135M


def distance(a: list[int], b: list[int]) -> int:
    """Levenshtein distance of two lists."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def real_drafts(engine: TransformersEngine, config: Config, n: int = 40, blocks: int = 3) -> list[dict[str, Any]]:
    """The last blocks of held-out texts, drafted in one pass each, and their distance to the text before and after repair.

    Of a question's first words hardly one can be guessed, so the ends are taken, where answers are.
    """
    rows = open_rows(config, "eval", engine.tokenizer)
    assert rows is not None
    batch = rows.batch(list(range(min(n, len(rows)))))
    cases = []
    for ids, docs in zip(batch["input_ids"].tolist(), batch["doc_ids"].tolist(), strict=True):
        whole = docs.count(docs[0]) // BLOCK
        for k in range(max(2, whole - blocks), whole):
            cases.append((ids[: k * BLOCK], ids[k * BLOCK : (k + 1) * BLOCK]))
    once = decode(engine, config, tau_mask=0.0, tau_edit=None, max_new_tokens=BLOCK)
    drafts = [done.token_ids for done in engine.generate_batch([Request(prompt, once) for prompt, _ in cases])]
    kept = [i for i, draft in enumerate(drafts) if len(draft) == BLOCK]
    found = []
    for tau_edit in TAU_EDIT:
        wanted = decode(engine, config, mode="Q_MODE", tau_edit=tau_edit, max_new_tokens=BLOCK)
        done = engine.generate_batch([Request(cases[i][0], wanted, draft=drafts[i]) for i in kept])
        after = [distance(answer.token_ids, cases[i][1]) for answer, i in zip(done, kept, strict=True)]
        before = [distance(drafts[i], cases[i][1]) for i in kept]
        found.append(
            {
                "tau_edit": tau_edit,
                "blocks": len(kept),
                "before": statistics.mean(before),
                "after": statistics.mean(after),
                "better": statistics.mean(b > a for b, a in zip(before, after, strict=True)),
                "worse": statistics.mean(b < a for b, a in zip(before, after, strict=True)),
                "insertions": sum(answer.stats.insertions for answer in done),
                "deletions": sum(answer.stats.deletions for answer in done),
            }
        )
    return found


def smollm2(out: Path, gsm8k: Path, seed: int) -> list[dict[str, Any]]:
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(gsm8k, out / "gsm8k.jsonl")
    source = {"data.sources": [{"kind": "instruct", "path": str(out / "gsm8k.jsonl"), "into": ["train"]}]}
    config = settings(SMOLLM2 | source, out, **{"train.seed": seed})
    if not (out / "ready").exists():
        prepare_data(config)
        tokenize_data(config, load_tokenizer(config.model))
        (out / "ready").touch()
    found = []
    for way in WAYS:
        config = settings(SMOLLM2 | source, out, **{"train.seed": seed, "noise.edits": way})
        name = f"{way}-{seed}"
        result = convert_wsd(config, name, resume=(out / name).exists())
        drafts = real_drafts(open_engine(config, result["checkpoint"]), config)
        found.append(
            {"part": "smollm2", "seed": seed, "way": way, "tokens": result["tokens_seen"], "drafts": drafts}
            | {"machine": machine()}
        )
    found[-1]["training_ratio"] = training_ratio(config, "smollm2-135m", "train", 6)
    return found


# --- The page


def of(results: list[dict[str, Any]], part: str, way: str) -> list[dict[str, Any]]:
    return [result for result in results if (result["part"], result["way"]) == (part, way)]


def table_rows(
    results: list[dict[str, Any]], part: str, key: str, thresholds: Sequence[float], figures: dict[str, int]
) -> list[str]:
    """A line for each way and threshold, with its figures over the seeds. figures: digits by name."""
    lines = []
    for way in WAYS:
        for i, threshold in enumerate(thresholds):
            rows = [run[key][i] for run in of(results, part, way)]
            values = (spread([row[name] for row in rows], digits) for name, digits in figures.items())
            lines.append(f"| {way} | {threshold} | {' | '.join(values)} |")
    return lines


def world_lines(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## The demo's world",
        "",
        f"The base of `make demo`, converted in 300 steps, then tuned in {WORLD['sft.steps']} steps of 4 rows in blocks of {BLOCK} (in_place, two turns, loss.keep {TUNING['loss.keep']}).",
        "",
        f"{N_FAULTY} new stories with one word dropped or doubled, given as drafts (Q_MODE). *Right*: equal to the story before the fault.",
        "",
        "| | tau_edit | right | of dropped | of doubled | accepted by the checker | passes |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = {"right": 2, "of_dropped": 2, "of_doubled": 2, "accepted": 2, "passes": 0}
    lines += table_rows(results, "world", "repairs", TAU_EDIT, figures)
    lines += [
        "",
        "100 new stories in S_MODE (tau_edit 0):",
        "",
        "| | tau_mask | accepted | tokens per forward |",
        "|---|---|---|---|",
    ]
    lines += table_rows(results, "world", "stories", TAU_MASK, {"accepted": 2, "tokens_per_forward": 2})
    runs = of(results, "world", WAYS[1])
    return [*lines, "", cost_line(runs)]


def cost_line(runs: list[dict[str, Any]]) -> str:
    line = f"Cost against substitution, alternating in one process: training {spread([run['training_ratio'] for run in runs], 2)}"
    if "pass_ratio" in runs[0]:
        line += f", a pass of decoding {spread([run['pass_ratio'] for run in runs], 2)}"
    load, cores = runs[0]["machine"]["load_before"], runs[0]["machine"]["cores"]
    return f"{line}. Load of the machine before: {load:.0f} on {cores} cores."


def smollm2_lines(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## SmolLM2-135M on GSM8K",
        "",
        f"112,640 row tokens, all weights, shifted, blocks of {BLOCK}, two turns. The last three whole blocks of held-out texts are drafted in one pass each, then repaired (Q_MODE).",
        "",
        "| | tau_edit | blocks | distance to the text before | after | better | worse | insertions | deletions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    figures = {"blocks": 0, "before": 2, "after": 2, "better": 2, "worse": 2, "insertions": 0, "deletions": 0}
    lines += table_rows(results, "smollm2", "drafts", TAU_EDIT, figures)
    return [*lines, "", cost_line(of(results, "smollm2", WAYS[1]))]


def write_page(results: list[dict[str, Any]]) -> None:
    seeds = sorted({result["seed"] for result in results})
    page = [
        "# Insertions and deletions",
        "",
        f"Generated by `benchmarks/edits.py`, seeds {', '.join(map(str, seeds))}: mean and range. *substitution* and *levenshtein* are the",
        "values of `noise.edits`; both train on the same rows.",
    ]
    if of(results, "world", WAYS[1]):
        page += ["", *world_lines(results)]
    if of(results, "smollm2", WAYS[1]):
        page += ["", *smollm2_lines(results)]
    page += ["", machines_line(results)]
    PAGE.with_suffix(".md").write_text("\n".join(page) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/edits"))
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl, for the part with SmolLM2-135M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        if not any((run["part"], run["seed"]) == ("world", seed) for run in stored_runs(PAGE)):
            write_json(PAGE.with_suffix(".json"), [*stored_runs(PAGE), *world(args.out / f"world-{seed}", seed)])
            write_page(stored_runs(PAGE))
    for seed in args.seeds[:1] if args.gsm8k else []:
        if not any((run["part"], run["seed"]) == ("smollm2", seed) for run in stored_runs(PAGE)):
            write_json(
                PAGE.with_suffix(".json"), [*stored_runs(PAGE), *smollm2(args.out / "smollm2", args.gsm8k, seed)]
            )
            write_page(stored_runs(PAGE))


if __name__ == "__main__":
    main()
