"""dInfer (inclusionAI/dInfer) for LLaDA-family checkpoints on CUDA, in its own worker processes.

Features that it lacks (editing, a second threshold, seeds) are listed in every completion. Importing dInfer imports
vLLM, so `can_serve` checks for it without an import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from hildanext.config import Config, EngineName
from hildanext.decoding.engines.protocol import (
    AS_USUAL,
    Completion,
    Event,
    Prompt,
    Rendering,
    Request,
    Stats,
    last_completion,
    refuse_grammar,
)
from hildanext.decoding.events import Finished
from hildanext.decoding.grammar import Grammar
from hildanext.decoding.settings import MODES_OF, Settings, check_request, resolve
from hildanext.errors import ModelError
from hildanext.model.pretrained import load_tokenizer, read_config_dict, read_generation_config
from hildanext.model.prompts import decode_prompt, encode_prompt, end_ids

# model_type in config.json -> (dInfer's model_type argument, the runtime whose worker loads that family)
FAMILIES = {"llada2_moe": ("llada2", "sglang"), "llada": ("llada", "vllm"), "dllm": ("llada-moe", "vllm")}
# Settings that its workers know nothing of.
SAMPLING = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
)
DEFAULT_BLOCK = 32  # LLaDA2.x is trained with blocks of 32


def fitting(
    target: Callable[..., Any], needed: dict[str, Any], wanted: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The arguments in `needed` and `wanted` that `target` accepts by name, and a line for each wanted one it lacks.

    dInfer's versions differ in their parameters. `**kwargs` does not count: it would hide a renamed parameter. Raises
    ModelError with the names of needed parameters that are missing.
    """
    parameters = inspect.signature(target).parameters
    name = target.__qualname__
    if missing := sorted(set(needed) - set(parameters)):
        raise ModelError(f"this dInfer's {name} has no parameter {', '.join(missing)}; install a version that has it")
    given = needed | {key: value for key, value in wanted.items() if key in parameters}
    return given, [
        f"{key} {value}: this dInfer's {name} has no such parameter"
        for key, value in wanted.items()
        if key not in given
    ]


def other_handle_runs() -> bool:
    """Whether dInfer's workers already run in this process. Imports nothing: without its module they cannot run."""
    module: Any = sys.modules.get("dinfer.decoding.serving")
    handle = module.__dict__.get("handle") if module is not None else None
    return handle is not None and hasattr(handle, "is_running") and bool(handle.is_running())


