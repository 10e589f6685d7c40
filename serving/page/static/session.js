// Who looks at the page: the login dialog, the CSRF token of the session, and logging out.

import { Problem, json, onUnauthorised, setCsrf } from "./api.js";
import { byId } from "./dom.js";

let visitor = null;
let asking = null;
let onChange = () => {};

/** Whether the visitor's token has this scope. */
export function may(scope) {
  return visitor !== null && visitor.scopes.includes(scope);
}

/**
 * Reads the session, opens the login where there is none, and resolves to whether somebody is logged in.
 * `changed(session)` is called now and at every login. Throws Problem.
 */
export async function begin(changed) {
  onChange = changed;
  onUnauthorised(ask);
  byId("login-form").addEventListener("submit", submit);
  byId("login-cancel").addEventListener("click", () => byId("login").close());
  byId("login").addEventListener("close", closed);
  byId("log-out").addEventListener("click", () => (visitor === null ? location.reload() : logOut()));
  take(await json("/page/session", { quiet: true }));
  return visitor !== null || ask();
}

/** The session has ended on the service: the page offers to log in again. */
export function ended() {
  take({ visitor: null, run: null, synthetic: false });
}

/** Opens the login, once for all who ask meanwhile; resolves to whether somebody has logged in. */
function ask() {
  if (asking !== null) return asking.promise;
  asking = Promise.withResolvers();
  byId("login-problem").textContent = "";
  byId("login").showModal();
  byId("token").focus();
  return asking.promise;
}

async function submit(event) {
  event.preventDefault();
  const field = byId("token");
  const token = field.value.trim();
  if (!token) {
    byId("login-problem").textContent = "Enter a token.";
    return;
  }
  try {
    take(await json("/page/login", { body: { token }, quiet: true }));
    field.value = "";
    byId("login").close("in");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    byId("login-problem").textContent = error.message;
    field.select();
  }
}

function closed() {
  const waiting = asking;
  asking = null;
  waiting?.resolve(byId("login").returnValue === "in");
  byId("login").returnValue = "";
}

async function logOut() {
  try {
    await json("/page/logout", { body: {}, quiet: true });
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
  }
  location.hash = "";
  location.reload(); // what was on the page goes with it
}

function take(session) {
  visitor = session.visitor;
  setCsrf(visitor?.csrf ?? null);
  byId("log-out").hidden = visitor !== null && !visitor.login;
  byId("log-out").textContent = visitor === null ? "Log in" : "Log out";
  onChange(session);
}
