"""The page in a real Chromium, against a real server and a real (tiny) model: what a visitor does, and what it then shows.

Each state is kept as a picture in build/screens/. Needs `playwright` (its Python package alone) and a Chromium of the
system: chromium, chromium-browser or google-chrome. Nothing is downloaded; without them these tests are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import PreTrainedTokenizerFast

from hildanext.config import Config, parse_config
from hildanext.decoding import sequence
from hildanext.decoding.engines.dummy import NOTICE
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.rule import Change
from hildanext.jobs import watcher
from hildanext.jobs.store import ENDED
from hildanext.server.command import open_jobs
from support import serving, waiting
from support.decoding import diffusion_lm
from support.models import write_gated
from support.training import material

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)

SCREENS = Path(__file__).parents[2] / "build" / "screens"
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROMPT = "Once upon a time"
expect = sync_api.expect
expect.set_options(timeout=900_000)  # a machine may be busy; nothing here waits longer than it must


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield found
        found.close()


class Visit:
    """A browser window on the server; what it complained of and where it went is kept."""

    def __init__(self, browser: Any, url: str, *, phone: bool = False, dark: bool = False) -> None:
        size = {"width": 360, "height": 740} if phone else {"width": 1280, "height": 800}
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.page = self.context.new_page()
        self.page.set_default_timeout(900_000)
        self.url, self.complaints, self.asked = url, [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def look(self, name: str) -> None:
        """Keep a picture; nothing may stick out sideways."""
        SCREENS.mkdir(parents=True, exist_ok=True)
        self.page.evaluate("scrollTo(0, 0)")
        self.page.screenshot(path=SCREENS / f"{name}.png", full_page=True)
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"

    def ask(self, prompt: str = PROMPT, **settings: str) -> None:
        self.page.get_by_role("radio", name="Plain text").check()
        self.page.fill("#prompt", prompt)
        if settings:
            self.page.locator("#settings-fold").evaluate("it => it.open = true")
        for name, value in settings.items():
            self.page.fill(f"#settings [name={name}]", value)

    def finished(self, nth: int = 0) -> Any:
        """The nth canvas, its run over."""
        canvas = self.page.locator(".canvas").nth(nth)
        expect(canvas).to_have_attribute("data-state", re.compile("done|failed"))
        return canvas


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """`visit(url, ...)`: a window on the page. At the end: no complaint, and no request to anybody else."""
    visits: list[Visit] = []

    def go(url: str, path: str = "/", **window: Any) -> Visit:
        visits.append(Visit(browser, url, **window))
        visits[-1].page.goto(url + path)
        return visits[-1]

    yield go
    for one in visits:
        one.context.close()
        assert one.complaints == []
        assert [address for address in one.asked if not address.startswith(one.url + "/")] == []


@pytest.fixture(scope="module")
def served(converted: Config) -> Config:
    return converted.model_copy(update={"engine": converted.engine.model_copy(update={"runtime": "eager"})})


@pytest.fixture(scope="module")
def server(served: Config) -> Iterator[str]:
    with serving.running(served) as (url, _):
        yield url


def text_of(canvas: Any) -> str:
    """The completion as it stands on the canvas."""
    return canvas.evaluate("it => [...it.querySelectorAll('.tok:not(.cut)')].map(one => one.textContent).join('')")


def test_a_generation_is_shown_as_it_happens_and_is_what_the_api_says(visit: Any, server: str) -> None:
    here = visit(server)
    here.look("playground")
    here.ask(max_new_tokens="14", tau_edit="0", tau_mask="0.02")
    here.page.click("#generate")
    canvas = here.finished()
    body = {"prompt": PROMPT, "mode": "Q_MODE", "max_new_tokens": 14, "tau_edit": 0, "tau_mask": 0.02, "trace": True}
    answer = httpx2.post(f"{server}/generate", json=body).json()
    assert text_of(canvas) == answer["text"]
    assert canvas.locator(".prompt-text").text_content() == PROMPT
    figures = dict(zip(canvas.locator("dt").all_text_contents(), canvas.locator("dd").all_text_contents(), strict=True))
    stats = answer["stats"]
    assert (figures["forwards"], figures["drafts"], figures["edits"]) == tuple(
        str(stats[name]) for name in ("forwards", "drafts", "edits")
    )
    assert figures["tokens"] == str(len(answer["token_ids"]))
    assert float(figures["tokens per forward"]) == pytest.approx(stats["tokens_per_forward"], rel=0.01)
    # Blocks of 4 are numbered within the answer, which may begin within the prompt's last block.
    n_prompt = prompt_tokens(server)
    blocks = canvas.locator(".tok").evaluate_all(
        "all => all.map(one => [Number(one.dataset.position), Number(one.parentNode.dataset.block)])"
    )
    assert blocks == [[position, position // 4 - n_prompt // 4 + 1] for position, _ in blocks]
    assert blocks[0] == [n_prompt, 1]
    about = canvas.locator(".more").text_content()
    assert "transformers engine, eager · Q_MODE · τ mask 0.02, τ edit 0" in about
    assert "dinfer: dInfer is not installed" in about
    here.look("generated")


def test_a_gated_checkpoint_shows_what_the_base_accepted(visit: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """EXACT is the default, and every token of the finished text keeps its colour."""
    config = write_gated(tmp_path_factory.mktemp("gated"), engine={"runtime": "eager"})
    with serving.running(config) as (url, _):
        here = visit(url)
        expect(here.page.get_by_role("radio", name="EXACT")).to_be_checked()
        here.ask(max_new_tokens="24")
        here.page.click("#generate")
        canvas = here.finished()
        answer = httpx2.post(f"{url}/generate", json={"prompt": PROMPT, "max_new_tokens": 24, "trace": True}).json()
        n_tokens = len(answer["token_ids"])
        assert text_of(canvas) == answer["text"]
        for kind in ("drafted", "edited"):
            assert canvas.locator(f".tok.{kind}").count() == sum(len(step[kind]) for step in answer["trace"])
        assert canvas.locator(".tok").count() == n_tokens
        stats = answer["stats"]
        figures = dict(
            zip(canvas.locator("dt").all_text_contents(), canvas.locator("dd").all_text_contents(), strict=True)
        )
        here.page.locator("#settings-fold").evaluate("it => it.open = true")
        visible = [one.get_attribute("name") for one in here.page.locator("#settings input:visible").all()]
        assert visible[:3] == ["tau_accept", "lookup", "max_new_tokens"]  # thresholds of editing have no effect here
        here.page.fill("[name=tau_accept]", "off")
        expect(here.page.locator("[name=tau_mask]")).to_be_visible()
        accepted = stats["accepted"] / stats["forwards"]
        assert float(figures["accepted a forward"]) == pytest.approx(accepted, rel=0.01)
        assert "EXACT · τ accept 1, 8 rows" in canvas.locator(".more").text_content()
        here.look("exact")


def states(trace: list[dict[str, Any]], n_prompt: int, k: int) -> dict[int, tuple[str | None, str]]:
    """The truth of the slider: position -> (piece, what pass k did to it), replayed from the API's trace."""
    found: dict[int, tuple[str | None, str]] = {}
    for number, step in enumerate(trace[:k], 1):
        for place, piece in enumerate(step["pieces"]):
            if step["start"] + place < n_prompt:
                continue
            what = "masked" if piece is None else "kept"
            if number == k:
                what = "edited" if place in step["edited"] else "drafted" if place in step["drafted"] else what
            found[step["start"] + place] = (piece, what)
    return found


