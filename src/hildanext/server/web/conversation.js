// The conversation of the chat: its turns, shown as text, and the messages of a request. Kept until the page is reloaded.

import { $, h } from "./dom.js";

let turns = []; // {user, assistant}, oldest first
let current = null; // the turn that a canvas shows, so that the list leaves it out

export const nTurns = () => turns.length;

/** The messages of a request that asks `next`. */
export function messages(next) {
  const system = $("system").value.trim();
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...turns.flatMap(({ user, assistant }) => [
      { role: "user", content: user },
      { role: "assistant", content: assistant },
    ]),
    { role: "user", content: next },
  ];
}

/** Add a turn. `isShown`: a canvas shows it. */
export function addTurn(turn, isShown) {
  turns.push(turn);
  current = isShown ? turn : null;
  drawTurns();
}

/** Remove the last turn and return it. */
export function takeBack() {
  const turn = turns.pop();
  current = null;
  drawTurns();
  return turn;
}

export function clearTurns() {
  turns = [];
  current = null;
  drawTurns();
}

/** List every turn, because the canvas will show something else. */
export function listAll() {
  current = null;
  drawTurns();
}

/** Show the turns and the buttons for them, if the playground is in a chat. */
export function drawTurns() {
  const listed = turns.filter((turn) => turn !== current);
  $("turns").replaceChildren(
    ...listed.map(({ user, assistant }) =>
      h(
        "li",
        {},
        h("p", { class: "said" }, h("span", { class: "visually-hidden" }, "You: "), user),
        h("p", { class: "answered" }, h("span", { class: "visually-hidden" }, "Model: "), assistant),
      ),
    ),
  );
  const isChat = $("playground").dataset.kind === "chat";
  $("turns-card").hidden = listed.length === 0 || !isChat;
  $("talk-actions").hidden = turns.length === 0 || !isChat;
}

