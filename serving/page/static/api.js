// Requests to the service: the session's token, errors as sentences, streams, and patience with models that load.

const REQUEST_MS = 60_000;
const SILENCE_MS = 120_000;
const PATIENCE_MS = 600_000;
const MAX_WAIT_S = 30;

/** What went wrong, as a sentence. `status` is 0 where no answer came. */
export class Problem extends Error {
  constructor(sentence, { status = 0, code = "", retryAfter = null } = {}) {
    super(sentence);
    Object.assign(this, { status, code, retryAfter });
  }
}

let csrf = null;
let askForLogin = async () => false;

/** The CSRF token of the session, from now on. */
export function setCsrf(token) {
  csrf = token;
}

/** `ask` opens the login and resolves to whether somebody has logged in. */
export function onUnauthorised(ask) {
  askForLogin = ask;
}

/**
 * The response to a request that has succeeded. With 401 the login opens and the request is sent again; `quiet` leaves
 * the login alone. Throws Problem; an aborted `signal` throws its AbortError.
 */
export async function send(path, { body, signal, quiet = false, deadline = REQUEST_MS } = {}) {
  const response = await once(path, body, signal, deadline);
  if (response.ok) return response;
  const problem = await problemOf(response);
  if (problem.status === 401 && !quiet && (await askForLogin())) {
    return send(path, { body, signal, quiet: true, deadline });
  }
  throw problem;
}

/** The JSON that a request brings. */
export async function json(path, options = {}) {
  const response = await send(path, options);
  try {
    return await withDeadline(response.json(), path);
  } catch (error) {
    if (options.signal?.aborted || error instanceof Problem) throw error;
    throw new Problem(`The service answered ${path} with something else than JSON, or the connection broke.`);
  }
}

async function once(path, body, signal, deadline) {
  const clock = new AbortController();
  const timer = setTimeout(() => clock.abort(), deadline);
  const signals = signal ? AbortSignal.any([signal, clock.signal]) : clock.signal;
  const headers = { accept: "application/json, text/event-stream" };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (csrf !== null) headers["x-csrf-token"] = csrf;
  const method = body === undefined ? "GET" : "POST";
  try {
    return await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signals,
      credentials: "same-origin",
      cache: "no-store",
      redirect: "error",
      referrerPolicy: "no-referrer",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    if (clock.signal.aborted) throw new Problem(`The service did not answer ${path} within ${deadline / 1000} s.`);
    throw new Problem("The service cannot be reached; it may be starting or down.");
  } finally {
    clearTimeout(timer); // a stream that has begun has a deadline of its own
  }
}

async function problemOf(response) {
  let said = null;
  try {
    said = (await response.json()).error;
  } catch {
    // a proxy's page, or nothing
  }
  const told = typeof said?.message === "string" ? said.message : null;
  const seconds = Number.parseFloat(response.headers.get("retry-after") ?? "");
  return new Problem(told ?? `The service answered with HTTP ${response.status}.`, {
    status: response.status,
    code: typeof said?.code === "string" ? said.code : "",
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

/**
 * What `work` brings, tried again while the service says that it is loading a model or busy. `wait(problem, seconds)`
 * is told before each pause and every second of it, `wait(null, 0)` when the work begins again.
 */
export async function patiently(work, { signal, wait, model }) {
  const began = Date.now();
  for (;;) {
    try {
      return await work();
    } catch (problem) {
      const worthWaiting = problem instanceof Problem && (problem.status === 503 || problem.status === 429);
      if (!worthWaiting) throw problem;
      if (Date.now() - began > PATIENCE_MS) {
        throw new Problem(`${model} was not there after ${PATIENCE_MS / 60_000} minutes of trying: ${problem.message}`);
      }
      const seconds = Math.ceil(Math.min(MAX_WAIT_S, Math.max(1, problem.retryAfter ?? 2)));
      for (let left = seconds; left > 0; left -= 1) {
        wait(problem, left);
        await pause(1000, signal);
      }
      wait(null, 0);
    }
  }
}

/** Resolves after `ms` milliseconds; rejects with AbortError where `signal` is aborted. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}

/** The JSON objects of a stream of server-sent events, until [DONE]. Throws Problem where it breaks or falls silent. */
export async function* events(response, model) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await withDeadline(reader.read(), model);
      if (done) break;
      buffer += value;
      const lines = buffer.split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const found = parsed(data, model);
        if (found.error) throw new Problem(String(found.error.message ?? "The service broke off the answer."));
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted stream refuses to be cancelled again
  }
  throw new Problem(`The answer of ${model} broke off: the connection ended before the answer did.`);
}

function parsed(data, model) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Problem(`The stream of ${model} holds something else than JSON.`);
  }
}

function withDeadline(promise, whose) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(
      () => reject(new Problem(`Nothing came from ${whose} for ${SILENCE_MS / 1000} s; the service may be down.`)),
      SILENCE_MS,
    );
  });
  return Promise.race([promise, silence]).finally(() => clearTimeout(timer));
}
