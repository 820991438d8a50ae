"""The `dpo` command: preference tuning of a converted checkpoint. The loss is in `preference.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hildanext.config import Config
from hildanext.data.corpus import is_held_out
from hildanext.data.documents import Rejects
from hildanext.data.preferences import ConversationPair, PreferencePairs, encode_pairs, read_pairs
from hildanext.diffusion.schedule import sft_point
from hildanext.errors import ConfigError, DataError, UsageError
from hildanext.model.adapter_file import SETTINGS, WEIGHTS, read_adapter
from hildanext.model.backbone import check_length
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.lora import fresh_values, values_of
from hildanext.model.pretrained import find_file
from hildanext.progress import say
from hildanext.training.preference import Preference, PreferenceTask
from hildanext.training.run import open_run, run_job
from hildanext.training.trainer import TrainingJob


def dpo(config: Config, name: str = "dpo", resume: bool = False) -> dict[str, Any]:
    """Tune a converted checkpoint on preference pairs. Returns a summary with the last checkpoint's path.

    Raises ConfigError without `lora.rank` or `dpo.pairs`, UsageError for a model that is not converted, DataError when
    there are no pairs or too many unusable records.
    """
    tune = config.dpo
    if config.lora.rank is None:
        raise ConfigError("'lora.rank': dpo trains an adapter beside the reference model; set a rank")
    if config.lora.gate:
        raise ConfigError(
            "'lora.gate': dpo tunes what a model writes, and a gated adapter writes its base's text; set it to false"
        )
    if tune.pairs is None:
        raise ConfigError("'dpo.pairs': no file of preference pairs is set; give one")
    opened = open_run(config, name, "dpo", resume)
    lm = opened.lm
    block = tune.block_size or lm.block_size
    if block is None:
        raise UsageError(
            f"model '{lm.name}' is not converted; run 'hildanext convert-wsd' and give its checkpoint as model.base"
        )
    check_length(lm.model, config.data.seq_len, "data.seq_len")
    pairs, held_out = open_pairs(config, lm, block)
    recipe = Preference(tune.beta, tune.draws, tune.complementary, *tune.mask_band)
    job = TrainingJob(
        title="dpo",
        steps=tune.steps,
        point=lambda step: sft_point(step, tune, config.train.lr_final_ratio, block),
        eval_block=block,
    )
    task = PreferenceTask(config, lm, opened.accelerator, recipe, pairs, held_out, block, reference(config, lm))
    return run_job(config, opened, job, task)


def open_pairs(config: Config, lm: DiffusionLM, block_size: int) -> tuple[PreferencePairs, PreferencePairs | None]:
    """Training pairs and held-out pairs, split by a hash of the first question; None if no pair is held out."""
    assert config.dpo.pairs is not None
    rejects = Rejects()
    read = list(read_pairs(config.dpo.pairs, rejects))
    parts: list[list[ConversationPair]] = [[], []]
    for pair in read:
        parts[is_held_out(pair.chosen, config.data.eval_share)].append(pair)
    length = config.data.seq_len
    fitted = [encode_pairs(part, lm.tokenizer, length, block_size, rejects) for part in parts]
    n_pairs = sum(len(part.pairs) for part in fitted)
    n_cut, n_left_out = sum(part.n_cut for part in fitted), sum(part.n_left_out for part in fitted)
    rejects.check(n_pairs + n_left_out, config.data.max_reject_share)
    if rejects.total:
        say(f"dpo: {rejects.total} records rejected: {rejects}")
    if n_cut or n_left_out:
        say(
            f"dpo: data.seq_len {length} cuts {n_cut} of {2 * n_pairs} answers and leaves out {n_left_out} pairs whose prompt "
            "is longer; raise it to keep more"
        )
    found = [PreferencePairs(part.pairs, lm.tokenizer, config.train.seed, length) for part in fitted]
    if not found[0]:
        raise DataError(f"{config.dpo.pairs}: no preference pairs to train on")
    if not found[1]:
        say("dpo: no held-out pairs: no evaluation, and no best checkpoints are kept (raise data.eval_share)")
    return found[0], found[1] or None


def reference(config: Config, lm: DiffusionLM) -> dict[str, Tensor]:
    """The adapter's values at the start of the run, also for a resumed run: those of `model.base`, or of a new adapter."""
    weights, settings = find_file(config.model, WEIGHTS), find_file(config.model, SETTINGS)
    if weights is None or settings is None:
        return fresh_values(lm.model)
    return values_of(lm.model, read_adapter(weights, settings)[0], config.model.base)
