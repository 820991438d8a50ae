// The page: three sections, chosen by the URL's hash, and a header with the served model.

import { get } from "./api.js";
import { $ } from "./dom.js";
import { showHealth } from "./health.js";
import { showJobs, startJobs } from "./jobs.js";
import { offer, startPlayground } from "./playground.js";

const SECTIONS = ["playground", "jobs", "health"];
const SERVED_MS = 5000;

function route() {
  const [name, id] = location.hash.slice(1).split("/");
  const section = SECTIONS.includes(name) ? name : "playground";
  for (const other of SECTIONS) {
    $(other).hidden = other !== section;
    $(`tab-${other}`).setAttribute("aria-selected", String(other === section));
  }
  document.title = section === "playground" ? "HildaNext" : `${section[0].toUpperCase()}${section.slice(1)} · HildaNext`;
  showHealth(section === "health");
  if (section === "jobs") showJobs(id && decodeURIComponent(id));
}

/** The arrow keys move the focus between the tabs. */
function walkTabs(event) {
  const to = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const at = SECTIONS.indexOf(event.target.id?.replace("tab-", ""));
  if (!to || at < 0) return;
  event.preventDefault();
  $(`tab-${SECTIONS[(at + to + SECTIONS.length) % SECTIONS.length]}`).focus();
}

async function served() {
  const dot = $("served").querySelector(".dot");
  const name = $("served").querySelector(".served-name");
  try {
    const health = await get("/health");
    dot.dataset.state = health.status;
    await offer(health);
    // Show only the last two parts of a path.
    const short = health.model.split("/").slice(-2).join("/");
    name.textContent = health.status === "ok" ? short : `${short}: ${health.status}`;
    $("served").title = `${health.model}, ${health.engine ?? "no engine"}, ${health.status}`;
  } catch (error) {
    dot.dataset.state = "stopped";
    name.textContent = error.message;
  }
  setTimeout(served, SERVED_MS);
}

startPlayground();
startJobs();
addEventListener("hashchange", route);
document.querySelector(".tabs").addEventListener("keydown", walkTabs);
route();
served();
