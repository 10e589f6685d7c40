// One model's answer: streamed, then scored by the reward model and compared with the reference.

import { Problem, events, json, patiently, send } from "./api.js";
import { Pieces, kl, versionsOf } from "./tokens.js";

const LONG_MS = 300_000;

/** An answer that comes, or that was kept. `state`: waiting, streaming, measuring, done, stopped or failed. */
export class Answer {
  state = "waiting";
  note = ""; // a sentence on what is waited for, or went wrong
  pieces = new Pieces();
  versions = [];
  finishReason = null;
  score = null;
  scoreNote = "";
  klNote = "";
  #keptKl;

  constructor(model, changed = () => {}) {
    this.model = model;
    this.changed = changed;
  }

  get kl() {
    return this.#keptKl === undefined ? kl(this.pieces.list) : this.#keptKl;
  }

  get text() {
    return this.pieces.text;
  }

  /** The answer as it is kept on the service. */
  record() {
    const tokens = this.pieces.list.map((piece) => ({
      text: piece.text.toWellFormed(),
      logprob: sum(piece.tokens, "logprob"),
      reference: sum(piece.tokens, "reference"),
    }));
    return {
      model: this.model,
      versions: this.versions,
      tokens,
      finish_reason: this.finishReason,
      score: this.score,
      kl: this.kl,
    };
  }

  /** The answer that was kept as `record`. */
  static from(record) {
    const answer = new Answer(record.model);
    answer.pieces.list = record.tokens.map(({ text, logprob, reference }) => ({
      text,
      tokens: [{ id: null, logprob, reference }],
    }));
    answer.#keptKl = record.kl;
    Object.assign(answer, { versions: record.versions, finishReason: record.finish_reason, score: record.score });
    answer.state = record.finish_reason === null ? "stopped" : "done";
    return answer;
  }

  /** Streams the answer to `prompt` ({text, tokens}), then measures it. Ends in state done, stopped or failed. */
  async run(prompt, sampling, signal, { scored, reference }) {
    try {
      await this.#stream(prompt, sampling, signal);
      if (!scored) this.scoreNote = "No score: this token lacks the scope score.";
      if (!reference) this.klNote = "No KL: the run has no reference yet.";
      this.#tell("measuring", "");
      await Promise.all([
        scored ? this.#scored(prompt, signal) : null,
        reference ? this.#compared(prompt, reference, signal) : null,
      ]);
      this.#tell("done", "");
    } catch (error) {
      this.pieces.finish();
      if (signal.aborted) this.#tell("stopped", "Stopped.");
      else if (error instanceof Problem) this.#tell("failed", error.message);
      else {
        this.#tell("failed", "The page made a mistake; the browser's console says which.");
        throw error;
      }
    }
  }

  async #stream(prompt, sampling, signal) {
    const body = {
      model: this.model,
      prompt: prompt.tokens,
      temperature: sampling.temperature,
      top_p: sampling.top_p,
      max_tokens: sampling.max_tokens,
      logprobs: 1,
      stream: true,
      return_token_ids: true,
    };
    if (sampling.seed !== null) body.seed = sampling.seed;
    const open = () => send("/v1/completions", { body, signal, deadline: LONG_MS });
    const response = await patiently(open, { signal, model: this.model, wait: this.#waiting(this.model) });
    const admitted = response.headers.get("x-amenable-version");
    if (admitted) this.versions = [admitted];
    this.#tell("streaming", "");
    for await (const part of events(response, this.model)) {
      this.#take(part);
      this.changed(this);
    }
    this.pieces.finish();
  }

  #take(part) {
    const versions = versionsOf(part.amenable);
    if (versions.length) this.versions = versions;
    for (const choice of part.choices ?? []) {
      const logprobs = choice.logprobs?.token_logprobs ?? [];
      const ids = choice.token_ids ?? [];
      const tokens = logprobs.map((logprob, index) => ({
        id: ids[index] ?? null,
        text: choice.logprobs.tokens?.[index] ?? "",
        logprob,
      }));
      this.pieces.add(choice.text ?? "", tokens);
      if (choice.finish_reason) this.finishReason = choice.finish_reason;
    }
  }

  async #scored(prompt, signal) {
    const pair = { prompt: prompt.text, response: this.text, finished: this.finishReason === "stop" };
    const body = { model: "rm", pairs: [pair] };
    const ask = () => json("/v1/score", { body, signal, deadline: LONG_MS });
    const wait = (problem, seconds) => {
      const late = `The score is not there yet: ${again(problem, seconds, "the reward model")}`;
      this.scoreNote = problem === null ? "" : late;
      this.changed(this);
    };
    try {
      const found = await patiently(ask, { signal, model: "The reward model", wait });
      this.score = Number.isFinite(found.scores?.[0]) ? found.scores[0] : null;
    } catch (error) {
      if (signal.aborted || !(error instanceof Problem)) throw error;
      this.scoreNote = `Not scored: ${error.message}`;
    }
  }

  async #compared(prompt, reference, signal) {
    const tokens = this.pieces.tokens;
    if (tokens.length === 0) return;
    if (this.model === reference) {
      this.pieces.setReference(tokens.map((token) => token.logprob));
      return;
    }
    if (tokens.some((token) => token.id === null)) {
      this.klNote = "The service did not name the tokens, so there is no KL.";
      return;
    }
    const ids = [...prompt.tokens, ...tokens.map((token) => token.id)];
    const body = { model: reference, prompt: ids, echo: true, max_tokens: 0, logprobs: 1, temperature: 0 };
    const ask = () => json("/v1/completions", { body, signal, deadline: LONG_MS });
    const wait = (problem, seconds) => {
      this.klNote = problem === null ? "" : `KL is not there yet: ${again(problem, seconds, "the reference")}`;
      this.changed(this);
    };
    try {
      const found = await patiently(ask, { signal, model: "The reference", wait });
      const all = found.choices?.[0]?.logprobs?.token_logprobs ?? [];
      const wanted = all.slice(prompt.tokens.length, ids.length);
      if (wanted.length !== tokens.length || wanted.includes(null)) {
        throw new Problem("the reference did not give a log-probability for every token.");
      }
      this.pieces.setReference(wanted);
    } catch (error) {
      if (signal.aborted || !(error instanceof Problem)) throw error;
      this.klNote = `No KL: ${error.message}`;
    }
  }

  #waiting(model) {
    return (problem, seconds) => this.#tell("waiting", again(problem, seconds, model));
  }

  #tell(state, note) {
    this.state = state;
    this.note = note;
    this.changed(this);
  }
}

function again(problem, seconds, model) {
  if (problem === null) return "";
  const what = problem.code === "model_loading" ? `${model} is being loaded` : problem.message.replace(/[.\s]+$/, "");
  return `${what}; trying again in ${seconds} s.`;
}

function sum(tokens, of) {
  if (tokens.length === 0 || tokens.some((token) => token[of] === null)) return null;
  return tokens.reduce((total, token) => total + token[of], 0);
}
