"""`hildanext chat` as its user meets it: through pipes in this process, and on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hildanext.cli import main
from hildanext.config import Config, load_config
from hildanext.decoding.engines import Request, open_engine
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.events import Finished, Step
from hildanext.errors import DataError, UsageError
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.model.prompts import encode_prompt
from hildanext.model.tiny import tiny_llama
from hildanext.terminal.cells import CellTracker, as_line, token_texts
from hildanext.terminal.dialogue import Dialogue
from hildanext.terminal.live import LiveAnswer, draw_line
from hildanext.terminal.paste import bracketed_paste
from support.models import CHATML, make_tokenizer
from support.waiting import LAST_RESORT

BLOCK, CONTEXT = 4, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny converted checkpoint of random weights with a chat template, and a configuration beside it."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer()
    assert tokenizer.chat_template == CHATML
    tiny_llama(tokenizer, hidden=32, layers=1, context=4096, seed=3).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    raw = {
        "model": {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"},
        "engine": {"runtime": "eager", "context": CONTEXT, "order": ["transformers"]},
        "decode": {"max_new_tokens": 10, "tau_mask": 0.3},
    }
    config = folder / "chat.json"
    config.write_text(json.dumps(raw), encoding="utf-8")
    lm, _ = load_diffusion_lm(load_config(config).model)
    lm.block_size = BLOCK
    save_diffusion_lm(lm, folder / "model")
    raw["model"]["base"] = str(folder / "model")  # type: ignore[index]
    config.write_text(json.dumps(raw), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return load_config(folder / "chat.json")


@pytest.fixture(scope="module")
def engine(config: Config) -> TransformersEngine:
    found = open_engine(config)
    assert isinstance(found, TransformersEngine)
    return found


@pytest.fixture
def piped(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """`piped(text, *options)`: (exit code, stdout, lines of stderr) of the command with that on its standard input."""

    def run(text: str, *options: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["chat", "--config", str(folder / "chat.json"), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def turns(engine: TransformersEngine, config: Config, messages: list[str]) -> Iterator[tuple[Request, list[int], str]]:
    """(request, new tokens, text) of each turn by hand: ids in front of ids, nothing stored in between."""
    tokenizer, ids = engine.tokenizer, []
    for message in messages:
        ids += tokenizer(f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        request = Request(list(ids), engine.settings(config))
        engine.scheduler.reset_prefix_cache()
        done = engine.generate(request)
        yield request, done.token_ids, done.text
        ids += done.token_ids
        closing = "\n" if done.finish_reason == "stop" else "<|im_end|>\n"
        ids += tokenizer(closing)["input_ids"]


# --- Through pipes


def test_line_by_line_through_pipes(piped, engine: TransformersEngine, config: Config):
    said = ["the cat saw a dog", "once upon", "a red house"]
    code, out, err = piped("\n".join(said) + "\n")
    expected = list(turns(engine, config, said))
    assert code == 0
    assert out == "".join(f"{text}\n" for _, _, text in expected)
    assert "\x1b" not in out
    costs = [line for line in err if line.startswith("[")]
    assert len(costs) == len(said)
    for number, (line, (request, ids, _)) in enumerate(zip(costs, expected, strict=True)):
        assert line.startswith(f"[{len(ids)} tokens")
        # The template closes a turn with other tokens than a budget does: the last block may be another one.
        kept, asked = map(int, re.findall(r"(\d+) of (\d+) prompt tokens", line)[0])
        before = len(expected[number - 1][0].prompt_ids) + len(expected[number - 1][1]) if number else 0
        assert asked == len(request.prompt_ids)
        assert max(0, before - 2 * BLOCK) <= kept <= before // BLOCK * BLOCK


def test_modes_and_thresholds(piped):
    code, _, err = piped("/mode s\n/mode\n/mode Q_MODE\n/tau 0.9 off\n/tau .5 .25\n/tau 0.8\n")
    assert code == 0
    assert err[-6:] == [
        "S_MODE: tau_mask 0.5, tau_edit 0",
        "S_MODE: tau_mask 0.5, tau_edit 0",
        "Q_MODE: tau_mask 0.7, tau_edit 0.5",
        "Q_MODE: tau_mask 0.9, tau_edit off",
        "Q_MODE: tau_mask 0.5, tau_edit 0.25",
        "Q_MODE: tau_mask 0.8, tau_edit 0.25",
    ]


def test_an_unseeded_answer_tells_its_seed_and_the_seed_repeats_it(piped):
    warm = ("--set", "decode.temperature=2")
    for _ in range(5):  # a sampled answer may be empty, and then tells no seed
        code, out, err = piped("the cat\n/reset\nthe cat\n", *warm)
        assert code == 0
        seeds = re.findall(r", seed (\d+)\]", "\n".join(err))
        if len(seeds) == 2:
            break
    assert len(set(seeds)) == 2
    _, again, _ = piped("the cat\n", *warm, "--set", f"decode.seed={seeds[1]}")
    assert out.endswith(again)
    assert out != 2 * again
    _, _, greedy = piped("the cat\n")
    assert "seed" not in greedy[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "unknown command '/nothing'; /help lists the commands"),
        ("/mode fast", "chat: 'decode.mode': must be 'EXACT', 'S_MODE' or 'Q_MODE', got 'FAST'"),
        ("/tau", "usage: /tau MASK [EDIT|off], for example /tau 0.7 0.5"),
        ("/tau high", "usage: /tau MASK [EDIT|off], for example /tau 0.7 0.5"),
        ("/tau 1.5", "chat: 'decode.tau_mask': must be between 0 and 1, got 1.5"),
        ("/trace", "there are no passes to show yet"),
        ("/save", "usage: /save FILE.json or FILE.md"),
        ("/save none.json", "the conversation is empty; there is nothing to save yet"),
        ("/load", "usage: /load FILE.json"),
        ("/load nowhere.json", "nowhere.json: No such file or directory"),
        ("x " * CONTEXT, "exceed the model's context of 256; shorten one of them"),
    ],
)
def test_a_mistake_is_one_line_and_ends_a_pipe(piped, line: str, message: str):
    code, out, err = piped(f"{line}\nnever reached\n")
    assert (code, out) in [(2, ""), (1, "")]
    assert err[-1].startswith("hildanext chat: ")
    assert err[-1].endswith(message)


def test_traces(piped, engine: TransformersEngine, config: Config, tmp_path: Path):
    file = tmp_path / "trace.jsonl"
    _, out, err = piped(f"/trace on\nthe cat\n/trace off\n/trace\n/trace {file}\n")
    request, _, text = next(turns(engine, config, ["the cat"]))
    passes = [event for event in engine.stream(request) if isinstance(event, Step)]
    assert out == f"{text}\n"
    lines = [line for line in err if line.startswith("block ")]
    assert len(lines) == 2 * len(passes)
    assert lines[: len(passes)] == lines[len(passes) :]
    assert [line.split(":")[0] for line in lines[: len(passes)]] == [
        f"block {s.block} pass {s.step + 1}" for s in passes
    ]
    written = [json.loads(line) for line in file.read_text().splitlines()]
    for found, step in zip(written, passes, strict=True):
        assert found.pop("confidence") == pytest.approx(step.confidence, abs=1e-5)
        assert found == {name: value for name, value in step._asdict().items() if name != "confidence"}


def test_saving_loading_system_and_reset(piped, engine: TransformersEngine, config: Config, tmp_path: Path):
    saved, text, later = tmp_path / "talk.json", tmp_path / "talk.md", tmp_path / "later.json"
    code, out, _ = piped(f"the cat\n/save {saved}\n/save {text}\n/system Be kind\n/reset\na dog\n/save {later}\n")
    assert code == 0
    _, _, answer = next(turns(engine, config, ["the cat"]))
    assert json.loads(saved.read_text()) == [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": answer},
    ]
    assert text.read_text() == f"**user**\n\nthe cat\n\n**assistant**\n\n{answer}\n"
    after = json.loads(later.read_text())
    assert [one["role"] for one in after] == ["system", "user", "assistant"]
    assert [one["content"] for one in after[:2]] == ["Be kind", "a dog"]
    assert out == f"{answer}\n{after[2]['content']}\n"
    # Loaded, the conversation goes on where it was.
    _, one, _ = piped(f"/load {saved}\nand now\n")
    _, two, _ = piped("the cat\nand now\n")
    assert two.endswith(one)
    _, three, _ = piped("a dog\n", "--system", "Be kind")
    assert out.endswith(three)


def test_saving_and_loading_before_the_first_answer(piped, engine: TransformersEngine, tmp_path: Path):
    saved, text, later = tmp_path / "talk.json", tmp_path / "talk.md", tmp_path / "later.json"
    kind = {"role": "system", "content": "Be kind"}
    code, _, err = piped(f"/save {saved}\n/save {text}\n", "--system", "Be kind")
    assert (code, err[-1]) == (0, f"1 messages written to {text}")
    assert json.loads(saved.read_text()) == [kind]
    assert text.read_text() == "**system**\n\nBe kind\n"
    code, out, _ = piped(f"/load {saved}\nthe cat\n/save {later}\n", "--system", "Be rude")
    assert code == 0
    assert [one["role"] for one in json.loads(later.read_text())] == ["system", "user", "assistant"]
    assert json.loads(later.read_text())[0] == kind
    assert piped("the cat\n", "--system", "Be kind")[1] == out
    # A question without an answer is a conversation, too.
    (tmp_path / "asked.json").write_text('[{"role": "user", "content": "a dog"}]')
    dialogue = Dialogue(engine)
    dialogue.load(tmp_path / "asked.json")
    assert dialogue.messages == [{"role": "user", "content": "a dog"}]


def test_what_is_no_conversation_is_not_loaded(engine: TransformersEngine, tmp_path: Path):
    dialogue = Dialogue(engine, "Be kind")
    for content in (
        "",
        "[]",
        '{"role": "user"}',
        '[{"role": "user", "content": 3}]',
        '[{"role": "king", "content": ""}]',
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=r"x.json: not a conversation saved as JSON by /save: "):
            dialogue.load(tmp_path / "x.json")
    assert [one["role"] for one in dialogue.messages] == ["system"]


def test_json_is_refused_and_so_is_a_model_without_a_chat_template(piped, folder: Path, tmp_path: Path):
    code, out, err = piped("hello\n", "--json")
    assert (code, out) == (2, "")
    assert err == [
        "hildanext chat: chat does not support --json; use 'generate --json', or /save FILE.json in the chat"
    ]
    for file in (folder / "model").iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, out, err = piped("hello\n", "--model", str(tmp_path))
    assert (code, out) == (2, "")
    assert err[-1] == (
        "hildanext chat: this model's tokenizer has no chat template; give a plain prompt (generate: --raw, Python: raw=True)"
    )


def test_a_template_that_refuses_a_role_is_one_line(engine: TransformersEngine):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(UsageError, match=r"^the chat template rejects the messages \(no system role\)$"):
        encode_prompt(tokenizer, [{"role": "system", "content": "x"}])


# --- The conversation


@given(
    turns=st.lists(
        st.tuples(st.text(max_size=12), st.lists(st.integers(4, 260), max_size=8), st.booleans()),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=30, deadline=None)
def test_the_ids_of_a_conversation_stand_for_the_rendered_text(tiny_tokenizer, turns):
    """Whatever was generated: the ids are the template's text, and begin with the ids that were decoded if that can be."""
    tokenizer, messages, known = tiny_tokenizer, [], []
    for said, generated, ended in turns:
        messages.append({"role": "user", "content": said + "x"})
        ids = encode_prompt(tokenizer, messages, known)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids) == text
        if text.startswith(tokenizer.decode(known)):
            assert ids[: len(known)] == known
        known = ids + generated + [tokenizer.eos_token_id] * ended
        messages.append({"role": "assistant", "content": tokenizer.decode(generated, skip_special_tokens=True)})


