// Turns AG-UI events into entries of the log, whatever order a replay brings.

import * as entries from "./entries.js";
import { known, say } from "./text.js";
import { Turns } from "./turns.js";

const HANDOFF = "agent_sessions:handoff";
const GONE = new Set([
  "unknown_interrupt",
  "interrupt_expired",
  "invalid_approval",
  "outdated_approval",
]);

/**
 * Events: "change" when `running`, `waiting` or `agent` did; "notice" {text} for the
 * status line; "answered" {entries} when every request for approval is answered;
 * "retry" {message}; "drawn" when something was added; "edit" {message}, whose `edits`
 * is the message to ask anew; "switch" {branch}; "draft" {text} that lost its message.
 */
export class Transcript extends EventTarget {
  running = null;
  agent = "";
  before = null;
  /** Whether the server has said what the conversation holds. */
  ready = false;
  #log;
  #open = new Map();
  #tools = new Map();
  #approvals = [];
  #waitingUsers = new Map();
  /** Messages whose runs were refused, with what was said to that. */
  #refused = new Map();
  #asides = new Set();
  #turns;
  /** Whether the conversation has branches. */
  branches = false;
  /** The place among them of what comes next. */
  siblings = null;

  constructor(log) {
    super();
    this.#log = log;
    const closed = () => (this.running ? "busy" : this.waiting ? "approvalWaiting" : "");
    this.#turns = new Turns(log, (name, detail) => this.#tell(name, detail), closed);
  }

  get waiting() {
    return this.#approvals.length > 0;
  }

  /** Put the focus on the first open request, so that its first button is next. */
  focus() {
    this.#approvals.find((card) => !card.answer)?.element.focus();
  }

  get left() {
    return this.#approvals.filter((card) => !card.answer).length;
  }

