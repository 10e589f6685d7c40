// An answer as pieces of text with their tokens, and hostile text made visible. Pure: no page, no network.

/** Characters that a reader would not see, or that would reorder what they read. */
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\u115f\u1160\u2800\u3164\uffa0]/u;
const PLAIN = new Set(["\n", "\t", "\u200d"]);

/** `text` in runs: [{text, hidden}], where a hidden character is written as its code, \u202e. */
export function runs(text) {
  const found = [];
  let plain = "";
  for (const character of text) {
    if (PLAIN.has(character) || !HIDDEN.test(character)) {
      plain += character;
      continue;
    }
    if (plain) found.push({ text: plain, hidden: false });
    plain = "";
    found.push({ text: `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`, hidden: true });
  }
  if (plain) found.push({ text: plain, hidden: false });
  return found;
}

/** `text` as one string in which hidden characters are written as their codes. */
export function visible(text) {
  return runs(text).map((run) => run.text).join("");
}

/**
 * The pieces of an answer, in order: {text, tokens: [{id, logprob, reference}]}. A piece is one token, or several that
 * share a character or cannot be told apart; the token that ends an answer is a piece without text.
 */
export class Pieces {
  list = [];
  #held = []; // tokens whose text has not come yet

  /** Adds a part of the stream: its text, and its tokens as [{id, text, logprob}]. */
  add(text, tokens) {
    const waiting = [...this.#held, ...tokens];
    this.#held = [];
    if (!text) {
      this.#held = waiting;
    } else if (waiting.length === 0 && this.list.length > 0) {
      this.list.at(-1).text += text;
    } else if (waiting.length <= 1) {
      this.#push(text, waiting);
    } else {
      this.#align(text, waiting);
    }
  }

  /** Tokens that never got a text, such as the one that ends an answer, become pieces of their own. */
  finish() {
    for (const token of this.#held) this.#push("", [token]);
    this.#held = [];
  }

  get text() {
    return this.list.map((piece) => piece.text).join("");
  }

  get tokens() {
    return this.list.flatMap((piece) => piece.tokens);
  }

  /** Gives every token its log-probability under the reference. Throws where there are not as many. */
  setReference(logprobs) {
    const tokens = this.tokens;
    if (tokens.length !== logprobs.length) {
      throw new Error(`the reference gave ${logprobs.length} log-probabilities for ${tokens.length} tokens`);
    }
    tokens.forEach((token, index) => (token.reference = logprobs[index]));
  }

  #push(text, tokens) {
    this.list.push({ text, tokens: tokens.map(({ id, logprob }) => ({ id, logprob, reference: null })) });
  }

  #align(text, tokens) {
    let position = 0;
    let unclear = [];
    for (const token of tokens) {
      const at = token.text && !token.text.includes("\ufffd") ? text.indexOf(token.text, position) : -1;
      if (at < 0 || at - position > (unclear.length ? 16 * unclear.length : 2)) {
        unclear.push(token);
        continue;
      }
      let start = position; // a blank that decoding puts before a word belongs to the word
      if (unclear.length) {
        this.#push(text.slice(position, at), unclear);
        unclear = [];
        start = at;
      }
      position = at + token.text.length;
      this.#push(text.slice(start, position), [token]);
    }
    const rest = text.slice(position);
    if (unclear.length && rest) this.#push(rest, unclear);
    else if (unclear.length) this.#held = unclear;
    else if (rest) this.list.at(-1).text += rest;
  }
}

/** Log-probability of a piece under the model ("logprob") or the reference, nats; null where one is not known. */
export function total(piece, of) {
  if (piece.tokens.length === 0 || piece.tokens.some((token) => token[of] === null)) return null;
  return piece.tokens.reduce((sum, token) => sum + token[of], 0);
}

/** Log-ratio of model to reference of a piece, nats; null where it is not known. */
export function ratio(piece) {
  const model = total(piece, "logprob");
  const reference = total(piece, "reference");
  return model === null || reference === null ? null : model - reference;
}

/** Log-ratio summed over an answer, nats: what it adds to the KL from the reference. Null where it is not known. */
export function kl(pieces) {
  const ratios = pieces.filter((piece) => piece.tokens.length > 0).map(ratio);
  return ratios.length === 0 || ratios.includes(null) ? null : ratios.reduce((sum, one) => sum + one, 0);
}

/** Log-ratios, nats, from which a token is shaded one step more. */
export const SHADES = [0.1, 0.5, 1, 2];

/** Class of a log-ratio: "more-1" to "more-4" where the model likes a token better, "less-…" where less, else "". */
export function shade(value) {
  const step = value === null ? 0 : SHADES.filter((edge) => Math.abs(value) >= edge).length;
  return step === 0 ? "" : `${value > 0 ? "more" : "less"}-${step}`;
}

/** Versions that wrote an answer, as text, from what the last part of a response says of them. */
export function versionsOf(said) {
  const spans = Array.isArray(said?.versions) ? said.versions : [];
  const names = spans.map((span) => String(typeof span === "object" && span !== null ? span.version : span));
  return names.filter((name, index) => name !== names[index - 1]);
}
