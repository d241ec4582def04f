// The list of conversations, and everything that is asked over HTTP.

import { ago, make, page, say, url } from "./text.js";

/** Ask the server; null if it refused, and off to the login where that's the reason. */
export async function ask(address, method = "GET") {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-CSRFToken"] = cookie(page.csrfCookie);
  let response;
  try {
    response = await fetch(address, { method, headers });
  } catch {
    return null;
  }
  if (response.redirected || response.status === 401) {
    toLogin();
    return null;
  }
  if (!response.ok) return null;
  return response.status === 204 ? {} : response.json();
}

export function toLogin() {
  location.assign(`${url("login")}?next=${encodeURIComponent(location.pathname)}`);
}

function cookie(name) {
  const found = document.cookie.split("; ").find((one) => one.startsWith(`${name}=`));
  return found?.slice(name.length + 1) ?? "";
}

/** Events: "open" {id}, "removed" {id}, "notice" {text}, "title" {title}. */
export class Sidebar extends EventTarget {
  #list = document.getElementById("list");
  #note = document.getElementById("list-note");
  #more = document.getElementById("list-more");
  #confirm = document.getElementById("confirm");
  #sessions = [];
  #next = null;
  #current = "";
  #asked = 0;

  constructor() {
    super();
    this.#more.addEventListener("click", () => this.#load(this.#next));
    setInterval(() => this.#draw(), 60_000);
  }

  get title() {
    return this.#sessions.find(({ id }) => id === this.#current)?.title ?? "";
  }

  select(id) {
    this.#current = id;
    this.#draw();
  }

  async refresh() {
    await this.#load(null);
  }

  async #load(after) {
    const query = after ? `?after=${encodeURIComponent(after)}` : "";
    const asked = after ? this.#asked : ++this.#asked;
    const answer = await ask(url("sessions") + query);
    // What was asked later knows more.
    if (asked !== this.#asked) return;
    if (!answer) {
      this.#note.textContent = say("listFailed");
      this.#note.hidden = false;
      return;
    }
    const known = after ? this.#sessions : [];
    this.#sessions = [...known, ...answer.sessions];
    this.#next = answer.next;
    this.#draw();
  }

  #draw() {
    this.#note.textContent = say("listEmpty");
    this.#note.hidden = this.#sessions.length > 0;
    this.#more.hidden = !this.#next;
    const focused = document.activeElement?.dataset?.focus;
    this.#list.replaceChildren(...this.#sessions.map((session) => this.#row(session)));
    if (focused) this.#list.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
    this.dispatchEvent(new CustomEvent("title"));
  }

  #row({ id, title, updatedAt, state }) {
    const name = title || say("untitled");
    const time = make("time", "", ago(updatedAt));
    time.dateTime = updatedAt;
    const details = make("span", "when", time);
    if (state !== "idle") {
      details.append(
        " · ",
        make("span", state, say(state === "running" ? "stateRunning" : "stateWaiting")),
      );
    }
    const label = make("span", "name", name);
    label.dir = "auto";
    const link = make("a", "", label, details);
    link.href = url("conversation", id);
    link.dataset.focus = `open ${id}`;
    if (id === this.#current) link.ariaCurrent = "page";
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.dispatchEvent(new CustomEvent("open", { detail: { id } }));
    });
    const remove = make("button", "icon", "×");
    remove.type = "button";
    remove.ariaLabel = say("delete", { title: name });
    remove.dataset.focus = `delete ${id}`;
    remove.addEventListener("click", () => this.#remove(id, name));
    return make("li", "", link, remove);
  }

  #busy(id) {
    return this.#sessions.find((session) => session.id === id)?.state === "running";
  }

  async #remove(id, title) {
    const question = document.getElementById("confirm-text");
    question.textContent = say("deleteAsk", { title });
    this.#confirm.returnValue = "no";
    this.#confirm.showModal();
    await new Promise((resolve) => {
      this.#confirm.addEventListener("close", resolve, { once: true });
    });
    if (this.#confirm.returnValue !== "yes") return;
    const done = await ask(url("session", id), "DELETE");
    if (done) {
      this.#sessions = this.#sessions.filter((session) => session.id !== id);
      this.#draw();
      this.dispatchEvent(new CustomEvent("removed", { detail: { id } }));
    }
    const key = done ? "deleted" : this.#busy(id) ? "deleteBusy" : "deleteFailed";
    this.dispatchEvent(new CustomEvent("notice", { detail: { text: say(key) } }));
  }
}