  /** What was sent and not taken by the server. */
  get unsent() {
    const refused = [...this.#refused.values()].map(({ message }) => message);
    const texts = [...this.#waitingUsers.values(), ...refused].map((m) => m.content);
    return [...texts, this.#turns.draft];
  }

  /** Whether there is an answer to ask for again. */
  get answered() {
    const busy = this.running || this.waiting || this.#refused.size;
    return this.branches && !busy && Boolean(this.#log.querySelector(".user"));
  }

  /** Note a run that says nothing new: its refusal is only told. */
  aside = (runId) => this.#asides.add(runId);

  get empty() {
    return !this.#log.childElementCount;
  }

  clear() {
    this.#log.replaceChildren();
    this.#open.clear();
    this.#tools.clear();
    this.#approvals = [];
  }

  /** Start over, for another conversation. */
  reset() {
    this.clear();
    this.#waitingUsers.clear();
    this.#refused.clear();
    this.#turns.hold();
    Object.assign(this, { branches: false, siblings: null, running: null, agent: "", before: null, ready: false });
    this.#tell("change");
  }

  /** Show what was sent before the server has said anything to it. */
  sent(runId, message) {
    this.#waitingUsers.set(runId, message);
    // What takes another's place comes with its branch.
    if (!message.edits) this.#user(message);
    this.#tell("drawn");
  }

  /** The server had this message all along, and has shown it. */
  forget(runId) {
    const message = this.#waitingUsers.get(runId);
    this.#waitingUsers.delete(runId);
    if (message) this.#find(message.id)?.remove();
  }

  apply(event) {
    if (/^[A-Z_]+$/.test(event.type)) this[event.type]?.(event);
    this.#tell("drawn");
  }

  /** Put earlier messages before what is shown. */
  prepend(messages) {
    const shown = [...this.#log.childNodes];
    const [running, agent] = [this.#tools, this.agent];
    this.#tools = new Map();
    this.agent = "";
    this.#log.replaceChildren();
    for (const message of messages) this.#message(message);
    for (const tool of this.#tools.values()) tool.leave();
    this.agent = agent;
    this.#tools = running;
    this.#log.append(...shown);
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  #add(element, id) {
    if (id) element.dataset.id = id;
    this.#log.append(element);
    return element;
  }

  #find(id) {
    return [...this.#log.children].find((child) => child.dataset.id === id);
  }

  #user(message) {
    if (this.#find(message.id)) return;
    const row = this.branches ? [this.#turns.row(message)] : [];
    this.#add(entries.userEntry(message, row), message.id);
  }

  // The run

  RUN_STARTED(event) {
    if (event.runId.startsWith("sync:")) {
      // What ran when the connection broke has ended meanwhile.
      this.running = null;
      this.#tell("change");
      return;
    }
    this.#waitingUsers.delete(event.runId);
    this.#asides.delete(event.runId);
    this.siblings = null;
    this.running = event.runId;
    this.#withdraw();
    for (const message of event.input?.messages ?? []) this.#user(message);
    this.#tell("change");
  }

  MESSAGES_SNAPSHOT(event) {
    const restore = this.#turns.hold();
    this.clear();
    this.branches = Boolean(event.metadata?.branch);
    this.siblings = event.metadata?.siblings ?? null;
    this.agent = "";
    this.ready = true;
    this.before = event.metadata?.before ?? null;
    for (const message of event.messages) this.#message(message);
    for (const m of this.#waitingUsers.values()) if (!m.edits) this.#user(m);
    restore();
    for (const [runId, { message, text }] of this.#refused) {
      this.#user(message);
      this.#fail(runId, message, text);
    }
    this.#tell("change");
  }

  RUN_FINISHED(event) {
    const { type = "success", interrupts = [] } = event.outcome ?? {};
    this.#settle();
    this.running = null;
    if (type === "interrupt") this.#ask(interrupts);
    if (type === "cancelled") {
      this.#add(entries.noteEntry(say("stopped")));
      this.#tell("notice", { text: say("stopped") });
    } else if (type === "success" && !event.runId.startsWith("sync:")) {
      this.#usage(event.usage);
      this.#tell("notice", { text: say("answered") });
    }
    this.#tell("change");
  }

  RUN_ERROR(event) {
    const runId = event.metadata?.runId;
    const refused = this.#waitingUsers.get(runId);
    const isAside = this.#asides.delete(runId);
    this.#waitingUsers.delete(runId);
    // A refusal is about another run than the one that goes on.
    if (!runId || runId === this.running) {
      this.#settle();
      this.running = null;
    }
    if (GONE.has(event.code)) this.#withdraw();
    const key = `error_${event.code}`;
    const text = known(key) ? say(key) : event.message || say("error_internal");
    // Nobody else has it: a snapshot must not take it away.
    if (refused) this.#refused.set(runId, { message: refused, text });
    if (refused?.edits) this.#user(refused);
    if (!isAside) this.#fail(runId, refused ?? this.#lastAsked(), text);
    this.#tell("notice", { text });
    this.#tell("change");
  }

  #fail(runId, message, text) {
    const retry = () => {
      entry.remove();
      this.#refused.delete(runId);
      this.#tell("retry", { message });
    };
    const entry = this.#add(entries.errorEntry(text, message && retry));
  }

  #lastAsked() {
    const last = [...this.#log.querySelectorAll(".user")].at(-1);
    if (!last) return null;
    const content = last.querySelector(".body").textContent;
    return { id: last.dataset.id, role: "user", content };
  }

  /** End whatever is still open. */
  #settle() {
    for (const entry of this.#open.values()) entry.end();
    this.#open.clear();
    for (const tool of this.#tools.values()) tool.leave();
  }

  #usage(usage) {
    const sum = (name) => (usage ?? []).reduce((all, one) => all + (one[name] ?? 0), 0);
    const [input, output] = [sum("inputTokens"), sum("outputTokens")];
    if (input || output) this.#add(entries.usageEntry(input, output));
  }

  #withdraw() {
    for (const card of this.#approvals) card.element.remove();
    this.#approvals = [];
  }

  #ask(interrupts) {
    const decide = () => {
      this.#tell("change");
      if (this.left) {
        this.focus();
        return;
      }
      this.#tell("answered", { entries: this.#approvals.map((card) => card.answer) });
    };
    this.#approvals = interrupts.map((interrupt) => {
      const tool = this.#tools.get(interrupt.toolCallId ?? interrupt.id);
      tool?.mark("toolWaiting");
      const card = new entries.Approval(interrupt, tool, decide);
      this.#add(card.element);
      return card;
    });
    this.#tell("notice", { text: say("approvalWaiting") });
  }

  // Agents

  STEP_STARTED(event) {
    this.agent = event.stepName;
    this.#tell("change");
  }

  CUSTOM(event) {
    if (event.name === HANDOFF) this.#handoff(event.value.to);
  }

  #handoff(agent) {
    this.agent = agent;
    this.#add(entries.handoffEntry(agent));
  }

  // Text and thoughts

  TEXT_MESSAGE_START(event) {
    const answer = new entries.Answer(event.name ?? this.agent, event.metadata?.refusal);
    this.#begin(event.messageId, answer);
  }

  TEXT_MESSAGE_CONTENT(event) {
    this.#entry(event.messageId, () => new entries.Answer(this.agent)).push(event.delta);
  }

  TEXT_MESSAGE_END(event) {
    this.#end(event.messageId);
  }

  REASONING_MESSAGE_START(event) {
    this.#begin(event.messageId, new entries.Reasoning());
  }

  REASONING_MESSAGE_CONTENT(event) {
    this.#entry(event.messageId, () => new entries.Reasoning()).push(event.delta);
  }

  REASONING_MESSAGE_END(event) {
    this.#end(event.messageId);
  }

  #begin(id, entry) {
    this.#open.set(id, entry);
    this.#add(entry.element, id);
    return entry;
  }

  #entry(id, make) {
    return this.#open.get(id) ?? this.#begin(id, make());
  }

  #end(id) {
    this.#open.get(id)?.end();
    this.#open.delete(id);
  }

  // Tools

  TOOL_CALL_START(event) {
    this.#tool(event.toolCallId, event.toolCallName);
  }

  TOOL_CALL_ARGS(event) {
    this.#tools.get(event.toolCallId)?.push(event.delta);
  }

  TOOL_CALL_RESULT(event) {
    this.#tools.get(event.toolCallId)?.finish(event.content);
  }

  #tool(id, name) {
    const known = this.#tools.get(id);
    // Some models count their calls anew in each answer.
    if (known && !known.done) return known;
    const tool = new entries.Tool(name);
    this.#tools.set(id, tool);
    this.#add(tool.element, id);
    return tool;
  }

  // Stored messages

  #message(message) {
    switch (message.role) {
      case "user":
        this.#user(message);
        break;
      case "assistant":
        this.#stored(message);
        break;
      case "reasoning": {
        const thoughts = new entries.Reasoning();
        thoughts.push(message.content);
        thoughts.end();
        this.#add(thoughts.element, message.id);
        break;
      }
      case "tool":
        this.#tools.get(message.toolCallId)?.finish(message.content);
        break;
      case "activity":
        if (message.activityType === HANDOFF) this.#handoff(message.content.to);
        break;
    }
  }

  #stored(message) {
    if (message.content) {
      const answer = new entries.Answer(
        message.name ?? this.agent,
        message.metadata?.refusal,
      );
      answer.push(message.content);
      answer.end();
      this.#add(answer.element, message.id);
    }
    for (const call of message.toolCalls ?? []) {
      const tool = this.#tool(call.id, call.function.name);
      if (call.function.arguments) tool.push(call.function.arguments);
    }
  }
}
