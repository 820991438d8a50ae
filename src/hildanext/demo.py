"""`demo`: trains, converts, tunes and compares a tiny model on synthetic stories, offline, in minutes on a laptop CPU.

A tiny AR model is trained from scratch as the base. A gated adapter converts it on the WSD schedule, which ends with a
merge of the best checkpoints. Then the base, EXACT and S_MODE write stories; those of EXACT are compared with the base's
token by token, and a checker accepts or rejects each story. A second conversion, without a gate, learns to insert and
delete, and repairs stories with a word too few or too many. All printed numbers are measured in the run.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hildanext.config import Config, Mode, load_config
from hildanext.data.prepare import prepare_data
from hildanext.data.rows import open_rows
from hildanext.data.synthetic import Slots, check, draw_slots, instruction, synthetic_instructions
from hildanext.data.tokenize import tokenize_data
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.events import Step
from hildanext.decoding.settings import Settings
from hildanext.demo_repair import measure_repairs, repair_config
from hildanext.errors import UsageError
from hildanext.files import atomic_open, write_json, writing
from hildanext.model.ar_generate import ar_complete
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import load_tokenizer
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.progress import duration, progress, say
from hildanext.provenance import git_revision, versions
from hildanext.terminal.cells import CellTracker, as_line
from hildanext.training.ar_base import train_ar
from hildanext.training.checkpoint import list_checkpoints
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.merge import best_checkpoints, merge

READY = Path(__file__).parent / "configs" / "demo.json"
N_INSTRUCTIONS = 6000
AR_STEPS, AR_ROWS, AR_LR = 900, 6, 6e-3
HIDDEN, LAYERS = 128, 3
N_PROMPTS = 100
WANT_EXACT, WANT_TPF = 1.0, 3.0
MODES = ("ar", "exact", "s_mode")


class Story(NamedTuple):
    """A story and what it cost."""

    text: str
    token_ids: list[int]
    forwards: int
    seconds: float


class Totals(NamedTuple):
    """The stories of one mode."""

    stories: list[Story]
    accepted: int

    @property
    def tokens(self) -> int:
        return sum(len(story.token_ids) for story in self.stories)


def _with_base(config: Config, base: Path | str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"base": str(base), "convention": None})})


def _inside(config: Config, folder: Path) -> Config:
    """The configuration with data, instructions and base model in the demo's folder."""
    paths = config.paths.model_copy(update={"data": str(folder / "data")})
    instructions = {"path": str(folder / "instructions.jsonl")}
    sources = [
        source.model_copy(update=instructions) if source.kind == "instruct" else source
        for source in config.data.sources
    ]
    data = config.data.model_copy(update={"sources": sources})
    model = config.model.model_copy(update={"base": str(folder / "base")})
    return config.model_copy(update={"paths": paths, "data": data, "model": model})


def make_base(config: Config, folder: Path) -> PreTrainedModel:
    """Prepare the data and train a tiny AR model from scratch; saves model and tokenizer in `folder/base`."""
    base = folder / "base"
    tokenizer = story_tokenizer()
    model = tiny_llama(tokenizer, HIDDEN, LAYERS, context=512, seed=config.train.seed)
    with writing(base):
        model.save_pretrained(base)  # tokenization needs the folder now; the trained weights replace these
        tokenizer.save_pretrained(base)
    with atomic_open(folder / "instructions.jsonl") as file:
        file.writelines(json.dumps(chat) + "\n" for chat in synthetic_instructions(N_INSTRUCTIONS, seed=3))
    prepare_data(config)
    tokenize_data(config, load_tokenizer(config.model))
    rows = open_rows(config, "train", tokenizer)
    assert rows is not None
    train_ar(model, rows, steps=AR_STEPS, batch_rows=AR_ROWS, lr=AR_LR, seed=config.train.seed)
    with writing(base):
        model.save_pretrained(base)
    return model


def prompts(seed: int) -> list[Slots]:
    """The subjects of the stories, drawn at random from the seed; no selection."""
    rng = random.Random(seed)
    return [draw_slots(rng) for _ in range(N_PROMPTS)]


