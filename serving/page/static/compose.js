// The form: a prompt, the models that answer it, and how they sample.

import { json } from "./api.js";
import { byId, element, refill } from "./dom.js";
import { visible } from "./tokens.js";
import { colour } from "./column.js";

const MOST_MODELS = 8;
const USUAL_MAX_TOKENS = 256;
const EXCERPT = 90;
const FIRST = ["base", "sft", "policy"];
const ORDER = ["base", "sft", "reference", "policy", "policy-ema"]; // as training made them

let prompts = [];
let known = []; // names of the models that are served
let touched = false; // whether the person has chosen models

/** Wires the form. `ask(request)` is called with {prompt, models, sampling}; `stop()` by its button. */
export function begin(ask, stop) {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const request = read();
    if (request !== null) ask(request);
  });
  byId("stop").addEventListener("click", stop);
  byId("another").addEventListener("click", another);
  byId("held-out").addEventListener("change", () => pick(byId("held-out").selectedIndex - 1));
  byId("models").addEventListener("change", () => (touched = true));
  byId("add").addEventListener("click", () => addVersion(byId("version").value));
}

/** Sends the form. */
export function submit() {
  byId("ask").requestSubmit();
}

/** Shows whether answers are under way. */
export function setBusy(busy) {
  byId("run").disabled = busy;
  byId("run").textContent = busy ? "Answering…" : "Ask";
  byId("stop").hidden = !busy;
}

/** Reads the held-out prompts. Throws Problem. */
export async function loadPrompts() {
  const found = await json("/page/prompts");
  prompts = found.prompts;
  const some = found.total > prompts.length ? `the first ${prompts.length} of ${found.total}` : `${found.total}`;
  refill(
    byId("held-out"),
    element("option", {}, `Pick one (${some})`),
    prompts.map(({ prompt }) => element("option", {}, excerpt(prompt))),
  );
  byId("pick").hidden = prompts.length === 0;
}

/** Puts another held-out prompt into the form, by chance. */
export function another() {
  if (prompts.length > 0) pick(Math.floor(Math.random() * prompts.length));
}

function pick(index) {
  if (index < 0) return;
  byId("held-out").selectedIndex = index + 1;
  byId("prompt").value = prompts[index].prompt;
}

/** Puts a request that was made before into the form. */
export function fill({ prompt, models, sampling }) {
  byId("prompt").value = prompt;
  byId("temperature").value = String(sampling.temperature);
  byId("top-p").value = String(sampling.top_p);
  byId("max-tokens").value = String(sampling.max_tokens);
  byId("seed").value = sampling.seed === null ? "" : String(sampling.seed);
  touched = true;
  for (const model of models) if (model.includes("@")) addVersion(model);
  for (const box of boxes()) box.checked = models.includes(box.value);
}

/** Offers the models that are served now. */
export function offer({ models, limits, wish }) {
  const field = byId("max-tokens");
  if (Number(field.max) !== limits.max_tokens) {
    field.max = String(limits.max_tokens);
    field.value = String(Math.min(limits.max_tokens, USUAL_MAX_TOKENS));
  }
  known = models.map((model) => model.name);
  const checked = new Set(boxes().filter((box) => box.checked).map((box) => box.value));
  const listed = boxes().map((box) => box.value);
  const versions = newestFirst(known.filter((name) => name.includes("@")));
  const plain = known.filter((name) => !name.includes("@")).sort((a, b) => ORDER.indexOf(a) - ORDER.indexOf(b));
  if (!touched) {
    checked.clear();
    [...FIRST, wish.pinned].filter((name) => known.includes(name)).forEach((name) => checked.add(name));
  }
  const shown = [...plain, ...versions.filter((name) => checked.has(name) || listed.includes(name))];
  if (shown.join(" ") !== listed.join(" ")) {
    refill(byId("models"), shown.map((name) => choice(name, checked.has(name)))); // only then: it takes the focus away
  }
  offerVersions(byId("version"), versions);
  byId("add-version").hidden = versions.length === 0;
}

/** Puts the names of checkpoints into a select, which keeps the one that is chosen while it is there. */
export function offerVersions(select, versions) {
  if ([...select.options].map((option) => option.value).join(" ") === versions.join(" ")) return;
  const chosen = select.value;
  refill(select, versions.map((name) => element("option", { value: name }, visible(name))));
  if (versions.includes(chosen)) select.value = chosen;
}

/** Names of checkpoints, the newest first. */
export function newestFirst(names) {
  return [...names].sort((a, b) => b.localeCompare(a, "en", { numeric: true }));
}

function addVersion(name) {
  if (!name) return;
  touched = true;
  const there = boxes().find((box) => box.value === name);
  if (there) there.checked = true;
  else if (known.includes(name)) byId("models").append(choice(name, true));
}

function choice(name, checked) {
  const box = element("input", { type: "checkbox", name: "model", value: name, checked });
  return element(
    "label",
    { class: `check model ${colour(name)}` },
    box,
    element("span", {}, visible(name)),
  );
}

function boxes() {
  return [...byId("models").querySelectorAll("input")];
}

/** The request in the form; null where it is not complete, which the form then says. */
function read() {
  const prompt = byId("prompt").value;
  const models = boxes().filter((box) => box.checked).map((box) => box.value);
  const wrong = complaint(prompt, models);
  byId("ask-problem").textContent = wrong?.sentence ?? "";
  for (const field of byId("ask").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  if (wrong !== null) {
    wrong.field?.setAttribute("aria-invalid", "true");
    wrong.field?.focus();
    return null;
  }
  const seed = byId("seed").value.trim();
  const sampling = {
    temperature: byId("temperature").valueAsNumber,
    top_p: byId("top-p").valueAsNumber,
    max_tokens: byId("max-tokens").valueAsNumber,
    seed: seed === "" ? null : Number(seed),
  };
  return { prompt, models, sampling };
}

function complaint(prompt, models) {
  if (!prompt.trim()) return { sentence: "Type a prompt, or pick one.", field: byId("prompt") };
  if (models.length === 0) return { sentence: "Choose at least one model.", field: boxes()[0] };
  if (models.length > MOST_MODELS) return { sentence: `Choose at most ${MOST_MODELS} models.`, field: boxes()[0] };
  const sentences = {
    temperature: "The temperature should be a number from 0 to 10.",
    "top-p": "Top-p should be a number above 0 and at most 1.",
    "max-tokens": `Max tokens should be a whole number from 1 to ${byId("max-tokens").max}.`,
    seed: "The seed should be a whole number, 0 or above, or empty.",
  };
  for (const [id, sentence] of Object.entries(sentences)) {
    const field = byId(id);
    if (!field.validity.valid || !(field.value === "" || Number.isSafeInteger(Math.floor(Number(field.value))))) {
      return { sentence, field };
    }
  }
  return null;
}

/** The beginning of a prompt, on one line. */
export function excerpt(prompt) {
  const line = visible(prompt.replace(/\s+/g, " ").trim());
  return line.length > EXCERPT ? `${line.slice(0, EXCERPT)}…` : line;
}
