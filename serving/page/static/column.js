// One column: a model's answer, its figures, and its tokens to look at one by one.

import { element, figure, hostile, refill, signed } from "./dom.js";
import { ratio, shade, total, visible } from "./tokens.js";

const COLOURS = { base: "base", sft: "sft", reference: "init" };

/** The class that colours a model's name, as in the report. */
export function colour(model) {
  return `is-${COLOURS[model] ?? "ppo"}`;
}

/** The view of an Answer. `number` is the key that leads to it, from 1. */
export class Column {
  #answer = null;
  #spans = [];
  #written = [];
  #current = -1;
  #asked = false;

  constructor(model, number) {
    const id = `answer-${number}`;
    this.versions = element("span", { class: "versions" });
    this.figures = element("div", { class: "scores" });
    this.state = element("p", { class: "state" });
    this.text = element("div", {
      class: "text tokens",
      tabindex: "0",
      role: "group",
      dir: "auto",
      "aria-describedby": `${id}-detail`,
      "aria-label": `Answer of ${visible(model)}; the arrow keys read its tokens`,
      keydown: (event) => this.#key(event),
      pointermove: (event) => this.#hover(event),
      click: (event) => this.#point(event),
      blur: () => this.#look(-1),
      pointerleave: (event) => this.#leave(event),
    });
    this.detail = element("p", { class: "detail fine", id: `${id}-detail`, "aria-live": "polite" });
    this.table = element("tbody");
    this.details = element(
      "details",
      { toggle: () => this.#fillTable() },
      element("summary", {}, "Tokens as a table"),
      element(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": `Tokens of ${visible(model)}` },
        element(
          "table",
          {},
          element(
            "thead",
            {},
            element(
              "tr",
              {},
              ...["Token", "Model", "Reference", "Log-ratio"].map((name) => element("th", { scope: "col" }, name)),
            ),
          ),
          this.table,
        ),
      ),
    );
    this.root = element(
      "article",
      { class: "answer", "aria-labelledby": id, "data-model": model },
      element(
        "h3",
        { id },
        element("kbd", { "aria-hidden": "true" }, String(number)),
        element("span", { class: `model ${colour(model)}` }, element("span", {}, visible(model))),
        this.versions,
      ),
      this.figures,
      this.state,
      this.text,
      this.detail,
      this.details,
    );
  }

  /** Shows `answer` as it is now, at the next frame. */
  show(answer) {
    this.#answer = answer;
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      this.#draw();
    });
  }

  /** Marks the best score of the row. */
  crown(best) {
    this.figures.classList.toggle("has-best", best);
  }

  #draw() {
    const answer = this.#answer;
    this.root.dataset.state = answer.state;
    this.text.setAttribute("aria-busy", String(answer.state === "streaming"));
    refill(this.versions, versionsSentence(answer.versions));
    const count = answer.pieces.tokens.length;
    refill(
      this.figures,
      element("span", { class: "score" }, "score ", element("b", {}, figure(answer.score))),
      element("span", { class: "kl" }, "KL ", element("b", {}, figure(answer.kl)), " nats"),
      element("span", {}, element("b", {}, String(count)), count === 1 ? " token" : " tokens"),
    );
    const said = [stateSentence(answer), answer.scoreNote, answer.klNote].filter(Boolean);
    this.state.hidden = said.length === 0;
    refill(this.state, said.map((sentence) => [sentence, " "]));
    this.#drawTokens(answer.pieces.list);
    if (this.#current < 0) this.#look(-1);
    if (this.details.open) this.#fillTable();
  }

  #drawTokens(pieces) {
    const end = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 4;
    pieces.forEach((piece, index) => {
      if (index >= this.#spans.length) {
        this.#spans.push(element("span"));
        this.text.append(this.#spans[index]);
      }
      const span = this.#spans[index];
      if (this.#written[index] !== piece.text) {
        this.#written[index] = piece.text;
        refill(span, piece.text ? hostile(piece.text) : "end");
      }
      span.className = ["token", piece.text ? "" : "end", shade(ratio(piece))].filter(Boolean).join(" ");
      span.classList.toggle("current", index === this.#current);
    });
    if (end) this.text.scrollTop = this.text.scrollHeight;
  }

  #key(event) {
    const last = this.#spans.length - 1;
    const to = {
      ArrowRight: Math.min(last, this.#current + 1),
      ArrowLeft: Math.max(0, this.#current - 1),
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#look(to);
    this.#spans[to].scrollIntoView({ block: "nearest" });
  }

  #hover(event) {
    // Text that scrolls below a pointer at rest is not pointed at: the arrow keys may be what scrolls it.
    if (event.pointerType === "mouse" && (event.movementX || event.movementY)) this.#point(event);
  }

  #leave(event) {
    if (event.pointerType === "mouse" && document.activeElement !== this.text) this.#look(-1);
  }

  #point(event) {
    const span = event.target.closest(".token");
    if (span !== null) this.#look(this.#spans.indexOf(span));
  }

  #look(index) {
    this.#spans[this.#current]?.classList.remove("current");
    this.#current = index;
    const piece = this.#answer?.pieces.list[index];
    if (piece === undefined) {
      refill(this.detail);
      return;
    }
    this.#spans[index].classList.add("current");
    refill(this.detail, element("b", {}, quoted(piece)), sentence(piece));
  }

  #fillTable() {
    if (!this.details.open || this.#answer === null) return;
    refill(
      this.table,
      this.#answer.pieces.list.map((piece) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, quoted(piece)),
          element("td", {}, figure(total(piece, "logprob"))),
          element("td", {}, figure(total(piece, "reference"))),
          element("td", { class: shade(ratio(piece)) }, signed(ratio(piece))),
        ),
      ),
    );
  }
}

function quoted(piece) {
  return piece.text ? `“${visible(piece.text).replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”` : "the end";
}

function sentence(piece) {
  const model = `model ${figure(total(piece, "logprob"))}`;
  const several = piece.tokens.length > 1 ? `, ${piece.tokens.length} tokens together` : "";
  const value = ratio(piece);
  if (value === null) return `: ${model} nats, reference not known${several}`;
  return `: ${signed(value)} nats (${model}, reference ${figure(total(piece, "reference"))}${several})`;
}

function versionsSentence(versions) {
  if (versions.length === 0) return "";
  return versions.length === 1 ? ` version ${versions[0]}` : ` versions ${versions.join(" → ")}`;
}

function stateSentence(answer) {
  if (answer.note) return answer.note;
  if (answer.state === "waiting") return "Waiting for the first token.";
  if (answer.state === "streaming") return "Answering.";
  if (answer.state === "measuring") return "Being scored and compared with the reference.";
  if (answer.state === "stopped") return "Stopped before its end.";
  if (answer.finishReason === "length") return "Cut off at max tokens.";
  return "";
}
