"""Numbers that a refactoring must not change: ten steps of each training, and forty decoded texts.

`python tests/golden/measure.py`, from the repository's root, records them again; `test_golden.py` compares.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from hildanext.config import Config, parse_config  # noqa: E402
from hildanext.decoding.engines import Request, open_engine  # noqa: E402
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm  # noqa: E402
from hildanext.training.convert import convert_wsd, sft  # noqa: E402
from hildanext.training.dpo import dpo  # noqa: E402
from support.training import material, write_base  # noqa: E402

WSD = {"warmup_steps": 4, "stable_steps": 2, "decay_steps": 4, "final_block": 4}
CLOCK = {"seconds", "tokens_per_second", "peak_memory_mb"}  # what a run's log holds besides numbers of the training
# What a completion's statistics count.
COUNTS = {"forwards", "prefill_forwards", "tokens_per_forward", "mask_ratio", "drafts", "edits", "prefix_tokens"}
PROMPTS = ["Once upon a time", "Tom has 3 apples.", "the cat saw a dog and the", "Why?"]
SETTINGS: dict[str, dict[str, Any]] = {
    "S_MODE": {"mode": "S_MODE", "tau_mask": 0.2},
    "Q_MODE": {"mode": "Q_MODE"},
    "editing off": {"mode": "S_MODE", "tau_mask": 0.3, "tau_edit": None},
    "sampled": {"mode": "S_MODE", "tau_mask": 0.2, "temperature": 0.8, "top_p": 0.95, "seed": 7},
    "several blocks": {"mode": "S_MODE", "tau_mask": 0.2, "edit_blocks": 1, "repetition_penalty": 1.2},
}


def machine() -> str:
    """The kind of machine, on which rounding depends: libraries choose their kernels by the processor's model."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
        facts = {key.strip(): value.strip() for key, value in lines}
        cpu = " ".join(facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping"))
    return f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cpu}"


def steps_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The log of a run, without times and memory."""
    lines = (Path(result["checkpoint"]).parents[1] / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def trainings(folder: Path) -> dict[str, Any]:
    """Ten steps of `convert-wsd` (all weights; an adapter), `sft` and `dpo` on a tiny Llama and random rows."""
    torch.set_num_threads(1)
    base = folder / "base"
    write_base(base)

    def made(name: str, start: Path, **sections: Any) -> Config:
        return material(folder / name, start, **sections)

    everything = {"turns": 2, "complementary": True, "embed_std": 0.1, "embed_steps": 5}
    converted = convert_wsd(made("convert", base, wsd=WSD, noise=everything, loss={"distill": 0.5, "cap_weight": 0.1}))
    whole = Path(converted["checkpoint"])
    in_place = {"convention": "in_place"}
    adapter = convert_wsd(
        made("adapter", base, wsd=WSD, model=in_place, lora={"rank": 4}, loss={"distill": 0.5, "weighting": "uniform"})
    )
    tuned = sft(made("sft", whole, sft={"steps": 10, "complementary": True}))
    pairs = folder / "pairs.jsonl"
    records = (
        {"prompt": f"the cat {n}?", "chosen": f"dog {n} saw the sun", "rejected": "a small boat"} for n in range(16)
    )
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    wanted = {"pairs": str(pairs), "steps": 10, "lr": 0.01, "lr_warmup_steps": 0, "draws": 2, "complementary": True}
    preferred = dpo(
        made(
            "dpo",
            whole,
            dpo=wanted | {"mask_band": [0.1, 0.9]},
            data={"seq_len": 56, "eval_share": 0.2},
            lora={"rank": 4},
        )
    )
    runs = {"convert-wsd": converted, "convert-wsd, adapter": adapter, "sft": tuned, "dpo": preferred}
    return {name: steps_of(result) for name, result in runs.items()}


def decodes(folder: Path) -> list[dict[str, Any]]:
    """Forty texts: two conventions, five settings, four prompts."""
    torch.set_num_threads(1)
    base = folder / "base"
    write_base(base)
    found = []
    for convention in ("shifted", "in_place"):
        model = {"base": str(base), "device": "cpu", "dtype": "float32", "convention": convention}
        lm, _ = load_diffusion_lm(parse_config({"model": model}).model)
        lm.block_size = 4
        save_diffusion_lm(lm, folder / convention)
        for name, settings in SETTINGS.items():
            raw = {"model": model | {"base": str(folder / convention)}, "engine": {"runtime": "eager"}}
            config = parse_config(raw | {"decode": settings | {"max_new_tokens": 24}})
            engine = open_engine(config)
            for prompt in PROMPTS:
                answer = engine.generate(Request(engine.encode(prompt), engine.settings(config)))
                stats = {key: value for key, value in answer.as_dict()["stats"].items() if key in COUNTS}
                key = {"convention": convention, "settings": name, "prompt": prompt}
                found.append(key | {"token_ids": answer.token_ids, "text": answer.text, "stats": stats})
            engine.close()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        numbers = {"machine": machine(), "trainings": trainings(Path(made) / "train"), "decodes": decodes(Path(made))}
    lines = json.dumps(numbers, indent=1)
    (HERE / "numbers.json").write_text(lines + "\n")
