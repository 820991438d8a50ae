// A form built from the configuration's JSON Schema. It sends only the keys that were changed.

import { h } from "./dom.js";
import { keyName, sectionName } from "./names.js";

/** Resolve a schema's $ref. */
const follow = (schema, defs) => (schema.$ref ? { ...defs[schema.$ref.split("/").pop()], ...schema, $ref: undefined } : schema);

/** Describe why a value does not fit its schema, or return null. The server checks again. */
export function misfit(value, schema, defs) {
  const it = follow(schema, defs);
  if (it.anyOf) {
    const found = it.anyOf.map((option) => misfit(value, option, defs));
    return found.includes(null) ? null : found[0];
  }
  if ("const" in it && value !== it.const) return `must be ${it.const}`;
  if (it.enum && !it.enum.includes(value)) return `must be one of ${it.enum.join(", ")}`;
  const kind = value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
  const fits = { integer: Number.isInteger(value), number: kind === "number" && Number.isFinite(value) };
  if (it.type && !(fits[it.type] ?? kind === it.type)) return `must be ${{ integer: "a whole number", number: "a number", array: "a list, as JSON" }[it.type] ?? it.type}`;
  if (kind === "number") {
    if (value < it.minimum) return `must be at least ${it.minimum}`;
    if (value > it.maximum) return `must be at most ${it.maximum}`;
    if (value <= it.exclusiveMinimum) return `must be greater than ${it.exclusiveMinimum}`;
    if (value >= it.exclusiveMaximum) return `must be less than ${it.exclusiveMaximum}`;
  }
  if (kind === "string" && value.length < (it.minLength ?? 0)) return "must not be empty";
  if (kind === "array") {
    if (value.length < (it.minItems ?? 0)) return `needs at least ${it.minItems} entries`;
    if (value.length > (it.maxItems ?? Infinity)) return `takes at most ${it.maxItems} entries`;
    const parts = value.map((item, at) => misfit(item, it.prefixItems?.[at] ?? it.items ?? {}, defs));
    return parts.find((part) => part !== null) ?? null;
  }
  return null;
}

const types = (schema, defs) => (follow(schema, defs).anyOf ?? [follow(schema, defs)]).map((option) => follow(option, defs));
const written = (value) => (value === null ? "" : typeof value === "string" ? value : JSON.stringify(value));
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** The field of one key: {root, read() -> {value, changed, wrong}}. */
class Field {
  constructor(name, schema, value, defs, onchange) {
    this.name = name;
    this.schema = schema;
    this.defs = defs;
    this.start = value;
    this.kinds = types(schema, defs);
    const id = `field-${name}`;
    this.input = this.#control(id);
    this.problem = h("span", { class: "misfit", id: `${id}-problem`, role: "alert" });
    this.root = h(
      "div",
      { class: "field" },
      h("div", { class: "row between" }, h("label", { for: id }, keyName(name)), h("code", {}, name)),
      this.input,
      h("p", { class: "hint", id: `${id}-hint` }, schema.description ?? "", this.problem),
    );
    this.input.addEventListener("input", () => {
      const { changed, wrong } = this.read();
      this.problem.textContent = wrong ?? "";
      this.root.classList.toggle("changed", changed);
      this.root.classList.toggle("wrong", Boolean(wrong));
      onchange();
    });
  }

  #control(id) {
    const described = { id, "aria-describedby": `${id}-hint`, name: this.name };
    const [first] = this.kinds;
    const choices = this.kinds.length === 1 ? first.enum ?? (first.type === "boolean" ? [false, true] : null) : null;
    if (choices) {
      this.choices = choices;
      return h("select", described, choices.map((choice) => h("option", { selected: same(choice, this.start) }, String(choice))));
    }
    const numeric = this.kinds.every((kind) => ["integer", "number", "null"].includes(kind.type));
    const empty = this.kinds.some((kind) => kind.type === "null") ? "none" : "";
    return h("input", { ...described, type: "text", inputmode: numeric ? "decimal" : null, value: written(this.start), placeholder: empty, spellcheck: "false", autocomplete: "off" });
  }

  read() {
    const value = this.choices ? this.choices[this.input.selectedIndex] : this.#parse(this.input.value.trim());
    return { value, changed: !same(value, this.start), wrong: same(value, this.start) ? null : misfit(value, this.schema, this.defs) };
  }

  #parse(text) {
    const has = (type) => this.kinds.some((kind) => kind.type === type);
    if (text === "" && has("null")) return null;
    if (has("array") || has("object")) {
      try {
        return JSON.parse(text);
      } catch {
        return text;
      }
    }
    if ((has("number") || has("integer")) && text !== "" && !Number.isNaN(Number(text))) return Number(text);
    return text;
  }
}

/** The form of one kind of job, from the answer of GET /jobs/schema. read() -> {config, options}; throws Error naming the key. */
export class JobForm {
  constructor(form, kind) {
    const { schema, values, kinds, options } = form;
    this.sections = kinds[kind].sections.map((name) => this.#section(name, follow(schema.properties[name], schema.$defs), values[name], schema.$defs));
    this.options = kinds[kind].options.map((name) => new Field(name, options[name], null, {}, () => {}));
    for (const field of this.options) field.input.placeholder = ""; // empty: the command's own default, in the hint
    this.root = h("div", { class: "job-form" }, this.options.map((field) => field.root), this.sections.map((section) => section.root));
  }

  #section(name, schema, values, defs) {
    const badge = h("span", { class: "badge", hidden: true });
    const count = () => {
      const n = fields.filter((field) => field.read().changed).length;
      badge.textContent = `${n} changed`;
      badge.hidden = n === 0;
    };
    const fields = Object.entries(schema.properties).map(([key, part]) => new Field(`${name}.${key}`, part, values[key], defs, count));
    const summary = h("summary", {}, h("b", {}, sectionName(name)), h("small", {}, schema.description ?? ""), badge);
    return { name, fields, root: h("details", { class: "section", "data-section": name }, summary, h("div", { class: "fields" }, fields.map((field) => field.root))) };
  }

  read() {
    const config = {};
    for (const section of this.sections) {
      for (const field of section.fields) {
        const { value, changed, wrong } = field.read();
        if (wrong) {
          section.root.open = true;
          field.input.focus();
          throw new Error(`${keyName(field.name)} (${field.name}) ${wrong}.`);
        }
        if (changed) (config[section.name] ??= {})[field.name.split(".").pop()] = value;
      }
    }
    const options = {};
    for (const field of this.options) {
      const { value, changed, wrong } = field.read();
      if (wrong) throw new Error(`${keyName(field.name)} (${field.name}) ${wrong}.`);
      if (changed && value !== "") options[field.name] = value;
    }
    return { config, options };
  }
}
