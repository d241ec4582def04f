// What stands below a person's message: its versions, and a form to ask it anew.

import { make, say } from "./text.js";

function button(className, text, label, click) {
  const made = make("button", className, text);
  made.type = "button";
  if (label) made.ariaLabel = made.title = label;
  made.addEventListener("click", click);
  return made;
}

/** ‹ 2 / 3 ›: `step` gets the branch to switch to, and "previous" or "next". */
export function pager(siblings, step) {
  const { place, count } = siblings;
  const arrow = (name, sign) => {
    const click = () => step(siblings[name], name);
    const made = button("icon", sign, say(`${name}Version`), click);
    made.disabled = !siblings[name];
    made.dataset.step = name;
    return made;
  };
  const shown = make("span", "", say("versionShort", { place, count }));
  shown.ariaHidden = "true";
  const group = make("div", "pager", arrow("previous", "‹"), shown, arrow("next", "›"));
  group.role = "group";
  group.ariaLabel = say("version", { place, count });
  Object.assign(group.dataset, { place, count });
  return group;
}

/** Put the focus back on the arrow that was pressed, or on the other one at an end. */
function focusPager(root, { index, place, count, name }) {
  const users = [...root.querySelectorAll(".user")];
  const isIt = (entry) => {
    const group = entry?.querySelector(".pager");
    return group?.dataset.place === `${place}` && group.dataset.count === `${count}`;
  };
  const entry = isIt(users[index]) ? users[index] : users.find(isIt);
  const arrows = [...(entry?.querySelectorAll(".pager button") ?? [])];
  const enabled = arrows.filter((arrow) => !arrow.disabled);
  (enabled.find((arrow) => arrow.dataset.step === name) ?? enabled[0])?.focus();
}

/** A form in the place of a message; `send` gets the new text, `close` no argument. */
class Editor {
  constructor(entry, text, { send, close }) {
    this.id = entry.dataset.id;
    this.box = make("textarea");
    this.box.value = text;
    this.box.dir = "auto";
    this.box.rows = Math.min(text.split("\n").length + 1, 8);
    this.box.ariaLabel = say("editLabel");
    const save = make("button", "button", say("send"));
    save.type = "submit";
    const cancel = button("quiet", say("cancel"), "", close);
    const actions = make("div", "actions", save, cancel);
    this.form = make("form", "editor", this.box, actions);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const said = this.box.value.trim();
      if (said) send(said);
    });
    this.box.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        this.form.requestSubmit();
      } else if (event.key === "Escape") {
        // It stops no answer.
        event.stopPropagation();
        close();
      }
    });
    entry.classList.add("editing");
    entry.append(this.form);
  }

  get text() {
    return this.box.value;
  }

  /** Show the message again. */
  remove() {
    this.form.parentElement?.classList.remove("editing");
    this.form.remove();
  }
}

/**
 * What is done to messages: `tell` gets "edit", "switch", "draft" and "notice", and
 * `closed` answers why nothing can be done now, or "".
 */
export class Turns {
  #log;
  #tell;
  #closed;
  #editor = null;
  #pressed = null;

  constructor(log, tell, closed) {
    this.#log = log;
    this.#tell = tell;
    this.#closed = closed;
  }

  /** What is written in the form. */
  get draft() {
    return this.#editor?.text ?? "";
  }

  /** Return the row below a message. */
  row(message) {
    const siblings = message.metadata?.siblings;
    const row = make("div", "turn");
    if (siblings) row.append(pager(siblings, (branch, name) => this.#step(row, branch, name)));
    // A form has no place for pictures.
    if (typeof message.content === "string") {
      const edit = () => this.#open(row.parentElement, message.content);
      row.append(button("icon edit", "✎", say("edit"), edit));
    }
    return row;
  }

  /** Let go of what is open, since all is drawn anew; returns what opens it again. */
  hold() {
    const [editor, pressed] = [this.#editor, this.#pressed];
    this.#editor = this.#pressed = null;
    return () => {
      if (pressed) focusPager(this.#log, pressed);
      if (!editor) return;
      const isIt = (child) => child.dataset.id === editor.id;
      const entry = [...this.#log.children].find(isIt);
      if (entry && !this.#closed()) this.#open(entry, editor.text);
      else this.#tell("draft", { text: editor.text });
    };
  }

  #step(row, branch, name) {
    const { place, count } = row.querySelector(".pager").dataset;
    const index = [...this.#log.querySelectorAll(".user")].indexOf(row.parentElement);
    const to = Number(place) + (name === "next" ? 1 : -1);
    this.#pressed = { index, place: to, count, name };
    this.#tell("switch", { branch });
  }

  #open(entry, text) {
    const closed = this.#closed();
    if (closed) {
      this.#tell("notice", { text: say(closed) });
      return;
    }
    this.#editor?.remove();
    const close = () => {
      this.#editor = null;
      editor.remove();
      entry.querySelector(".edit").focus();
    };
    const send = (content) => {
      close();
      this.#tell("edit", { message: { content, edits: editor.id } });
    };
    const editor = new Editor(entry, text, { send, close });
    this.#editor = editor;
    editor.box.focus();
  }
}
