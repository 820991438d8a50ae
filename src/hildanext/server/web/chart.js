// Line charts in SVG: several series over steps, with the values under the pointer. Also sparklines.

import { h, number, s } from "./dom.js";

const MOST_POINTS = 600; // points per line; more cannot be told apart on a screen
const HEIGHT = 168;
const EDGE = { top: 10, right: 12, bottom: 22, left: 46 };

/** About `n` ticks at round numbers. */
function ticks(low, high, n) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** Reduce the points to the lowest and highest of each section, which keeps spikes. */
function thinned(points) {
  if (points.length <= MOST_POINTS) return points;
  const size = Math.ceil((2 * points.length) / MOST_POINTS);
  const found = [];
  for (let at = 0; at < points.length; at += size) {
    const part = points.slice(at, at + size);
    const low = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    found.push(...(low[0] <= high[0] ? [low, high] : [high, low]).slice(0, low === high ? 1 : 2));
  }
  return found;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** Index of the point nearest to `x`; the points are sorted by x. */
function nearest(points, x) {
  let [low, high] = [0, points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? low : high;
}

export class Chart {
  constructor(title, { fromZero = false } = {}) {
    this.title = title;
    this.fromZero = fromZero;
    this.series = [];
    this.svg = s("svg", { class: "plot", role: "img", height: HEIGHT });
    this.readout = h("figcaption", { class: "readout" });
    this.root = h("figure", { class: "chart" }, h("h3", {}, title), this.svg, this.readout);
    this.svg.addEventListener("pointermove", (event) => this.#hover(event));
    this.svg.addEventListener("pointerleave", () => this.#rest());
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  /** series: [{name, tone (0..5), points: [[x, y]], dots}] */
  set(series) {
    this.series = series.filter((line) => line.points.length);
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth || 320;
    const all = this.series.flatMap((line) => line.points);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", this.series.map((line) => `${line.name} ${number(line.points.at(-1)[1])} at step ${line.points.at(-1)[0]}`).join(", ") || `${this.title}: no data yet`);
    if (!all.length) {
      this.svg.replaceChildren(s("text", { class: "empty", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no data yet"));
      this.readout.replaceChildren();
      return;
    }
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const [x, y] of all) [x0, x1, y0, y1] = [Math.min(x0, x), Math.max(x1, x), Math.min(y0, y), Math.max(y1, y)];
    if (this.fromZero) y0 = Math.min(0, y0);
    const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    [y0, y1] = [this.fromZero ? y0 : y0 - room, y1 + room];
    if (x1 === x0) x1 = x0 + 1;
    this.x = (value) => EDGE.left + ((value - x0) / (x1 - x0)) * (width - EDGE.left - EDGE.right);
    this.y = (value) => HEIGHT - EDGE.bottom - ((value - y0) / (y1 - y0)) * (HEIGHT - EDGE.top - EDGE.bottom);
    this.toStep = (pixel) => x0 + ((pixel - EDGE.left) / (width - EDGE.left - EDGE.right)) * (x1 - x0);
    this.cursor = s("g", { class: "cursor" });
    this.svg.replaceChildren(
      s("g", { class: "grid" }, ticks(y0, y1, 4).map((value) => [
        s("line", { x1: EDGE.left, x2: width - EDGE.right, y1: this.y(value), y2: this.y(value) }),
        s("text", { x: EDGE.left - 7, y: this.y(value) + 4, "text-anchor": "end" }, number(value)),
      ])),
      s("g", { class: "grid" }, ticks(x0, x1, Math.max(2, width / 75)).filter(Number.isInteger).map((value) =>
        s("text", { x: this.x(value), y: HEIGHT - 6, "text-anchor": this.x(value) > width - 28 ? "end" : "middle" }, number(value, 5)),
      )),
      ...this.series.map((line) => this.#line(line)),
      this.cursor,
    );
    this.#rest();
  }

  #line(line) {
    const points = thinned(line.points).map(([x, y]) => [this.x(x), this.y(y)]);
    const dots = line.dots || points.length === 1 ? points.map(([cx, cy]) => s("circle", { cx, cy, r: 3 })) : [];
    return s("g", { class: `line t${line.tone}${line.dots ? " dotted" : ""}` }, s("path", { d: path(points) }), dots);
  }

  #hover(event) {
    if (!this.series.length) return;
    const box = this.svg.getBoundingClientRect();
    const step = this.toStep(event.clientX - box.left);
    const found = this.series.map((line) => [line, line.points[nearest(line.points, step)]]);
    const at = found.reduce((a, b) => (Math.abs(b[1][0] - step) < Math.abs(a[1][0] - step) ? b : a))[1][0];
    this.cursor.replaceChildren(
      s("line", { x1: this.x(at), x2: this.x(at), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
      ...found.map(([line, [x, y]]) => s("circle", { class: `t${line.tone}`, cx: this.x(x), cy: this.y(y), r: 3.5 })),
    );
    this.#read(found);
  }

  /** Show the last values while no pointer is over the chart. */
  #rest() {
    this.cursor?.replaceChildren();
    this.#read(this.series.map((line) => [line, line.points.at(-1)]));
  }

  #read(found) {
    this.readout.replaceChildren(
      ...found.map(([line, [x, y]]) =>
        h("span", { class: `key t${line.tone}${line.dots ? " dotted" : ""}` }, h("i", {}), `${line.name} `, h("b", {}, number(y, 4)), h("small", {}, ` at ${x}`)),
      ),
    );
  }
}

/** A small curve: {root, mark(index)}. `most`: top of the scale; default: the largest value. */
export function sparkline(values, { label, most = null, width = 240, height = 40 } = {}) {
  const top = most ?? Math.max(...values, 1e-9);
  const x = (index) => 2 + (index / Math.max(values.length - 1, 1)) * (width - 4);
  const y = (value) => height - 3 - (value / top) * (height - 6);
  const line = values.map((value, index) => [x(index), y(value)]);
  const dot = s("line", { class: "mark", y1: 0, y2: height, visibility: "hidden", "vector-effect": "non-scaling-stroke" });
  const root = s(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, preserveAspectRatio: "none" },
    line.length ? s("path", { class: "area", d: `${path(line)}L${x(values.length - 1)} ${height}L${x(0)} ${height}Z` }) : null,
    line.length ? s("path", { class: "edge", d: path(line), "vector-effect": "non-scaling-stroke" }) : null,
    dot,
  );
  const mark = (index) => {
    const inside = index >= 0 && index < values.length;
    dot.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) {
      dot.setAttribute("x1", x(index));
      dot.setAttribute("x2", x(index));
    }
  };
  return { root, mark };
}