def test_the_slider_steps_through_every_pass(visit: Any, server: str) -> None:
    # Thresholds of 0: a random model changes its mind all the time.
    settings = {"max_new_tokens": 9, "tau_mask": 0.003, "tau_edit": 0, "stop": ["\0"]}
    answer = httpx2.post(
        f"{server}/generate", json={"prompt": PROMPT, "mode": "S_MODE", "trace": True} | settings
    ).json()
    trace = answer["trace"]
    assert any(step["edited"] for step in trace)
    assert len(trace) > 5
    n_prompt = prompt_tokens(server)
    here = visit(server)
    here.ask(max_new_tokens="9", tau_mask="0.003", tau_edit="0")
    here.page.get_by_role("radio", name="S_MODE").check()
    here.page.click("#generate")
    canvas = here.finished()
    slider = canvas.get_by_label("Denoising pass")
    assert slider.get_attribute("max") == str(len(trace))
    last = {step["start"] + place: token for step in trace for place, token in enumerate(step["tokens"])}
    end = n_prompt + len(answer["token_ids"])
    for k in [*range(len(trace) + 1), 2]:
        slider.fill(str(k))
        shown = {
            int(one["position"]): one
            for one in canvas.locator(".tok").evaluate_all(
                "all => all.map(one => ({position: one.dataset.position, text: one.textContent, names: [...one.classList]}))"
            )
        }
        wanted = states(trace, n_prompt, k)
        assert set(shown) == set(wanted)
        for position, (piece, what) in wanted.items():
            assert what in shown[position]["names"], (k, position)
            # What is settled shows its share of the text, where half characters meet.
            if piece is None or ("\ufffd" not in piece and last[position] is not None):
                assert shown[position]["text"] == (piece or "")
            assert ("cut" in shown[position]["names"]) == (position >= end)
        assert canvas.locator("output").text_content() == f"pass {k} of {len(trace)}"
    # Keys do the same, wherever the focus is but in a field; and a token tells its story.
    here.page.locator("body").click(position={"x": 5, "y": 700})
    here.page.keyboard.press("ArrowRight")
    expect(canvas.locator("output")).to_have_text(f"pass 3 of {len(trace)}")
    changed = next(step["start"] + place for step in trace for place in step["edited"] if step["start"] + place < end)
    canvas.locator(f"[data-position='{changed}']").evaluate("it => it.click()")
    story = canvas.locator(".history li:not(.quiet):has(.what), .history li.quiet:has(.what)")
    truth = [
        ("drafted" if changed - step["start"] in step["drafted"] else "edited", number)
        for number, step in enumerate(trace, 1)
        if changed - step["start"] in (*step["drafted"], *step["edited"])
    ]
    assert [(one.locator(".what").text_content(), one.locator("button").text_content()) for one in story.all()] == [
        (what, f"pass {number}") for what, number in truth
    ]
    here.look("history")
    canvas.get_by_label("Play").click()
    expect(canvas.locator("output")).to_have_text(f"pass {len(trace)} of {len(trace)}")


