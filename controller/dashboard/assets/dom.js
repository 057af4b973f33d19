// Small helpers. Text from the run reaches the page by textContent alone.

export const byId = (id) => document.getElementById(id);

/** Make an element: properties, then children (nodes or text). */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set a node's text if it is another. */
export function say(node, text) {
  const wanted = String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

/** Text from the run as it can be read: what has no form, or turns others round, becomes a box. */
export const plain = (text) => String(text).replace(INVISIBLE, "\ufffd");

/** A name from the run: bidi-isolated, cut off by style, whole in its title. */
export function nameOf(text) {
  const shown = plain(text);
  return make("bdi", { className: "name", title: shown }, shown);
}

export function empty(text) {
  return make("p", { className: "empty" }, text);
}

/** Show a table in `place`, or `nothing` where there are no rows. Rows: lists of nodes or text. */
export function table(place, { caption, columns, rows, nothing, className = "" }) {
  if (!rows.length) {
    place.replaceChildren(empty(nothing));
    return;
  }
  const head = columns.map(([title, kind]) => make("th", { scope: "col", className: kind || "" }, title));
  const body = rows.map((row) =>
    make("tr", {}, ...row.map((cell, index) => make("td", { className: columns[index][1] || "" }, cell))),
  );
  place.replaceChildren(
    make(
      "table",
      { className },
      make("caption", { className: "hidden" }, caption),
      make("thead", {}, make("tr", {}, ...head)),
      make("tbody", {}, ...body),
    ),
  );
}

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const count = (value) => (known(value) ? whole.format(value) : "–");
export const percent = (value, digits = 1) => (known(value) ? `${(100 * value).toFixed(digits)}%` : "–");
export const number = (value, digits = 3) => (known(value) ? value.toFixed(digits) : "–");

/** Three digits that count, and none beyond the fourth after the point. */
export const digits = (value) => {
  if (!known(value)) return "–";
  if (Math.abs(value) >= 100) return value.toFixed(0);
  return Math.abs(value) >= 0.1 ? value.toPrecision(3) : value.toFixed(4);
};

/** 12,345,678 as 12.3 M. */
export function short(value) {
  if (!known(value)) return "–";
  const sizes = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  for (const [size, unit] of sizes) {
    if (Math.abs(value) >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  return Math.abs(value) >= 10 || value === 0 ? value.toFixed(0) : value.toPrecision(2);
}

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Numbers of a base64 text of little-endian float32. */
export function unpack(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let index = 0; index < raw.length; index += 1) bytes[index] = raw.charCodeAt(index);
  return new Float32Array(bytes.buffer);
}

/** Ask the controller; throws an Error with its sentence. */
export async function ask(path, body) {
  const options = body === undefined
    ? {}
    : {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Headrace": "1" },
        body: JSON.stringify(body),
      };
  const answer = await fetch(path, { credentials: "same-origin", ...options });
  if (answer.status === 401) {
    location.assign("/login");
    throw new Error("log in again");
  }
  const told = await answer.json().catch(() => ({ error: `the answer is ${answer.status}` }));
  if (!answer.ok) throw new Error(told.error);
  return told;
}
