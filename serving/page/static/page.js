// The page: what is asked, answered and shown, and what is looked at again by itself.

import { Answer } from "./answer.js";
import { Problem, json, pause } from "./api.js";
import { stage } from "./charts.js";
import { Column } from "./column.js";
import * as compose from "./compose.js";
import { announce, byId, element, figure, hostile, moment, refill } from "./dom.js";
import * as kept from "./kept.js";
import * as keys from "./keys.js";
import * as served from "./served.js";
import * as session from "./session.js";
import { SHADES, visible } from "./tokens.js";

const MODELS_EVERY_MS = 5_000;
const CURVES_EVERY_MS = 20_000;
const FIRST_PANELS = 3; // score, score after the KL penalty, KL: a row of a wide page

let current = null; // the comparison that is shown: {prompt, sampling, answers, time, id}
let columns = [];
let stopping = null; // AbortController of what is being answered

// asking ----------------------------------------------------------------------------------------------------------

async function ask({ prompt, models, sampling }) {
  if (stopping !== null) return;
  stopping = new AbortController();
  const { signal } = stopping;
  compose.setBusy(true);
  byId("ask-problem").textContent = "";
  try {
    const { tokens } = await json("/page/tokens", { body: { prompt: prompt.toWellFormed() }, signal });
    const answers = models.map((model) => new Answer(model, changed));
    const comparison = { prompt, sampling, answers, time: new Date().toLocaleTimeString(), id: null };
    show(comparison);
    kept.setAddress(null);
    const reference = served.names().includes("reference") ? "reference" : null;
    const needs = { scored: session.may("score"), reference };
    await Promise.all(answers.map((answer) => answer.run({ text: prompt, tokens }, sampling, signal, needs)));
    if (answers.some((answer) => answer.text)) kept.remember(comparison, show);
    announce(answers.map(summary).join(" "));
  } catch (error) {
    if (!signal.aborted) tell("ask-problem", error);
  } finally {
    stopping = null;
    compose.setBusy(false);
    byId("keep").disabled = !mayBeKept();
  }
}

function stop() {
  stopping?.abort();
}

function summary(answer) {
  const name = visible(answer.model);
  if (answer.state === "failed") return `${name}: ${answer.note}`;
  return `${name} has answered: score ${figure(answer.score)}, KL ${figure(answer.kl)} nats.`;
}

// showing ---------------------------------------------------------------------------------------------------------

function show(comparison) {
  current = comparison;
  columns = comparison.answers.map((answer, index) => new Column(answer.model, index + 1));
  refill(byId("columns"), columns.map((column) => column.root));
  refill(byId("asked"), hostile(comparison.prompt));
  comparison.answers.forEach((answer, index) => columns[index].show(answer));
  crown();
  byId("answers-empty").hidden = true;
  byId("answers-body").hidden = false;
  byId("kept-note").hidden = true;
  byId("link").hidden = true;
  byId("keep-problem").textContent = "";
  byId("keep").disabled = !mayBeKept();
  byId("answers").scrollIntoView({ block: "start" });
}

function changed(answer) {
  const index = current.answers.indexOf(answer);
  if (index < 0) return; // another comparison is shown meanwhile
  columns[index].show(answer);
  crown();
}

function crown() {
  const scores = current.answers.map((answer) => answer.score);
  const known = scores.filter((score) => score !== null);
  const best = known.length > 1 ? Math.max(...known) : null;
  columns.forEach((column, index) => column.crown(best !== null && scores[index] === best));
}

function mayBeKept() {
  return current !== null && stopping === null && current.id === null && current.answers.some((answer) => answer.text);
}

// keeping ---------------------------------------------------------------------------------------------------------

async function keep() {
  if (!mayBeKept()) return;
  byId("keep").disabled = true;
  byId("keep-problem").textContent = "";
  const comparison = current;
  try {
    const stored = await kept.keep({
      prompt: comparison.prompt.toWellFormed(),
      sampling: comparison.sampling,
      answers: comparison.answers.filter((answer) => answer.text).map((answer) => answer.record()),
    });
    comparison.id = stored.id;
    if (current === comparison) {
      kept.setAddress(stored.id);
      await showLink(stored.id);
    }
    await kept.loadHistory();
  } catch (error) {
    tell("keep-problem", error);
    byId("keep").disabled = !mayBeKept();
  }
}

async function showLink(id) {
  const link = kept.linkTo(id);
  byId("link").hidden = false;
  byId("link-text").value = link;
  try {
    await navigator.clipboard.writeText(link);
    announce("Kept; the link has been copied.");
    byId("keep-problem").textContent = "";
  } catch {
    byId("link-text").select(); // a browser that lets no page write: the link is there to be copied
    announce("Kept; the link is selected.");
  }
}

