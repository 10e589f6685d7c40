// What is served now: the facts in the page's head, the table of models, and holding the policy at a checkpoint.

import { Problem, json } from "./api.js";
import { newestFirst, offerVersions } from "./compose.js";
import { announce, byId, element, moment, refill } from "./dom.js";
import { colour } from "./column.js";
import { may } from "./session.js";
import { visible } from "./tokens.js";

let state = null;
let tell = () => {};

/** Wires the form that holds the policy. `changed(state)` is called with what is served, at every `load`. */
export function begin(changed) {
  tell = changed;
  byId("hold").addEventListener("submit", (event) => {
    event.preventDefault();
    want(byId("hold-version").value || null);
  });
  byId("follow").addEventListener("click", () => want(null));
}

/** Reads what is served and shows it. Throws Problem. */
export async function load(options = {}) {
  state = await json("/page/models", options);
  show();
  tell(state);
}

/** Names of the models that are served. */
export function names() {
  return state === null ? [] : state.models.map((model) => model.name);
}

function show() {
  const policy = state.models.find((model) => model.name === "policy");
  const { pinned, who, when } = state.wish;
  const by = who === null ? "" : ` by ${visible(who)}${when === null ? "" : `, ${moment(when)}`}`;
  refill(
    byId("facts"),
    policy ? element("span", {}, "policy ", strong(`version ${visible(policy.version ?? "not known")}`)) : null,
    element("span", {}, pinned === null ? "follows the newest weights" : ["held at ", strong(visible(pinned))]),
    element("span", {}, strong(String(state.models.filter((model) => model.loaded).length)), " models loaded"),
  );
  const free = `policy follows the newest weights of the run${by ? `; set${by}` : ""}.`;
  byId("wish").textContent = pinned === null ? free : `policy is held at ${visible(pinned)}${by}.`;
  refill(
    byId("served-rows"),
    state.models.map(({ name, title, version, loaded }) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, modelName(name)),
        element("td", {}, visible(title)),
        element("td", {}, visible(version ?? "–")),
        element("td", {}, loaded ? "loaded" : "loads when asked"),
      ),
    ),
  );
  showForm();
}

function strong(text) {
  return element("b", {}, text);
}

function modelName(name) {
  return element("span", { class: `model ${colour(name)}` }, element("span", {}, visible(name)));
}

function showForm() {
  const versions = newestFirst(names().filter((name) => name.includes("@")));
  byId("hold").hidden = !may("operate") || versions.length === 0;
  offerVersions(byId("hold-version"), versions);
  byId("follow").disabled = state.wish.pinned === null;
}

async function want(pinned) {
  byId("hold-problem").textContent = "";
  try {
    await json("/page/desired", { body: { pinned, seen: state.wish.counter } });
    await load();
    announce(byId("wish").textContent);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    byId("hold-problem").textContent = error.message;
    if (error.status === 409) await load().catch(() => {}); // the sentence stands; what the other has set is shown
  }
}