# The history of the token at each position from ... to, after each pass: what happened to it, in which pass.
STORIES = """(canvas, [from, to]) => {
  const slider = canvas.querySelector("input[type=range]");
  return [...Array(Number(slider.max)).keys()].map((k) => {
    slider.value = k + 1;
    slider.dispatchEvent(new Event("input"));
    return [...Array(to - from).keys()].map((i) => {
      const click = () => canvas.querySelector(`[data-position="${from + i}"]`).click();
      click();
      const lines = [...canvas.querySelectorAll(".history li:has(.what)")];
      const found = lines.map((line) => [".what", "button"].map((part) => line.querySelector(part).textContent));
      click();
      return found;
    });
  });
}"""


def fate(changes: list[Change], position: int, k: int) -> list[tuple[str, str]]:
    """The truth of a history: what each pass did to the token that stands at a position of the first block after pass k."""
    found, place = [], position
    for number in range(k, 0, -1):  # backwards, to where it came from
        change = changes[number - 1]
        kinds = [kind for kind in ("inserted", "drafted", "edited") if place in getattr(change, kind)]
        found += [(kind, f"pass {number}") for kind in kinds]
        source = change.sources[place]
        if source is None:
            break
        place = source
    found.reverse()
    place = position
    for number in range(k + 1, len(changes) + 1):  # forwards, to where it went
        change = changes[number - 1]
        if place not in change.sources:
            is_deleted = changes[number - 2].tokens[place] in [token for _, token in change.deleted]  # else cut off
            return found + [("deleted", f"pass {number}")] * is_deleted
        place = change.sources.index(place)
        found += [(kind, f"pass {number}") for kind in ("drafted", "edited") if place in getattr(change, kind)]
    return found


