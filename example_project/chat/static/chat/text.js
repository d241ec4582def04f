// What the server handed to the page: its sentences and its addresses.

export const page = JSON.parse(document.getElementById("page").textContent);
const language = document.documentElement.lang;
const numbers = new Intl.NumberFormat(language);
const relative = new Intl.RelativeTimeFormat(language, { numeric: "auto" });

/** Return a sentence with its {braces} filled in. */
export function say(key, values = {}) {
  const sentence = page.strings[key] ?? key;
  return sentence.replace(/\{(\w+)\}/g, (whole, name) => {
    const value = values[name];
    return typeof value === "number" ? numbers.format(value) : String(value ?? whole);
  });
}

/** Tell whether there is a sentence of this name. */
export const known = (key) => Object.hasOwn(page.strings, key);

/** Return what stands before and after a conversation's id in an address. */
export function around(name) {
  const address = page.urls[name];
  // The last one: the site's own prefix may hold these letters too.
  const place = address.lastIndexOf("ID");
  return [address.slice(0, place), address.slice(place + 2)];
}

/** Return the address of that name, for a conversation. */
export function url(name, id = "") {
  return id ? around(name).join(encodeURIComponent(id)) : page.urls[name];
}

const UNITS = [
  ["year", 31_536_000],
  ["month", 2_592_000],
  ["week", 604_800],
  ["day", 86_400],
  ["hour", 3_600],
  ["minute", 60],
];

/** Say when a moment was or will be, in the page's language. */
export function ago(iso) {
  const seconds = (new Date(iso) - Date.now()) / 1000;
  for (const [unit, length] of UNITS) {
    if (Math.abs(seconds) >= length) {
      return relative.format(Math.round(seconds / length), unit);
    }
  }
  return relative.format(0, "second");
}

/** Make an element with a class and children; text stays text. */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}