def tell(engine: TransformersEngine, subjects: list[Slots], write: Callable[[list[int]], Story]) -> Totals:
    """Write and check one story per subject. write: the story for a prompt given as token ids."""
    accepted, stories = 0, list[Story]()
    for slots in subjects:
        stories.append(write(engine.encode([{"role": "user", "content": instruction(slots)}])))
        accepted += not check(stories[-1].text, slots.name, slots.thing)
    return Totals(stories, accepted)


def base_story(engine: TransformersEngine, base: PreTrainedModel, budget: int, ids: list[int]) -> Story:
    """A story by the AR base, with transformers' own greedy `generate`."""
    done = ar_complete(base, engine.tokenizer, ids, budget)
    return Story(done.text, done.token_ids, len(done.token_ids), done.seconds)


def drafted_story(engine: TransformersEngine, settings: Settings, ids: list[int]) -> Story:
    """A story by the converted model."""
    done = engine.generate(Request(ids, settings))
    return Story(done.text, done.token_ids, done.stats.forwards, done.stats.seconds)


def show_passes(engine: TransformersEngine, settings: Settings, slots: Slots, passes: int = 8) -> str:
    """The first passes of one answer, a line each: [word] is an accepted draft, {word} corrects one, others are the base's."""
    request = Request(engine.encode([{"role": "user", "content": instruction(slots)}]), settings)
    tracker = CellTracker(engine, request)
    steps = [event for event in engine.stream(request) if isinstance(event, Step)]
    lines = [as_line(step, tracker.cells(step)).partition(":")[2] for step in steps[:passes]]
    return "\n".join(f"  pass {number}:{line}" for number, line in enumerate(lines, start=1))


def measure(config: Config, base: PreTrainedModel, lm: DiffusionLM) -> tuple[dict[str, Any], str]:
    """Measure the AR base, EXACT and S_MODE on the same prompts: report entries, and the passes of one answer as text."""
    engine = TransformersEngine(config, {}, lm)
    budget = config.decode.max_new_tokens
    of_mode: dict[str, Mode] = {"exact": "EXACT", "s_mode": "S_MODE"}
    modes = {
        name: engine.settings(config.model_copy(update={"decode": config.decode.model_copy(update={"mode": mode})}))
        for name, mode in of_mode.items()
    }
    subjects = prompts(seed=99)
    with progress("stories", len(MODES), "modes") as advance:
        totals = {"ar": tell(engine, subjects, partial(base_story, engine, base, budget))}
        for done, (name, settings) in enumerate(modes.items(), start=1):
            advance(done, name)
            totals[name] = tell(engine, subjects, partial(drafted_story, engine, settings))
        advance(len(MODES))
    report = {}
    for name, total in totals.items():
        pairs = zip(total.stories, totals["ar"].stories, strict=True)
        report[name] = {
            "accept_rate": total.accepted / len(subjects),
            "same_text": sum(story.token_ids == own.token_ids for story, own in pairs) / len(subjects),
            "tokens_per_forward": total.tokens / sum(story.forwards for story in total.stories),
            "tokens_per_second": total.tokens / sum(story.seconds for story in total.stories),
            "sample": next((story.text for story in total.stories if story.text), ""),
        }
    return report, show_passes(engine, modes["exact"], subjects[0])


def train_repair(config: Config) -> str:
    """Convert the base and tune it on instructions, both with insertions and deletions; returns the checkpoint."""
    converted = convert_wsd(config, "repair-convert")["checkpoint"]
    return str(sft(_with_base(config, converted), "repair")["checkpoint"])


def repair(config: Config, checkpoint: str) -> tuple[dict[str, Any], str]:
    """Repair stories with the second model: report entries, and the passes of one as text."""
    final = _with_base(config, checkpoint)
    engine = TransformersEngine(final, {}, load_diffusion_lm(final.model)[0])
    return measure_repairs(engine, engine.settings(final))