@given(said=st.lists(st.text("abc ", min_size=1, max_size=60).map(lambda text: "w" + text), min_size=2, max_size=14))
@settings(max_examples=15, deadline=None)
def test_a_conversation_of_any_length_goes_on(engine: TransformersEngine, config: Config, said: list[str]):
    dialogue, wanted = Dialogue(engine, "Be kind"), engine.settings(config)
    for number, message in enumerate(said):
        before = list(dialogue.messages)
        request, dropped = dialogue.ask(message, wanted)
        assert len(request.prompt_ids) + wanted.max_new_tokens <= CONTEXT
        kept = dialogue.messages
        assert kept[0] == {"role": "system", "content": "Be kind"}
        assert kept[1:] == [*before, kept[-1]][1 + dropped :]
        assert kept[-1]["content"] == message
        assert [one["role"] for one in kept[1:]] == ["user", "assistant"] * (len(kept) // 2 - 1) + ["user"]
        if dropped:  # then there is room for some turns
            assert len(kept) == 2 or len(request.prompt_ids) + wanted.max_new_tokens <= 0.75 * CONTEXT
        dialogue.answered(request, [5, 6, 7 + number], "abc")


def test_the_oldest_turns_are_dropped_with_a_note(piped):
    code, _, err = piped("".join(f"number {n} of a long conversation\n" for n in range(12)))
    assert code == 0
    notes = [line for line in err if "no longer fits" in line]
    assert 1 <= len(notes) < 6
    assert re.fullmatch(r"the conversation no longer fits the context: its \d+ oldest messages were dropped", notes[0])


def test_a_message_that_never_fits_leaves_the_conversation_as_it_was(engine: TransformersEngine, config: Config):
    dialogue = Dialogue(engine)
    request, _ = dialogue.ask("hello", engine.settings(config))
    answer = engine.tokenizer("a cat")["input_ids"][::-1]  # not as the tokenizer would cut it
    dialogue.answered(request, answer, engine.decode_tokens(answer))
    before = list(dialogue.messages)
    with pytest.raises(UsageError, match="exceed the model's context of 256"):
        dialogue.ask("word " * 300, engine.settings(config))
    assert dialogue.messages == before
    known = request.prompt_ids + answer
    assert dialogue.ask("and", engine.settings(config))[0].prompt_ids[: len(known)] == known


# --- What is shown


def test_each_token_adds_its_piece_of_the_text(engine: TransformersEngine):
    tokenizer, mask = engine.tokenizer, engine.mask_token_id
    ids = tokenizer("the cat saw ü and 漢字")["input_ids"]
    texts = token_texts(engine.decode_tokens, ids, mask)
    assert "".join(texts) == "the cat saw ü and 漢字"
    assert len(texts) == len(ids)
    assert token_texts(engine.decode_tokens, [mask, *ids[:2], mask, ids[1]], mask) == ["", *texts[:2], "", texts[1]]


def test_cells_say_what_each_pass_did(engine: TransformersEngine, config: Config):
    mask, (eos,) = engine.mask_token_id, engine.eos_token_ids
    request = Request([10, 11], engine.settings(config)._replace(max_new_tokens=4))
    tracker = CellTracker(engine, request)

    def kinds(tokens: list[int], drafted: list[int], edited: list[int]) -> list[str]:
        cells = tracker.cells(Step(0, 0, tokens, drafted, edited, [0.25] * len(tokens), 0.0, 0))
        assert [cell.position for cell in cells] == list(range(len(tokens)))
        return [f"{cell.kind} {cell.strength:.2f}" for cell in cells]

    assert kinds([10, 11, 20, mask], [2], []) == ["prompt 1.00", "prompt 1.00", "drafted 0.25", "mask 1.00"]
    assert kinds([10, 11, 21, 22], [3], [2])[2:] == ["edited 1.00", "drafted 0.25"]
    assert kinds([10, 11, 21, eos], [], [3])[2:] == ["edited 0.67", "end 1.00"]
    assert kinds([10, 11, 21, 22, 23, 24, 25], [], [3])[2:] == [
        "edited 0.33",
        "edited 1.00",
        *["settled 1.00"] * 2,
        "cut 1.00",
    ]
    assert kinds([10, 11, eos, 22, mask], [], [])[2:] == ["end 1.00", "cut 0.67", "cut 1.00"]


def test_a_pass_as_a_line(engine: TransformersEngine, config: Config):
    ids = engine.tokenizer("the cat saw a")["input_ids"]
    the, cat, saw, a = ids
    request = Request([the], engine.settings(config))
    assert engine.mask_token_id is not None
    tokens = [the, cat, engine.mask_token_id, saw, a, *engine.eos_token_ids, a]
    step = Step(3, 1, tokens, [1], [3], [0.5] * 7, 0.0, 0)
    cells = CellTracker(engine, request).cells(step)
    assert as_line(step, cells) == "block 3 pass 2:  the [cat] _ {saw} a ∎"
    assert draw_line(step, cells).plain == "block   3 pass  2 the cat ▒ saw a ∎"
    styles = {span.style for span in draw_line(step, cells).spans}
    assert styles >= {"dim green", "bold magenta", "bright_black"}


def test_a_live_answer_ends_as_its_plain_text_and_cannot_steer_the_terminal(engine: TransformersEngine, config: Config):
    console = Console(file=io.StringIO(), force_terminal=True, width=30, height=10, color_system="truecolor")
    tracker = CellTracker(engine, Request([10], engine.settings(config)))
    mask = engine.mask_token_id
    assert mask is not None
    step = Step(0, 0, [10, 20, mask, mask], [1], [], [None, 0.9, 0.1, 0.1], 1.0, 0)
    texts = ["one two three four five six seven eight nine\n", "\nten \x1b[31meleven\a twelve", " end"]
    with LiveAnswer(console, tracker, BLOCK, trace=False) as shown:
        shown.show(step)
        for text in texts:
            shown.show(Finished(0, [1], text))
            shown.drawn = 0.0
            shown.show(step)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\a" not in out
    assert "\x1b[31m" not in out
    assert "▒" in out
    assert screen(out) == ["one two three four five six", "seven eight nine", "", "ten [31meleven twelve end"]


def test_verified_text_keeps_its_colours(engine: TransformersEngine, config: Config):
    """Accepted drafts, a correction and the base's own word; a stop string leaves other text, which stays plain."""
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=10, color_system="standard")
    settings = engine.settings(config)._replace(tau_accept=1.0)
    the, cat, saw, a = engine.tokenizer("the cat saw a")["input_ids"]
    with LiveAnswer(console, CellTracker(engine, Request([the], settings)), BLOCK, trace=False) as shown:
        for step, text in (
            (Step(0, 0, [cat, saw], [0], [1], [0.95, None], 1.0, 1), " cat saw"),
            (Step(1, 0, [a], [], [], [None], 1.0, 3), " a"),
            (Step(2, 0, [cat, saw], [0, 1], [], [0.95, 0.95], 1.0, 4), " cat"),
        ):
            shown.show(step)
            shown.show(Finished(step.step, step.tokens, text))
        paragraph = shown.paragraph
    assert paragraph.plain == " cat saw a cat"
    styles = [(paragraph.plain[span.start : span.end].strip(), span.style) for span in paragraph.spans]
    assert [(word, style) for word, style in styles if style] == [("cat", "bold green"), ("saw", "bold magenta")]


