// Requests to the server: JSON, server-sent events over fetch (an EventSource cannot send a key), API key, one-line errors.

import { $, say } from "./dom.js";

const KEY = "hildanext.key";

const HINTS = { 429: "the server is busy", 503: "not available", 504: "timed out" };

/** An error as one line. `status` 0: the server cannot be reached. */
export class Problem extends Error {
  constructor(status, line) {
    super(HINTS[status] ? `${status}, ${HINTS[status]}: ${line}` : line);
    this.status = status;
  }
}

async function problemOf(answer) {
  let line = answer.statusText || `HTTP ${answer.status}`;
  try {
    line = (await answer.json()).detail ?? line;
  } catch {
    // not JSON: keep the status text
  }
  return new Problem(answer.status, line);
}

let asking = null; // promise of the open key dialog; all requests share it

function askKey(refused) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    say($("key-problem"), refused ? "That key was not accepted." : null);
    $("key").value = "";
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

/** A key as UTF-8 bytes, one character each: a header accepts no other characters. */
const bytes = (key) => String.fromCharCode(...new TextEncoder().encode(key));

/** A fetch that sends the API key, and asks the user for it if the server requires one. Throws Problem. */
export async function request(path, { body, headers = {}, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const sent = { ...headers, ...(key ? { Authorization: `Bearer ${bytes(key)}` } : {}) };
    if (body !== undefined) sent["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, { ...options, headers: sent, body: body === undefined ? undefined : JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, "the server cannot be reached");
    }
    if (answer.status === 401) {
      // Another request may have asked for a key meanwhile: then try that key first.
      if (sessionStorage.getItem(KEY) === key) await askKey(Boolean(key));
      continue;
    }
    if (!answer.ok) throw await problemOf(answer);
    return answer;
  }
}

export const get = async (path, options) => (await request(path, options)).json();
export const post = async (path, body = {}, headers) => (await request(path, { method: "POST", body, headers })).json();

/** Yield the server-sent events of an answer as {event, data}, with the data parsed. */
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = { event: "message", data: "" };
        for (const line of block.split("\n")) {
          if (line.startsWith("event: ")) found.event = line.slice(7);
          else if (line.startsWith("data: ")) found.data += line.slice(6);
        }
        yield { event: found.event, data: JSON.parse(found.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Yield the events of a request. Throws AbortError if aborted, Problem if the connection is lost. */
export async function* stream(path, options) {
  const answer = await request(path, options);
  try {
    yield* eventsOf(answer);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw error instanceof TypeError ? new Problem(0, "the connection was lost") : error;
  }
}
