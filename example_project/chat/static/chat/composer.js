// The box at the bottom: writing, sending, stopping, and the line that says how it goes.

import { say } from "./text.js";

const LIMIT = 32_000;
// The server takes frames of 64 KiB, and some scripts need three bytes a character.
const BYTES = 63 * 1024;
const sizeOf = (text) => new TextEncoder().encode(JSON.stringify(text)).length;
const GROWS = CSS.supports("field-sizing", "content");

export class Composer extends EventTarget {
  /** Sends a text; answers whether it went out. Set by the page. */
  send = async () => false;
  #box = document.getElementById("prompt");
  #form = document.getElementById("form");
  #send = document.getElementById("send");
  #stop = document.getElementById("stop");
  #status = document.getElementById("status");
  #running = null;
  #waiting = false;
  #closed = false;
  #last = "";
  #sending = false;

  constructor() {
    super();
    this.#box.addEventListener("keydown", (event) => this.#key(event));
    this.#box.addEventListener("input", () => this.#grow());
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#stop.addEventListener("click", () => this.#abort());
    document.addEventListener("keydown", (event) => {
      const inDialog = document.querySelector("dialog[open]");
      if (event.key === "Escape" && !event.isComposing && !inDialog) this.#abort();
    });
  }

  /** Send what was entered before the page was ready, unless it was changed since. */
  begin() {
    const { asked } = this.#form.dataset;
    delete this.#form.dataset.asked;
    if (asked && asked === this.#box.value) this.#submit();
  }

  set running(run) {
    const ended = this.#running && !run;
    this.#running = run;
    this.#update();
    if (ended && document.activeElement === document.body) this.focus();
  }

  /** Wait for answers to requests; tell whether the focus has lost its place. */
  wait(waiting) {
    const again = this.#waiting && !waiting;
    const was = this.#hasFocus;
    this.#waiting = waiting;
    this.#update();
    if (again) this.focus();
    return was && waiting;
  }

  get #hasFocus() {
    return [this.#box, this.#send, this.#stop].includes(document.activeElement);
  }

  /** Take no more messages, and say why; with no reason take them again. */
  close(reason) {
    this.#closed = Boolean(reason);
    this.status(reason);
    this.#update();
  }

  status(text) {
    this.#status.textContent = text;
  }

  focus() {
    this.#box.focus({ preventScroll: true });
  }

  get text() {
    return this.#box.value;
  }

  /** Keep what the server has not taken until the conversation is opened again. */
  keep(id, texts) {
    const draft = texts.filter(Boolean).join("\n");
    if (draft) sessionStorage.setItem(this.#draft(id), draft);
  }

  restore(id) {
    const draft = sessionStorage.getItem(this.#draft(id));
    if (!draft || this.#box.value) return;
    sessionStorage.removeItem(this.#draft(id));
    this.#box.value = draft;
    this.#grow();
  }

  /** Put a text into the box if nothing is written there. */
  offer(text) {
    if (this.#box.value) return;
    this.#box.value = text;
    this.#grow();
  }

  /** Name a draft; the next person at this window has others. */
  #draft(id) {
    return `draft ${document.querySelector(".who").textContent} ${id}`;
  }

  #update() {
    this.#box.disabled = this.#waiting || this.#closed;
    this.#send.disabled = this.#box.disabled;
    // The stop button takes the place of the other: the focus goes along.
    const stopped = document.activeElement === this.#stop;
    this.#send.hidden = Boolean(this.#running);
    this.#stop.hidden = !this.#running;
    if (stopped && !this.#running) this.focus();
  }

  #key(event) {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.#submit();
    } else if (event.key === "ArrowUp" && !this.#box.value && this.#last) {
      event.preventDefault();
      this.#box.value = this.#last;
      this.#grow();
    }
  }

  async #submit() {
    const text = this.#box.value.trim();
    if (!text || this.#sending || this.#box.disabled) return;
    if (this.#running) {
      this.status(say("busy"));
      return;
    }
    if (text.length > LIMIT || sizeOf(text) > BYTES) {
      this.status(say("tooLong", { count: text.length }));
      return;
    }
    this.#sending = true;
    const sent = await this.send(text);
    this.#sending = false;
    if (!sent) return;
    this.#last = text;
    this.#box.value = "";
    this.#grow();
    this.focus();
  }

  #abort() {
    this.dispatchEvent(new CustomEvent("stop"));
  }

  #grow() {
    if (GROWS) return;
    this.#box.rows = 1;
    while (this.#box.rows < 10 && this.#box.scrollHeight > this.#box.clientHeight) {
      this.#box.rows += 1;
    }
  }
}