def screen(out: str) -> list[str]:
    """What a terminal would show, of the few sequences that rich writes: colours, line erased, cursor up."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", out):
        if piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        elif piece.startswith("\x1b["):
            if piece.endswith("A"):
                row -= int(piece[2:-1] or 1)
            elif piece == "\x1b[2K":
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return "\n".join(line.rstrip() for line in lines).rstrip("\n").split("\n")


# --- On a terminal


CLI = ("-m", "hildanext.cli")


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, folder: Path, term: str, *options: str, program: tuple[str, ...] = CLI) -> None:
        command = [sys.executable, *program, "chat", "--config", str(folder / "chat.json"), *options]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell runs the tests in the background
            os.execve(sys.executable, command, os.environ | {"TERM": term})
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.seen, self.at = "", 0

    def wait(self, wanted: str, again: str = "") -> str:
        """Read until it appears after what was waited for before; what came till then, colours and all.

        `again` is typed whenever ten reads one after the other brought nothing.
        """
        begin, deadline, silent = self.at, time.monotonic() + LAST_RESORT, 0
        while wanted not in self.seen[begin:]:
            assert time.monotonic() < deadline, self.seen
            before = len(self.seen)
            self.read()
            silent = silent + 1 if len(self.seen) == before else 0
            if silent == 10:
                self.type(again)
                silent = 0
        self.at = self.seen.index(wanted, begin) + len(wanted)
        return self.seen[begin : self.at]

    def read(self) -> bool:
        """Whether there may be more to come; waits a second at most."""
        if not select.select([self.fd], [], [], 1)[0]:
            return True
        try:
            piece = os.read(self.fd, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self.seen += piece.decode(errors="replace")
        return bool(piece)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        deadline = time.monotonic() + LAST_RESORT
        while self.read():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(self.seen)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_on_a_terminal(folder: Path, tmp_path: Path):
    long = ("--set", "decode.max_new_tokens=3500", "--set", "engine.context=4096")
    terminal = Terminal(folder, "xterm-256color", *long)
    assert "/help lists the" in terminal.wait("> ")
    terminal.type("the cat\n")
    terminal.wait("\x1b[90m ▒▒▒")
    for _ in range(3):
        terminal.wait("\x1b[2K")  # redrawn: a pass and what it drafted
    terminal.type("\x03")
    stopped = terminal.wait("tokens]")
    assert 0 < int(re.findall(r"stopped after (\d+) tokens\]", stopped)[0]) < 3500
    terminal.wait("> ")  # the prompt again: only there do Ctrl-C and Ctrl-D mean what they do below
    terminal.type("\x03")  # it only says how to leave; Python misses one that comes before it waits for a key
    terminal.wait("Ctrl-D or /quit leaves", again="\x03")
    terminal.wait("> ")
    terminal.type("/tau 2\n")
    assert "'decode.tau_mask': must be between 0 and 1" in terminal.wait("got 2")
    terminal.wait("> ")
    terminal.type(f"/save {tmp_path / 'talk.json'}\n")
    terminal.wait("2 messages written")
    terminal.wait("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [one["role"] for one in messages] == ["user", "assistant"]
    assert messages[1]["content"]


def test_a_dumb_terminal_gets_plain_text_and_sigterm_ends_an_answer(folder: Path):
    long = ("--set", "decode.max_new_tokens=3500", "--set", "engine.context=4096")
    terminal = Terminal(folder, "dumb", *long)
    terminal.wait("> ")
    terminal.type("the cat\n")
    terminal.wait("the cat\r\n")
    while terminal.seen.endswith("the cat\r\n"):
        terminal.seen += os.read(terminal.fd, 100).decode(errors="replace")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.end() == 0
    assert "stopped after" in terminal.seen
    assert "\x1b" not in terminal.seen
    assert "▒" not in terminal.seen


def paste(text: str) -> str:
    """What a terminal sends for pasted text, if it was asked to enclose it."""
    return f"\x1b[200~{text}\x1b[201~"


def test_a_paste_is_one_message_and_no_command(folder: Path, tmp_path: Path):
    saved = tmp_path / "talk.json"
    terminal = Terminal(folder, "xterm-256color", "--set", 'engine.order=["dummy"]')
    terminal.wait("\x1b[?2004h")  # asked to enclose
    terminal.wait("> ")
    pasted = ["/quit", "/quit\n/mode s\n", "two\n\nlines with ü", "/save nowhere"]
    for text in pasted:
        terminal.type(paste(text) + "\n")
        terminal.wait("tokens")
        terminal.wait("> ")
    terminal.type("look: " + paste("a\n/quit\n") + " end\n")
    terminal.wait("tokens")
    terminal.wait("> ")
    terminal.type("/save " + paste(str(saved)) + "\n")  # a typed command with something pasted is one
    terminal.wait(f"{2 * len(pasted) + 2} messages written")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert terminal.seen.rindex("\x1b[?2004l") > terminal.seen.rindex("\x1b[?2004h")
    said = [one["content"] for one in json.loads(saved.read_text()) if one["role"] == "user"]
    assert said == [*(text.strip() for text in pasted), "look: a\n/quit\n end"]


def test_a_paste_where_readline_does_not_edit_the_line(monkeypatch: pytest.MonkeyPatch):
    """Then the terminal's sequences are in the lines that `input` returns."""
    typed = iter(["/help", "\x1b[200~/quit", "/mode s", "more\x1b[201~ and", "a \x1b[200~/b\x1b[201~ c", " /typed"])

    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    with bracketed_paste() as read_line:
        lines = [read_line("> ") for _ in range(4)]
    assert lines == ["/help", " /quit\n/mode s\nmore and", "a /b c", " /typed"]


def test_loading_shows_a_line_and_ctrl_c_ends_it_with_one(folder: Path, piped):
    _, _, err = piped("")
    assert err[0] == f"loading {folder / 'model'} ..."
    # Loading takes as long as it must here: until Ctrl-C.
    endless = "import time; from hildanext import cli; from hildanext.terminal import chat;"
    endless += "chat.open_engine = lambda config: time.sleep(9999); raise SystemExit(cli.main())"
    for term, shown in (("xterm-256color", "loading tiny \x1b[33m0:00:0"), ("dumb", "loading tiny ...\r\n")):
        terminal = Terminal(folder, term, "--model", "tiny", program=("-c", endless))
        terminal.wait(shown)
        terminal.type("\x03")
        assert terminal.end() == 130
        assert terminal.seen.endswith("hildanext chat: interrupted\r\n")
        assert "Traceback" not in terminal.seen
        # On a capable terminal the line was redrawn, and the cursor is back.
        assert (terminal.seen.rfind("\x1b[?25h") > terminal.seen.rfind("\x1b[?25l") >= 0) is (term != "dumb")
        assert ("\x1b" in terminal.seen) is (term != "dumb")
