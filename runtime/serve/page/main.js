// Starts the page: the bar at its top, and which place is shown by what stands behind # in the address.

import { clip } from "./clip.js";
import { compare } from "./compare.js";
import { compose } from "./compose.js";
import { fill, h, icon, symbolButton } from "./dom.js";
import { library } from "./library.js";
import { storyboard } from "./storyboard.js";
import { LANGUAGES, language, setLanguage, t } from "./texts.js";
import { active, listen, start, state } from "./videos.js";

const PLACES = { create: compose, storyboard, library, compare, clip };
const TABS = [["create", "expand"], ["storyboard", "story"], ["library", "grid"], ["compare", "compare"]];
const THEME = "theme";

const bar = document.querySelector(".bar");
const main = document.querySelector("main");
let leave = () => {};
let place = "";

const where = () => location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);

function show() {
  const [name, ...rest] = where();
  place = name in PLACES ? name : "create";
  leave();
  leave = () => {};
  const root = h("div", { class: `place ${place}` });
  fill(main, root);
  leave = PLACES[place](root, ...rest) ?? (() => {});
  drawBar();
  scrollTo(0, 0);
}

function theme() {
  const kept = localStorage.getItem(THEME);
  if (kept) document.documentElement.dataset.theme = kept;
  return kept ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function drawBar() {
  document.title = `${t(`place.${place === "clip" ? "library" : place}`)} · dit-runtime`;
  document.querySelector(".skip").textContent = t("skip");
  const dark = theme() === "dark";
  const tabs = TABS.map(([name, symbol]) => {
    const here = name === place || (name === "library" && place === "clip");
    return h("a", { href: `#/${name}`, "aria-current": here ? "page" : null }, icon(symbol), h("span", {}, t(`place.${name}`)));
  });
  const next = LANGUAGES.find((each) => each.code !== language());
  fill(bar,
    h("a", { class: "mark", href: "#/create" }, h("img", { src: "page/icon.svg", alt: "", width: 28, height: 28 }), h("span", {}, "dit-runtime")),
    h("nav", { "aria-label": t("places") }, tabs),
    h("div", { class: "tools" },
      h("a", { class: "busy", href: "#/create", hidden: true }),
      h("button", { type: "button", class: "button plain", lang: next.code, onclick: () => (setLanguage(next.code), document.documentElement.lang = next.code, show()) }, next.name),
      symbolButton(t(dark ? "theme.light" : "theme.dark"), dark ? "sun" : "moon", () => {
        localStorage.setItem(THEME, dark ? "light" : "dark");
        drawBar();
        bar.querySelector(".tools > :last-child").focus();
      }),
    ),
  );
  drawState();
}

function drawState() {
  const busy = bar.querySelector(".busy");
  const count = active().length;
  busy.hidden = count === 0;
  busy.textContent = t("busy", { n: count });
  const offline = document.querySelector(".offline");
  offline.hidden = !state.offline;
  offline.textContent = state.offline ? t("offline") : "";
}

document.documentElement.lang = language();
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", show);
addEventListener("dragover", (event) => event.preventDefault()); // a file dropped beside a place for it opens nothing
addEventListener("drop", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawBar);
listen(drawState);
show();
start();
