// Comparisons that were made before: those of this visit, in the page's memory, and those kept on the service.

import { json } from "./api.js";
import { excerpt } from "./compose.js";
import { byId, element, moment, refill } from "./dom.js";
import { visible } from "./tokens.js";

const PREFIX = "#comparison=";
const MOST_IN_VISIT = 50;

const visit = [];

/** Id of the comparison that the address names; null where it names none. */
export function idInAddress() {
  return location.hash.startsWith(PREFIX) ? location.hash.slice(PREFIX.length) : null;
}

/** Makes the address name this comparison (null: none), without a new entry in the browser's history. */
export function setAddress(id) {
  history.replaceState(null, "", id === null ? location.pathname : PREFIX + id);
}

/** The link that opens a kept comparison. */
export function linkTo(id) {
  return `${location.origin}${location.pathname}${PREFIX}${id}`;
}

/** The kept comparison with this id. Throws Problem. */
export async function fetchKept(id) {
  return json(`/page/comparisons/${encodeURIComponent(id)}`);
}

/** Keeps a comparison ({prompt, sampling, answers}) on the service and returns it with its id. Throws Problem. */
export async function keep(comparison) {
  return json("/page/comparisons", { body: comparison });
}

/** Lists what the service has kept. Throws Problem. */
export async function loadHistory() {
  const { comparisons } = await json("/page/history");
  byId("history-empty").hidden = comparisons.length > 0;
  refill(
    byId("history"),
    comparisons.map(({ id, created, who, prompt, models }) =>
      element(
        "li",
        {},
        element("a", { href: PREFIX + id }, excerpt(prompt)),
        element("small", {}, `${models.map(visible).join(", ")} · ${moment(created)} · ${visible(who)}`),
      ),
    ),
  );
}

/** Remembers a comparison of this visit; `show(comparison)` is called when its line is chosen. */
export function remember(comparison, show) {
  visit.unshift(comparison);
  visit.length = Math.min(visit.length, MOST_IN_VISIT);
  byId("visit-empty").hidden = true;
  refill(
    byId("visit"),
    visit.map((one) =>
      element(
        "li",
        {},
        element("button", { type: "button", class: "link", click: () => show(one) }, excerpt(one.prompt)),
        element("small", {}, `${one.answers.map((answer) => visible(answer.model)).join(", ")} · ${one.time}`),
      ),
    ),
  );
}
