// The page: one conversation at a time, its composer and its place in the window.

import { AgentClient, newId } from "../agent_sessions/client.js";
import { Composer } from "./composer.js";
import { Scroll } from "./scroll.js";
import { ask, Sidebar, toLogin } from "./sidebar.js";
import { around, known, say, url } from "./text.js";
import { pager } from "./turns.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const sidebar = new Sidebar();
const transcript = new Transcript($("log"));
const composer = new Composer();
const scroll = new Scroll($("scroller"), $("jump"));
// Kept over a reload, to tell this tab's runs from another's.
const mine = new Set(JSON.parse(sessionStorage.getItem("runs") ?? "[]"));
let client = null;
let current = "";

// Conversations

function idOfPage() {
  const [before, after] = around("conversation");
  const path = location.pathname;
  if (!path.startsWith(before) || !path.endsWith(after)) return "";
  return decodeURIComponent(path.slice(before.length, -after.length));
}

/** Show a conversation, or with no id the empty page. */
function open(id) {
  client?.close();
  client = null;
  composer.keep(current, transcript.unsent);
  current = id;
  transcript.reset();
  composer.restore(id);
  composer.close("");
  banner("");
  sidebar.select(id);
  $("drawer").close();
  scroll.toEnd();
  if (id) connect(id);
  else show();
  composer.focus();
}

function go(id) {
  history.pushState(null, "", id ? url("conversation", id) : url("chat"));
  open(id);
}

function connect(id) {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  client = new AgentClient(`${scheme}//${location.host}${url("socket", id)}`, id);
  const mineStill = (listener) => {
    const owner = client;
    return (event) => owner === client && listener(event.detail);
  };
  client.addEventListener("connection", mineStill(connection));
  client.addEventListener("event", mineStill(received));
  client.addEventListener("known", mineStill(({ runId }) => transcript.forget(runId)));
  client.connect();
}

function received({ event }) {
  scroll.keep(() => transcript.apply(event));
  if (event.code === "interrupts_pending") client.refresh();
  const isSync = event.type === "RUN_STARTED" && event.runId.startsWith("sync:");
  const isRun = /^RUN_(STARTED|FINISHED|ERROR)$/.test(event.type) && !isSync;
  // The first message names a conversation, and is stored after RUN_STARTED.
  const isNamed = /^(TEXT_MESSAGE|TOOL_CALL)_START$/.test(event.type) && !sidebar.title;
  if (isRun || isNamed) sidebar.refresh();
}

async function send(text, message) {
  if (!current) {
    const made = await ask(url("sessions"), "POST");
    if (!made) {
      composer.status(say("createFailed"));
      return false;
    }
    go(made.id);
  }
  message ??= { id: newId("u"), role: "user", content: text };
  const runId = begin();
  transcript.sent(runId, message);
  if (message.edits) client.edit(message.edits, text, message.id, runId);
  else client.run(text, message.id, runId);
  return true;
}

/** Note that a run is this tab's; returns its id. */
function begin() {
  const runId = newId("r");
  mine.add(runId);
  sessionStorage.setItem("runs", JSON.stringify([...mine].slice(-50)));
  scroll.toEnd();
  composer.status(say("answering", { agent: transcript.agent || say("assistant") }));
  return runId;
}

function switchTo(branch) {
  if (transcript.running || transcript.waiting) {
    composer.status(say(transcript.running ? "busy" : "approvalWaiting"));
  } else transcript.aside(client.switchTo(branch));
}

// What the page shows around the log

function show() {
  const { running, waiting, left, agent, before } = transcript;
  $("empty").hidden = Boolean(current && !transcript.ready) || !transcript.empty;
  $("earlier").hidden = before === null;
  $("again").hidden = !transcript.answered;
  const { siblings } = transcript;
  $("versions").replaceChildren(...(siblings ? [pager(siblings, switchTo)] : []));
  // Before the stop button goes: it may have the focus too.
  const isLost = composer.wait(waiting);
  composer.running = running;
  if (isLost) transcript.focus();
  if (running) {
    const name = agent || say("assistant");
    composer.status(
      mine.has(running) ? say("answering", { agent: name }) : say("answeringElsewhere"),
    );
  } else if (waiting) {
    composer.status(
      left === 0
        ? say("answering", { agent: agent || say("assistant") })
        : say(left > 1 ? "approvalsLeft" : "approvalWaiting", { count: left }),
    );
  }
}