async function openKept(id) {
  if (stopping !== null) stop();
  try {
    const stored = await kept.fetchKept(id);
    const { prompt, sampling, created, who } = stored;
    show({ prompt, sampling, answers: stored.answers.map(Answer.from), time: moment(created), id: stored.id });
    const note = byId("kept-note");
    note.hidden = false;
    note.textContent = `Kept by ${visible(who)}, ${moment(created)}; ${samplingSentence(sampling)}.`;
    byId("link").hidden = false;
    byId("link-text").value = kept.linkTo(id);
    announce(note.textContent);
  } catch (error) {
    tell("notice", error);
  }
}

function samplingSentence({ temperature, top_p, max_tokens, seed }) {
  const seeded = seed === null ? "no seed" : `seed ${seed}`;
  return `temperature ${temperature}, top-p ${top_p}, at most ${max_tokens} tokens, ${seeded}`;
}

// telling ---------------------------------------------------------------------------------------------------------

/** Writes the sentence of an error where people look; what is not expected flies on, to the browser's console. */
function tell(id, error) {
  const place = byId(id);
  place.hidden = false;
  place.textContent = error instanceof Problem ? error.message : "The page made a mistake; the console says which.";
  if (!(error instanceof Problem)) throw error;
}

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    tell("notice", error);
  }
}

// looking again ---------------------------------------------------------------------------------------------------

async function loadCurves(options = {}) {
  const { stages } = await json("/page/curves", options);
  const note = byId("curves-note");
  note.hidden = stages.length > 0;
  note.textContent = "This run has recorded nothing yet; the curves appear while it trains.";
  const [first, ...others] = stages;
  const rest = first ? [{ ...first, panels: first.panels.slice(FIRST_PANELS) }, ...others] : [];
  const shown = first ? [stage({ ...first, panels: first.panels.slice(0, FIRST_PANELS) })] : [];
  refill(byId("curves-body"), shown);
  refill(byId("curves-rest"), rest.filter(({ panels }) => panels.length > 0).map(stage));
  byId("curves-more").hidden = byId("curves-rest").childElementCount === 0;
}

/** Does `work` again and again while somebody looks; the notice says where the service has gone. */
async function repeat(work, everyMs) {
  for (;;) {
    await pause(everyMs);
    if (document.hidden || byId("login").open) continue;
    if (stopping !== null) continue; // answers need the few connections that a browser has
    try {
      await work({ quiet: true });
      if (byId("notice").dataset.gone) {
        byId("notice").hidden = true;
        delete byId("notice").dataset.gone;
      }
    } catch (error) {
      tell("notice", error);
      if (error.status === 401) return session.ended();
      byId("notice").dataset.gone = "yes";
    }
  }
}

function drawScale() {
  const edges = [...SHADES].reverse();
  const steps = [
    ...edges.map((edge, index) => [`less-${4 - index}`, `≤ −${edge}`]),
    ["", "0"],
    ...SHADES.map((edge, index) => [`more-${index + 1}`, `≥ ${edge}`]),
  ];
  refill(byId("scale"), steps.map(([name, label]) => element("span", { class: `token ${name}` }, label)));
}

function takeSession({ run, synthetic }) {
  if (run === null) return;
  byId("run-name").textContent = visible(run);
  document.title = `${visible(run)} · spot checks · amenable`;
  byId("synthetic").hidden = !synthetic;
}

// beginning -------------------------------------------------------------------------------------------------------

async function begin() {
  drawScale();
  compose.begin(ask, stop);
  served.begin(compose.offer);
  keys.begin({
    ask: compose.submit,
    stop,
    answer: (number) => columns[number - 1]?.text.focus(),
    actions: {
      "/": () => byId("prompt").focus(),
      p: compose.another,
      k: keep,
      h: () => (byId("kept").querySelector("li a, li button") ?? byId("open-keys")).focus(),
    },
  });
  byId("keep").addEventListener("click", keep);
  byId("reuse").addEventListener("click", () => {
    const { prompt, sampling, answers } = current;
    compose.fill({ prompt, sampling, models: answers.map((answer) => answer.model) });
    byId("prompt").focus();
  });
  byId("link-text").addEventListener("focus", () => byId("link-text").select());
  window.addEventListener("hashchange", () => {
    const id = kept.idInAddress();
    if (id !== null && id !== current?.id) openKept(id);
  });
  if (!(await session.begin(takeSession))) {
    byId("notice").hidden = false;
    byId("notice").textContent = "Log in with a token to ask the models of this run.";
    return;
  }
  await attempt(() => served.load());
  await Promise.all([attempt(compose.loadPrompts), attempt(loadCurves), attempt(kept.loadHistory)]);
  const id = kept.idInAddress();
  if (id !== null) await openKept(id);
  else if (document.activeElement === document.body) byId("prompt").focus();
  document.documentElement.dataset.ready = "yes";
  repeat(served.load, MODELS_EVERY_MS);
  repeat(loadCurves, CURVES_EVERY_MS);
}

begin().catch((error) => tell("notice", error));
