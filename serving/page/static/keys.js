// The keyboard: one table of keys, and the list of them that people can open.

import { byId } from "./dom.js";

const STORED = "amenable.single-keys";

/**
 * Wires the keys. `actions` maps a key ("/", "p", "?") to what it does; `ask` and `stop` are Ctrl+Enter and Escape;
 * `answer(number)` goes to an answer, counted from 1.
 */
export function begin({ actions, ask, stop, answer }) {
  const all = { ...actions, "?": open };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return act(event, ask);
    if (event.key === "Escape") return act(event, stop);
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target) || !byId("single-keys").checked) return;
    if (/^[1-8]$/.test(event.key)) return act(event, () => answer(Number(event.key)));
    if (Object.hasOwn(all, event.key)) act(event, all[event.key]);
  });
  byId("open-keys").addEventListener("click", open);
  byId("close-keys").addEventListener("click", () => byId("keys").close());
  byId("single-keys").checked = remembered() !== "off";
  byId("single-keys").addEventListener("change", () => remember(byId("single-keys").checked ? "on" : "off"));
}

function act(event, what) {
  event.preventDefault();
  what();
}

function typing(target) {
  return target instanceof Element && target.closest("input:not([type=checkbox]), textarea, select") !== null;
}

function open() {
  byId("keys").showModal();
}

function remembered() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // a browser that keeps nothing
  }
}

function remember(value) {
  try {
    localStorage.setItem(STORED, value);
  } catch {
    // the choice holds until the page is closed
  }
}
