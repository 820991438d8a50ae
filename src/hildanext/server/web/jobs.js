// The jobs section: the list of jobs, the form for a new job, a job with live curves and log, and comparing runs.

import { get, post, request, stream } from "./api.js";
import { Chart } from "./chart.js";
import { $, duration, h, number, say } from "./dom.js";
import { JobForm } from "./form.js";
import { kindHelp, kindName } from "./names.js";

const EVERY_MS = 2000;
const ENDED = ["done", "failed", "cancelled", "interrupted"];
const TRAINING = ["convert-wsd", "sft"];
const MOST_LINES = 2000; // log lines kept on the page
// Charts of a run: [title, fromZero, [series name, key of a row, dots]]
const CHARTS = [
  ["Loss", false, [["train", "loss", false], ["held-out", "eval_loss", true]]],
  ["Block size", true, [["block", "block_size", false]]],
  ["Learning rate", true, [["lr", "lr", false]]],
  ["Tokens per second", true, [["tokens/s", "tokens_per_second", false]]],
];

let jobs = [];
let open = null; // id of the shown job
let watching = null; // AbortController of its log and metrics streams
let picked = new Set(); // ids of the jobs to compare
let pane = "none"; // none, form, job or compare

const when = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
const pill = (state) => h("span", { class: "pill", "data-state": state }, state);
const took = (job) => (job.started ? duration((job.ended ?? Date.now() / 1000) - job.started) : "not started");

/** Run a request; an error is shown as a line above the list. */
async function attempt(work) {
  say($("jobs-problem"), null);
  try {
    return await work();
  } catch (error) {
    say($("jobs-problem"), error.message);
    return null;
  }
}

export async function refreshJobs() {
  const found = await get("/jobs").catch((error) => {
    say($("jobs-problem"), error.status === 404 ? "This server runs no jobs." : error.message);
    return null;
  });
  if (!found) return;
  jobs = found.jobs;
  drawList();
  const job = jobs.find((item) => item.id === open);
  if (job && pane === "job") drawHead(job);
}

function drawList() {
  const items = jobs.map((job) => {
    const pick = TRAINING.includes(job.kind)
      ? h("input", { type: "checkbox", checked: picked.has(job.id), "aria-label": `Compare ${kindName(job.kind)} ${job.id}`, onchange: (event) => pickRun(job.id, event.target.checked) })
      : h("span", { class: "no-pick" });
    const link = h(
      "a",
      { href: `#jobs/${job.id}`, class: "job", "aria-current": job.id === open && pane === "job" ? "true" : null },
      h("span", { class: "row between" }, h("b", {}, kindName(job.kind)), pill(job.state)),
      h("small", {}, `${job.request.options?.run ?? job.id} · ${when(job.created)} · ${took(job)}`),
    );
    return h("li", { "data-id": job.id }, pick, link);
  });
  const focus = document.activeElement?.closest?.("#job-list li")?.dataset.id;
  const tag = document.activeElement?.tagName.toLowerCase();
  $("job-list").replaceChildren(...(items.length ? items : [h("li", { class: "quiet" }, "No jobs yet. A job prepares text, trains a model or measures one, while the server goes on answering.")]));
  if (focus) $("job-list").querySelector(`[data-id="${focus}"] ${tag}`)?.focus();
}

function leave(next) {
  watching?.abort();
  watching = null;
  pane = next;
  drawList();
}

/** Fill the pane. In a narrow window, where it is below the list, scroll to it. */
function fillPane(...parts) {
  $("job-pane").replaceChildren(...parts.filter(Boolean));
  if (matchMedia("(max-width: 900px)").matches) $("job-pane").scrollIntoView({ block: "start" });
}

// --- A new job

