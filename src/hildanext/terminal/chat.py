"""The `chat` command: a conversation in a terminal, or line by line through pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from hildanext.config import MODES, Config, changed_settings, parse_config
from hildanext.decoding.engines import Completion, Engine, Event, Request, as_steps, open_engine, say_passed_over
from hildanext.decoding.events import Finished, Step
from hildanext.errors import HildaError, UsageError
from hildanext.progress import say, stop_on_signals, waiting
from hildanext.terminal.cells import CellTracker, as_line, write_trace
from hildanext.terminal.console import NOT_UTF8, checked, input_lines
from hildanext.terminal.dialogue import Dialogue
from hildanext.terminal.live import LiveAnswer, PlainAnswer, draw_line
from hildanext.terminal.paste import bracketed_paste

HELP = """\
/mode                     show the mode and its thresholds
/mode S_MODE|Q_MODE       switch to S_MODE (speedy) or Q_MODE (careful), with its own thresholds; 's', 'q' for short
/tau MASK [EDIT|off]      set the thresholds: draft above MASK, edit above EDIT; 'off' turns editing off
/trace                    show every pass of the last answer, one line each
/trace on|off             show every pass of all further answers, or stop showing them
/trace FILE               write the passes of the last answer to FILE as JSON lines
/system [TEXT]            set the system message; without TEXT, remove it
/save FILE                save the conversation as JSON, or as Markdown if FILE ends in .md
/load FILE                continue a conversation that was saved as JSON
/reset                    start a new conversation; the system message is kept
/help                     show this help
/quit                     leave (or press Ctrl-D)
Ctrl-C stops an answer. To send a message that begins with '/', type a space before it.
Pasted text is one message, whatever lines it has, and never a command."""


def chat(config: Config, system: str | None) -> None:
    """Run a conversation until the end of input.

    Raises HildaError for a model that cannot chat and, if stdin is not a terminal, for any invalid line.
    """
    with waiting(f"loading {config.model.base}"):
        engine = open_engine(config)
    try:
        say_passed_over(engine)
        engine.encode(
            [{"role": "user", "content": "Hello"}]
        )  # refuses a model without a chat template before the first message
        Chat(config, engine, system).run()
    finally:
        engine.close()


class Chat:
    """Reads lines; each is a command or a message."""

    def __init__(self, config: Config, engine: Engine, system: str | None) -> None:
        self.config, self.engine = config, engine
        self.dialogue = Dialogue(engine, system)
        self.console = Console(highlight=False)
        self.interactive = sys.stdin.isatty()
        self.live = sys.stdout.isatty() and not self.console.is_dumb_terminal
        self.trace = False
        self.passes: list[Step] = []  # passes of the last answer
        self.asked: Request | None = None
        self.left = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: self.tell(HELP),
            "/mode": self.set_mode,
            "/tau": self.set_tau,
            "/trace": self.set_trace,
            "/system": lambda rest: self.dialogue.set_system(rest or None),
            "/save": self.save,
            "/load": self.load,
            "/reset": lambda rest: self.dialogue.reset(),
            "/quit": self.leave,
        }

    def run(self) -> None:
        if self.interactive:
            self.tell(f"{self.config.model.base}, {self.thresholds()}; /help lists the commands")
        for line in self.lines():
            try:
                if line.startswith("/"):
                    self.run_command(line)
                elif line.strip():
                    self.answer(line.strip())
            except (HildaError, OSError) as error:
                if not self.interactive:
                    raise
                reason = error if isinstance(error, HildaError) else f"{error.filename}: {error.strerror}"
                self.tell(f"{reason}")
            except KeyboardInterrupt:  # outside an answer; within one it stops the answer
                if not self.interactive:
                    raise
                self.tell("interrupted")
            if self.left:
                return

    def lines(self) -> Iterator[str]:
        """Yield the user's lines until the end of input."""
        if not self.interactive:
            yield from input_lines()
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` a history and editing keys)
        with bracketed_paste() as read_line:
            yield from self.typed(read_line)

    def typed(self, read_line: Callable[[str], str]) -> Iterator[str]:
        """Yield the lines that are typed on a terminal."""
        while True:
            try:
                yield checked(read_line("> " if sys.stdout.isatty() else ""))
            except (UnicodeDecodeError, UsageError):
                self.tell(NOT_UTF8)
            except EOFError:
                if sys.stdout.isatty():
                    print()
                return
            except KeyboardInterrupt:
                print()
                self.tell("Ctrl-D or /quit leaves")

    def tell(self, text: str) -> None:
        """Show a line that is not part of the conversation: dimmed on a terminal, else on stderr."""
        if self.live:
            self.console.print(text, style="bright_black", markup=False)
        else:
            say(text)

    # --- An answer

    def answer(self, text: str) -> None:
        settings = self.engine.settings(self.config)
        request, dropped = self.dialogue.ask(text, settings)
        if dropped:
            self.tell(f"the conversation no longer fits the context: its {dropped} oldest messages were dropped")
        self.passes, self.asked = [], request
        tracker = CellTracker(self.engine, request)
        shown: LiveAnswer | PlainAnswer = PlainAnswer(tracker, trace=self.trace)
        if self.live:
            shown = LiveAnswer(self.console, tracker, settings.block_size, trace=self.trace)
        blocks: list[Finished] = []
        done: Completion | None = None
        try:
            with stop_on_signals() as stopped, shown:
                for event in self.events(request, stopped):
                    if isinstance(event, Completion):
                        done = event
                        break
                    shown.show(event)
                    if isinstance(event, Step):
                        self.passes.append(event)
                    else:
                        blocks.append(event)
        except HildaError:
            self.dialogue.take_back()
            raise
        self.conclude(request, blocks, done)
        self.left = stopped() == "SIGTERM"

    def events(self, request: Request, stopped: Callable[[], str | None]) -> Iterator[Event]:
        """Yield a request's events until its Completion or a signal. Signals are checked after every pass."""
        steps = as_steps(self.engine)
        handle = steps.submit(request)
        try:
            while not stopped():
                for _, what in steps.step():
                    if isinstance(what, HildaError):
                        raise what
                    yield what
        finally:
            steps.cancel(handle)

    def conclude(self, request: Request, blocks: list[Finished], done: Completion | None) -> None:
        """Add the answer, complete or stopped, to the conversation and show what it cost."""
        text = "".join(block.text for block in blocks)
        if not text:
            self.dialogue.take_back()
            self.tell("[no answer; the message was removed from the conversation]")
            return
        tokens = [token for block in blocks for token in block.new_tokens]
        self.dialogue.answered(request, tokens, text)
        if done is None:
            self.tell(f"[stopped after {len(tokens)} tokens]")
            return
        stats = done.stats
        cut = " (decode.max_new_tokens)" if done.finish_reason == "length" else ""
        self.tell(
            f"[{len(done.token_ids)} tokens{cut}, {stats.tokens_per_forward:.2f} per forward, "
            f"{stats.tokens_per_second:.1f} tokens/s, {stats.changes}, "
            f"{stats.prefix_tokens} of {len(request.prompt_ids)} prompt tokens from the cache"
            f"{'' if stats.seed is None else f', seed {stats.seed}'}]"
        )

    # --- Commands

    def run_command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if name not in self.commands:
            raise UsageError(f"unknown command '{name}'; /help lists the commands")
        self.commands[name](rest.strip())

    def leave(self, rest: str) -> None:
        self.left = True

    def change(self, **decode: object) -> None:
        """Change decoding settings, with the same checks as for a configuration file."""
        raw = self.config.model_dump(mode="json")
        self.config = parse_config(raw | {"decode": raw["decode"] | changed_settings(decode)}, "chat")

    def thresholds(self) -> str:
        settings = self.engine.settings(self.config)
        edit = "off" if settings.tau_edit is None else f"{settings.tau_edit:g}"
        behind = f", edit_blocks {settings.editable_blocks}" if settings.editable_blocks else ""
        return f"{settings.mode}: tau_mask {settings.tau_mask:g}, tau_edit {edit}{behind}"

    def set_mode(self, rest: str) -> None:
        if rest:
            self.change(mode={mode[0]: mode for mode in MODES}.get(rest.upper(), rest.upper()))
        self.tell(self.thresholds())

    def set_tau(self, rest: str) -> None:
        try:
            mask, *edit = rest.split()
            wanted: dict[str, object] = {"tau_mask": float(mask)}
            if edit:
                (value,) = edit
                wanted["tau_edit"] = None if value == "off" else float(value)
        except ValueError:
            raise UsageError("usage: /tau MASK [EDIT|off], for example /tau 0.7 0.5") from None
        self.change(**wanted)
        self.tell(self.thresholds())

    def set_trace(self, rest: str) -> None:
        if rest in ("on", "off"):
            self.trace = rest == "on"
        elif self.asked is None or not self.passes:
            raise UsageError("there are no passes to show yet")
        elif rest:
            write_trace(Path(rest).expanduser(), self.passes)
            self.tell(f"{len(self.passes)} passes written to {rest}")
        else:
            tracker = CellTracker(self.engine, self.asked)
            for step in self.passes:
                cells = tracker.cells(step)
                if self.live:
                    self.console.print(draw_line(step, cells))
                else:
                    say(as_line(step, cells))

    def save(self, rest: str) -> None:
        if not rest:
            raise UsageError("usage: /save FILE.json or FILE.md")
        self.dialogue.save(Path(rest).expanduser())
        self.tell(f"{len(self.dialogue.messages)} messages written to {rest}")

    def load(self, rest: str) -> None:
        if not rest:
            raise UsageError("usage: /load FILE.json")
        self.dialogue.load(Path(rest).expanduser())
        self.tell(f"{len(self.dialogue.messages)} messages read from {rest}")
