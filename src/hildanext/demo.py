"""`demo`: the whole way on synthetic stories, offline, in minutes on a laptop CPU.

A tiny AR model is trained from scratch (the "before"), converted on the WSD schedule and tuned on instructions, the best
checkpoints merged each time; then AR, Q_MODE and S_MODE tell stories that a checker accepts or not. Every number printed is
measured in the run.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, PreTrainedModel

from hildanext.config import Config, load_config
from hildanext.data.prepare import prepare_data
from hildanext.data.rows import open_rows
from hildanext.data.synthetic import Slots, check, draw_slots, instruction, synthetic_instructions
from hildanext.data.tokenize import tokenize_data
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.rule import Settings, Step, resolve
from hildanext.errors import UsageError
from hildanext.evaluate.ar_likelihood import ar_likelihood
from hildanext.evaluate.elbo import elbo
from hildanext.files import atomic_open, write_json, writing
from hildanext.model.ar_generate import ar_complete
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import load_tokenizer
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.progress import duration, progress, say
from hildanext.provenance import git_revision, versions
from hildanext.training.ar_base import train_ar
from hildanext.training.checkpoint import list_checkpoints
from hildanext.training.convert import convert_wsd, sft
from hildanext.training.merge import best_checkpoints, merge

READY = Path(__file__).parent / "configs" / "demo.json"
N_INSTRUCTIONS = 6000
AR_STEPS, AR_ROWS, AR_LR = 2000, 6, 6e-3
HIDDEN, LAYERS = 128, 3
N_PROMPTS, N_ELBO_ROWS = 100, 40
WANT_QUALITY, WANT_TPF = 0.9, 2.5


class Told(NamedTuple):
    """Stories of one mode."""

    accepted: int
    tokens: int
    forwards: int
    seconds: float
    sample: str


def _with_base(config: Config, base: Path | str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"base": str(base), "convention": None})})


def _inside(config: Config, folder: Path) -> Config:
    """The configuration with everything that the demo makes for itself in its own folder."""
    paths = config.paths.model_copy(update={"data": str(folder / "data")})
    instructions = {"path": str(folder / "instructions.jsonl")}
    sources = [one.model_copy(update=instructions) if one.kind == "instruct" else one for one in config.data.sources]
    data = config.data.model_copy(update={"sources": sources})
    model = config.model.model_copy(update={"base": str(folder / "base")})
    return config.model_copy(update={"paths": paths, "data": data, "model": model})


def make_base(config: Config, folder: Path) -> PreTrainedModel:
    """Data, tokenizer and a tiny AR model trained from scratch, saved as `folder/base`."""
    base = folder / "base"
    tokenizer = story_tokenizer()
    model = tiny_llama(tokenizer, HIDDEN, LAYERS, context=512, seed=config.train.seed)
    with writing(base):
        model.save_pretrained(base)  # the commands below need its tokenizer; the weights follow
        tokenizer.save_pretrained(base)
    with atomic_open(folder / "instructions.jsonl") as file:
        file.writelines(json.dumps(one) + "\n" for one in synthetic_instructions(N_INSTRUCTIONS, seed=3))
    prepare_data(config)
    tokenize_data(config, load_tokenizer(config.model))
    rows = open_rows(config, "train", tokenizer)
    assert rows is not None
    train_ar(model, rows, steps=AR_STEPS, batch_rows=AR_ROWS, lr=AR_LR, seed=config.train.seed)
    with writing(base):
        model.save_pretrained(base)
    return model


def prompts(seed: int) -> list[Slots]:
    """What the stories are to be about; none of it is held back or chosen after the fact."""
    rng = random.Random(seed)
    return [draw_slots(rng) for _ in range(N_PROMPTS)]


def tell_ar(engine: TransformersEngine, model: PreTrainedModel, asked: list[Slots], budget: int) -> Told:
    """Stories of the AR base, by transformers' own greedy generate."""
    accepted = tokens = 0
    seconds, sample = 0.0, ""
    for slots in asked:
        ids = engine.encode([{"role": "user", "content": instruction(slots)}])
        done = ar_complete(model, engine.lm.tokenizer, ids, budget)
        accepted += not check(done.text, slots.name, slots.thing)
        tokens += len(done.token_ids)
        seconds += done.seconds
        sample = sample or done.text
    return Told(accepted, tokens, tokens, seconds, sample)