async function newJob() {
  const form = await attempt(() => get("/jobs/schema"));
  if (!form) return;
  open = null;
  leave("form");
  let parts = null;
  const kinds = Object.keys(form.kinds);
  const select = h("select", { id: "job-kind", "aria-describedby": "job-kind-hint" }, kinds.map((kind) => h("option", { value: kind, selected: kind === "convert-wsd" }, kindName(kind))));
  const help = h("p", { class: "hint", id: "job-kind-hint" });
  const holder = h("div", {});
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const start = h("button", { type: "submit", class: "primary" }, "Start");
  const rebuild = () => {
    parts = new JobForm(form, select.value);
    holder.replaceChildren(parts.root);
    help.replaceChildren(kindHelp(select.value), " ", h("code", {}, `hildanext ${select.value}`));
  };
  let key = newKey(); // kept until the server has answered, so that a retry creates no second job
  select.addEventListener("change", rebuild);
  rebuild();
  const submit = async (event) => {
    event.preventDefault();
    start.disabled = true;
    say(problem, null);
    try {
      const job = await post("/jobs", { kind: select.value, ...parts.read() }, { "Idempotency-Key": key });
      location.hash = `#jobs/${job.id}`;
    } catch (error) {
      say(problem, error.message);
      if (error.status) key = newKey();
    } finally {
      start.disabled = false;
    }
  };
  fillPane(
    h(
      "form",
      { class: "card", onsubmit: submit, novalidate: true },
      h("h2", { class: "title" }, "New job"),
      h("p", { class: "quiet" }, "Choose what to do and press Start. Fields that you do not change keep the server's configuration."),
      h("div", { class: "field" }, h("label", { for: "job-kind" }, "What to do"), select, help),
      holder,
      problem,
      h("div", { class: "row actions" }, start),
    ),
  );
  select.focus();
}

const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// --- One job

let head = null; // elements that change with the job's state

async function showJob(id) {
  const job = await attempt(() => get(`/jobs/${encodeURIComponent(id)}`));
  if (!job) return;
  open = id;
  leave("job");
  watching = new AbortController();
  head = { title: h("header", {}), result: h("div", {}), actions: h("div", { class: "row actions" }), drawn: "" };
  const log = h("pre", { class: "log", tabindex: 0, "aria-label": "Log" });
  const charts = TRAINING.includes(job.kind) ? makeCharts() : [];
  fillPane(
    h("article", { class: "card" }, head.title, head.actions),
    charts.length ? h("article", { class: "card charts" }, charts.map(([chart]) => chart.root)) : null,
    h("article", { class: "card" }, h("h2", { class: "title" }, "Log"), log),
    head.result,
  );
  drawHead(job);
  drawList();
  follow(job.id, log, charts, watching.signal);
}

/** Follow log and metrics until the job ends. */
function follow(id, log, charts, signal) {
  const metrics = charts.length ? followMetrics(id, charts, signal) : Promise.resolve();
  Promise.all([followLog(id, log, signal), metrics])
    .then(async () => {
      await refreshJobs();
      const job = await get(`/jobs/${encodeURIComponent(id)}`);
      if (!signal.aborted) drawHead(job);
    })
    .catch((error) => {
      if (error.name !== "AbortError" && !signal.aborted) say($("jobs-problem"), error.message);
    });
}

async function followLog(id, log, signal) {
  let waiting = [];
  log.replaceChildren();
  for await (const { event, data } of stream(`/jobs/${encodeURIComponent(id)}/logs?follow=true`, { signal })) {
    if (event === "reset") log.replaceChildren();
    if (event !== "message") continue;
    if (!waiting.length) {
      requestAnimationFrame(() => {
        const below = log.scrollHeight - log.scrollTop - log.clientHeight < 24;
        log.append(...waiting.map((line) => h("span", {}, `${line}\n`)));
        while (log.childElementCount > MOST_LINES) log.firstElementChild.remove();
        waiting = [];
        if (below) log.scrollTop = log.scrollHeight;
      });
    }
    waiting.push(data);
  }
}

async function followMetrics(id, charts, signal) {
  let rows = [];
  let drawing = false;
  for await (const { event, data } of stream(`/jobs/${encodeURIComponent(id)}/metrics?follow=true`, { signal })) {
    if (event === "reset") rows = [];
    if (event === "message") rows.push(data);
    if (!drawing) {
      drawing = true;
      requestAnimationFrame(() => {
        drawing = false;
        drawCharts(charts, [{ rows, name: null }]);
      });
    }
  }
}

const makeCharts = () => CHARTS.map(([title, fromZero, series]) => [new Chart(title, { fromZero }), series]);

/** runs: [{name, rows}]. One run: one colour per series. Several runs: one colour per run. */
function drawCharts(charts, runs) {
  for (const [chart, series] of charts) {
    chart.set(
      runs.flatMap(({ name, rows }, at) =>
        series.map(([label, key, dots], of) => ({
          name: name === null ? label : of ? `${name}, ${label}` : name,
          tone: name === null ? of : at % 6,
          dots,
          points: rows.filter((row) => typeof row[key] === "number").map((row) => [row.step, row[key]]),
        })),
      ),
    );
  }
}

