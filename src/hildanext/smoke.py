"""`smoke-test`: runs every stage once, in seconds, on a tiny random model or on the configured one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hildanext.config import Config, parse_config
from hildanext.data.prepare import prepare_data
from hildanext.data.synthetic import synthetic_instructions
from hildanext.data.tokenize import tokenize_data
from hildanext.decoding.engines import Request, open_engine
from hildanext.files import writing
from hildanext.model.pretrained import load_tokenizer
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.training.convert import convert_wsd, sft


def smoke_config(folder: Path, base: str) -> Config:
    """A configuration that trains one step per stage and writes only into `folder`."""
    return parse_config(
        {
            "paths": {"data": str(folder / "data"), "runs": str(folder / "runs")},
            "model": {"base": base},
            "data": {
                "sources": [
                    {"kind": "tinystories", "documents": 30},
                    {"kind": "instruct", "path": str(folder / "instructions.jsonl")},
                ],
                "seq_len": 128,
                "eval_share": 0.1,
            },
            "wsd": {"warmup_steps": 0, "stable_steps": 1, "decay_steps": 0, "peak_block": 8, "final_block": 8},
            "train": {"rows_per_step": 2, "micro_batch": 2, "eval_rows": 2},
            "sft": {"steps": 1},
            "decode": {"max_new_tokens": 16},
            "engine": {"runtime": "eager", "slots": 1},
        }
    )


def smoke_test(config: Config | None = None) -> dict[str, Any]:
    """Load, prepare, tokenize, convert one step, tune one step, generate. `config` selects a real model."""
    with tempfile.TemporaryDirectory(prefix="hildanext-smoke-") as name:
        folder = Path(name)
        if config is None:
            tokenizer = story_tokenizer()
            base = str(folder / "base")
            with writing(Path(base)):
                tiny_llama(tokenizer, hidden=32, layers=2, context=256, seed=0).save_pretrained(base)
                tokenizer.save_pretrained(base)
        else:
            base = config.model.base
        lines = (json.dumps(conversation) + "\n" for conversation in synthetic_instructions(20, seed=2))
        (folder / "instructions.jsonl").write_text("".join(lines), encoding="utf-8")
        first = smoke_config(folder, base)
        prepare_data(first)
        tokenize_data(first, load_tokenizer(first.model))
        converted = convert_wsd(first)
        tuned = sft(smoke_config(folder, converted["checkpoint"]))
        final = smoke_config(folder, tuned["checkpoint"])
        engine = open_engine(final)
        ids = engine.encode([{"role": "user", "content": "Tell a story about Mia with a kite."}])
        completion = engine.generate(Request(ids, engine.settings(final)))
        engine.close()
    return {
        "model": base if config is not None else "tiny random Llama",
        "convert_tokens": converted["tokens_seen"],
        "sft_tokens": tuned["tokens_seen"],
        "engine": completion.engine,
        "forwards": completion.stats.forwards,
        "stdout": f"OK: converted, tuned and decoded {len(completion.token_ids)} tokens ({completion.engine} engine)",
    }
