"""`benchmark`: compares a converted checkpoint with its AR base on the same held-out text.

Measures likelihood (exact for the base, ELBO bound for the diffusion model), continuations of held-out documents scored
by the base, and whether completions of a small HumanEval-like set parse (they are never run).
"""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hildanext.config import Config
from hildanext.config.decoding import MODES
from hildanext.data.documents import read_documents
from hildanext.data.encode import encode_document
from hildanext.data.rows import open_rows
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.settings import resolve
from hildanext.errors import DataError
from hildanext.evaluate.ar_likelihood import Likelihood, ar_likelihood
from hildanext.evaluate.elbo import elbo
from hildanext.evaluate.judge import distinct_2, total_log_likelihood
from hildanext.evaluate.ways import seeded
from hildanext.files import write_json
from hildanext.model.ar_generate import ar_complete
from hildanext.model.backbone import check_length
from hildanext.model.loading import load_with_base
from hildanext.model.prompts import encode_prompt
from hildanext.progress import progress
from hildanext.provenance import git_revision, versions
from hildanext.training.trainer import peak_memory_mb

N_PROMPTS = 16
PROMPT_TOKENS = 48
ROWS = 16


class Continuation(NamedTuple):
    """A prompt, its continuation and what it cost."""

    prompt_ids: list[int]
    token_ids: list[int]
    seconds: float
    forwards: int
    edits: int


def _bits(likelihood: Likelihood, n_bytes: int) -> dict[str, float]:
    """A likelihood in bits. n_bytes: UTF-8 bytes of the text, without special tokens; their bits are counted."""
    bits = likelihood.nats / math.log(2)
    return {
        "bits_per_token": bits / likelihood.tokens,
        "bits_per_byte": bits / max(n_bytes, 1),
        "standard_error": likelihood.standard_error / math.log(2) / likelihood.tokens,
    }


def held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The first PROMPT_TOKENS token ids of up to N_PROMPTS held-out documents. Raises DataError if there are none."""
    path = Path(config.paths.data) / "processed" / "eval.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no held-out documents; run 'hildanext prepare-data' first")
    prompts = []
    for document in read_documents(path):
        ids = encode_document(document, tokenizer, all_tokens=True).input_ids[:-1].tolist()
        if len(ids) > PROMPT_TOKENS:
            prompts.append(ids[:PROMPT_TOKENS])
        if len(prompts) == N_PROMPTS:
            break
    if not prompts:
        raise DataError(f"{path}: no document is longer than {PROMPT_TOKENS} tokens, so no prompt can be made")
    return prompts


def _code_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    path = Path(config.paths.data) / "processed" / "humaneval_dummy.jsonl"
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    # Tokenizers merge the line break at the end of a prompt with the indent after it.
    prompts = [problem["prompt"].rstrip() for problem in problems]
    return [(prompt, encode_prompt(tokenizer, prompt)) for prompt in prompts]


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def _row(found: list[Continuation], base: PreTrainedModel, ends: tuple[int, ...]) -> dict[str, Any]:
    """The report's figures over some continuations; `parent_log_likelihood` is per token under the base, in nats."""
    log_p = [total_log_likelihood(base, text.prompt_ids, text.token_ids) for text in found]
    n_tokens = sum(len(text.token_ids) for text in found)
    return {
        "parent_log_likelihood": sum(log_p) / max(n_tokens, 1),
        "distinct_2": distinct_2([text.token_ids for text in found]),
        "share_ended": sum(bool(set(text.token_ids[-1:]) & set(ends)) for text in found) / len(found),
        "tokens": n_tokens,
        "tokens_per_forward": n_tokens / max(sum(text.forwards for text in found), 1),
        "edits": sum(text.edits for text in found),
        "tokens_per_second": n_tokens / max(sum(text.seconds for text in found), 1e-9),
    }


