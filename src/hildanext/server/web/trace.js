// A decode as data: the passes, and from them the text after any pass and the history of any token. Uses no DOM.

export class Trace {
  constructor() {
    this.steps = []; // {block, step, start, tokens, pieces, drafted, edited, inserted, deleted, dropped, confidence, mask_ratio, keys, gone}
    this.last = new Map(); // position -> {token, key} after the last pass. A token's key stays with it when it moves.
    this.n_keys = 0;
    this.promptTokens = 0;
    this.blockSize = 1; // 1: no blocks to show
    this.isByToken = false; // the AR base's text
    this.done = null; // the completion
    this.shown = null; // position -> its token's part of the final text
  }

  /** Add an event of POST /generate or /generate/base. */
  push(event, data) {
    if (event === "start") {
      this.promptTokens = data.prompt_tokens;
      this.settings = data.settings;
      this.blockSize = this.verifies ? 1 : data.settings.block_size;
    } else if (event === "step") {
      this.#add(data);
    } else if (event === "token") {
      this.isByToken = true;
      const start = this.promptTokens + this.steps.length;
      const pass = { block: start, step: 0, start, tokens: [data.token], pieces: [data.text], drafted: [0], edited: [], inserted: [], deleted: [], dropped: [] };
      this.#add({ ...pass, confidence: [data.confidence], mask_ratio: 1 });
    } else if (event === "done") {
      this.done = data;
      this.#align();
    }
  }

