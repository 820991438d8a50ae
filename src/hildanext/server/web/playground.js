// The playground: the prompt, the decoding settings, and one canvas (Generate) or three (Compare).

import { get, Problem, stream } from "./api.js";
import { Canvas } from "./canvas.js";
import { $, h, say } from "./dom.js";

// Settings of POST /generate besides prompt and mode: [key, label, attributes, hint]. Empty: the server's value.
const SETTINGS = [
  ["tau_mask", "τ mask", { type: "number", min: 0, max: 1, step: "any" }, "draft above this confidence"],
  ["tau_edit", "τ edit", { type: "text", inputmode: "decimal" }, "edit above this confidence; off: no editing"],
  ["max_new_tokens", "New tokens", { type: "number", min: 1, step: 1 }, "maximum"],
  ["temperature", "Temperature", { type: "number", min: 0, max: 2, step: "any" }, "0: greedy"],
  ["top_k", "Top k", { type: "number", min: 1, step: 1 }, "only the k most likely tokens"],
  ["top_p", "Top p", { type: "number", min: 0, max: 1, step: "any" }, "only this share of probability"],
  ["repetition_penalty", "Repetition", { type: "number", min: 0.1, max: 2, step: "any" }, "penalty; 1: none"],
  ["seed", "Seed", { type: "number", min: 0, step: 1 }, "for sampling; empty: a new one each time"],
  ["stop", "Stop", { type: "text" }, "end the answer before this text"],
  ["deadline_s", "Deadline", { type: "number", min: 0, step: "any" }, "time limit in seconds"],
];
const BASE = ["prompt", "messages", "max_new_tokens", "stop", "deadline_s"]; // fields of POST /generate/base

let modes = ["Q_MODE", "S_MODE"]; // of the served model; the first is its default
let running = null; // AbortController of the running requests
let focused = null; // canvas that the arrow keys control

const chosen = (name) => document.querySelector(`#ask [name="${name}"]:checked`).value;

/** Offer the modes of the served model. `health`: the answer of GET /health. */
export function offerModes(health) {
  if (!health.modes || String(health.modes) === String(modes)) return;
  modes = health.modes;
  for (const radio of document.querySelectorAll('#ask [name="mode"]')) {
    radio.closest("label").hidden = !modes.includes(radio.value);
    radio.checked = radio.value === health.mode;
  }
}

function buildSettings() {
  $("settings").append(
    ...SETTINGS.map(([key, label, attributes, hint]) =>
      h("label", { class: "setting" }, h("span", {}, label), h("input", { ...attributes, name: key, placeholder: "default" }), h("small", {}, hint)),
    ),
  );
  $("settings").addEventListener("input", () => {
    const n = SETTINGS.filter(([key]) => field(key).value.trim() !== "").length;
    $("n-set").textContent = n;
    $("n-set").hidden = n === 0;
  });
}

const field = (key) => $("ask").elements[key];

/** Build the request body. Throws Error with one line for an invalid field. */
function body() {
  const prompt = $("prompt").value;
  if (!prompt.trim()) throw new Error("The prompt is empty.");
  const found = chosen("kind") === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  for (const [key, label] of SETTINGS) {
    const input = field(key);
    const text = input.value.trim();
    if (input.validity.badInput) throw new Error(`${label} is not a number.`);
    if (text === "") continue;
    if (key === "stop") found.stop = [input.value];
    else if (key === "tau_edit" && ["off", "null", "none"].includes(text.toLowerCase())) found.tau_edit = null;
    else if (Number.isNaN(Number(text))) throw new Error(`${label} is not a number.`);
    else found[key] = Number(text);
  }
  return found;
}

/** Run one request and show it on a canvas, errors included. Returns true if it completed. */
async function run(canvas, path, asked, signal) {
  canvas.begin($("prompt").value, "messages" in asked);
  try {
    for await (const { event, data } of stream(path, { method: "POST", body: { ...asked, stream: true }, signal })) {
      if (event === "error") throw new Problem(data.status, data.detail);
      canvas.push(event, data);
    }
    if (!canvas.trace.done) canvas.fail("the connection was lost");
    return Boolean(canvas.trace.done);
  } catch (error) {
    if (error.name === "AbortError") canvas.fail(null);
    else canvas.fail(error.message);
    return false;
  }
}

/** Check the form, disable the buttons and run `work(body, signal)`. Stop aborts the signal. */
async function during(work) {
  let asked;
  try {
    asked = body();
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
  for (const id of ["generate", "compare"]) $(id).disabled = isBusy;
  $("halt").hidden = !isBusy;
}

function show(canvases) {
  focused?.pause();
  focused = canvases[0];
  $("answers").replaceChildren(...canvases.map((canvas) => canvas.root));
  $("answers").classList.toggle("three", canvases.length > 1);
  for (const canvas of canvases) canvas.root.addEventListener("pointerdown", () => (focused = canvas));
  if (matchMedia("(max-width: 900px)").matches) $("answers").scrollIntoView({ block: "start" });
}

const generate = () =>
  during(async (asked, signal) => {
    const canvas = new Canvas("Answer");
    show([canvas]);
    await run(canvas, "/generate", { ...asked, mode: chosen("mode") }, signal);
  });

/** Run the AR base, the default mode and the fastest one in turn, so that none slows another, each with its own thresholds. */
const compare = () =>
  during(async (asked, signal) => {
    const { tau_mask, tau_edit, ...shared } = asked;
    const base = Object.fromEntries(Object.entries(shared).filter(([key]) => BASE.includes(key)));
    const parts = [
      ["AR base", "/generate/base", base],
      ...[modes[0], modes.at(-1)].map((mode) => [mode, "/generate", { ...shared, mode }]),
    ].map(([title, path, ask]) => [new Canvas(title, { compact: true }), path, ask]);
    show(parts.map(([canvas]) => canvas));
    for (const [canvas] of parts) canvas.begin($("prompt").value, "messages" in asked);
    for (const [canvas, path, ask] of parts) {
      if (signal.aborted) canvas.fail(null);
      else {
        canvas.state.textContent = path === "/generate/base" ? await loading() : "waiting";
        await run(canvas, path, ask, signal);
      }
    }
  });

/** The state to show while waiting for the AR base. */
async function loading() {
  const { base } = await get("/health").catch(() => ({}));
  return base === "ready" ? "waiting" : "loading the AR base";
}

function welcome() {
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

export function startPlayground() {
  buildSettings();
  welcome();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) generate();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  $("compare").addEventListener("click", compare);
  $("halt").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const typing = event.target.closest("input, textarea, select, [contenteditable], [role=tab]");
    if (to && focused && !typing && !$("playground").hidden && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      focused.go(focused.k + to);
    }
  });
}