class DInferEngine:
    """One dInfer server group per process. Its workers keep the sampling parameters that they were started with."""

    name: EngineName = "dinfer"
    modes = MODES_OF["blocks"]
    has_base = False
    trained_block: int | None = DEFAULT_BLOCK
    device: str | None = "cuda"
    dtype: str | None = None  # chosen by dInfer
    policy: dict[str, object] | None = None
    slots = 1
    mask_token_id: int | None = None  # dInfer reports no passes

    def __init__(self, config: Config, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        self.tokenizer = load_tokenizer(config.model)
        # dInfer itself stops at the tokenizer's end-of-text token only.
        self.eos_token_ids = end_ids(self.tokenizer, read_generation_config(config.model).get("eos_token_id"))
        model_config = read_config_dict(config.model)
        self.context: int | None = int(model_config.get("max_position_embeddings", 4096))
        self.started = self.settings(config)
        mask_id = self.tokenizer.mask_token_id
        if mask_id is None:
            mask_id = model_config.get("mask_token_id")
        if mask_id is None or self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"model '{config.model.base}' has no mask token or no end-of-text token; dInfer needs both"
            )
        family, _ = FAMILIES[model_config["model_type"]]
        dinfer: Any = importlib.import_module("dinfer")
        sampling = {
            "threshold": self.started.tau_mask,
            "temperature": self.started.temperature,
            "mask_id": mask_id,
            "eos_id": self.tokenizer.eos_token_id,
            "use_bd": family == "llada2",
        }
        optional = {
            "cache": "prefix",
            "early_stop": True,
            "parallel_decoding": "threshold",
            "max_length": self.context,
        }
        sampling, unknown = fitting(dinfer.SamplingParams, sampling, optional)
        group, more = fitting(
            dinfer.DiffusionLLMServing,
            {
                "model": config.model.base,
                "model_type": family,
                "sample_params": dinfer.SamplingParams(**sampling),
                "backend": config.engine.dinfer_backend,
            },
            {
                "server_port": config.engine.dinfer_port,
                "num_gpus": config.engine.dinfer_gpus,
                "dp_size": 1,
                "tpep_size": config.engine.dinfer_gpus,
            },
        )
        self.not_passed = unknown + more
        self.serving = dinfer.DiffusionLLMServing(**group)
        self.forwards_before = 0

    @staticmethod
    def can_serve(config: Config) -> str | None:
        try:
            version: str | None = importlib.metadata.version("dinfer")
        except importlib.metadata.PackageNotFoundError:
            version = None
        if importlib.util.find_spec("dinfer") is None:
            if version is not None:
                return f"the installed dinfer {version} is an unrelated placeholder package; install dInfer from git (inclusionAI/dInfer)"
            return "dInfer is not installed (from git: inclusionAI/dInfer)"
        if not torch.cuda.is_available():
            return "dInfer needs a CUDA GPU, and this machine has none"
        model_config = read_config_dict(config.model)
        if model_config.get("model_type") not in FAMILIES:
            return f"dInfer serves {', '.join(FAMILIES)} checkpoints, not '{model_config.get('model_type')}'"
        convention = model_config.get("hilda", {}).get("convention", "in_place")
        if convention != "in_place":
            return f"dInfer supports 'in_place' prediction only, and this checkpoint is '{convention}'"
        if "edits" in model_config.get("hilda", {}) and config.decode.min_indel_confidence is not None:
            return "dInfer has no insertions and deletions, for which this checkpoint was trained; set decode.min_indel_confidence to null"
        family, backend = FAMILIES[model_config["model_type"]]
        if config.engine.dinfer_backend != backend:
            return f"dInfer runs {family} on '{backend}' only; set engine.dinfer_backend to '{backend}'"
        # dInfer imports vLLM with either runtime.
        for runtime in dict.fromkeys((backend, "vllm")):
            if importlib.util.find_spec(runtime) is None:
                return f"dInfer's runtime '{runtime}' is not installed"
        if other_handle_runs():
            return "dInfer already runs in this process with its own model and parameters; close that engine first"
        return None

    def encode(self, prompt: Prompt, known: list[int] | None = None, rendering: Rendering = AS_USUAL) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, known, **rendering._asdict())

    def settings(self, config: Config) -> Settings:
        return resolve(config.decode, DEFAULT_BLOCK)

    def compile(self, grammar: Grammar) -> NoReturn:
        refuse_grammar(self.name)

    def decode_tokens(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def detokenize(self, token_ids: list[int]) -> str:
        return decode_prompt(self.tokenizer, token_ids)

    def ignored(self, settings: Settings) -> list[str]:
        """One line for each setting of a request that dInfer does not support."""
        lines = []
        if settings.tau_edit is not None:
            lines.append(f"tau_edit {settings.tau_edit:g}: dInfer has no editing")
            lines.append(f"max_post_steps {settings.max_post_steps}: dInfer has no correction passes")
            if settings.edit_blocks:
                lines.append(f"edit_blocks {settings.edit_blocks}: dInfer has no editing")
        for name in ("tau_mask", "temperature"):
            asked, running = settings._asdict()[name], self.started._asdict()[name]
            if asked != running:
                lines.append(f"{name} {asked:g}: the workers were started with {running:g} and cannot change it")
        if max(settings.temperature, self.started.temperature) > 0:
            lines.append(f"seed {settings.seed}: dInfer has no seed")
        usual, asked_for = Settings._field_defaults, settings._asdict()
        lines += [f"{name}: dInfer does not support it" for name in SAMPLING if asked_for[name] != usual[name]]
        return lines + self.not_passed

    def answer_of(self, output: list[int], prompt_ids: list[int]) -> list[int]:
        """The new tokens in dInfer's output. Raises ModelError if the output does not begin with the prompt.

        At batch 1 dInfer deletes all end-of-text ids, also those of the prompt. So the output must begin with the
        prompt as sent, or with the prompt without those ids; cutting off the prompt's length would be wrong.
        """
        eos = self.tokenizer.eos_token_id
        for prefix in (prompt_ids, [i for i in prompt_ids if i != eos]):
            if output[: len(prefix)] == prefix:
                new = output[len(prefix) :]
                return next((new[:i] for i, token in enumerate(new) if token in self.eos_token_ids), new)
        raise ModelError("dInfer's output does not begin with the prompt; this version of dInfer is not supported")

    def forwards(self) -> int:
        """The forwards of the last request. dInfer's workers count them from their start."""
        total = int(self.serving.num_forwards)
        spent = total - self.forwards_before
        self.forwards_before = total
        return spent

    def generate(self, request: Request) -> Completion:
        return last_completion(self.stream(request))

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield the completion as one finished block: dInfer reports no passes."""
        settings = request.settings
        check_request(request.prompt_ids, settings, self.context)
        began = time.perf_counter()
        output = self.serving.generate(
            torch.tensor([request.prompt_ids]), gen_length=settings.max_new_tokens, block_length=settings.block_size
        )
        seconds = time.perf_counter() - began
        new = self.answer_of(output[0].tolist(), request.prompt_ids)
        stopped = len(new) < settings.max_new_tokens
        new = new[: settings.max_new_tokens]
        forwards = self.forwards()
        yield Finished(0, new, self.decode_tokens(new))
        yield Completion(
            text=self.decode_tokens(new),
            token_ids=new,
            finish_reason="stop" if stopped else "length",
            engine=self.name,
            engine_reasons=self.reasons,
            mode=settings.mode,
            tau_mask=self.started.tau_mask,
            tau_edit=None,
            stats=Stats(forwards, 0, len(new) / max(forwards, 1), [], len(new), 0, seconds, len(new) / seconds),
            ignored=self.ignored(settings),
        )

    def rest(self) -> None:
        """Nothing to free: the memory is that of the workers."""

    def close(self) -> None:
        self.serving.stop_serving()