  /** Add a pass, with the keys of its tokens and of those that are gone. A mask keeps its key when it is filled. */
  #add(step) {
    step.gone = [];
    const gone = step.deleted.map(([place, token]) => ({ place, token }));
    let from = step.start; // where the next token that was there before stood
    step.keys = step.tokens.map((_, place) => {
      if (step.inserted.includes(place)) return this.n_keys++;
      while (gone.length && gone[0].place === place && (this.last.get(from)?.token ?? gone[0].token) === gone[0].token) {
        step.gone.push(this.last.get(from++)?.key);
        gone.shift();
      }
      return this.last.get(from++)?.key ?? this.n_keys++;
    });
    step.tokens.forEach((token, place) => this.last.set(step.start + place, { token, key: step.keys[place] }));
    this.steps.push(step);
  }

  /** Whether the passes verify drafts: a token then stays what it was, an accepted draft, a correction or the base's own. */
  get verifies() {
    return !this.isByToken && (this.settings?.tau_accept ?? null) !== null;
  }

  /** A block's number within the answer, from 1. The answer may begin within a block of the prompt's last tokens. */
  numberOf(block) {
    return block - Math.floor(this.promptTokens / this.blockSize) + 1;
  }

  /** First position after the completion; tokens from there on were cut off. */
  get end() {
    return this.done ? this.promptTokens + this.done.token_ids.length : Infinity;
  }

  /**
   * The text after the first `k` passes: [{position, key, piece (null: masked), state, confidence, block}].
   * state: masked, inserted (a mask, by pass k), drafted or edited (by pass k, or by any pass that verifies), kept;
   * `wasEdited`: by any pass up to k; `dropped`: the text that pass k deleted before it.
   */
  at(k) {
    const cells = new Map();
    const known = new Map(); // key -> its cell
    for (let index = 0; index < k; index++) {
      const step = this.steps[index];
      const coloured = index === k - 1 || this.verifies;
      step.tokens.forEach((token, place) => {
        const position = step.start + place;
        if (position < this.promptTokens) return;
        const key = step.keys[place];
        const before = known.get(key);
        const drafted = step.drafted.includes(place);
        const edited = step.edited.includes(place);
        const masked = step.pieces[place] === null;
        const inserted = index === k - 1 && step.inserted.includes(place);
        const dropped = index === k - 1 ? step.dropped.filter((_, i) => step.deleted[i][0] === place).join("") : "";
        const cell = {
          position,
          key,
          token,
          piece: masked ? null : step.pieces[place],
          silent: step.pieces[place] === "", // a special token, which adds no text
          block: Math.floor(position / this.blockSize),
          confidence: drafted || edited ? step.confidence[place] : before?.confidence ?? null,
          dropped,
          state: inserted ? "inserted" : masked ? "masked" : coloured && edited ? "edited" : coloured && drafted ? "drafted" : "kept",
          wasEdited: edited || Boolean(before?.wasEdited),
        };
        cells.set(position, cell);
        known.set(key, cell);
      });
    }
    const found = [...cells.values()].sort((a, b) => a.position - b.position);
    if (this.shown) {
      for (const cell of found) {
        if (cell.piece !== null && this.last.get(cell.position).token === cell.token && this.shown.has(cell.position)) {
          cell.piece = this.shown.get(cell.position);
        }
      }
    }
    return found;
  }

  /** Where the token of a key stands after `k` passes, or where it stood last. */
  placeOf(key, k) {
    let found = null;
    this.steps.forEach((step, index) => {
      const place = step.keys.indexOf(key);
      if (place >= 0 && (index < k || found === null)) found = step.start + place;
    });
    return found;
  }

  /** The history of the token of a key, wherever it stood: [{index, block, step, what, piece, before, confidence}]. */
  history(key) {
    const found = [];
    let before = null;
    this.steps.forEach((step, index) => {
      const place = step.keys.indexOf(key);
      const gone = step.gone.includes(key);
      if (place < 0 && !gone) return;
      const what = gone ? "deleted" : ["inserted", "drafted", "edited"].find((kind) => step[kind].includes(place)) ?? "unchanged";
      const confidence = step.confidence[place] ?? null;
      if (what !== "unchanged" || confidence !== null) {
        found.push({ index, block: step.block, step: step.step, what, piece: gone ? before : step.pieces[place], before, confidence });
      }
      before = step.pieces[place];
    });
    return found;
  }

  /** All edits: [{index, position, before, piece, confidence}]. */
  edits() {
    const found = [];
    const now = new Map(); // key -> piece
    this.steps.forEach((step, index) => {
      step.tokens.forEach((_, place) => {
        const key = step.keys[place];
        if (step.edited.includes(place)) {
          const [before, piece] = [now.get(key) ?? "", step.pieces[place]];
          found.push({ index, position: step.start + place, before, piece, confidence: step.confidence[place] });
        }
        now.set(key, step.pieces[place]);
      });
    });
    return found;
  }

  /**
   * Split the completion's text among its tokens. The text of a token alone can differ from what it adds to the whole (part
   * of a character, a space that appears only between words), so each piece is located in the text.
   */
  #align() {
    const pieces = new Map();
    for (const step of this.steps) step.pieces.forEach((piece, place) => pieces.set(step.start + place, piece ?? ""));
    const [text, from, to] = [this.done.text, this.promptTokens, this.end];
    this.shown = new Map();
    let [cursor, open] = [0, null]; // open: a token whose part ends where the next token's part begins
    const close = (upto) => {
      if (open !== null) this.shown.set(open, text.slice(cursor, upto));
      if (open !== null) cursor = upto;
      open = null;
    };
    for (let position = from; position < to; position++) {
      const piece = pieces.get(position) ?? "";
      const whole = piece !== "" && (!piece.includes("\uFFFD") || (open === null && text.startsWith(piece, cursor)));
      const found = whole ? text.indexOf(piece, cursor) : -1;
      if (found >= 0 && (open !== null || text.slice(cursor, found).trim() === "")) {
        close(found);
        this.shown.set(position, text.slice(cursor, found + piece.length));
        cursor = found + piece.length;
      } else if (open === null && piece !== "") {
        open = position;
      } else {
        this.shown.set(position, "");
      }
    }
    if (open === null && cursor < text.length) {
      open = [...this.shown.keys()].pop() ?? null;
      cursor -= open === null ? 0 : this.shown.get(open).length;
    }
    close(text.length);
  }
}
