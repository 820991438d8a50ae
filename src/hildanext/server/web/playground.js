// The playground: a conversation or a plain prompt, the decoding settings, and one canvas (Generate) or three (Compare).

import { get, Problem, stream } from "./api.js";
import { Canvas } from "./canvas.js";
import { addTurn, clearTurns, drawTurns, listAll, messages, nTurns, takeBack } from "./conversation.js";
import { $, h, say } from "./dom.js";
import { buildSettings, readSettings, showDefaults } from "./settings.js";

const BASE = ["prompt", "messages", "max_new_tokens", "stop", "deadline_s"]; // fields of POST /generate/base
const OWN = ["tau_mask", "tau_edit", "tau_accept"]; // settings of one mode, which Compare leaves to each

let modes = ["Q_MODE", "S_MODE"]; // of the served model; the first is its default
let uptime = Infinity; // of the server when its settings were read, in seconds
let running = null; // AbortController of the running requests
let focused = null; // canvas that the arrow keys control

const chosen = (name) => document.querySelector(`#ask [name="${name}"]:checked`).value;
const isChat = () => chosen("kind") === "chat";

/** Offer the modes and settings of the served model. `health`: the answer of GET /health, at each poll. */
export async function offer(health) {
  const isSame = health.uptime_s > uptime;
  if (!health.modes || isSame) return;
  const settings = await get("/settings");
  uptime = health.uptime_s;
  modes = health.modes;
  for (const radio of document.querySelectorAll('#ask [name="mode"]')) {
    radio.closest("label").hidden = !modes.includes(radio.value);
    radio.checked = radio.value === health.mode;
  }
  showDefaults(settings);
}

/** The request body for a prompt. Throws Error with one line for an invalid field. */
function body(prompt) {
  if (!prompt.trim()) throw new Error(isChat() ? "The message is empty." : "The prompt is empty.");
  return { ...(isChat() ? { messages: messages(prompt) } : { prompt }), ...readSettings() };
}

/** Run one request and show it on a canvas, errors included. Returns the answer's text, if stopped as far as it came. */
async function run(canvas, path, prompt, asked, signal) {
  let text = "";
  canvas.begin(prompt, "messages" in asked);
  try {
    for await (const { event, data } of stream(path, { method: "POST", body: { ...asked, stream: true }, signal })) {
      if (event === "error") throw new Problem(data.status, data.detail);
      if (event === "block") text += data.text;
      if (event === "done") text = data.text;
      canvas.push(event, data);
    }
    if (!canvas.trace.done) throw new Problem(0, "the connection was lost");
    return text;
  } catch (error) {
    const isStopped = error.name === "AbortError";
    canvas.fail(isStopped ? null : error.message);
    return isStopped ? text : "";
  }
}

/** Check the form, disable the buttons and run `work(body, signal)`. Stop aborts the signal. */
async function during(prompt, work) {
  let asked;
  try {
    asked = body(prompt);
  } catch (error) {
    say($("ask-problem"), error.message);
    return;
  }
  say($("ask-problem"), null);
  running = new AbortController();
  setBusy(true);
  try {
    await work(asked, running.signal);
  } finally {
    running = null;
    setBusy(false);
  }
}

function setBusy(isBusy) {
  for (const id of ["generate", "compare", "again", "revise", "restart"]) $(id).disabled = isBusy;
  $("halt").hidden = !isBusy;
}

function show(canvases) {
  focused?.pause();
  focused = canvases[0];
  listAll();
  $("answers").replaceChildren(...canvases.map((canvas) => canvas.root));
  $("answers").classList.toggle("three", canvases.length > 1);
  for (const canvas of canvases) canvas.root.addEventListener("pointerdown", () => (focused = canvas));
  if (nTurns() || matchMedia("(max-width: 900px)").matches) $("answers").scrollIntoView({ block: "start" });
}

/** Answer a prompt. In a chat the answer makes it a turn, also if it was stopped; without an answer, `undo` runs. */
async function generate(prompt, undo) {
  const inChat = isChat();
  let text = "";
  await during(prompt, async (asked, signal) => {
    const canvas = new Canvas("Answer");
    show([canvas]);
    text = await run(canvas, "/generate", prompt, { ...asked, mode: chosen("mode") }, signal);
  });
  if (!inChat) return;
  if (text) addTurn({ user: prompt, assistant: text }, true);
  else undo();
}