def test_a_history_follows_its_token_through_insertions_and_deletions(
    visit: Any, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the sources that the decoding rule reports, in an answer of one block, which every pass may shift."""
    changes: list[Change] = []
    real = sequence.indel_step
    keep = lambda *args, **kwargs: changes.append(real(*args, **kwargs)) or changes[-1]  # noqa: E731
    monkeypatch.setattr(sequence, "indel_step", keep)
    engine_keys = {"order": ["transformers"], "runtime": "eager", "context": 64}
    config = parse_config({"engine": engine_keys, "decode": {"block_size": 16}})
    engine = TransformersEngine(config, {}, diffusion_lm(tiny_tokenizer, "in_place", edits=True))
    with serving.running(config, lambda config: engine) as (url, _):
        here = visit(url)
        here.ask("the", max_new_tokens="14", tau_mask="0.1", tau_edit="0.1")
        changes.clear()
        here.page.click("#generate")
        canvas = here.finished()
        n_prompt = len(engine.encode("the"))
        assert any(change.deleted for change in changes)
        assert any(change.inserted for change in changes)
        stories = canvas.evaluate(STORIES, [n_prompt, n_prompt + 14])
        assert len(stories) == len(changes)
        for k, positions in enumerate(stories, 1):
            for position, story in enumerate(positions, n_prompt):
                assert [tuple(line) for line in story] == fate(changes, position, k), (k, position)
        canvas.locator(".tok").last.evaluate("it => it.click()")
        here.look("moved")


def prompt_tokens(server: str) -> int:
    """The number of tokens of PROMPT."""
    body = {"prompt": PROMPT, "max_new_tokens": 1, "stream": True}
    events = httpx2.post(f"{server}/generate", json=body).text.split("\n")
    (start,) = (json.loads(line[6:]) for line in events if "prompt_tokens" in line)
    return int(start["prompt_tokens"])


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """A server that answers with NOTICE and the last message."""
    with serving.running(serving.dummy({"max_new_tokens": 100})) as (url, _):
        yield url


def test_a_conversation_is_sent_with_its_history(visit: Any, echo: str) -> None:
    here = visit(echo)
    page, bodies = here.page, []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.locator("details", has=page.locator("#system")).evaluate("it => it.open = true")
    page.fill("#system", "Be kind.")

    def say(text: str) -> str:
        page.fill("#prompt", text)
        page.click("#generate")
        return settled()

    def settled() -> str:
        expect(page.locator("#generate")).to_be_enabled()
        return str(page.locator("#answers .tokens").text_content())

    system = {"role": "system", "content": "Be kind."}

    def talk(*said: str) -> list[dict[str, str]]:
        roles = ("user", "assistant") * len(said)
        return [system, *({"role": role, "content": text} for role, text in zip(roles, said, strict=False))]

    assert say("<b>one</b>") == NOTICE + "<b>one</b>"
    say("two")
    first = ("<b>one</b>", NOTICE + "<b>one</b>")
    assert bodies[-1]["messages"] == talk(*first, "two")
    assert page.locator("#turns li p").all_text_contents() == [f"You: {first[0]}", f"Model: {first[1]}"]
    assert page.input_value("#prompt") == ""
    here.look("conversation")
    # The last turn again, then edited.
    page.get_by_role("button", name="Try again").click()
    settled()
    assert bodies[-1]["messages"] == talk(*first, "two")
    page.get_by_role("button", name="Edit last").click()
    assert page.input_value("#prompt") == "two"
    say("three")
    assert bodies[-1]["messages"] == talk(*first, "three")
    # What is not sent changes nothing: an empty message, a field that is no number.
    page.click("#generate")
    expect(page.locator("#ask-problem")).to_have_text("The message is empty.")
    page.locator("#settings-fold").evaluate("it => it.open = true")
    page.fill("[name=tau_edit]", "much")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#ask-problem")).to_have_text("τ edit is not a number.")
    page.fill("[name=tau_edit]", "")
    # Plain text knows nothing of it, and the conversation goes on afterwards.
    page.get_by_role("radio", name="Plain text").check()
    say("alone")
    assert (bodies[-1]["prompt"], "messages" in bodies[-1]) == ("alone", False)
    assert not page.locator("#turns-card").is_visible()
    page.get_by_role("radio", name="Chat").check()
    assert page.locator("#turns li").count() == 2
    say("four")
    assert bodies[-1]["messages"] == talk(*first, "three", NOTICE + "three", "four")
    page.get_by_role("button", name="Start over").click()
    say("five")
    assert bodies[-1]["messages"] == talk("five")


def test_a_message_without_an_answer_stays_to_be_sent(visit: Any, echo: str) -> None:
    here = visit(echo)
    page = here.page
    page.fill("#prompt", "one")
    page.click("#generate")
    expect(page.locator("#talk-actions")).to_be_visible()
    page.route("**/generate", lambda route: route.fulfill(status=503, json={"detail": "it stops"}))
    page.fill("#prompt", "two")
    for button in ("#generate", "#again"):
        page.click(button)
        expect(page.locator("#answers .problem")).to_contain_text("it stops")
        expect(page.locator("#generate")).to_be_enabled()
        assert page.input_value("#prompt") == "two"
        assert page.locator("#turns li").count() == 1
    here.complaints.clear()  # the browser notes a 503 by itself


def test_an_empty_field_shows_the_servers_value(visit: Any, server: str) -> None:
    here = visit(server, phone=True)
    page = here.page
    page.locator("#settings-fold").evaluate("it => it.open = true")
    found = httpx2.get(f"{server}/settings").json()
    expect(page.locator("#fixed")).to_contain_text("blocks of 4 tokens")
    expect(page.locator("#fixed")).to_contain_text("room for 64 tokens")
    for mode in ("S_MODE", "Q_MODE"):
        page.get_by_role("radio", name=mode).check()
        values = found["modes"][mode] | {"deadline_s": found["deadline_s"]}
        shown = {one.get_attribute("name"): one for one in page.locator("#settings input:visible").all()}
        assert set(shown) <= set(values)
        assert {"tau_mask", "tau_edit", "max_new_tokens", "temperature", "stop", "seed"} <= set(shown)
        words = {"top_k": "all", "seed": "random", "stop": "none"}
        for name, field in shown.items():
            assert field.get_attribute("placeholder") == words.get(name, str(values[name]).removesuffix(".0")), name
    here.look("settings")
    here.ask(max_new_tokens="8")
    expect(page.locator("#n-set")).to_have_text("1 changed")
    page.click("#generate")
    canvas = here.finished()
    # Wide enough for a thumb.
    slider, card = canvas.get_by_label("Denoising pass").bounding_box(), canvas.bounding_box()
    assert slider["width"] > 0.85 * card["width"]


@pytest.mark.slow
def test_the_base_beside_both_modes(visit: Any, server: str) -> None:
    here = visit(server)
    here.ask(max_new_tokens="12")
    here.page.click("#compare")
    canvases = [here.finished(nth) for nth in range(3)]
    assert [one.locator("h2").text_content() for one in canvases] == ["AR base", "Q_MODE", "S_MODE"]
    body = {"prompt": PROMPT, "max_new_tokens": 12}
    answers = [httpx2.post(f"{server}/generate/base", json=body).json()]
    answers += [httpx2.post(f"{server}/generate", json=body | {"mode": mode}).json() for mode in ("Q_MODE", "S_MODE")]
    assert [text_of(one) for one in canvases] == [answer["text"] for answer in answers]
    assert (
        canvases[0].locator("output").text_content()
        == f"token {len(answers[0]['token_ids'])} of {len(answers[0]['token_ids'])}"
    )
    here.look("compare")


@pytest.mark.slow
def test_a_base_that_cannot_be_had_is_said_in_its_column(visit: Any, converted: Config, tmp_path: Path) -> None:
    shutil.copytree(converted.model.base, tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    stored["hilda"]["base_model"] = "/nowhere/at/all"
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    model = converted.model.model_copy(update={"base": str(tmp_path / "model")})
    with serving.running(converted.model_copy(update={"model": model})) as (url, _):
        here = visit(url)
        here.ask()
        here.page.click("#compare")
        canvases = [here.finished(nth) for nth in range(3)]
        problem = "the AR base is not available: model '/nowhere/at/all': no such folder"
        assert canvases[0].locator(".problem").text_content() == problem
        assert [one.get_attribute("data-state") for one in canvases[1:]] == ["done", "done"]
        here.look("compare-no-base")
        (said,) = here.complaints  # the browser notes a 404 by itself
        assert "404" in said
        here.complaints.clear()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"tau_mask": "2"}, "'tau_mask': Input should be less than or equal to 1"),
        ({"tau_edit": "some"}, "τ edit is not a number."),
        ({"max_new_tokens": "500"}, "exceed the model's context of 64"),
        ({"deadline_s": "0.000001"}, "504, timed out: the deadline passed"),
    ],
)
@pytest.mark.slow
def test_what_is_refused_is_one_clear_line(visit: Any, server: str, settings: dict[str, str], line: str) -> None:
    here = visit(server)
    here.ask(**settings)
    here.page.click("#generate")
    problem = here.page.locator(".problem:visible")
    expect(problem).to_contain_text(line)
    assert "\n" not in problem.text_content()
    here.complaints[:] = [said for said in here.complaints if "Failed to load resource" not in said]


@pytest.mark.slow
def test_stop_ends_the_request(visit: Any, server: str) -> None:
    here = visit(server)
    here.page.route("**/generate", lambda route: None)  # it never answers
    here.ask()
    here.page.click("#generate")
    here.page.click("#halt")
    canvas = here.finished()
    assert canvas.locator(".run-state").text_content() == "stopped"
    expect(here.page.locator("#generate")).to_be_enabled()


@pytest.mark.slow
def test_a_server_with_keys_is_asked_with_one(visit: Any, served: Config) -> None:
    with serving.running(served, keys=["schlüssel".encode()]) as (url, _):
        here = visit(url)
        dialog = here.page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        here.look("key")
        here.page.fill("#key", "wrong")
        here.page.get_by_role("button", name="Continue").click()
        expect(dialog.get_by_role("alert")).to_have_text("That key was not accepted.")
        here.page.fill("#key", "schlüssel")
        here.page.get_by_role("button", name="Continue").click()
        expect(here.page.locator(".dot")).to_have_attribute("data-state", "ok")
        here.ask()
        here.page.click("#generate")
        assert here.finished().get_attribute("data-state") == "done"
        here.page.reload()  # the tab keeps it
        expect(here.page.locator(".dot")).to_have_attribute("data-state", "ok")
        expect(dialog).to_be_hidden()
        here.complaints[:] = [said for said in here.complaints if "401" not in said]


@pytest.mark.slow
def test_health_shows_what_health_says(visit: Any, server: str) -> None:
    here = visit(server, "/#health")
    health = httpx2.get(f"{server}/health").json()
    figures = here.page.locator("#health .figures")
    expect(figures).to_contain_text("transformers")
    rows = [one.text_content() for one in figures.locator("div").all()]
    assert {"Enginetransformers", "ModeQ_MODE", f"Running0 of {health['slots']}"} <= set(rows)
    assert f"Waiting0 of {health['queue_limit']}" in rows
    assert here.page.locator("#health .pill").text_content() == "ok"
    # The rest is folded, and a fold that was opened stays open when the figures change.
    folds = here.page.locator("#health details")
    assert not folds.locator("dl:visible, figure:visible").count()
    for title in ("About this server", "Load in the last"):
        folds.locator("summary", has_text=title).click()
    facts = [one.text_content() for one in folds.locator(".facts div").all()]
    assert f"Model{health['model']}" in facts
    assert f"Block size{health['block_size']}" in facts
    assert "dinfer passed over" in here.page.locator(".reasons").text_content()
    # A rate is the difference of two looks: the tokens decoded between them.
    gauge = here.page.locator("[data-gauge='Tokens per forward'] b")
    expect(gauge).to_have_text("0")
    answer = httpx2.post(f"{server}/generate", json={"prompt": PROMPT, "max_new_tokens": 12}).json()
    expect(gauge).not_to_have_text("0")
    assert float(gauge.text_content()) == pytest.approx(answer["stats"]["tokens_per_forward"], rel=0.01)
    assert folds.locator("figure:visible").count() == 6
    here.look("health")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("phone", [False, True])
@pytest.mark.slow
def test_every_section_on_every_screen(visit: Any, server: str, phone: bool, dark: bool) -> None:
    here = visit(server, phone=phone, dark=dark)
    name = f"{'phone' if phone else 'desktop'}-{'dark' if dark else 'light'}"
    ground = here.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) is dark
    here.ask(max_new_tokens="12", tau_edit="0")
    here.page.click("#compare")
    for nth in range(3):
        here.finished(nth)
    here.page.locator(".tok:not(.silent)").first.evaluate("it => it.click()")
    here.look(f"{name}-playground")
    here.page.get_by_role("tab", name="Health").click()
    expect(here.page.locator("#health .figures")).to_be_visible()
    here.look(f"{name}-health")


@pytest.mark.slow
def test_without_a_mouse(visit: Any, server: str) -> None:
    here = visit(server)
    keys = here.page.keyboard
    keys.press("Tab")
    expect(here.page.get_by_text("Skip to content")).to_be_focused()
    here.page.locator("#prompt").focus()
    keys.type(PROMPT)
    keys.press("Control+Enter")
    canvas = here.finished()
    canvas.locator(".tok").first.focus()
    keys.press("ArrowDown")
    keys.press("Enter")
    expect(canvas.locator(".history h3")).to_contain_text("Token 2")
    here.page.get_by_role("tab", name="Playground").focus()
    keys.press("ArrowLeft")  # round to the last one
    keys.press("Enter")
    expect(here.page.locator("#health")).to_be_visible()


# --- Jobs


# Tests name `workplace` before `visit`: the page must be closed before its server, which it asks every two seconds.
@pytest.fixture
def workplace(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with jobs over real rows and a real base; what still runs at the end is cancelled."""
    monkeypatch.chdir(tmp_path)
    config = material(tmp_path, tiny_base)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"order": ["dummy"]})})
    with serving.running(config, jobs=open_jobs(config)) as (url, _):
        yield url
        for job in httpx2.get(f"{url}/jobs").json()["jobs"]:
            if job["state"] not in ENDED:
                httpx2.post(f"{url}/jobs/{job['id']}/cancel", json={})
        waiting.until(lambda: all(job["state"] in ENDED for job in httpx2.get(f"{url}/jobs").json()["jobs"]))