def tell_blocks(engine: TransformersEngine, settings: Settings, asked: list[Slots]) -> Told:
    """Stories of the diffusion model in one mode."""
    accepted = tokens = forwards = 0
    seconds, sample = 0.0, ""
    for slots in asked:
        ids = engine.encode([{"role": "user", "content": instruction(slots)}])
        done = engine.generate(Request(ids, settings))
        accepted += not check(done.text, slots.name, slots.thing)
        tokens += len(done.token_ids)
        forwards += done.stats.forwards
        seconds += done.stats.seconds
        sample = sample or done.text
    return Told(accepted, tokens, forwards, seconds, sample)


def show_steps(engine: TransformersEngine, settings: Settings, slots: Slots, blocks: int = 3) -> str:
    """One decode, pass by pass: `_` is a mask, [word] was drafted in this pass, {word} was edited."""
    ids = engine.encode([{"role": "user", "content": instruction(slots)}])
    lines = []
    for event in engine.stream(Request(ids, settings)):
        if not isinstance(event, Step) or event.block >= len(ids) // settings.block_size + blocks:
            continue
        words = []
        for place, token in enumerate(event.tokens):
            word = engine.decode_tokens([token]).strip() if token != engine.lm.mask_token_id else "_"
            words.append(f"[{word}]" if place in event.drafted else f"{{{word}}}" if place in event.edited else word)
        lines.append(f"  block {event.block} pass {event.step + 1}:  {' '.join(words)}")
    return "\n".join(lines)


def measure(config: Config, base: PreTrainedModel, lm: DiffusionLM) -> tuple[dict[str, Any], str]:
    """The four ways to tell stories, side by side: report entries, and a decode shown step by step."""
    engine = TransformersEngine(config, {}, lm)
    assert lm.block_size is not None
    rows = open_rows(config, "eval", lm.tokenizer)
    assert rows is not None
    exact = ar_likelihood(base, rows, N_ELBO_ROWS, config.train.micro_batch)
    bound = elbo(lm, rows, lm.block_size, N_ELBO_ROWS, config.train.micro_batch)
    modes = {
        "q_mode": resolve(config.decode.model_copy(update={"mode": "Q_MODE"}), lm.block_size),
        "s_mode": resolve(config.decode.model_copy(update={"mode": "S_MODE"}), lm.block_size),
        "s_mode_no_edit": resolve(config.decode.model_copy(update={"mode": "S_MODE", "tau_edit": None}), lm.block_size),
    }
    asked = prompts(seed=99)
    report = {}
    with progress("stories", len(modes) + 1, "modes") as advance:
        told = {"ar": tell_ar(engine, base, asked, config.decode.max_new_tokens)}
        for done, (name, settings) in enumerate(modes.items(), start=1):
            advance(done, name)
            told[name] = tell_blocks(engine, settings, asked)
        advance(len(modes) + 1)
    for name, one in told.items():
        likelihood = exact if name == "ar" else bound
        report[name] = {
            "accept_rate": one.accepted / len(asked),
            "bits_per_token": likelihood.nats / likelihood.tokens / math.log(2),
            "tokens_per_forward": one.tokens / one.forwards,
            "tokens_per_second": one.tokens / one.seconds,
            "sample": one.sample,
        }
    return report, show_steps(engine, modes["s_mode"], asked[0])