function banner(text, button = true) {
  $("banner").hidden = !text;
  $("banner-text").textContent = text;
  $("reconnect").hidden = !button;
}

let slow = 0;
function connection({ state, code, seconds }) {
  clearTimeout(slow);
  if (state === "open") banner("");
  else if (state === "connecting") {
    slow = setTimeout(() => banner(say("connecting"), false), 500);
  } else if (state === "offline") banner(say("offline"));
  else if (state === "waiting") {
    const key = known(`closed${code}`) ? `closed${code}` : "reconnecting";
    banner(say(key, { seconds }));
  } else if (code === 4401) toLogin();
  else {
    banner(say(`closed${code}`), false);
    composer.close(say(`closed${code}`));
    if (code === 4404) $("empty").hidden = true;
  }
}

function title() {
  const text = sidebar.title || say(current ? "untitled" : "new");
  $("title").textContent = text;
  document.title = text;
}

// Wiring

transcript.addEventListener("change", show);
transcript.addEventListener("drawn", () => transcript.empty || ($("empty").hidden = true));
transcript.addEventListener("notice", ({ detail }) => composer.status(detail.text));
transcript.addEventListener("retry", ({ detail }) => {
  send(detail.message.content, detail.message);
});
transcript.addEventListener("edit", ({ detail }) => {
  const { content, edits } = detail.message;
  send(content, { id: newId("u"), role: "user", content, edits });
  composer.focus();
});
transcript.addEventListener("switch", ({ detail }) => switchTo(detail.branch));
transcript.addEventListener("draft", ({ detail }) => composer.offer(detail.text));
$("again").addEventListener("click", () => {
  const runId = begin();
  transcript.aside(runId);
  client.regenerate(runId);
  composer.focus();
});
transcript.addEventListener("answered", ({ detail }) => {
  mine.add(client.resume(detail.entries));
  composer.focus();
});
composer.addEventListener("stop", () => {
  if (!transcript.running) return;
  client.abort(transcript.running);
  composer.status(say("stopping"));
});
composer.send = send;

sidebar.addEventListener("open", ({ detail }) => go(detail.id));
sidebar.addEventListener("title", title);
sidebar.addEventListener("notice", ({ detail }) => composer.status(detail.text));
sidebar.addEventListener("removed", ({ detail }) => detail.id === current && go(""));

$("new").addEventListener("click", (event) => {
  event.preventDefault();
  go("");
});
for (const button of document.querySelectorAll(".starters button")) {
  button.addEventListener("click", () => {
    send(button.textContent);
    composer.focus();
  });
}
$("reconnect").addEventListener("click", () => client?.retry());
$("earlier").addEventListener("click", async () => {
  const owner = client;
  const query = `?before=${encodeURIComponent(transcript.before)}`;
  const answer = await ask(url("messages", current) + query);
  if (owner !== client) return;
  if (!answer) {
    composer.status(say("earlierFailed"));
    return;
  }
  transcript.before = answer.before;
  scroll.hold(() => transcript.prepend(answer.messages));
  show();
});

// Under 700 px the conversations move into a dialog.
$("menu").addEventListener("click", () => {
  $("drawer").append($("conversations"));
  $("drawer").showModal();
});
$("drawer-close").addEventListener("click", () => $("drawer").close());
$("drawer").addEventListener("close", () => $("sidebar").append($("conversations")));
$("drawer").addEventListener("click", (event) => {
  if (event.target === $("drawer")) $("drawer").close();
});
matchMedia("(min-width: 700px)").addEventListener("change", () => $("drawer").close());

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  const root = document.documentElement;
  if (name === "auto") {
    delete root.dataset.theme;
    localStorage.removeItem("theme");
  } else {
    root.dataset.theme = name;
    localStorage.setItem("theme", name);
  }
  const label = say(`theme${name[0].toUpperCase()}${name.slice(1)}`);
  $("theme").ariaLabel = label;
  $("theme").title = label;
}
theme(document.documentElement.dataset.theme ?? "auto");
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  theme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});

addEventListener("pagehide", () => {
  composer.keep(current, [...transcript.unsent, composer.text]);
});
addEventListener("popstate", () => open(idOfPage()));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  client?.retry();
  sidebar.refresh();
});

sidebar.refresh();
open(idOfPage());
composer.begin();
