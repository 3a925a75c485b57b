// Consent to an application's key: signs in if need be, asks, and sends the browser back with a code.
"use strict";

const asked = new URLSearchParams(location.search);
const byId = (id) => document.getElementById(id);
let csrfToken = "";

function show(id) {
  for (const other of ["sign-in", "consent", "done"]) byId(other).hidden = other !== id;
}

function alertWith(text) {
  byId("alert").textContent = text;
  byId("alert").hidden = !text;
}

async function call(method, path, body) {
  const headers = { "X-CSRF-Token": csrfToken };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch("/api/v1" + path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.error.message), { status: answer.status });
  return content.data;
}

function ask(session) {
  csrfToken = session.csrf_token;
  const callback = asked.get("callback_url");
  let site = "An application without a page of its own";
  if (callback !== null) {
    try { site = new URL(callback).host; } catch { alertWith("callback_url is no URL"); return; }
  }
  byId("site").textContent = site;
  byId("who").textContent = session.email;
  const period = asked.get("usage_limit_type");
  byId("limit").textContent = asked.get("limit") ? `, up to ${asked.get("limit")} USD${period ? " " + period : ""}` : "";
  byId("back").hidden = callback === null;
  byId("callback").textContent = callback ?? "";
  show("consent");
}

async function authorize() {
  const wish = {};
  for (const name of ["callback_url", "code_challenge", "code_challenge_method", "key_label", "usage_limit_type", "expires_at", "workspace_id"])
    if (asked.get(name)) wish[name] = asked.get(name);
  if (asked.get("limit")) wish.limit = Number(asked.get("limit"));
  const { id } = await call("POST", "/auth/keys/code", wish); // it refuses every callback that is not https or this machine
  if (!wish.callback_url) {
    byId("code").textContent = id;
    show("done");
    return;
  }
  const target = new URL(wish.callback_url);
  target.searchParams.set("code", id);
  location.replace(target.href);
}

function attempt(work) {
  return async (event) => {
    event?.preventDefault();
    alertWith("");
    try { await work(); } catch (error) { alertWith(error.message); }
  };
}

const credentials = () => ({ email: byId("email").value, password: byId("password").value });

byId("sign-in").addEventListener("submit", attempt(async () => ask(await call("POST", "/session", credentials()))));
byId("sign-up").addEventListener("click", attempt(async () => {
  if (!byId("sign-in").reportValidity()) return;
  await call("POST", "/account", credentials());
  ask(await call("POST", "/session", credentials()));
}));
byId("authorize").addEventListener("click", attempt(authorize));
byId("refuse").addEventListener("click", () => history.back());

call("GET", "/session").then(ask, () => show("sign-in"));