/** Send what was typed. Without an answer it stays in the field. */
const send = () => {
  const prompt = $("prompt").value;
  if (isChat()) $("prompt").value = "";
  generate(prompt, () => ($("prompt").value ||= prompt));
};

/** Answer the last message again, with the settings as they are now. */
function again() {
  const turn = takeBack();
  generate(turn.user, () => addTurn(turn, false));
}

/** Take the last turn back and let its message be edited. */
function revise() {
  $("prompt").value = takeBack().user;
  welcome();
  $("prompt").focus();
}

function restart() {
  clearTurns();
  welcome();
  $("prompt").focus();
}

/** Run the AR base, the default mode and the fastest one in turn, so that none slows another. No turn of the chat. */
const compare = () => {
  const prompt = $("prompt").value;
  return during(prompt, async (asked, signal) => {
    const shared = Object.fromEntries(Object.entries(asked).filter(([key]) => !OWN.includes(key)));
    const base = Object.fromEntries(Object.entries(shared).filter(([key]) => BASE.includes(key)));
    const parts = [
      ["AR base", "/generate/base", base],
      ...[modes[0], modes.at(-1)].map((mode) => [mode, "/generate", { ...shared, mode }]),
    ].map(([title, path, ask]) => [new Canvas(title, { compact: true }), path, ask]);
    show(parts.map(([canvas]) => canvas));
    for (const [canvas] of parts) canvas.begin(prompt, "messages" in asked);
    for (const [canvas, path, ask] of parts) {
      if (signal.aborted) canvas.fail(null);
      else {
        canvas.state.textContent = path === "/generate/base" ? await loading() : "waiting";
        await run(canvas, path, prompt, ask, signal);
      }
    }
  });
};

/** The state to show while waiting for the AR base. */
async function loading() {
  const { base } = await get("/health").catch(() => ({}));
  return base === "ready" ? "waiting" : "loading the AR base";
}

function welcome() {
  focused = null;
  $("answers").classList.remove("three");
  $("answers").replaceChildren(
    h(
      "article",
      { class: "card canvas welcome" },
      h("p", { class: "canvas-text" }, ...legend("Tokens", "kept"), ...legend(" are drafted", "drafted c9"), ...legend(" in parallel", "drafted c5"), ...legend(" and edited", "edited"), ...legend(" later", "edited"), ...legend("", "masked"), ...legend("", "masked"), ...legend("", "masked")),
      h("p", { class: "quiet" }, "A block of masked tokens is filled in a few passes. Green marks a draft: the stronger the colour, the higher the confidence. Amber marks an edit. In EXACT mode, green marks drafts that the base accepted, amber its corrections. After the answer, step through the passes, or click a token to see its history."),
    ),
  );
}

const legend = (text, kind) => [h("span", { class: `tok ${kind}` }, text)];

/** Show what belongs to the chosen kind of prompt. */
function chooseKind() {
  $("playground").dataset.kind = chosen("kind");
  for (const part of document.querySelectorAll("#ask .chat-only")) part.hidden = !isChat();
  $("prompt-label").textContent = isChat() ? "Message" : "Prompt";
  $("generate").textContent = isChat() ? "Send" : "Generate";
  $("prompt").placeholder = `Type a ${isChat() ? "message. Ctrl+Enter sends" : "text to continue. Ctrl+Enter generates"}.`;
  drawTurns();
}

export function startPlayground() {
  buildSettings();
  welcome();
  chooseKind();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) send();
  });
  for (const radio of document.querySelectorAll('#ask [name="kind"]')) radio.addEventListener("change", chooseKind);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  $("system").addEventListener("input", () => ($("has-system").hidden = !$("system").value.trim()));
  $("compare").addEventListener("click", compare);
  $("halt").addEventListener("click", () => running?.abort());
  $("again").addEventListener("click", again);
  $("revise").addEventListener("click", revise);
  $("restart").addEventListener("click", restart);
  document.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const typing = event.target.closest("input, textarea, select, [contenteditable], [role=tab]");
    if (to && focused && !typing && !$("playground").hidden && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      focused.go(focused.k + to);
    }
  });
}
