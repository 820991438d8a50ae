// The settings of a request: a field each, with the value that the server takes where it is left empty.

import { $, h, number } from "./dom.js";

// Settings of POST /generate besides prompt and mode: [key, label, attributes, hint, word for null].
const SETTINGS = [
  ["tau_accept", "τ accept", { type: "text", inputmode: "decimal" }, "accept a draft above this share of the base's best; off: edit blocks", "off"],
  ["lookup", "Lookup", { type: "text", inputmode: "numeric" }, "also draft from the text so far, after this many equal tokens (2 to 4)", "off"],
  ["tau_mask", "τ mask", { type: "number", min: 0, max: 1, step: "any" }, "draft above this confidence"],
  ["tau_edit", "τ edit", { type: "text", inputmode: "decimal" }, "edit above this confidence; off: no editing", "off"],
  ["max_new_tokens", "New tokens", { type: "number", min: 1, step: 1 }, "maximum"],
  ["temperature", "Temperature", { type: "number", min: 0, max: 2, step: "any" }, "0: greedy"],
  ["top_k", "Top k", { type: "number", min: 1, step: 1 }, "only the k most likely tokens", "all"],
  ["top_p", "Top p", { type: "number", min: 0, max: 1, step: "any" }, "only this share of probability"],
  ["repetition_penalty", "Repetition", { type: "number", min: 0.1, max: 2, step: "any" }, "penalty; 1: none"],
  ["seed", "Seed", { type: "number", min: 0, step: 1 }, "for sampling; empty: a new one each time", "random"],
  ["stop", "Stop", { type: "text" }, "end the answer before this text", "none"],
  ["deadline_s", "Deadline", { type: "number", min: 0, step: "any" }, "time limit in seconds"],
];
const OFF = ["off", "null", "none"];
const VERIFYING = ["tau_accept", "lookup"]; // where drafts are verified
const EDITING = ["tau_mask", "tau_edit"]; // where blocks are edited instead

let defaults = null; // the answer of GET /settings

const field = (key) => $("ask").elements[key];
const chosenMode = () => document.querySelector('#ask [name="mode"]:checked').value;

export function buildSettings() {
  $("settings").append(
    ...SETTINGS.map(([key, label, attributes, hint]) =>
      h("label", { class: "setting" }, h("span", {}, label), h("input", { ...attributes, name: key }), h("small", {}, hint)),
    ),
  );
  $("ask").addEventListener("input", draw);
}

/** Show the server's values. `found`: the answer of GET /settings. */
export function showDefaults(found) {
  defaults = found;
  draw();
}

/** Show what an empty field means in the chosen mode, and only the fields that have an effect there. */
function draw() {
  const values = defaults?.modes[chosenMode()];
  if (values) {
    const verifies = (mode) => mode.tau_accept !== null;
    const isOff = OFF.includes(field("tau_accept").value.trim().toLowerCase());
    for (const [key, , , , none] of SETTINGS) {
      const value = key === "deadline_s" ? defaults.deadline_s : values[key];
      field(key).placeholder = value === null || value.length === 0 ? none : Array.isArray(value) ? value.join(", ") : String(value);
      field(key).closest("label").hidden =
        (VERIFYING.includes(key) && !Object.values(defaults.modes).some(verifies)) ||
        (EDITING.includes(key) && verifies(values) && !isOff);
    }
    const passes = verifies(values) && !isOff ? `${values.rows} rows in a pass` : `blocks of ${values.block_size} tokens, at most ${values.max_post_steps} editing passes after the last mask, ${values.edit_blocks} earlier blocks editable`;
    const room = defaults.context === null ? "" : ` Prompt and answer have room for ${number(defaults.context, 7)} tokens.`;
    $("fixed").textContent = `An empty field takes the value shown in it. Fixed by the server: ${passes}.${room}`;
  }
  const n = SETTINGS.filter(([key]) => isGiven(key)).length;
  $("n-set").textContent = `${n} changed`;
  $("n-set").hidden = n === 0;
}

const isGiven = (key) => field(key).value.trim() !== "" && !field(key).closest("label").hidden;

/** Return the settings that were given, for a request. Throws Error with one line for an invalid field. */
export function readSettings() {
  const found = {};
  for (const [key, label, , , none] of SETTINGS) {
    const input = field(key);
    const text = input.value.trim();
    if (input.validity.badInput) throw new Error(`${label} is not a number.`);
    if (!isGiven(key)) continue;
    if (key === "stop") found.stop = [input.value];
    else if (none === "off" && OFF.includes(text.toLowerCase())) found[key] = null;
    else if (Number.isNaN(Number(text))) throw new Error(`${label} is not a number.`);
    else found[key] = Number(text);
  }
  return found;
}
