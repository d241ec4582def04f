// AgentClient speaks to AgentConsumer. The protocol, and nothing of a page: connect, sync, run, resume, edit, regenerate, switch, abort, retry.
//
// Events: "connection" {state, code, seconds} with the states connecting, open,
// waiting, offline and closed; "event" {event}: an AG-UI event; "known" {runId}: a run
// that was sent again had ended long before, and the events just given hold it. A run
// that no connection lives to answer is given up: an "event" RUN_ERROR "unanswered".

const STEPS = [1, 2, 4, 8, 16, 30];
const SENDS = 4;
const SILENCE = 60_000;
const STEADY = 60_000;
// After these the server would only say the same again.
const FAILED = 4500;
const FINAL = new Set([1000, 1009, 4400, 4401, 4403, 4404, 4413]);
const LOCAL = /^(localhost|127(\.\d+){3}|\[::1\])$/;

/** Return a random id. `crypto.randomUUID` would need HTTPS. */
export function newId(prefix) {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `${prefix}-${Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("")}`;
}

const branching = (agentSessions) => ({ forwardedProps: { agentSessions } });

export class AgentClient extends EventTarget {
  #url;
  #threadId;
  #socket = null;
  #offset = null;
  #pending = new Map();
  #again = [];
  #rests = 0;
  #tries = 0;
  #failures = 0;
  #openedAt = 0;
  #timer = 0;
  #watch = 0;
  #over = false;
  #online = () => this.retry();

  constructor(url, threadId) {
    super();
    this.#url = url;
    this.#threadId = threadId;
    globalThis.addEventListener?.("online", this.#online);
  }

  connect() {
    clearTimeout(this.#timer);
    if (this.#over || this.#socket) return;
    this.#report("connecting");
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    socket.addEventListener("open", () => this.#opened());
    socket.addEventListener("message", (message) => this.#received(message.data));
    socket.addEventListener("close", ({ code }) => {
      if (socket === this.#socket) this.#closed(code);
    });
    this.#listen();
  }

  /** Connect now instead of when the time has come. */
  retry() {
    if (!this.#socket) this.connect();
  }

  /** End for good. */
  close() {
    this.#over = true;
    clearTimeout(this.#timer);
    clearTimeout(this.#watch);
    globalThis.removeEventListener?.("online", this.#online);
    const socket = this.#socket;
    this.#socket = null;
    socket?.close(1000);
  }

  /** Ask; returns the run's id. Sent again after a break: the id makes that safe. */
  run(text, messageId = newId("u"), runId = newId("r")) {
    const message = { id: messageId, role: "user", content: text };
    return this.#request(runId, { messages: [message] });
  }

  /** Ask anew in the place of a message of the user, on a branch of its own. */
  edit(edited, text, messageId = newId("u"), runId = newId("r")) {
    const message = { id: messageId, role: "user", content: text };
    const ours = { edit: { messageId: edited } };
    return this.#request(runId, { messages: [message], ...branching(ours) });
  }

  /** Ask the last message again, on a branch of its own. */
  regenerate(runId = newId("r")) {
    return this.#request(runId, { messages: [], ...branching({ regenerate: true }) });
  }

  /** Show and go on with another branch. It isn't sent again: a reload shows what is. */
  switchTo(branch, runId = newId("r")) {
    const body = { messages: [], ...branching({ branch }) };
    this.#send({ threadId: this.#threadId, runId, ...body });
    return runId;
  }

  /** Answer every open interrupt. */
  resume(entries, runId = newId("r")) {
    return this.#request(runId, { messages: [], resume: entries });
  }

  /** Ask for everything again, from the start. */
  refresh() {
    this.#offset = null;
    this.#sync();
  }

  abort(runId, mode) {
    this.#send({ type: "abort", runId, ...(mode && { mode }) });
  }

  #sync() {
    this.#send({ type: "sync", ...(this.#offset && { offset: this.#offset }) });
  }

  #request(runId, body) {
    const frame = { threadId: this.#threadId, runId, ...body };
    this.#pending.set(runId, { frame, sent: 0 });
    this.#ask(runId);
    return runId;
  }

  /** Send a run, but not for ever: what it meets may end each connection. */
  #ask(runId) {
    const asked = this.#pending.get(runId);
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    if (asked.sent++ < SENDS) this.#send(asked.frame);
  }

  /** Say which runs are given up, once the answer to a sync has drawn the page. */
  #giveUp() {
    for (const [runId, { sent }] of this.#pending) {
      if (sent <= SENDS) continue;
      this.#pending.delete(runId);
      const event = { type: "RUN_ERROR", code: "unanswered", metadata: { runId } };
      this.dispatchEvent(new CustomEvent("event", { detail: { event } }));
    }
  }

  #send(frame) {
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#socket.send(JSON.stringify(frame));
    }
  }

  #opened() {
    this.#openedAt = Date.now();
    this.#report("open");
    this.#sync();
    this.#rests = 0;
    this.#again = [...this.#pending.keys()];
    for (const runId of this.#again) this.#ask(runId);
  }

  #received(data) {
    this.#listen();
    const frame = JSON.parse(data);
    if (!frame.chunk) return;
    this.#offset = frame.id;
    const event = frame.chunk;
    this.#pending.delete(event.runId ?? event.metadata?.runId);
    this.dispatchEvent(new CustomEvent("event", { detail: { event } }));
    if (/^RUN_(FINISHED|ERROR)$/.test(event.type)) this.#giveUp();
    if (event.runId?.startsWith("sync:") && event.type === "RUN_FINISHED") this.#rested();
  }

  /** The first rest answers the sync; one more answers a run that needs no answer. */
  #rested() {
    this.#rests += 1;
    if (this.#rests < 2 || !this.#again.length) return;
    const runId = this.#again.shift();
    if (!this.#pending.delete(runId)) return;
    this.dispatchEvent(new CustomEvent("known", { detail: { runId } }));
  }

  /** Expect to hear something, at least a ping, before long. */
  #listen() {
    clearTimeout(this.#watch);
    this.#watch = setTimeout(() => {
      // A dead network doesn't answer the close either: don't wait for it.
      const socket = this.#socket;
      this.#closed(1006);
      socket?.close();
    }, SILENCE);
  }

  #closed(code) {
    this.#socket = null;
    clearTimeout(this.#watch);
    if (this.#over) return;
    if (this.#openedAt && Date.now() - this.#openedAt > STEADY) {
      this.#tries = 0;
      this.#failures = 0;
    }
    this.#failures += code === FAILED;
    if (FINAL.has(code) || this.#failures >= SENDS) {
      this.close();
      this.#report("closed", code);
      return;
    }
    this.#openedAt = 0;
    if (globalThis.navigator?.onLine === false && !LOCAL.test(new URL(this.#url).hostname)) {
      this.#report("offline", code);
      return;
    }
    const step = STEPS[Math.min(this.#tries++, STEPS.length - 1)];
    // A newer socket took the place of this one: a page that is seen takes it back.
    if (code === 4429 && globalThis.document?.hidden) {
      this.#report("offline", code);
      return;
    }
    const seconds = code === 4429 ? 30 : step * (0.5 + Math.random() / 2);
    this.#report("waiting", code, Math.ceil(seconds));
    this.#timer = setTimeout(() => this.connect(), seconds * 1000);
  }

  #report(state, code = 0, seconds = 0) {
    const detail = { state, code, seconds };
    this.dispatchEvent(new CustomEvent("connection", { detail }));
  }
}
