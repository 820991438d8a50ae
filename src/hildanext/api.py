"""HildaNext from Python: load a model, complete prompts, watch the passes, and score text.

import hildanext

with hildanext.load("hilda-smollm2-135m", max_new_tokens=96) as model:
    print(model.generate("Tell me a short story about a shy fox."))
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, overload

from hildanext.config import SHIPPED_MODEL, Config, changed_settings, load_config, parse_config
from hildanext.config.names import as_overrides, decode_settings
from hildanext.data.tokenizer import leading_ids
from hildanext.decoding import engines
from hildanext.decoding.engines import Engine, Event, Request, Steps, as_steps, open_engine
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.grammar import Grammar
from hildanext.errors import ContextError, HildaError, UsageError
from hildanext.evaluate.likelihood import Pair, base_chain, bound
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.terminal.notebook import Completion, shown_completion

Messages = list[dict[str, str]]
Prompt = str | Messages


class LogProbability(NamedTuple):
    """How likely a model finds a text, in nats."""

    log_p: float
    n_tokens: int  # of the text, without the prompt's
    # "exact": the base's own log-probability. "bound": a lower bound, estimated by Monte Carlo (docs/evaluation.md).
    kind: Literal["exact", "bound"]
    standard_error: float  # of the estimate; 0 for an exact value, NaN for a single draw


def load(model: str | Path | None = None, *, config: str | Path | None = None, **settings: Any) -> Model:
    """Open a model and the engine that runs it.

    model: 'hilda-smollm2-135m' (the default), 'smollm2-135m', a folder, a .gguf file or a name on the Hugging Face hub.
    config: a configuration file (JSON). settings: its keys, which replace the file's. Keys of the sections `decode`,
    `engine` and `model` need no section (`mode="EXACT"`, `runtime="openvino"`, `dtype="float32"`, `slots=4`); any key can
    be given with it (`**{"evaluate.draws": 8}`). A model that is not converted needs `mode="EXACT"`.

    Raises UsageError for an unknown setting, an invalid value, a missing model and one that no engine can serve,
    ModelError for damaged files.
    """
    overrides = as_overrides(settings)
    if model is not None:
        overrides.append(f"model.base={json.dumps(str(model))}")
    parsed = load_config(config, overrides, base=SHIPPED_MODEL)
    return Model(parsed, open_engine(parsed))


class Model:
    """A loaded model. `load` makes it; `with` or `close` frees it.

    It may be used from several threads: passes run one after the other, and requests of all threads share them. A stream
    may be left open while other requests run.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config = config
        self._engine: Engine | None = engine
        self._steps: Steps | None = as_steps(engine)
        self._passing = threading.Lock()  # held during a pass, and by whatever else uses the engine
        self._news: dict[Any, deque[Event | HildaError]] = {}  # of each request, what nobody has read yet
        self._dropped: deque[Any] = deque()  # requests to cancel before the next pass
        self._scorer: DiffusionLM | None = None

    @property
    def engine(self) -> Engine:
        """The engine, for its facts: `name`, `device`, `dtype`, `modes`, `context`. Raises UsageError after `close`."""
        return self._opened()[0]

    def _opened(self) -> tuple[Engine, Steps]:
        if self._engine is None or self._steps is None:
            raise UsageError(f"the model '{self.config.model.base}' is closed; load it again")
        return self._engine, self._steps

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        steps: bool = False,
        json_schema: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[Messages],
        *,
        raw: bool = False,
        steps: bool = False,
        json_schema: dict[str, Any] | None = None,
        **settings: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Any,
        *,
        raw: bool = False,
        steps: bool = False,
        json_schema: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Completion | list[Completion]:
        """Complete a prompt, or a list of prompts as one batch of up to `engine.slots` at a time.

        prompt: a user's message as text, or a conversation: a list of {"role": ..., "content": ...}. raw: continue the
        text without the chat template. steps: keep the passes; a notebook then shows a picture of them. json_schema: a
        JSON Schema; each text is JSON that it allows, unless `max_new_tokens` cuts it. settings: keys of `decode`
        (`mode`, `max_new_tokens`, `temperature`, ...); others keep the value of `load`. With a seed s, the prompt of
        index i in a list has the seed s + i.

        All prompts are checked before the first pass. Raises UsageError for a bad prompt or setting and for a schema that
        is not supported, ContextError for a prompt that does not fit, and the error that ended a request.
        """
        prompts, is_batch = _prompts(prompt)
        requests = self._requests(prompts, raw, settings, json_schema)
        handles = self._submit(requests)
        try:
            found = [
                self._finished(handle, text, request, steps)
                for handle, text, request in zip(handles, prompts, requests, strict=True)
            ]
        finally:
            self._drop(*handles)
        return found if is_batch else found[0]

    def stream(
        self, prompt: Prompt, *, raw: bool = False, json_schema: dict[str, Any] | None = None, **settings: Any
    ) -> Iterator[Step | Finished | Completion]:
        """Yield what the page gets from POST /generate, as it happens: `Step`, `Finished` (a block) and the Completion.

        Arguments and errors as in `generate`. Closing the iterator early drops the request.
        """
        (request,) = self._requests([prompt], raw, settings, json_schema)

        def events() -> Iterator[Step | Finished | Completion]:
            (handle,) = self._submit([request])
            try:
                for event in self._events(handle):
                    yield self._shown(prompt, request, event, None) if isinstance(event, engines.Completion) else event
            finally:
                self._drop(handle)

        return events()

    def logprob(self, text: str, prompt: Prompt = "", *, raw: bool = False) -> LogProbability:
        """The log-probability of a text after a prompt, as `hildanext evaluate` computes it.

        A gated checkpoint gives its base's exact log-probability, and so does a model that is not converted. Another
        converted checkpoint gives a lower bound at its block size, estimated with `evaluate.draws` pairs of masks.
        Without a prompt the text follows the begin-of-text token, or the end-of-text token where there is none.

        With the OpenVINO runtime, which frees the weights in torch, the first call loads them again. Raises UsageError
        for an empty text, ContextError for one that does not fit.
        """
        engine = self.engine
        if not isinstance(engine, TransformersEngine):
            raise UsageError(
                f"the {engine.name} engine gives no likelihoods; load the model with order=['transformers']"
            )
        with self._passing:
            pair = self._pair(engine, text, prompt, raw)
            if self._scorer is None:
                self._scorer = engine.lm or load_diffusion_lm(self.config.model)[0]
            lm, draws, seed = self._scorer, self.config.evaluate.draws, self.config.evaluate.seed
            lm.model.eval()
            if engine.kind == "blocks":
                assert lm.block_size is not None
                (score,) = bound(lm, [pair], [0], lm.block_size, draws, seed)
                return LogProbability(score.log_p, len(pair[1]), "bound", score.standard_error)
            (score,) = base_chain(lm, [pair], [0])
        return LogProbability(score.log_p, len(pair[1]), "exact", 0.0)

    def close(self) -> None:
        """Free the weights and the cache. A request that is not finished fails."""
        with self._passing:
            if self._engine is not None:
                self._engine.close()
            self._engine = self._steps = self._scorer = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self._engine
        state = "closed" if engine is None else f"engine {engine.name}, {engine.device}, {engine.dtype}"
        return f"<hildanext.Model '{self.config.model.base}', {state}>"

    # --- requests

    def _requests(
        self, prompts: list[Prompt], raw: bool, settings: dict[str, Any], json_schema: dict[str, Any] | None
    ) -> list[Request]:
        """One request for each prompt. Raises UsageError for a bad prompt, setting or schema."""
        grammar = None if json_schema is None else self.engine.compile(Grammar.of_schema(json_schema))
        changes = changed_settings(decode_settings(settings))
        raw_config = {"decode": self.config.decode.model_dump(mode="json") | changes}
        decode, requests = parse_config(raw_config, "settings").decode, []
        for index, prompt in enumerate(prompts):
            seeded = decode if decode.seed is None else decode.model_copy(update={"seed": decode.seed + index})
            with self._passing:
                engine = self.engine
                chosen = engine.settings(self.config.model_copy(update={"decode": seeded}))
                requests.append(Request(engine.encode(_conversation(prompt, raw)), chosen, grammar))
        return requests

    def _submit(self, requests: list[Request]) -> list[Any]:
        """Queue requests; all or none."""
        handles: list[Any] = []
        with self._passing:
            _, steps = self._opened()
            try:
                for request in requests:
                    handles.append(steps.submit(request))
                    self._news[handles[-1]] = deque()
            except HildaError:
                self._drop(*handles)
                raise
        return handles

    def _drop(self, *handles: Any) -> None:
        """Forget requests, finished or not. Takes no lock: it may run while Python collects an abandoned stream."""
        for handle in handles:
            self._news.pop(handle, None)
            self._dropped.append(handle)

    def _events(self, handle: Any) -> Iterator[Event]:
        """The events of a request, up to its Completion. Raises the error that ended it."""
        news = self._news[handle]
        while True:
            while not news:
                self._run_pass(news)
            event = news.popleft()
            if isinstance(event, HildaError):
                raise event
            yield event
            if isinstance(event, engines.Completion):
                return

    def _run_pass(self, news: deque[Event | HildaError]) -> None:
        """Run a pass of all requests, unless another thread's pass has brought `news` meanwhile."""
        with self._passing:
            _, steps = self._opened()
            while self._dropped:
                steps.cancel(self._dropped.popleft())
            if not news:
                for handle, event in steps.step():
                    if (waiting := self._news.get(handle)) is not None:  # not dropped by its reader
                        waiting.append(event)

    def _finished(self, handle: Any, prompt: Prompt, request: Request, keeps_steps: bool) -> Completion:
        steps: list[Step] = []
        for event in self._events(handle):
            if isinstance(event, Step) and keeps_steps:
                steps.append(event)
            elif isinstance(event, engines.Completion):
                return self._shown(prompt, request, event, steps if keeps_steps else None)
        raise RuntimeError("a request's events ended without a completion")

    def _shown(
        self, prompt: Prompt, request: Request, done: engines.Completion, steps: list[Step] | None
    ) -> Completion:
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return shown_completion(self.engine, asked, request, done, steps)

    def _pair(self, engine: TransformersEngine, text: str, prompt: Prompt, raw: bool) -> Pair:
        """Token ids of the prompt and of the text after it."""
        if not text:
            raise UsageError("the text is empty; give some text to score")
        tokenizer = engine.tokenizer
        asked = _conversation(prompt, raw) if prompt else ""
        if asked:
            context = engine.encode(asked)
        else:
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            context = [int(first)]
        if isinstance(asked, str) and asked:  # tokens may span the border: the text's are those behind the prompt's
            both = leading_ids(tokenizer) + list(tokenizer(asked + text, add_special_tokens=False)["input_ids"])
            target = both[len(context) :]
        else:
            target = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        n, limit = len(context) + len(target), engine.context
        if limit is not None and n > limit:
            raise ContextError(
                f"prompt and text have {n} tokens, more than the model's context of {limit}; shorten one"
            )
        return context, target


def _prompts(prompt: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they were given as a list. Raises UsageError for anything else."""
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, dict) for item in prompt):
            return [prompt], False
        if all(isinstance(item, (str, list)) for item in prompt):
            return list(prompt), True
    raise UsageError("the prompt must be a text, a list of messages, or a list of several of these that is not empty")


def _conversation(prompt: Prompt, raw: bool) -> Prompt:
    """A prompt as `Engine.encode` takes it. Raises UsageError for a message without a role and a text."""
    if isinstance(prompt, str):
        return prompt if raw else [{"role": "user", "content": prompt}]
    if raw:
        raise UsageError("raw=True continues a text, not messages; give a text")
    for number, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UsageError(f"message {number}: must be {{'role': ..., 'content': ...}} with texts")
    return prompt