def verdicts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The demo's three claims with the measured numbers."""
    exact, s = report["exact"], report["s_mode"]
    return {
        "EXACT writes the AR base's stories, token for token": {
            "measured": f"{exact['same_text']:.2f} of them",
            "wanted": f"{WANT_EXACT:g}",
            "ok": exact["same_text"] >= WANT_EXACT,
        },
        "EXACT needs fewer passes than tokens": {
            "measured": f"{exact['tokens_per_forward']:.2f} tokens per forward",
            "wanted": f">= {WANT_TPF}",
            "ok": exact["tokens_per_forward"] >= WANT_TPF,
        },
        "S_MODE trades the exact text for still fewer": {
            "measured": f"{s['tokens_per_forward']:.2f} tokens per forward, {s['accept_rate']:.2f} accepted",
            "wanted": "more",
            "ok": s["tokens_per_forward"] > exact["tokens_per_forward"],
        },
    }


def summary(report: dict[str, Any], passes: str, repairs: str) -> str:
    """The text that the demo prints at its end. passes, repairs: those of one answer of each model."""
    lines = ["", "One answer, pass by pass (EXACT; [accepted draft], {correction}, the base's own word):", passes]
    found = report["repair"]
    lines += ["", "One repair, pass by pass ([filled mask], {replaced}, +_ inserted mask, -deleted-):", repairs]
    lines += [
        f"  {found['repaired']} of {found['stories']} stories with a word dropped or doubled became what they were before "
        f"({found['dropped']} of the dropped, {found['doubled']} of the doubled)"
    ]
    lines += ["", "One story of each:"]
    lines += [f"  {name}: {report[name]['sample']}" for name in MODES]
    lines += ["", f"{'':10}{'accepted':>10}{'same text':>12}{'tokens/forward':>16}{'tokens/s':>10}"]
    for name in MODES:
        row = report[name]
        lines.append(
            f"{name:10}{row['accept_rate']:10.2f}{row['same_text']:12.2f}"
            f"{row['tokens_per_forward']:16.2f}{row['tokens_per_second']:10.0f}"
        )
    lines.append("")
    for claim, found in report["verdicts"].items():
        lines.append(f"{'ok    ' if found['ok'] else 'MISSED'} {claim}: {found['measured']} (wanted {found['wanted']})")
    lines += [
        "",
        f"total time {duration(report['seconds'])}; report {report['report']}, curves {', '.join(report['curves'])}",
    ]
    return "\n".join(lines)


def _merged(run: Path, k: int) -> Path:
    """Merge a run's k best checkpoints, or all of them if it has fewer."""
    out = run / "merged"
    merge(best_checkpoints(run, min(k, len(list_checkpoints(run / "checkpoints")))), out)
    return out


def demo(config_path: str | None, overrides: list[str]) -> dict[str, Any]:
    """Run the demo in the folder `paths.runs`, which may be an earlier demo's; returns the content of report.json.

    Raises UsageError if the folder exists and is not an earlier demo's.
    """
    config = load_config(config_path or READY, overrides)
    folder = Path(config.paths.runs)
    config = _inside(config, folder)
    if folder.exists():
        if not (folder / "demo.marker").is_file():
            raise UsageError(f"{folder} exists and was not made by an earlier demo; choose another paths.runs")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "demo.marker").write_text(
        "Made by 'hildanext demo'. The next run replaces this folder.\n", encoding="utf-8"
    )
    # The models are so small that a second thread gains little, and on a busy machine they would wait for each other.
    torch.set_num_threads(1)
    began = time.perf_counter()
    say("1/4  train a tiny AR model from scratch")
    base = make_base(config, folder)
    say("2/4  convert it: a gated adapter, groups of 1 to 8 masks (WSD)")
    convert_wsd(config)
    converted = _merged(folder / "convert", 2)
    say("3/4  convert the base once more, without a gate; repair stories by insertions and deletions")
    repairing = repair_config(config)
    repaired, repairs = repair(repairing, train_repair(repairing))
    say("4/4  write stories: AR base, EXACT, S_MODE")
    final = _with_base(config, converted)
    lm, _ = load_diffusion_lm(final.model)
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    report, passes = measure(final, base, lm)
    report |= {
        "repair": repaired,
        "verdicts": verdicts(report),
        "seconds": time.perf_counter() - began,
        "checkpoint": str(converted),
        "report": str(folder / "report.json"),
        "curves": [str(folder / run / "curves.png") for run in ("convert", "repair")],
        "seed": config.train.seed,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "git": git_revision(),
    }
    write_json(folder / "report.json", report)
    return report | {"stdout": summary(report, passes, repairs)}
