"""The parity kit: two tiny models, 40 prompts for each, and the tokens that a greedy decoder of block diffusion must write.

    PYTHONPATH=src:tests python -m parity.kit write FOLDER      the models, and cases.json without the answers
    PYTHONPATH=src:tests python -m parity.kit check FILE.json   compare a decoder's answers with golden.json
    PYTHONPATH=src:tests python -m parity.kit make              write golden.json anew

docs/parity.md describes the files. The weights come from integer arithmetic, so they are the same on every machine.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hildanext.export.diffusers import export_diffusers
from hildanext.export.sdar import export_sdar
from hildanext.export.source import open_checkpoint
from hildanext.files import write_json
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import save_diffusion_lm
from parity.loops import Settings, paper_loop, served_loop

GOLDEN = Path(__file__).parent / "golden.json"
MODELS = ("qwen3", "llama")
EOS, MASK, SERVED_MASK, ROWS = 11, 60, 62, 64  # 61 to 63 pad the vocabulary; a server's mask token has an id of its own
BLOCK, NEW, CONTEXT = 8, 24, 96
ROPE_THETA = {"qwen3": 500.0, "llama": 2_000_000.0}
SETTINGS: dict[str, Settings] = {
    "S": Settings(0.5, 0.0, 16),
    "Q": Settings(0.7, 0.5, 16),
    "off": Settings(0.7, None, 16),
    "capped": Settings(0.5, 0.0, 2),  # two editing passes and not one more
}


# --- The models


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1), float32, from SplitMix64 (Steele et al. 2014): integers only, the same everywhere."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, math.prod(shape) + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    values = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return torch.from_numpy(values.reshape(shape))


def build(name: str) -> PreTrainedModel:
    """A model with fixed weights. Qwen3 has tied heads; both have rows that pad the vocabulary and would often win."""
    sizes: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA[name]},
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    model: PreTrainedModel = (
        Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **sizes))
        if name == "qwen3"
        else LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **sizes))
    )
    with torch.no_grad():
        for number, (key, parameter) in enumerate(sorted(model.named_parameters())):
            drawn = uniform(1000 * MODELS.index(name) + number, tuple(parameter.shape))
            parameter.copy_(1 + 0.3 * drawn if parameter.ndim == 1 else 0.6 * drawn)
            if key.startswith(("model.embed_tokens", "lm_head")):
                parameter[MASK + 1 :] *= 3
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens t0 to t59, of which t11 ends a text, and the mask token."""
    words = {("<|end|>" if i == EOS else f"t{i}"): i for i in range(MASK)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="t0")
    made.add_special_tokens({"mask_token": "<|mask|>"})
    assert made.mask_token_id == MASK
    return made


def write_models(folder: Path) -> None:
    """FOLDER/NAME is HildaNext's checkpoint, FOLDER/NAME-diffusers and FOLDER/qwen3-sdar are its exports."""
    for name in MODELS:
        record = {"base_model": f"parity-{name}", "base_revision": None, "tokens_trained": 0}
        lm = DiffusionLM(
            build(name), tokenizer(), mask_token_id=MASK, block_size=BLOCK, convention="in_place", record=record
        )
        save_diffusion_lm(lm, folder / name)
        checkpoint = open_checkpoint(folder / name)
        export_diffusers(checkpoint, folder / f"{name}-diffusers")
        if name == "qwen3":
            export_sdar(checkpoint, folder / "qwen3-sdar", SERVED_MASK)


# --- The cases


def cases() -> list[dict[str, Any]]:
    """The golden cases: model, prompt, name of the settings, completion."""
    found: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    return found


def make(folder: Path) -> dict[str, Any]:
    """Choose prompts of 1 to 40 tokens for which no decision is close, and write down what the equations give.

    A prompt is passed over if a threshold or a second choice is within 3e-4 of deciding otherwise, so that rounding in
    another runtime cannot matter, or if a server that gives padding rows a share of the probability writes another text.
    """
    found = []
    for name in MODELS:
        model = build(name).double()
        served = served_model(folder).double() if name == "qwen3" else None
        rng = np.random.default_rng(0)
        for number in range(40):
            setting = list(SETTINGS)[(number + number // 8) % 4]
            while True:
                prompt = [int(i) for i in rng.integers(0, MASK, number + 1) if i != EOS] or [1]
                prompt = (prompt * (number + 1))[: number + 1]
                result = paper_loop(model, prompt, SETTINGS[setting], BLOCK, NEW, MASK, EOS)
                if result.margin < 3e-4:
                    continue
                if served is not None and result.tokens != served_loop(
                    served, prompt, SETTINGS[setting], BLOCK, NEW, SERVED_MASK, EOS
                ):
                    continue
                break
            found.append({"model": name, "prompt": prompt, "settings": setting, "completion": result.tokens})
    return {
        "block_size": BLOCK,
        "max_new_tokens": NEW,
        "eos_token_id": EOS,
        "settings": settings_json(),
        "cases": found,
    }


def served_model(folder: Path) -> Qwen3ForCausalLM:
    """The exported weights in a stock Qwen3, as a server that knows nothing of `never_decoded` runs them."""
    config = build("qwen3").config
    config.tie_word_embeddings = False
    model: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(folder / "qwen3-sdar", config=config)
    return model.eval()


def settings_json() -> dict[str, Any]:
    return {name: found._asdict() for name, found in SETTINGS.items()}


def check(answers: list[dict[str, Any]]) -> list[str]:
    """What differs from the golden tokens, a line for each case; an answer has the case's index and its completion."""
    golden, wrong = cases(), []
    given = {answer["case"]: answer["completion"] for answer in answers}
    for number, case in enumerate(golden):
        if number not in given:
            wrong.append(f"case {number}: no answer")
        elif given[number] != case["completion"]:
            where = next(
                (i for i, (a, b) in enumerate(zip(given[number], case["completion"], strict=False)) if a != b),
                min(len(given[number]), len(case["completion"])),
            )
            wrong.append(
                f"case {number} ({case['model']}, {case['settings']}, prompt of {len(case['prompt'])} tokens): differs at "
                f"token {where}"
            )
    return wrong


def main(words: list[str]) -> int:
    """The three commands of the module."""
    if words == ["make"]:
        with tempfile.TemporaryDirectory() as temporary:
            write_models(Path(temporary))
            made = make(Path(temporary))
        lines = [json.dumps(case) for case in made.pop("cases")]
        head = json.dumps(made, indent=2)[:-2]
        GOLDEN.write_text(f'{head},\n  "cases": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n", encoding="utf-8")
        return 0
    if len(words) == 2 and words[0] == "write":
        folder = Path(words[1])
        write_models(folder)
        golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
        asked = [
            {"case": number} | {key: case[key] for key in ("model", "prompt", "settings")}
            for number, case in enumerate(golden["cases"])
        ]
        write_json(folder / "cases.json", golden | {"cases": asked})
        return 0
    if len(words) == 2 and words[0] == "check":
        wrong = check(json.loads(Path(words[1]).read_text(encoding="utf-8")))
        print("\n".join([*wrong, f"{len(cases()) - len(wrong)} of {len(cases())} texts are the golden ones"]))
        return 1 if wrong else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
