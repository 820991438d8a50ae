// Creating elements, and formatting numbers. Text is always inserted as text, never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** h("button", {class: "primary", onclick: f}, "Go") */
export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

/** Like `h`, for SVG elements. */
export const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

export const $ = (id) => document.getElementById(id);

/** Show a line in an element; without a line, hide the element. */
export function say(element, line) {
  element.textContent = line ?? "";
  element.hidden = !line;
}

/** Format a number with about three digits. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  if (Math.abs(value) >= 10 ** digits || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** Format a duration given in seconds. */
export function duration(seconds) {
  if (seconds < 10) return `${number(seconds, 2)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  if (seconds < 3600) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return hours < 48 ? `${hours} h ${minutes} min` : `${Math.floor(hours / 24)} days`;
}
