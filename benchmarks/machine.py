"""For decode.py: memory at batch 8, and the cost of a pass as the context grows."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.runtimes.protocol import pad_batch
from hildanext.model.decoding_attention import grouped_attention

MEMORY = """
import gc, json, sys, torch
from hildanext.config import parse_config
from hildanext.decoding.settings import Settings
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.engines import Request
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import load_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
config = parse_config({"model": {"base": sys.argv[1], "dtype": "bfloat16"},
    "engine": {"runtime": "eager", "slots": 8, "context": 2048, "prefill_chunk": 128}})
now = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
def tiny(tokenizer):  # loads all but the model: libraries, the tokenizer, a decode with a tiny model
    small = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2048)).bfloat16()
    lm = DiffusionLM(small, tokenizer, mask_token_id=5, block_size=8, convention="shifted", record={})
    TransformersEngine(config, {}, lm).generate(Request([7] * 100, wanted))
wanted = Settings("S_MODE", 0.0, None, 16, 8, 16, 0.0, 0)
tokenizer = load_tokenizer(config.model)
tiny(tokenizer)
gc.collect()
before = now()
lm, _ = load_diffusion_lm(config.model)
lm.block_size = lm.block_size or 8
engine = TransformersEngine(config, {}, lm)
loaded = now()
open("/proc/self/clear_refs", "w").write("5")  # resets the peak: loading has a peak of its own
g = torch.Generator().manual_seed(0)
requests = [Request(torch.randint(5, 40000, (2032,), generator=g).tolist(), wanted) for _ in range(8)]
engine.generate_batch(requests)
lines = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
top = int(lines["VmHWM"].split()[0]) * 1024
model = lm.model
weights = sum(p.numel() * p.element_size() for p in model.parameters())
cache = sum(t.numel() * t.element_size() for l in engine.runtime.cache.slot_layers for t in (l.keys, l.values))
c = model.config
by_hand = 2 * c.num_hidden_layers * 8 * 2048 * c.num_key_value_heads * c.head_dim * 2
print(json.dumps({"weights": weights, "cache": by_hand, "allocated_cache": cache, "before": before, "loaded": loaded, "peak": top}))
"""


def memory_at_batch_8(model: str) -> dict[str, Any]:
    """Peak resident memory of eight sequences of 2,048 tokens, in a fresh process, over calculated weights + cache."""
    output = subprocess.run([sys.executable, "-c", MEMORY, model], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    found["over"] = (found["peak"] - found["before"]) / (found["weights"] + found["cache"])
    return found


@torch.inference_mode()
def context_costs(engine: TransformersEngine) -> dict[str, Any]:
    """Milliseconds of a denoising pass of 8 tokens after K cached tokens, and of the attention in that pass."""
    runtime, block, rows = engine.runtime, 8, []
    spent = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        began = time.perf_counter()
        result = grouped_attention(*args, **kwargs)
        spent += time.perf_counter() - began
        return result

    AttentionInterface.register("timed", timed)
    assert engine.lm is not None
    engine.lm.model.set_attn_implementation("timed")
    runtime.allocate(1, 4352)
    for context in (256, 512, 1024, 2048, 4096):
        batch = pad_batch([([5] * block, context, [context + block] * block)], 0)
        steps, attention = [], []
        for _ in range(25):
            spent, began = 0.0, time.perf_counter()
            runtime.body(batch)
            steps.append(time.perf_counter() - began)
            attention.append(spent)
        rows.append({"context": context, "step_ms": _ms(steps), "attention_ms": _ms(attention)})
    first, last = rows[0], rows[-1]
    attention, whole = (last[key] - first[key] for key in ("attention_ms", "step_ms"))
    return {
        "rows": rows,
        "attention": last["attention_ms"] / first["attention_ms"],
        "pass": last["step_ms"] / first["step_ms"],
        "milliseconds": whole / attention,
    }


def _ms(values: list[float]) -> float:
    return statistics.median(values[3:]) * 1e3


def draw_contexts(found: dict[str, Any], path: Path) -> None:
    """Plot the time of a pass and of its attention over the context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    contexts = [row["context"] for row in found["rows"]]
    axis.plot(contexts, [row["step_ms"] for row in found["rows"]], "o-", label="denoising pass of 8 tokens")
    axis.plot(contexts, [row["attention_ms"] for row in found["rows"]], "o-", label="its attention alone")
    first = found["rows"][0]
    expected = [first["step_ms"] + row["attention_ms"] - first["attention_ms"] for row in found["rows"]]
    axis.plot(contexts, expected, "k--", linewidth=1, label="pass at 256 + growth of attention")
    axis.set(xlabel="cached tokens", ylabel="milliseconds", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