def until(page: Any, condition: Callable[[], bool]) -> None:
    """Wait for what the page is about to show."""
    for _ in range(18_000):
        if condition():
            return
        page.wait_for_timeout(50)
    pytest.fail("the page did not show it within 15 minutes")


def last_step(page: Any, chart: str) -> int:
    """The last step that a chart shows."""
    label = page.locator("figure", has_text=chart).locator("svg").get_attribute("aria-label") or ""
    return int((re.findall(r"at step (\d+)", label) or ["0"])[0])


@pytest.mark.slow
def test_a_job_is_started_watched_cancelled_and_resumed(workplace: str, visit: Any) -> None:
    here = visit(workplace, "/#jobs")
    page = here.page
    expect(page.locator("#job-list")).to_contain_text("No jobs yet")
    page.click("#new-job")
    for section, key, value in (
        ("wsd", "stable_steps", "50000"),
        ("train", "save_every", "50000"),
        ("wsd", "start_block", "0"),
    ):
        page.locator(f"[data-section={section}]").evaluate("it => it.open = true")
        page.fill(f"[name='{section}.{key}']", value)
    here.look("job-form")
    page.get_by_role("button", name="Start").click()
    problem = "First block size (wsd.start_block) must be at least 1."
    expect(page.locator("#job-pane .problem")).to_have_text(problem)
    page.fill("[name='wsd.start_block']", "1")  # as it was: not sent
    page.fill("[name='run']", "mine")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#job-pane .pill")).to_have_text("running")
    (job,) = httpx2.get(f"{workplace}/jobs").json()["jobs"]
    sent = {"wsd": {"stable_steps": 50_000}, "train": {"save_every": 50_000}}
    assert job["request"]["config"] == sent
    assert job["request"]["options"]["run"] == "mine"
    # The curves grow.
    until(page, lambda: page.locator(".chart .line").count() >= 5)
    for wanted in (4, 8):
        until(page, lambda wanted=wanted: last_step(page, "Loss") >= wanted)
    box = page.locator(".chart svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + 60)
    expect(page.locator(".chart .cursor line").first).to_be_attached()
    here.look("job-running")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-pane .pill")).to_have_text("cancelled")
    rows = httpx2.get(f"{workplace}/jobs/{job['id']}/metrics").json()["rows"]
    for chart in ("Loss", "Block size", "Learning rate", "Tokens per second"):
        until(page, lambda chart=chart: last_step(page, chart) == rows[-1]["step"])
    assert "saved step" in page.locator(".log").first.text_content()
    here.look("job-cancelled")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#job-pane .pill")).to_have_text("running")
    until(page, lambda: last_step(page, "Loss") > rows[-1]["step"])
    assert httpx2.get(f"{workplace}/jobs/{job['id']}").json()["attempt"] == 2
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-pane .pill")).to_have_text("cancelled")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#job-list")).to_contain_text("No jobs yet")


