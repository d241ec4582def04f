// What a conversation is drawn from: one function for each kind of entry.

import { Formatter } from "./format.js";
import { ago, make, say } from "./text.js";

/** Join the text of AG-UI content, which may hold pictures. */
export function textOf(content) {
  if (typeof content === "string") return content;
  const parts = content ?? [];
  return parts
    .map((part) => (part.type === "text" ? part.text : say("picture")))
    .join("\n");
}

/** What a person said, with a row of tools below it. */
export function userEntry(message, tools) {
  const author = make("h2", "hidden", say("you"));
  const body = make("div", "body", textOf(message.content));
  body.dir = "auto";
  return make("article", "entry user", author, body, ...tools);
}

/** An answer that is being written; `push` text to it and `end` it. */
export class Answer {
  constructor(name, refusal) {
    this.body = make("div", "body");
    this.body.dir = "auto";
    const author = make("h2", "author", name || say("assistant"));
    this.element = make("article", "entry assistant", author, this.body);
    if (refusal) this.element.classList.add("refusal");
    // A screen reader waits for the end and then speaks the whole message.
    this.element.ariaBusy = "true";
    this.formatter = new Formatter(this.body);
  }

  push(text) {
    this.formatter.push(text);
  }

  end() {
    this.formatter.end();
    this.element.ariaBusy = "false";
  }
}

/** What the model thought, folded away. */
export class Reasoning {
  constructor() {
    this.body = make("div", "fold-body");
    this.body.dir = "auto";
    this.element = make(
      "details",
      "entry fold reasoning",
      make("summary", "", say("reasoning")),
      this.body,
    );
    this.element.ariaBusy = "true";
  }

  push(text) {
    this.body.append(text);
  }

  end() {
    this.body.normalize();
    this.element.ariaBusy = "false";
  }
}

/** A tool's call: its name and state, with the arguments and the result inside. */
export class Tool {
  arguments = "";

  constructor(name) {
    this.name = name;
    this.state = make("span", "state");
    const summary = make("summary", "", make("code", "", name), " ", this.state);
    this.inside = make("div", "fold-body");
    this.element = make("details", "entry fold tool", summary, this.inside);
    this.mark("toolRunning");
  }

  get done() {
    return this.element.dataset.state === "toolDone";
  }

  mark(state) {
    this.element.dataset.state = state;
    this.state.textContent = say(state);
  }

  push(text) {
    this.arguments += text;
    if (!this.shown) {
      this.shown = make("pre");
      this.inside.append(make("p", "label", say("toolArguments")), this.shown);
    }
    this.shown.textContent = pretty(this.arguments);
  }

  finish(result) {
    this.mark("toolDone");
    const text = textOf(result);
    if (!text) return;
    const shown = make("pre", "", pretty(text));
    this.inside.append(make("p", "label", say("toolResult")), shown);
  }

  /** The run is over, and this never came to an end. */
  leave() {
    if (this.element.dataset.state === "toolRunning") this.mark("toolOpen");
  }
}

/** JSON with line breaks; anything else as it is. */
export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

export const handoffEntry = (agent) =>
  make("p", "entry handoff", make("span", "", say("handoff", { agent })));

export const usageEntry = (input, output) =>
  make("p", "entry usage", say("usage", { input, output }));

export const noteEntry = (text) => make("p", "entry stopped", text);

export function errorEntry(text, retry) {
  const entry = make("div", "entry error", make("p", "", text));
  if (retry) {
    const button = make("button", "quiet", say("retry"));
    button.type = "button";
    button.addEventListener("click", retry);
    entry.append(button);
  }
  return entry;
}

let cards = 0;

/** A request for approval. `decide` gets AG-UI's answer to the interrupt. */
export class Approval {
  constructor(interrupt, tool, decide) {
    this.interrupt = interrupt;
    const { metadata = {} } = interrupt;
    const name = metadata.toolName ?? metadata.tool_name ?? metadata.name ?? tool?.name;
    const given = metadata.arguments ?? tool?.arguments ?? "";
    const title = make("h2", "", say("approvalTitle", { tool: name ?? "?" }));
    title.id = `approval-${++cards}`;
    this.element = make("section", "entry approval", title);
    this.element.role = "group";
    this.element.tabIndex = -1;
    this.element.setAttribute("aria-labelledby", title.id);
    const shown = typeof given === "string" ? pretty(given) : JSON.stringify(given, null, 2);
    if (shown) this.element.append(make("pre", "", shown));
    this.decide = decide;
    this.#controls();
    if (interrupt.expiresAt) this.#expiry(new Date(interrupt.expiresAt));
  }

  #controls() {
    const label = make("label", "", say("reason"));
    this.reason = make("input");
    this.reason.id = `${this.element.getAttribute("aria-labelledby")}-reason`;
    this.reason.maxLength = 500;
    this.reason.dir = "auto";
    label.htmlFor = this.reason.id;
    const approve = make("button", "button", say("approve"));
    const refuse = make("button", "quiet", say("refuse"));
    approve.type = refuse.type = "button";
    approve.addEventListener("click", () => this.#choose({ approved: true }));
    refuse.addEventListener("click", () => {
      const reason = this.reason.value.trim();
      this.#choose({ approved: false, ...(reason && { reason }) });
    });
    this.controls = make(
      "div",
      "controls",
      make("div", "actions", approve, refuse),
      make("div", "reason", label, this.reason),
    );
    this.element.append(this.controls);
  }

  #choose(payload) {
    clearTimeout(this.timer);
    this.answer = { interruptId: this.interrupt.id, status: "resolved", payload };
    const chosen = say(payload.approved ? "approved" : "refused");
    this.controls.replaceWith(make("p", "chosen", chosen));
    this.decide(this);
  }

  #expiry(moment) {
    const note = make("p", "note");
    this.element.append(note);
    const update = () => {
      const left = moment - Date.now();
      if (left <= 0) {
        note.textContent = say("expired");
        if (this.controls.contains(document.activeElement)) this.element.focus();
        this.controls.remove();
        return;
      }
      note.textContent = say("expires", { when: ago(moment) });
      if (this.element.isConnected || !this.timer) {
        this.timer = setTimeout(update, Math.min(left, 30_000));
      }
    };
    update();
  }
}