def benchmark(config: Config, base_name: str | None, out: Path) -> dict[str, Any]:
    """Compare the converted checkpoint `model.base` with its AR base; write the report to `out` and return it.

    Raises UsageError if `model.base` is not converted, DataError without held-out text.
    """
    lm, block_size, base, tokenizer, base_config, policy = load_with_base(config.model, base_name)
    rows = open_rows(config, "eval", lm.tokenizer)
    if rows is None:
        raise DataError("the split 'eval' has no rows; raise data.eval_share and tokenize again")
    check_length(lm.model, rows.seq_len, "data.seq_len")
    n_rows = min(ROWS, len(rows))
    batch = rows.batch(list(range(n_rows)))
    counted = batch["loss_mask"] & (batch["position_ids"] > 0)
    # Text only: special tokens, such as the end of text, have no letters.
    n_bytes = sum(
        len(str(tokenizer.decode(ids[keep].tolist(), skip_special_tokens=True)).encode())
        for ids, keep in zip(batch["input_ids"], counted, strict=True)
    )
    micro = config.train.micro_batch
    exact = _bits(ar_likelihood(base, rows, n_rows, micro), n_bytes)
    # EXACT writes the base's text, so a gated checkpoint's likelihood is the base's.
    bound = exact if lm.gated else _bits(elbo(lm, rows, block_size, n_rows, micro, seed=config.evaluate.seed), n_bytes)
    report: dict[str, Any] = {
        "model": config.model.base,
        "base": base_config.base,
        "convention": lm.convention,
        "block_size": block_size,
        "device": str(policy.device),
        "dtype": str(policy.compute),
        "versions": versions(),
        "git": git_revision(),
        "likelihood": {
            "text_tokens": int(counted.sum()),
            "ar_exact": exact,
            "dllm_bound": bound,
        },
    }
    engine = TransformersEngine(config, {}, lm)
    report["continuation"], report["code"] = _continuations(config, engine, base, tokenizer)
    report["peak_memory_mb"] = peak_memory_mb(policy.device)
    write_json(out, report)
    return report | {"out": str(out), "stdout": table(report)}


def _continuations(
    config: Config, engine: TransformersEngine, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's entries `continuation` and `code`: figures of the base and of each mode."""
    texts, problems = held_out_prompts(config, tokenizer), _code_prompts(config, tokenizer)
    budget, block = config.decode.max_new_tokens, engine.trained_block
    assert block is not None
    changes: dict[str, dict[str, Any]] = {
        "q_mode": {"mode": "Q_MODE"},
        "s_mode": {"mode": "S_MODE"},
        "s_mode_no_edit": {"mode": "S_MODE", "tau_edit": None},
    }
    if engine.kind == "gated":
        changes = {mode.lower(): {"mode": mode} for mode in MODES}
    settings = {
        name: resolve(seeded(config).model_copy(update=change), block, engine.presets, engine.kind)
        for name, change in changes.items()
    }
    prose: dict[str, Any] = {}
    code: dict[str, Any] = {"problems": len(problems), "executed": False}
    total = (len(settings) + 1) * (len(texts) + len(problems))
    done = 0
    with progress("benchmark", total, "completions") as advance:
        for name in ("ar", *settings):
            continuations, parsed = [], 0
            for number, prompt in enumerate([*texts, *(ids for _, ids in problems)]):
                if name == "ar":
                    answer = ar_complete(base, tokenizer, prompt, budget)
                    found = Continuation(prompt, answer.token_ids, answer.seconds, len(answer.token_ids), 0)
                else:
                    engine.scheduler.reset_prefix_cache()  # no prompt cache: the AR base has none either
                    completion = engine.generate(Request(prompt, settings[name]))
                    stats = completion.stats
                    found = Continuation(prompt, completion.token_ids, stats.seconds, stats.forwards, stats.edits)
                if number < len(texts):
                    continuations.append(found)
                else:
                    parsed += _parses(problems[number - len(texts)][0] + engine.decode_tokens(found.token_ids))
                done += 1
                advance(done, name)
            prose[name] = _row(continuations, base, engine.eos_token_ids)
            code[name] = {"parses": parsed}
    return prose, code


def table(report: dict[str, Any]) -> str:
    """The report as a plain-text table."""
    exact, bound = report["likelihood"]["ar_exact"], report["likelihood"]["dllm_bound"]
    lines = [
        f"{report['model']} (block {report['block_size']}, {report['convention']}) against {report['base']} "
        f"on {report['device']}, {report['dtype']}",
        f"held-out text: base {exact['bits_per_token']:.3f} bits/token ({exact['bits_per_byte']:.3f} bits/byte), "
        f"exact; diffusion <= {bound['bits_per_token']:.3f} +- {bound['standard_error']:.3f} "
        f"({bound['bits_per_byte']:.3f} bits/byte)",
        "",
        f"{'':16}{'tokens/s':>10}{'TPF':>8}{'edits':>8}{'base logp':>13}{'distinct-2':>12}{'ended':>8}"
        f"{'code parses':>13}",
    ]
    for name, row in report["continuation"].items():
        parsed = f"{report['code'][name]['parses']}/{report['code']['problems']}"
        lines.append(
            f"{name:16}{row['tokens_per_second']:10.1f}{row['tokens_per_forward']:8.2f}{row['edits']:8d}"
            f"{row['parent_log_likelihood']:13.3f}{row['distinct_2']:12.3f}{row['share_ended']:8.2f}{parsed:>13}"
        )
    lines.append(f"peak memory {report['peak_memory_mb']:.0f} MB")
    return "\n".join(lines)