def verdicts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The three promises of the demo with the measured numbers."""
    ar, q, s, plain = (report[name] for name in ("ar", "q_mode", "s_mode", "s_mode_no_edit"))
    quality = q["accept_rate"] / ar["accept_rate"] if ar["accept_rate"] else 0.0
    return {
        "Q_MODE keeps the AR base's stories": {
            "measured": f"{quality:.2f} of {ar['accept_rate']:.2f} accepted",
            "wanted": f">= {WANT_QUALITY}",
            "ok": quality >= WANT_QUALITY,
        },
        "S_MODE drafts in parallel": {
            "measured": f"{s['tokens_per_forward']:.2f} tokens per forward",
            "wanted": f">= {WANT_TPF}",
            "ok": s["tokens_per_forward"] >= WANT_TPF,
        },
        "editing beats no editing at the S thresholds": {
            "measured": f"{s['accept_rate']:.2f} against {plain['accept_rate']:.2f} accepted",
            "wanted": "more",
            "ok": s["accept_rate"] > plain["accept_rate"],
        },
    }


def summary(report: dict[str, Any], steps: str) -> str:
    """What the demo prints at its end."""
    lines = ["", "One decode, step by step (S_MODE; _ masked, [drafted], {edited}):", steps, "", "A story of each:"]
    lines += [f"  {name}: {report[name]['sample']}" for name in ("ar", "q_mode", "s_mode", "s_mode_no_edit")]
    lines += ["", f"{'':16}{'accepted':>10}{'bits/token':>12}{'tokens/forward':>16}{'tokens/s':>10}"]
    for name in ("ar", "q_mode", "s_mode", "s_mode_no_edit"):
        row = report[name]
        lines.append(
            f"{name:16}{row['accept_rate']:10.2f}{row['bits_per_token']:12.3f}{row['tokens_per_forward']:16.2f}{row['tokens_per_second']:10.0f}"
        )
    lines += ["(bits/token: exact for AR, an upper bound for the diffusion model)", ""]
    for claim, found in report["verdicts"].items():
        lines.append(f"{'ok    ' if found['ok'] else 'MISSED'} {claim}: {found['measured']} (wanted {found['wanted']})")
    lines += [
        "",
        f"{duration(report['seconds'])} in all; report {report['report']}, curves {', '.join(report['curves'])}",
    ]
    return "\n".join(lines)


def _merged(run: Path, k: int) -> Path:
    """The mean of a run's k best checkpoints, of all where it was made too short to keep as many."""
    out = run / "merged"
    merge(best_checkpoints(run, min(k, len(list_checkpoints(run / "checkpoints")))), out)
    return out


def demo(config_path: str | None, overrides: list[str]) -> dict[str, Any]:
    """Run the demo in `paths.runs` (an earlier demo's folder is replaced); returns the report, also in report.json."""
    config = load_config(config_path or READY, overrides)
    folder = Path(config.paths.runs)
    config = _inside(config, folder)
    if folder.exists():
        if not (folder / "demo.marker").is_file():
            raise UsageError(f"{folder} exists and is not an earlier demo's; choose another paths.runs")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "demo.marker").write_text("Made by 'hildanext demo', which replaces this folder.\n", encoding="utf-8")
    began = time.perf_counter()
    say("1/4  a tiny AR model, from scratch")
    base = make_base(config, folder)
    say("2/4  conversion: block size up, stable, down (WSD)")
    convert_wsd(config)
    converted = _merged(folder / "convert", 2)
    say("3/4  instruction tuning")
    sft(_with_base(config, converted))
    tuned = _merged(folder / "sft", 3)
    say("4/4  stories: AR, Q_MODE, S_MODE")
    final = _with_base(config, tuned)
    lm, _ = load_diffusion_lm(final.model)
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    report, steps = measure(final, base, lm)
    report |= {
        "verdicts": verdicts(report),
        "seconds": time.perf_counter() - began,
        "checkpoint": str(tuned),
        "report": str(folder / "report.json"),
        "curves": [str(folder / name / "curves.png") for name in ("convert", "sft")],
        "seed": config.train.seed,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "git": git_revision(),
    }
    write_json(folder / "report.json", report)
    return report | {"stdout": summary(report, steps)}
