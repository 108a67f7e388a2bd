// Small pieces that every place is made of. Text only ever becomes a text node: nothing here parses HTML.

import { t } from "./texts.js";

const SVG = "http://www.w3.org/2000/svg";

// 24 x 24, drawn with one stroke.
const ICONS = {
  add: "M12 5v14M5 12h14",
  back: "M15 5l-7 7 7 7",
  bin: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12M10.5 11v5M13.5 11v5",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  compare: "M12 4v16M4 7h5v10H4zM15 7h5v10h-5z",
  connect: "M4 8h5v8H4zM15 8h5v8h-5zM9 12h6",
  copy: "M9 9h10v10H9zM5 15V5h10",
  dice: "M5 5h14v14H5zM9 9h.01M15 9h.01M12 12h.01M9 15h.01M15 15h.01",
  down: "M12 4v11M7 11l5 5 5-5M5 20h14",
  expand: "M12 4l1.6 4.4L18 10l-4.4 1.6L12 16l-1.6-4.4L6 10l4.4-1.6zM18 16l.7 1.8 1.8.7-1.8.7L18 21l-.7-1.8-1.8-.7 1.8-.7z",
  extend: "M4 7h8v10H4zM15 12h6M18 9l3 3-3 3",
  film: "M4 5h16v14H4zM8 5v14M16 5v14M4 12h4M16 12h4",
  finish: "M5 19l9-9M14 5l1 2 2 1-2 1-1 2-1-2-2-1 2-1zM18 13l.7 1.3 1.3.7-1.3.7-.7 1.3-.7-1.3-1.3-.7 1.3-.7z",
  grid: "M5 5h5v5H5zM14 5h5v5h-5zM5 14h5v5H5zM14 14h5v5h-5z",
  lock: "M7 11h10v8H7zM9 11V8a3 3 0 0 1 6 0v3",
  loop: "M7 8h8a4 4 0 0 1 0 8H9a4 4 0 0 1-3.5-6M7 5L4 8l3 3",
  moon: "M19 14.5A7.5 7.5 0 0 1 9.5 5a7.5 7.5 0 1 0 9.5 9.5z",
  on: "M9 5l7 7-7 7",
  open: "M7 11h10v8H7zM9 11V8a3 3 0 0 1 5.8-1",
  pause: "M9 6v12M15 6v12",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15 9h.01",
  play: "M8 5.5v13l10-6.5z",
  remix: "M4 8h3l9 9h4M17 14l3 3-3 3M4 17h3l2.5-2.5M14 9.5L15.5 8H20M17 5l3 3-3 3",
  seal: "M12 3l7 3v5c0 4.5-3 8-7 10-4-2-7-5.5-7-10V6zM9 11.5l2.2 2.2L15.5 9.5",
  search: "M11 5a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM15.5 15.5L20 20",
  story: "M4 9h6v6H4zM12 9h3v6h-3zM17 9h3v6h-3zM4 5h16M4 19h16",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6L7 7M17 17l1.4 1.4M18.4 5.6L17 7M7 17l-1.4 1.4",
  trim: "M7 4v16M17 4v16M7 8h10M7 16h10",
  use: "M4 12h11M11 8l4 4-4 4M15 5h5v14h-5",
};

// An element: properties (on* are listeners, aria-* and data-* attributes, style an object), then children.
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (name === "class") element.className = value;
    else if (/^(aria-|data-)|^(role|for|list|form)$/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  fill(element, ...children);
  return element;
}

// Puts children in the place of what an element holds.
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(2).filter((each) => each !== null && each !== undefined && each !== false));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function button(text, symbol, onclick, more = {}) {
  return h("button", { type: "button", class: "button", onclick, ...more }, symbol && icon(symbol), h("span", {}, text));
}

// A button that shows its symbol alone; its name is for those who cannot see it, and for who points at it.
export function symbolButton(text, symbol, onclick, more = {}) {
  return h("button", { type: "button", class: "button symbol", "aria-label": text, title: text, onclick, ...more }, icon(symbol));
}

let count = 0;
export const fresh = (name) => `${name}-${(count += 1)}`;

// A control with its label above it.
export function field(text, control, more = {}) {
  const target = control.matches("input, textarea, select") ? control : control.querySelector("input, textarea, select");
  target.id ||= fresh("field");
  return h("div", { class: "field", ...more }, h("label", { for: target.id }, text), control);
}

// A row of choices of which one holds; `choices` are [value, what stands in it, its name].
export function choice(legend, choices, chosen, onchange, kind = "segments") {
  const name = fresh("choice");
  const options = choices.map(([value, shown, named]) => {
    const input = h("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onchange(value) });
    if (named) input.setAttribute("aria-label", named);
    return h("label", { title: named ?? "" }, input, h("span", {}, shown));
  });
  return h("fieldset", { class: kind }, h("legend", {}, legend), h("div", {}, options));
}

export function areaFor(text, more = {}) {
  const area = h("textarea", { rows: 3, value: text, dir: "auto", maxLength: 20000, ...more });
  area.addEventListener("input", () => grow(area));
  requestAnimationFrame(() => grow(area));
  return area;
}

export function grow(area) {
  area.style.setProperty("height", "auto");
  area.style.setProperty("height", `${Math.min(area.scrollHeight + 2, 320)}px`);
}

// A message that goes by itself; with an action it can be undone while it stands.
export function toast(text, action, act, seconds = 6) {
  const gone = () => box.remove();
  const box = h("div", { class: "toast" }, h("span", { dir: "auto" }, text));
  if (action) box.append(h("button", { type: "button", onclick: () => (gone(), act()) }, action));
  document.querySelector(".toasts").append(box);
  setTimeout(gone, seconds * 1000);
  return gone;
}

// A dialog; `build` gets a function that closes it with a result, which the promise then holds (null where dismissed).
export function ask(title, build) {
  return new Promise((resolve) => {
    const dialog = h("dialog", {});
    const close = (result) => {
      resolve(result);
      dialog.close();
    };
    const id = fresh("title");
    dialog.setAttribute("aria-labelledby", id);
    dialog.addEventListener("close", () => (resolve(null), dialog.remove()));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    fill(
      dialog,
      h("div", { class: "inside" },
        h("div", { class: "head" }, h("h2", { id }, title), symbolButton(t("close"), "close", () => dialog.close())),
        build(close),
      ),
    );
    document.body.append(dialog);
    dialog.showModal();
  });
}

export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(+seconds)) return "–";
  const value = +seconds;
  if (value < 10) return t("seconds", { n: value.toFixed(1).replace(/\.0$/, "") });
  if (value < 90) return t("seconds", { n: Math.round(value) });
  if (value < 5400) return t("minutes", { n: Math.round(value / 60) });
  return t("hours", { n: (value / 3600).toFixed(1) });
}

export function bytes(value) {
  if (!value) return "–";
  return value < 2 ** 30 ? `${Math.max(1, Math.round(value / 2 ** 20))} MiB` : `${(value / 2 ** 30).toFixed(1)} GiB`;
}

export function ago(unix) {
  const seconds = Date.now() / 1000 - unix;
  const [value, unit] = seconds < 3600 ? [seconds / 60, "minute"] : seconds < 86400 ? [seconds / 3600, "hour"] : [seconds / 86400, "day"];
  if (seconds < 60) return t("now");
  return new Intl.RelativeTimeFormat(document.documentElement.lang, { numeric: "auto" }).format(-Math.round(value), unit);
}