function drawHead(job) {
  head.time?.replaceChildren(took(job));
  const drawn = JSON.stringify([job.state, job.attempt, job.cancel_requested]);
  if (drawn === head.drawn && !("result" in job)) return; // jobs of the list have no result
  head.drawn = drawn;
  head.time = h("dd", {}, took(job));
  const changed = Object.entries(job.request.config).flatMap(([section, keys]) =>
    Object.entries(keys ?? {}).map(([key, value]) => h("code", {}, `${section}.${key} = ${JSON.stringify(value)}`)),
  );
  const facts = [["Attempt", job.attempt], ["Run", job.run], ["Exit code", job.exit_code], ["Note", job.note]];
  head.title.replaceChildren(
    h("div", { class: "row between" }, h("h2", { class: "title" }, kindName(job.kind), h("small", {}, ` ${job.kind} · ${job.id}`)), pill(job.cancel_requested && job.state === "running" ? "cancelling" : job.state)),
    h(
      "dl",
      { class: "facts" },
      h("div", {}, h("dt", {}, "Time"), head.time),
      facts.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))),
    ),
    h("p", { class: "changed-keys" }, changed.length ? changed : h("span", { class: "quiet" }, "server's configuration, no changes")),
  );
  const act = (name, kind, path, method = "POST") =>
    h("button", { type: "button", class: kind, onclick: () => control(job.id, path, method) }, name);
  const ended = ENDED.includes(job.state);
  head.actions.replaceChildren(
    ended || job.cancel_requested ? "" : act("Cancel", "danger", "/cancel"),
    ended && job.state !== "done" ? act("Resume", "primary", "/resume") : "",
    ended ? act("Delete", "", "", "DELETE") : "",
  );
  if (job.result !== undefined) {
    const { stdout, ...result } = job.result ?? {};
    head.result.replaceChildren(
      job.result === null
        ? ""
        : h("article", { class: "card" }, h("h2", { class: "title" }, "Result"), h("pre", { class: "log" }, stdout ?? JSON.stringify(result, null, 2))),
    );
  }
}

async function control(id, path, method) {
  const job = await attempt(async () => {
    const answer = await request(`/jobs/${encodeURIComponent(id)}${path}`, { method, body: method === "POST" ? {} : undefined });
    return method === "DELETE" ? true : answer.json();
  });
  await refreshJobs();
  if (job === true) {
    picked.delete(id);
    location.hash = "#jobs";
  } else if (job && path === "/resume") showJob(id);
}

// --- Several runs

function pickRun(id, isPicked) {
  if (isPicked) picked.add(id);
  else picked.delete(id);
  if (picked.size > 1) compareRuns();
  else if (pane === "compare") {
    leave("none");
    showHint();
  }
}

async function compareRuns() {
  open = null;
  leave("compare");
  const charts = makeCharts();
  const chosen = jobs.filter((job) => picked.has(job.id));
  const status = h("p", { class: "quiet" }, "loading …");
  fillPane(
    h("article", { class: "card" }, h("h2", { class: "title" }, `${chosen.length} runs`), status),
    h("article", { class: "card charts" }, charts.map(([chart]) => chart.root)),
  );
  const runs = await attempt(() =>
    Promise.all(
      chosen.map(async (job) => ({ name: job.request.options?.run ?? job.id.slice(-8), rows: (await get(`/jobs/${encodeURIComponent(job.id)}/metrics`)).rows })),
    ),
  );
  if (!runs || pane !== "compare") return;
  status.textContent = runs.map((run) => `${run.name}: ${number(run.rows.length)} steps`).join(" · ");
  drawCharts(charts, runs);
}

function showHint() {
  $("job-pane").replaceChildren(h("article", { class: "card quiet" }, "Select a job, start a new one, or tick two or more training jobs to compare their curves."));
}

/** Show the job with this id, taken from the page's URL, or none. */
export function showJobs(id) {
  refreshJobs().then(() => {
    if (id) {
      if (id !== open || pane !== "job") showJob(id);
    } else if (pane === "job" || pane === "none") {
      open = null;
      leave("none");
      showHint();
    }
  });
}

export function startJobs() {
  $("new-job").addEventListener("click", newJob);
  setInterval(() => {
    if (!$("jobs").hidden && !document.hidden) refreshJobs();
  }, EVERY_MS);
}
