// Library: all that was made. Cards beyond the window are kept by the browser but neither laid out nor painted.

import { address, content, picture } from "./api.js";
import { ago, areaFor, ask, button, choice, duration, field, fill, h, icon, still, symbolButton } from "./dom.js";
import { connectForm } from "./making.js";
import { t } from "./texts.js";
import { list, listen, remove, state, videos } from "./videos.js";

const KINDS = ["all", "text", "place", "extend", "loop", "connect", "edit", "storyboard", "draft", "failed"];

const seen = { words: "", kind: "all", oldest: false };

export const isDraft = (video) => video.quality === "draft" || "final_size" in video;

function wanted(video) {
  if (["queued", "in_progress"].includes(video.status)) return false;
  const kind = seen.kind;
  if (kind === "failed") return video.status !== "completed";
  if (video.status !== "completed") return false;
  if (kind === "draft" && !isDraft(video)) return false;
  const task = video.task === "prepend" ? "extend" : video.task;
  if (!["all", "draft"].includes(kind) && task !== kind) return false;
  return !seen.words || `${video.prompt} ${video.id} ${video.seed}`.toLowerCase().includes(seen.words.toLowerCase());
}

// The place; returns what ends it.
export function library(root) {
  const chosen = new Set();
  const grid = h("ul", { class: "grid", "aria-label": t("place.library") });
  const bar = h("div", { class: "chosen", role: "region", "aria-label": t("chosen"), hidden: true });
  const count = h("p", { class: "quiet", role: "status" });
  const cards = new Map();
  let shown = "";

  const draw = () => {
    let found = list().filter(wanted);
    if (seen.oldest) found = found.reverse();
    count.textContent = state.loaded ? t("library.count", { n: found.length }) : t("loading");
    const now = found.map((each) => each.id).join();
    if (now === shown && (found.length || grid.firstChild)) return;
    shown = now;
    for (const each of found) if (!cards.has(each.id)) cards.set(each.id, cardOf(each, chosen, drawBar));
    const keep = new Set(found.map((each) => each.id));
    for (const id of chosen) if (!keep.has(id)) chosen.delete(id);
    fill(grid, found.length ? found.map((each) => cards.get(each.id)) : state.loaded && nothing());
    drawBar();
  };

  const clear = () => {
    chosen.clear();
    for (const box of grid.querySelectorAll(".pick")) box.checked = false;
    drawBar();
  };

  function drawBar() {
    bar.hidden = chosen.size === 0;
    const two = [...chosen];
    fill(bar, h("span", {}, t("chosen.n", { n: chosen.size })), h("div", { class: "row" },
      chosen.size === 2 && button(t("compare"), "compare", () => (location.hash = `#/compare/${two.join("/")}`)),
      chosen.size === 2 && button(t("connect"), "connect", () => connectDialog(...two)),
      button(t("delete"), "bin", () => (remove(two), clear())),
      symbolButton(t("chosen.none"), "close", clear)));
  }

  const search = h("input", { type: "search", value: seen.words, placeholder: t("search.example"), oninput: () => ((seen.words = search.value), draw()) });
  const kind = h("select", { onchange: () => ((seen.kind = kind.value), draw()) }, KINDS.map((each) => h("option", { value: each, selected: each === seen.kind }, t(`kind.${each}`))));
  const order = h("select", { onchange: () => ((seen.oldest = order.value === "oldest"), draw()) },
    ["newest", "oldest"].map((each) => h("option", { value: each, selected: (each === "oldest") === seen.oldest }, t(`order.${each}`))));
  fill(root,
    h("div", { class: "title" }, h("h1", {}, t("place.library")), count),
    h("div", { class: "filters" }, field(t("search"), search), field(t("kind"), kind), field(t("order"), order)),
    grid, bar);
  draw();
  return listen(draw);
}

function nothing() {
  const any = list().length > 0;
  return h("li", { class: "empty" }, icon("grid"), h("h2", {}, t(any ? "library.none" : "library.empty")), h("p", { class: "quiet" }, t(any ? "library.none.why" : "library.empty.why")),
    !any && h("a", { class: "button first", href: "#/create" }, icon("expand"), h("span", {}, t("library.make"))));
}

function cardOf(video, chosen, changed) {
  const done = video.status === "completed";
  const pick = h("input", { type: "checkbox", class: "pick", "aria-label": t("choose", { prompt: video.prompt.slice(0, 80) }), onchange: () => (pick.checked ? chosen.add(video.id) : chosen.delete(video.id), changed()) });
  const look = h("span", { class: "look" }, done ? picture(content(video.id, "thumbnail")) : icon("close"), done && h("span", { class: "length" }, duration(video.seconds)));
  const link = h("a", { href: `#/clip/${video.id}`, draggable: done }, look, h("span", { class: "prompt", dir: "auto" }, video.prompt || t("no.prompt")));
  const kind = isDraft(video) ? t("kind.draft") : t(`kind.${video.task === "prepend" ? "extend" : video.task}`);
  const card = h("li", { class: "shot", "data-id": video.id }, link, done && pick, h("span", { class: "quiet small meta" }, done ? `${kind} · ${ago(video.created_at)}` : t(video.status)));
  if (done) {
    if (video.spritesheet) hoverPlay(link, look, video);
    link.addEventListener("dragstart", (event) => {
      event.dataTransfer.setData("text/x-video", video.id);
      event.dataTransfer.effectAllowed = "copy";
    });
    link.addEventListener("dragover", (event) => event.preventDefault());
    link.addEventListener("dragenter", () => card.classList.add("over"));
    link.addEventListener("dragleave", (event) => link.contains(event.relatedTarget) || card.classList.remove("over"));
    link.addEventListener("drop", (event) => {
      event.preventDefault();
      card.classList.remove("over");
      const other = event.dataTransfer.getData("text/x-video");
      if (other && other !== video.id) connectDialog(other, video.id);
    });
  }
  return card;
}

// Plays the sheet of pictures while a pointer or the focus is on a card.
function hoverPlay(link, look, video) {
  const { columns, rows, frames, width, height } = video.spritesheet;
  let timer = 0;
  let sheet = null;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    if (sheet) sheet.hidden = true;
  };
  const play = async () => {
    if (still() || timer) return;
    timer = -1;
    const url = await address(content(video.id, "spritesheet")).catch(() => null);
    if (!url || timer === 0) return;
    if (!sheet) {
      sheet = h("i", { class: "sheet", style: { "background-image": `url("${url}")`, "background-size": `${columns * 100}% ${rows * 100}%`, "aspect-ratio": `${width} / ${height}` } });
      look.append(sheet);
    }
    sheet.hidden = false;
    let place = 0;
    timer = setInterval(() => {
      place = (place + 1) % frames;
      const x = columns > 1 ? ((place % columns) / (columns - 1)) * 100 : 0;
      const y = rows > 1 ? (Math.floor(place / columns) / (rows - 1)) * 100 : 0;
      sheet.style.setProperty("background-position", `${x}% ${y}%`);
    }, Math.max(60, (1000 * Number(video.seconds)) / frames));
  };
  link.addEventListener("pointerenter", play);
  link.addEventListener("pointerleave", stop);
  link.addEventListener("focus", play);
  link.addEventListener("blur", stop);
}

// Asks what happens between two videos, and makes it.
export function connectDialog(first, second) {
  ask(t("connect"), (close) => h("div", { class: "stack" },
    h("div", { class: "two" }, [first, second].map((id) => h("figure", {}, picture(content(id, "thumbnail")), h("figcaption", { class: "quiet small", dir: "auto" }, videos.get(id)?.prompt)))),
    connectForm(first, second, close)));
}
