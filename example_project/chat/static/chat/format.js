// Markdown's common half as DOM nodes. Text becomes text nodes only, never HTML.

import { make, say } from "./text.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const BULLET = /^\s{0,3}[-*+]\s+/;
const NUMBER = /^\s{0,3}\d{1,9}[.)]\s+/;
const HEADING = /^ {0,3}#{1,6}\s+/;
const INLINE = new RegExp(
  [
    "`([^`]+)`",
    "\\*\\*([^*]+(?:\\*[^*]+)*?)\\*\\*",
    "\\*([^*\\s](?:[^*]*[^*\\s])?)\\*",
    "\\b_([^_\\s](?:[^_]*[^_\\s])?)_\\b",
    "\\[([^\\]]+)\\]\\((https?://[^\\s)]+)\\)",
    "(https?://[^\\s<>\"”]*[^\\s<>\"”.,;:!?)\\]])",
  ].join("|"),
  "g",
);

/** Shows a text that is still being written: plain at its end, formatted before. */
export class Formatter {
  #rest = "";
  #tail = make("p", "tail");

  constructor(element) {
    element.append(this.#tail);
  }

  push(text) {
    this.#rest += text;
    const { blocks, rest } = split(this.#rest);
    for (const block of blocks) this.#tail.before(render(block));
    this.#rest = rest;
    this.#tail.textContent = rest;
  }

  end() {
    const { blocks, rest } = split(`${this.#rest}\n\n`);
    for (const block of blocks) this.#tail.before(render(block));
    if (rest.trim()) this.#tail.before(render(rest.trimEnd().split("\n")));
    this.#rest = "";
    this.#tail.remove();
  }
}

/** Cut a text into complete blocks of lines and what is not complete yet. */
function split(text) {
  const lines = text.split("\n");
  const last = lines.pop();
  const blocks = [];
  let block = [];
  let fence = "";
  for (const line of lines) {
    const marks = line.match(FENCE)?.[1] ?? "";
    if (fence) {
      block.push(line);
      if (!marks.startsWith(fence) || line.trim() !== marks) continue;
      fence = "";
      blocks.push(block);
      block = [];
    } else if (marks) {
      if (block.length) blocks.push(block);
      block = [line];
      fence = marks;
    } else if (line.trim()) {
      block.push(line);
    } else if (block.length) {
      blocks.push(block);
      block = [];
    }
  }
  return { blocks, rest: [...block, last].join("\n") };
}

function render(lines) {
  if (FENCE.test(lines[0])) return code(lines);
  const nodes = [];
  for (const group of grouped(lines)) nodes.push(part(group));
  if (nodes.length === 1) return nodes[0];
  const fragment = document.createDocumentFragment();
  fragment.append(...nodes);
  return fragment;
}

const kind = (line) =>
  BULLET.test(line) ? "ul" : NUMBER.test(line) ? "ol" : HEADING.test(line) ? "h" : "p";

/** Join the lines of a block that belong together: a list, a paragraph. */
function* grouped(lines) {
  let group = null;
  for (const line of lines) {
    const found = kind(line);
    const goesOn =
      group &&
      group.kind !== "h" &&
      (found === group.kind || (found === "p" && /^\s{2,}/.test(line)));
    if (!goesOn) {
      if (group) yield group;
      group = { kind: found, lines: [] };
    }
    if (found === "p" && group.kind !== "p") {
      group.lines[group.lines.length - 1] += `\n${line.trim()}`;
    } else {
      group.lines.push(line);
    }
  }
  if (group) yield group;
}

function part({ kind, lines }) {
  if (kind === "h") return make("p", "heading", ...inline(lines[0].replace(HEADING, "")));
  if (kind === "p") return make("p", "", ...inline(lines.join("\n")));
  const list = make(kind);
  const start = kind === "ol" ? parseInt(lines[0], 10) : 1;
  if (start !== 1) list.start = start;
  const mark = kind === "ul" ? BULLET : NUMBER;
  list.append(
    ...lines.map((line) => make("li", "", ...inline(line.replace(mark, "")))),
  );
  return list;
}

function code(lines) {
  const [, marks, language] = lines[0].match(FENCE);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(marks);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = make("button", "quiet copy", say("copy"));
  copy.type = "button";
  copy.addEventListener("click", async () => {
    let done = "copied";
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      done = "copyFailed";
    }
    copy.textContent = say(done);
    setTimeout(() => (copy.textContent = say("copy")), 2000);
  });
  const pre = make("pre", "", make("code", "", text));
  pre.tabIndex = 0;
  return make("div", "code", make("div", "code-bar", make("span", "", language), copy), pre);
}

function* inline(text) {
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > end) yield text.slice(end, match.index);
    end = match.index + match[0].length;
    const [whole, mono, bold, italic, slanted, label, address, bare] = match;
    if (mono) yield make("code", "", mono);
    else if (bold) yield make("strong", "", ...inline(bold));
    else if (italic ?? slanted) yield make("em", "", ...inline(italic ?? slanted));
    else yield link(address ?? bare ?? whole, label ?? whole);
  }
  if (end < text.length) yield text.slice(end);
}

function link(address, label) {
  const anchor = make("a", "", label);
  anchor.href = address;
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer";
  return anchor;
}
