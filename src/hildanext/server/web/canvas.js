// The canvas of one answer: its tokens as text, a slider over the passes, the history of a token, and statistics.

import { sparkline } from "./chart.js";
import { h, number, duration } from "./dom.js";
import { Trace } from "./trace.js";

const PLAY_MS = 140;

/** CSS class for a confidence, one of ten tints. */
const tint = (confidence) => (confidence === null ? "" : `c${Math.min(9, Math.floor(confidence * 10))}`);
const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share < 0.1 ? 1 : 0)} %`;

/** What a pass did to a token, in words. In a trace that verifies drafts, a draft is shown when it is accepted. */
const WORDS = { drafted: "accepted draft", edited: "correction" };

/** A piece of text with visible white space. */
const readable = (piece) =>
  piece === null ? "mask" : piece === "" ? "∅" : piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "·");

export class Canvas {
  /** `title`: the heading. `compact`: one of several canvases side by side. */
  constructor(title, { compact = false } = {}) {
    this.trace = new Trace();
    this.k = 0; // number of passes shown
    this.live = true; // show each new pass
    this.chosen = null; // key of the token whose history is shown
    this.nodes = new Map(); // position -> its element
    this.blocks = new Map(); // block -> its element
    this.timer = this.frame = null;
    this.#build(title, compact);
  }

  #build(title, compact) {
    this.state = h("span", { class: "run-state", role: "status" });
    this.prompt = h("span", { class: "prompt-text" });
    this.body = h("span", { class: "tokens", role: "group", "aria-label": "Tokens" });
    this.text = h("div", { class: "canvas-text" }, this.prompt, this.body);
    this.slider = h("input", { type: "range", min: 0, max: 0, step: 1, value: 0, "aria-label": "Denoising pass" });
    this.where = h("output", { class: "where" });
    this.play = h("button", { type: "button", class: "icon", "aria-label": "Play" }, "▶");
    const back = h("button", { type: "button", class: "icon", "aria-label": "Back one pass" }, "‹");
    const forward = h("button", { type: "button", class: "icon", "aria-label": "Forward one pass" }, "›");
    this.bar = h("div", { class: "stepper", hidden: true }, back, this.play, forward, this.slider, this.where);
    this.history = h("div", { class: "history", hidden: true });
    this.stats = h("div", { class: "stats" });
    this.more = h("div", { class: "more" });
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.root = h(
      "article",
      { class: compact ? "card canvas compact" : "card canvas" },
      h("header", { class: "row between" }, h("h2", { class: "title" }, title), this.state),
      h("div", {}, this.text, this.problem),
      this.bar,
      this.history,
      this.stats,
      this.more,
    );
    this.slider.addEventListener("input", () => this.go(this.slider.valueAsNumber));
    back.addEventListener("click", () => this.go(this.k - 1));
    forward.addEventListener("click", () => this.go(this.k + 1));
    this.play.addEventListener("click", () => (this.timer ? this.pause() : this.start()));
    this.body.addEventListener("click", (event) => this.#choose(event.target.closest(".tok")));
    this.body.addEventListener("keydown", (event) => this.#walk(event));
  }

  /** Show the prompt before the first event arrives. */
  begin(prompt, isChat) {
    this.prompt.textContent = prompt;
    this.prompt.classList.toggle("said", isChat);
    this.state.textContent = "waiting";
    this.root.dataset.state = "running";
  }

  push(event, data) {
    this.trace.push(event, data);
    if (event === "step" || event === "token") {
      const inBlocks = this.trace.blockSize > 1;
      this.state.textContent = inBlocks ? `block ${this.trace.numberOf(data.block)} · pass ${data.step + 1}` : `${this.unit} ${this.trace.steps.length}`;
    }
    if (event === "done") this.#finished(data);
    this.#drawSoon();
  }

  /** Show that the run ended without a completion: `line` is the error, null means stopped. */
  fail(line) {
    this.root.dataset.state = "failed";
    this.state.textContent = line ? "failed" : "stopped";
    this.problem.textContent = line ?? "";
    this.problem.hidden = !line;
    this.#drawSoon();
  }

  /** Draw at most once per animation frame. */
  #drawSoon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.live) this.k = this.trace.steps.length;
      this.draw();
    });
  }

  /** Show the text after `k` passes. */
  go(k) {
    const n = this.trace.steps.length;
    this.k = Math.max(0, Math.min(n, k));
    this.live = this.k === n && !this.trace.done;
    this.draw();
  }

  start() {
    if (this.k >= this.trace.steps.length) this.go(0);
    this.play.textContent = "❚❚";
    this.play.setAttribute("aria-label", "Pause");
    this.timer = setInterval(() => (this.k < this.trace.steps.length ? this.go(this.k + 1) : this.pause()), PLAY_MS);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "▶";
    this.play.setAttribute("aria-label", "Play");
  }

  draw() {
    const cells = this.trace.at(this.k);
    const step = this.k ? this.trace.steps[this.k - 1] : null;
    const seen = new Set();
    for (const cell of cells) {
      seen.add(cell.position);
      this.#drawToken(cell, step);
    }
    for (const [position, node] of this.nodes) {
      if (!seen.has(position)) {
        node.remove();
        this.nodes.delete(position);
      }
    }
    for (const [block, node] of this.blocks) {
      node.classList.toggle("current", step !== null && block === step.block && this.trace.blockSize > 1);
      if (!node.querySelector(".tok")) {
        node.remove();
        this.blocks.delete(block);
      }
    }
    if (!this.body.querySelector('[tabindex="0"]')) this.body.querySelector(".tok")?.setAttribute("tabindex", "0");
    this.#drawBar(step);
    this.#drawHistory();
    this.spark?.mark(this.k - 1);
  }

  #drawToken(cell, step) {
    const { position, key, piece, state } = cell;
    let node = this.nodes.get(position);
    if (!node) {
      node = h("span", { class: "tok", role: "button", tabindex: -1, "data-position": position });
      this.nodes.set(position, node);
      this.#block(cell.block).append(node);
    }
    if (node.dataset.key !== String(key)) node.dataset.key = key;
    const names = state === "inserted" ? ["tok", "masked", state] : ["tok", state];
    if (piece !== null) names.push(tint(cell.confidence));
    if (cell.silent) names.push("silent");
    if (cell.wasEdited) names.push("was-edited");
    if (step && cell.block === step.block && this.trace.blockSize > 1) names.push("open");
    if (position >= this.trace.end) names.push("cut");
    if (key === this.chosen) names.push("chosen");
    // Alternating classes restart the animation when two passes in a row edit the same token.
    if (state === "edited" && !this.trace.verifies) names.push(this.k % 2 ? "odd" : "even");
    const wanted = names.filter(Boolean).join(" ");
    if (node.className !== wanted) node.className = wanted;
    const text = piece ?? "";
    if (node.textContent !== text) node.textContent = text;
    if (node.dataset.dropped !== cell.dropped) node.dataset.dropped = cell.dropped; // drawn before the token
    const sure = cell.confidence === null ? "" : `, ${percent(cell.confidence)}`;
    const gone = cell.dropped && `, after ${readable(cell.dropped)}, deleted`;
    const label = `${readable(piece)}${state === "kept" || state === "masked" ? "" : `, ${this.#word(state)}`}${sure}${gone}`;
    if (node.title !== label) {
      node.title = label;
      node.setAttribute("aria-label", label);
    }
  }

  #block(block) {
    let node = this.blocks.get(block);
    if (!node) {
      node = h("span", { class: this.trace.blockSize > 1 ? "block" : "block plain", "data-block": this.trace.numberOf(block) });
      this.blocks.set(block, node);
      // Blocks arrive in order, except earlier blocks that are edited again.
      const next = [...this.blocks.keys()].filter((other) => other > block).sort((a, b) => a - b)[0];
      this.body.insertBefore(node, next === undefined ? null : this.blocks.get(next));
    }
    return node;
  }

  #drawBar(step) {
    const n = this.trace.steps.length;
    this.bar.hidden = n === 0;
    this.slider.max = n;
    this.slider.value = this.k;
    const name = this.unit;
    const [drafted, edited] = this.trace.verifies ? ["accepted", "corrected"] : ["drafted", "edited"];
    const moved = step && step.inserted.length + step.deleted.length ? `, ${step.inserted.length} inserted, ${step.deleted.length} deleted` : "";
    const what = step === null ? "before the first pass" : `${step.drafted.length} ${drafted}, ${step.edited.length} ${edited}${moved}`;
    this.where.textContent = `${name} ${this.k} of ${n}`;
    this.slider.setAttribute("aria-valuetext", `${name} ${this.k} of ${n}: ${what}`);
    this.slider.title = what;
  }

  /** Show a token's history, or hide it if it is shown. */
  #choose(node) {
    const key = node ? Number(node.dataset.key) : null;
    this.chosen = key === this.chosen ? null : key;
    if (node) {
      for (const other of this.body.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
      node.setAttribute("tabindex", "0");
    }
    this.draw();
  }

  /** Up and Down move between tokens, Enter shows a history. Left and Right step through the passes. */
  #walk(event) {
    const node = event.target.closest(".tok");
    if (!node) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#choose(node);
    }
    const all = [...this.body.querySelectorAll(".tok")];
    const to = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = to && all[all.indexOf(node) + to];
    if (to) event.preventDefault();
    if (next) {
      node.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    }
  }

  #drawHistory() {
    this.history.hidden = this.chosen === null;
    if (this.chosen === null) return;
    const rows = this.trace.history(this.chosen).filter((row) => row.what !== "unchanged" || row.piece === null);
    const shown = rows.filter((row) => row.what !== "unchanged");
    const waited = rows.length - shown.length;
    const position = this.trace.placeOf(this.chosen, this.k);
    this.history.replaceChildren(
      h(
        "div",
        { class: "row between" },
        h("h3", {}, `Token ${position - this.trace.promptTokens + 1}`, h("small", {}, this.#place(position))),
        h("button", { type: "button", class: "icon", "aria-label": "Close the history", onclick: () => this.#choose(null) }, "×"),
      ),
      h(
        "ol",
        {},
        waited ? h("li", { class: "quiet" }, `masked for ${waited} pass${waited === 1 ? "" : "es"}`) : null,
        this.trace.verifies && !shown.length ? h("li", { class: "quiet" }, "the base's own choice, not drafted") : null,
        shown.map((row) =>
          h(
            "li",
            { class: row.index < this.k ? "" : "quiet" },
            h("button", { type: "button", class: "link", onclick: () => this.go(row.index + 1) }, `${this.unit} ${row.index + 1}`),
            h("span", { class: `what ${row.what}` }, this.#word(row.what)),
            row.what === "edited" && !this.trace.verifies ? h("del", {}, readable(row.before)) : null,
            h("b", {}, readable(row.piece)),
            row.confidence === null ? null : h("span", { class: "meter", role: "img", "aria-label": `confidence ${percent(row.confidence)}` }, h("i", { class: `fill ${tint(row.confidence)}` })),
            row.confidence === null ? null : h("span", { class: "number" }, percent(row.confidence)),
          ),
        ),
      ),
    );
  }

  #word(state) {
    return this.trace.verifies ? (WORDS[state] ?? state) : state;
  }

  #place(position) {
    const block = this.trace.blockSize > 1 ? `, block ${this.trace.numberOf(Math.floor(position / this.trace.blockSize))}` : "";
    return ` position ${position}${block}`;
  }

  /** The name of one step of the trace: a pass, or a token of the AR base. */
  get unit() {
    return this.trace.isByToken ? "token" : "pass";
  }

  #finished(done) {
    const stats = done.stats;
    this.root.dataset.state = "done";
    this.live = false;
    this.k = this.trace.steps.length;
    this.state.textContent = { stop: "finished", length: "token limit reached" }[done.finish_reason] ?? done.finish_reason;
    const figures = [
      [number(stats.tokens_per_second), "tokens/s"],
      [number(stats.tokens_per_forward), "tokens per forward"],
      [number(stats.forwards), "forwards"],
      [number(done.token_ids.length), "tokens"],
      ...this.#made(done),
      [duration(stats.seconds), "time"],
      ...(stats.seed === null ? [] : [[String(stats.seed), "seed"]]),
    ];
    this.stats.replaceChildren(
      h("dl", { class: "figures" }, figures.map(([value, name]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    );
    if (done.mode !== "AR" && stats.mask_ratio.length) {
      this.spark = sparkline(stats.mask_ratio, { label: "Mask ratio before each pass", most: 1 });
      this.stats.append(h("figure", { class: "mask-ratio" }, this.spark.root, h("figcaption", {}, "mask ratio before each pass")));
    }
    this.#about(done);
    if (!this.trace.steps.length) this.body.textContent = done.text; // the engine reports no passes
  }

  /** Figures of the tokens' making: drafts and edits, or how often drafts were accepted, by their row in the group. */
  #made({ mode, stats }) {
    if (mode === "AR") return [];
    if (!this.trace.verifies) return [[number(stats.drafts), "drafts"], [number(stats.edits), "edits"], ...this.#moved(stats)];
    const shares = stats.tried_by_offset.map((tried, row) => [tried && percent(stats.right_by_offset[row] / tried), row ? `right in row ${row}` : "right, lookup"]);
    return [[number(stats.accepted / stats.forwards), "accepted a forward"], ...shares.filter(([share]) => share)];
  }

  #moved({ insertions, deletions }) {
    return insertions + deletions ? [[number(insertions), "insertions"], [number(deletions), "deletions"]] : [];
  }

  #about(done) {
    const edits = this.trace.verifies ? [] : this.trace.edits();
    const reasons = Object.entries(done.engine_reasons);
    const copy = h("button", { type: "button", class: "link" }, "Copy the text");
    copy.addEventListener("click", async () => {
      await navigator.clipboard?.writeText(done.text);
      copy.textContent = "Copied";
    });
    const { tau_accept, rows } = this.trace.settings;
    const verified = `τ accept ${number(tau_accept)}, ${rows} rows`;
    const thresholds = done.mode === "AR" ? "greedy" : this.trace.verifies ? verified : `τ mask ${number(done.tau_mask)}, τ edit ${done.tau_edit === null ? "off" : number(done.tau_edit)}`;
    const parts = [
      h("p", { class: "engine" }, h("b", {}, done.engine), ` engine${done.runtime ? `, ${done.runtime}` : ""} · ${done.mode} · ${thresholds} · `, copy),
      reasons.length || done.ignored.length
        ? h(
            "details",
            {},
            h("summary", {}, reasons.length ? "Engines passed over" : "Ignored settings"),
            h("ul", {}, reasons.map(([name, reason]) => h("li", {}, h("b", {}, name), `: ${reason}`)), done.ignored.map((line) => h("li", {}, `ignored: ${line}`))),
          )
        : null,
      edits.length
        ? h(
            "details",
            { class: "edits" },
            h("summary", {}, `${edits.length} edit${edits.length === 1 ? "" : "s"}`),
            h(
              "ol",
              {},
              edits.map((edit) =>
                h(
                  "li",
                  {},
                  h("button", { type: "button", class: "link", onclick: () => this.go(edit.index + 1) }, `pass ${edit.index + 1}`),
                  h("del", {}, readable(edit.before)),
                  "→",
                  h("b", {}, readable(edit.piece)),
                  h("span", { class: "number" }, percent(edit.confidence)),
                ),
              ),
            ),
          )
        : null,
    ];
    this.more.replaceChildren(...parts.filter(Boolean));
  }
}
