// Making elements. Text reaches the page as text nodes only, with hidden characters made visible.

import { runs } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";

/** The element of the page with this id. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element ${id}`);
  return found;
}

/** An HTML element. `attributes`: false and null are left out, true is a bare attribute, functions are listeners. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

/** Puts `children` in the place of what `parent` holds. */
export function refill(parent, ...children) {
  parent.replaceChildren(...children.flat(Infinity).filter((child) => child !== null).map(node));
}

/** Text from a model or a person, as nodes: hidden characters are marked and written as their codes. */
export function hostile(text) {
  return runs(text).map((run) =>
    run.hidden
      ? element("span", { class: "hidden-character", title: "A character that would not be seen." }, run.text)
      : document.createTextNode(run.text),
  );
}

function filled(target, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === false || value === undefined) continue;
    if (typeof value === "function") target.addEventListener(key, value);
    else target.setAttribute(key, value === true ? "" : String(value));
  }
  target.append(...children.flat(Infinity).filter((child) => child !== null).map(node));
  return target;
}

function node(child) {
  return child instanceof Node ? child : document.createTextNode(runs(String(child)).map((run) => run.text).join(""));
}

/** A figure for a person, with `places` decimals and a true minus; a dash where it is not known. */
export function figure(value, places = 2) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const text = value.toFixed(places);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

/** The same with its sign. */
export function signed(value, places = 2) {
  const text = figure(value, places);
  return value > 0 && Number(value.toFixed(places)) > 0 ? `+${text}` : text;
}

/** An ISO time as people of this browser write it. */
export function moment(iso) {
  const time = new Date(iso);
  if (Number.isNaN(time.valueOf())) return iso;
  return time.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** Says a sentence to those who cannot see the page change. */
export function announce(sentence) {
  byId("announcer").textContent = sentence;
}
