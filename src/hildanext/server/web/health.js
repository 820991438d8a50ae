// The health section: the server's state from /health, and its load from the change of /metrics between two polls.

import { get, request } from "./api.js";
import { sparkline } from "./chart.js";
import { $, duration, h, number } from "./dom.js";

const EVERY_MS = 2000;
const KEPT = 90; // polls shown in a curve

/** Parse Prometheus' text format into a map from "name{labels}" to value. */
export function parseMetrics(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)/.exec(line);
    if (match) found.set(match[1], Number(match[2]));
  }
  return found;
}

// Curves: [name, unit, function of two polls (before, now, seconds between)]
const delta = (before, now, name) => (now.get(name) ?? 0) - (before.get(name) ?? 0);
const ratio = (above, below) => (below > 0 ? above / below : 0);
const CURVES = [
  ["Throughput", "tokens/s", (a, b, s) => delta(a, b, "hildanext_tokens_total") / s],
  ["Forwards", "per second", (a, b, s) => delta(a, b, "hildanext_forwards_total") / s],
  ["Tokens per forward", "TPF", (a, b) => ratio(delta(a, b, "hildanext_tokens_total"), delta(a, b, "hildanext_forwards_total"))],
  ["Batch", "requests per pass", (a, b) => ratio(delta(a, b, "hildanext_batch_size_sum"), delta(a, b, "hildanext_batch_size_count"))],
  ["Running", "requests", (a, b) => b.get("hildanext_running") ?? 0],
  ["Queue", "requests", (a, b) => b.get("hildanext_queue") ?? 0],
];

let last = null; // {time, metrics}
let timer = null;
const curves = CURVES.map(() => []);

const BASES = { off: "off (server.base is false)", "not loaded": "not loaded; Compare loads it" };

// The section: a card of figures that is drawn at each poll, and folds that stay open or closed meanwhile.
const figures = h("article", { class: "card" });
const fold = (title) => {
  const content = h("div", {});
  return { content, root: h("details", { class: "card fold" }, h("summary", { class: "title" }, title), content) };
};
const load = fold(`Load in the last ${Math.round((KEPT * EVERY_MS) / 60000)} minutes`);
const about = fold("About this server");
const totals = fold("Since the server started");

const list = (rows, names) => h("dl", { class: names }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
const now = (name) => number(curves[CURVES.findIndex(([title]) => title === name)].at(-1) ?? 0);

function drawFigures(health) {
  figures.replaceChildren(
    h(
      "header",
      { class: "row between" },
      h("h2", { class: "title" }, health.model.split("/").slice(-2).join("/")),
      h("span", { class: "pill", "data-state": health.status }, health.status),
    ),
    list(
      [
        ["Engine", health.engine ?? "–"],
        ["Mode", health.mode ?? "–"],
        ["Running", `${health.running} of ${health.slots ?? "–"}`],
        ["Waiting", `${health.queue} of ${health.queue_limit}`],
        ["Tokens/s now", now("Throughput")],
        ["Up for", duration(health.uptime_s)],
      ],
      "figures wide",
    ),
  );
}

function drawAbout(health) {
  const reasons = Object.entries(health.engine_reasons);
  const facts = [
    ["Model", health.model],
    ["Modes", health.modes?.join(", ") ?? "–"],
    ["Block size", health.block_size ?? "–"],
    ["Device", [health.device, health.dtype].filter(Boolean).join(", ") || "–"],
    ["Slots", health.slots ?? "–"],
    ["AR base", BASES[health.base] ?? health.base],
    ["Jobs", health.jobs ? health.jobs.trouble ?? health.jobs.backend : "off"],
    ["Version", health.version],
  ];
  about.content.replaceChildren(
    list(facts, "facts wide"),
    reasons.length ? h("ul", { class: "reasons" }, reasons.map(([name, reason]) => h("li", {}, h("b", {}, name), ` passed over: ${reason}`))) : "",
  );
}

function drawLoad() {
  load.content.replaceChildren(
    h(
      "div",
      { class: "gauges" },
      CURVES.map(([name, unit], at) =>
        h(
          "figure",
          { class: "gauge", "data-gauge": name },
          h("figcaption", {}, name),
          h("p", {}, h("b", {}, number(curves[at].at(-1) ?? 0)), h("small", {}, ` ${unit}`)),
          sparkline(curves[at], { label: `${name}, ${unit}` }).root,
        ),
      ),
    ),
  );
}

function drawTotals(metrics) {
  const byStatus = new Map();
  const rows = [
    ["Tokens", number(metrics.get("hildanext_tokens_total"), 7)],
    ["Forwards", number(metrics.get("hildanext_forwards_total"), 7)],
  ];
  const errors = [];
  for (const [name, value] of metrics) {
    const status = name.startsWith("hildanext_requests_total{") && /status="(\d+)"/.exec(name)[1];
    if (status) byStatus.set(status, (byStatus.get(status) ?? 0) + value);
    if (name.startsWith("hildanext_errors_total{")) errors.push([/kind="(.*)"/.exec(name)[1], number(value, 7)]);
  }
  const answers = [...byStatus].sort().map(([status, value]) => [`Answers ${status}`, number(value, 7)]);
  totals.content.replaceChildren(list([...rows, ...answers, ...errors], "facts wide"));
}

async function poll() {
  try {
    const [health, answer] = await Promise.all([get("/health"), request("/metrics")]);
    const [metrics, time] = [parseMetrics(await answer.text()), performance.now() / 1000];
    CURVES.forEach(([, , figure], at) => {
      if (last) curves[at].push(figure(last.metrics, metrics, time - last.time));
      if (curves[at].length > KEPT) curves[at].shift();
    });
    last = { time, metrics };
    drawFigures(health);
    drawLoad();
    drawAbout(health);
    drawTotals(metrics);
    if (!figures.isConnected) $("health").replaceChildren(figures, load.root, about.root, totals.root);
  } catch (error) {
    $("health").replaceChildren(h("article", { class: "card" }, h("p", { class: "problem", role: "alert" }, error.message)));
  }
  if (timer !== null) timer = setTimeout(poll, EVERY_MS);
}

/** Start or stop polling; it runs only while the section is shown. */
export function showHealth(isShown) {
  clearTimeout(timer);
  timer = isShown ? 0 : null;
  if (isShown) poll();
}