# What a training leaves behind, without the training: metrics in its run's folder, a result on stdout.
TRAINED = """
import json, math, pathlib, sys
folder = pathlib.Path("runs", sys.argv[1])
folder.mkdir()
scale = {"slow": 1, "fast": 3}[sys.argv[1]]
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, 2001):
        row = {"step": step, "loss": 5 * math.exp(-step * scale / 900) + 0.3 * math.sin(step * 1.7) ** 2 + 1}
        row |= {"block_size": min(32, 1 + step // 20), "lr": 1e-4 * scale, "tokens_per_second": 900 + 50 * math.cos(step)}
        file.write(json.dumps(row | ({"eval_loss": row["loss"] + 0.1} if step % 200 == 0 else {})) + "\\n")
print(json.dumps({"finished": True, "steps": 2000}))
"""


@pytest.mark.slow
def test_runs_are_laid_over_each_other(
    workplace: str, visit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        watcher, "command", lambda python, kind, options, *_, **__: [python, "-c", TRAINED, options.run]
    )
    ids = []
    for name, lr in (("slow", 0.001), ("fast", 0.01)):
        body = {"kind": "convert-wsd", "options": {"run": name}, "config": {"train": {"lr": lr}}}
        ids.append(httpx2.post(f"{workplace}/jobs", json=body).json()["id"])
    here = visit(workplace, f"/#jobs/{ids[1]}")
    page = here.page
    expect(page.locator("#job-pane .pill")).to_have_text("done")
    expect(page.locator("#job-pane")).to_contain_text("train.lr = 0.01")
    expect(page.locator("#job-pane")).to_contain_text("Result")
    here.look("job-done")
    for box in page.locator("#job-list input").all():
        box.check()
    loss = page.locator("figure", has_text="Learning rate")
    expect(loss.locator(".line")).to_have_count(2)
    last = [json.loads(line) for line in (tmp_path / "runs" / "slow" / "metrics.jsonl").read_text().splitlines()][-1]
    expect(loss.locator(".readout")).to_contain_text("slow")
    assert last_step(page, "Learning rate") == last["step"]
    here.look("jobs-compared")
    phone = visit(workplace, f"/#jobs/{ids[1]}", phone=True, dark=True)
    expect(phone.page.locator("#job-pane .pill")).to_have_text("done")
    until(phone.page, lambda: last_step(phone.page, "Loss") == last["step"])
    assert phone.page.locator(".chart .grid line").count() >= 8  # two a chart at the least
    phone.look("phone-dark-job")
    phone.page.click("#new-job")
    phone.page.locator("[data-section=train] summary").click()
    phone.look("phone-dark-job-form")


@pytest.mark.slow
def test_a_server_without_a_jobs_table_says_so(visit: Any, server: str) -> None:
    here = visit(server, "/#jobs")
    expect(here.page.locator("#jobs-problem")).to_have_text("This server runs no jobs.")
    here.complaints[:] = [said for said in here.complaints if "404" not in said]
