"""Export for diffusers' LLaDA2Pipeline: the checkpoint, and a subclass of its class that attends in blocks.

The pipeline hands a model a 2-D attention mask, under which a stock causal LM would read from left to right.
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from hildanext.decoding.settings import Settings
from hildanext.errors import UsageError
from hildanext.export.source import (
    Checkpoint,
    copy_files,
    never_decoded,
    other_files,
    require_servable,
    require_space,
)
from hildanext.export.weights import by_file, write_shards
from hildanext.files import atomic_open, new_folder, write_json

REMOTE = Path(__file__).parent / "remote"
TARGET = "diffusers"
EVERY_CHANGE = 1e-9  # for tau_edit 0: diffusers takes 0 for no editing
MODELING = Template('''"""$base, which attends in blocks: for diffusers' LLaDA2Pipeline."""

from transformers import $base

from .block_diffusion import BlockDiffusion


class BlockDiffusionForCausalLM(BlockDiffusion, $base):
    """Logits [B, L, V] that predict the token at each position."""
''')


def export_diffusers(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    """Write the new folder `out` atomically. Returns what was written.

    Raises UsageError for a model whose texts the pipeline cannot write, WriteError if there is no room.
    """
    require_servable(checkpoint, TARGET)
    if checkpoint.has_indels:
        raise UsageError(
            f"'{checkpoint.folder}' was trained to insert and delete, which diffusers cannot do; convert with noise.edits "
            "'substitution', or use --to sdar for SGLang"
        )
    tensors = checkpoint.tensors()
    shards = list(by_file(tensors).values())
    n_bytes = sum(stored.n_bytes for stored in tensors.values())
    require_space(out, n_bytes + sum(path.stat().st_size for path in other_files(checkpoint)))
    settings = checkpoint.settings("Q_MODE")
    with new_folder(out) as folder:
        copy_files(other_files(checkpoint, ("config.json", "README.md")), checkpoint.folder, folder)
        write_shards(folder, shards, [])
        copy_files([REMOTE / "block_diffusion.py"], REMOTE, folder)
        with atomic_open(folder / "modeling_block_diffusion.py") as file:
            file.write(MODELING.substitute(base=checkpoint.architecture))
        ids = never_decoded(checkpoint.tokenizer, checkpoint.mask_token_id, checkpoint.config["vocab_size"])
        write_json(
            folder / "config.json",
            checkpoint.config
            | {
                "auto_map": {"AutoModelForCausalLM": "modeling_block_diffusion.BlockDiffusionForCausalLM"},
                "never_decoded": ids,
            },
        )
        write_json(
            folder / "scheduler_config.json",
            {
                "_class_name": "BlockRefinementScheduler",
                "block_length": settings.block_size,
                "num_inference_steps": inference_steps(settings),
                "threshold": settings.tau_mask,
                "editing_threshold": editing_threshold(settings),
                "minimal_topk": 1,
            },
        )
        with atomic_open(folder / "README.md") as file:
            file.write(card(checkpoint, settings, out.name))
    return {"out": str(out), "shards": len(shards), "bytes": n_bytes}


def inference_steps(settings: Settings) -> int:
    """`num_inference_steps`: more than a block can take, so that every pass fills at least one mask and none more must."""
    return 2 * settings.block_size


def editing_threshold(settings: Settings) -> float:
    """`editing_threshold`: 0 is off for diffusers, where it takes every change here. None would be the scheduler's own."""
    return 0.0 if settings.tau_edit is None else max(settings.tau_edit, EVERY_CHANGE)


def post_steps(settings: Settings) -> int:
    """`max_post_steps`: diffusers makes one pass more than it is told."""
    return settings.max_post_steps - 1


def call_arguments(settings: Settings) -> dict[str, Any]:
    """What LLaDA2Pipeline is called with to write the text that HildaNext writes with these settings, greedily."""
    return {
        "block_length": settings.block_size,
        "num_inference_steps": inference_steps(settings),
        "threshold": settings.tau_mask,
        "editing_threshold": editing_threshold(settings),
        "max_post_steps": post_steps(settings),
        "sampling_method": "greedy",
        "eos_early_stop": False,
    }


def card(checkpoint: Checkpoint, settings: Settings, folder: str) -> str:
    """README.md of the exported folder."""
    arguments = "".join(f"    {name}={value!r},\n" for name, value in call_arguments(settings).items())
    return f"""---
library_name: diffusers
pipeline_tag: text-generation
---

# {checkpoint.base} as a block-diffusion model, for diffusers

Converted and exported by HildaNext {checkpoint.record["version"]}. Blocks of {settings.block_size} tokens. The folder
brings code, `block_diffusion.py` and `modeling_block_diffusion.py`: read it before you trust it.

```python
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

pipe = LLaDA2Pipeline(
    model=AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True),
    scheduler=BlockRefinementScheduler.from_pretrained("{folder}"),
    tokenizer=AutoTokenizer.from_pretrained("{folder}"),
)
output = pipe(
    prompt="Hello",
    gen_length={8 * settings.block_size},
{arguments})
```

These arguments give the text that HildaNext writes in Q_MODE, greedily; cut it after the end-of-text token. With
`eos_early_stop=True` the pipeline stops in the middle of a block, before its corrections. `gen_length` must be twice the
block length or more: a smaller one lowers `num_inference_steps`, and then passes fill masks below the threshold.
"""
