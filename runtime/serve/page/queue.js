// What is being made: the stage with the one that is watched, and the line behind it.

import { address, content, picture } from "./api.js";
import { button, duration, fill, h, icon, still, symbolButton, toast } from "./dom.js";
import { t } from "./texts.js";
import { active, cancel, isActive, list, listen, previews, state, videos } from "./videos.js";

let watched = null; // id of the video on the stage
const mine = new Set(); // made in this tab: their failures stay in the line until they are seen

// Puts a video on the stage.
export function watch(id) {
  watched = id;
  mine.add(id);
}

// How far a video is, in words.
export function progressOf(video) {
  if (video.status === "failed") return video.error?.message ?? t("failed");
  if (video.status === "cancelled") return t("cancelled");
  if (video.status === "completed") return t("done");
  const left = video.eta_seconds === null || video.eta_seconds === undefined ? "" : ` · ${t("left", { s: duration(video.eta_seconds) })}`;
  if (video.status === "queued") return t(video.queue_position ? "queue.behind" : "queue.next", { n: video.queue_position }) + left;
  if (video.step >= video.total_steps) return t("queue.writing");
  return t("queue.step", { n: video.step, of: video.total_steps }) + left;
}

const steady = (canvas, url) => {
  const image = new Image();
  image.onload = () => {
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
  };
  image.src = url;
};

// An element that shows the latest look at a video; who wants less motion gets one frame of it.
function preview() {
  const element = h(still() ? "canvas" : "img", { class: "preview", alt: "" });
  let shown = "";
  return {
    element,
    update(id) {
      const url = previews.get(id) ?? "";
      element.hidden = !url;
      if (url === shown || !url) return;
      shown = url;
      if (element.tagName === "CANVAS") steady(element, url);
      else element.src = url;
    },
  };
}

const newest = () => list().find((each) => each.status === "completed");

function pick() {
  const chosen = videos.get(watched);
  if (chosen && (chosen.status !== "cancelled" || !active().length)) return chosen;
  return active()[0] ?? newest();
}

// The stage and the line; returns what ends it. `samples` are prompts for who has nothing yet, `use` takes one.
export function queue(root, samples = [], use = () => {}) {
  const screen = h("div", { class: "screen" });
  const words = h("p", { class: "prompt", dir: "auto" });
  const meta = h("p", { class: "quiet", "data-progress": "" });
  const meter = h("progress", { max: 100, value: 0, "aria-label": t("progress") });
  const actions = h("div", { class: "row" });
  const foot = h("div", { class: "foot" }, h("div", { class: "grow" }, words, meta), actions);
  const line = h("ul", { class: "line", "aria-label": t("queue") });
  const rest = h("section", { class: "waiting", hidden: true }, h("h2", {}, t("queue")), line);
  fill(root, h("section", { class: "stage", "aria-label": t("stage") }, screen, meter, foot), rest);

  const look = preview();
  const rows = new Map();
  let scene = "";

  function drawStage() {
    const video = pick();
    const next = video ? `${video.id} ${isActive(video) ? "active" : video.status}` : state.loaded ? "blank" : "loading";
    meter.hidden = !video || !isActive(video);
    foot.hidden = !video;
    if (video) {
      words.textContent = video.prompt;
      meta.textContent = video.status === "completed" ? `${video.size.replace("x", " × ")} · ${duration(video.seconds)} · ${t("seed")} ${video.seed}` : progressOf(video);
      meta.classList.toggle("bad", video.status === "failed");
      meter.value = video.progress;
      look.update(video.id);
    }
    if (next === scene) return;
    scene = next;
    screen.className = `screen ${video?.status ?? next}`;
    fill(actions);
    if (!video) fill(screen, state.loaded ? empty(samples, use) : h("p", { class: "quiet" }, t("loading")));
    else if (isActive(video)) {
      const [width, height] = video.size.split("x");
      fill(screen, h("div", { class: "developing", style: { "aspect-ratio": `${width} / ${height}` } }, look.element));
      fill(actions, button(t("cancel"), "close", () => cancel(video.id)));
    } else if (video.status === "completed") {
      fill(screen, player(video));
      fill(actions, h("a", { class: "button", href: `#/clip/${video.id}` }, icon("open"), h("span", {}, t("open"))));
    } else fill(screen, h("p", { class: "ended" }, icon("close"), t(video.status)));
  }

  function drawLine() {
    const failed = list().filter((each) => mine.has(each.id) && each.status === "failed");
    const shown = [...active(), ...failed].filter((each) => each.id !== pick()?.id);
    rest.hidden = shown.length === 0;
    for (const [id, row] of rows) if (!shown.some((each) => each.id === id)) (row.element.remove(), rows.delete(id));
    shown.forEach((video, place) => {
      if (!rows.has(video.id)) rows.set(video.id, lineRow(video));
      const row = rows.get(video.id);
      row.update(video);
      if (line.children[place] !== row.element) line.insertBefore(row.element, line.children[place] ?? null);
    });
  }

  const draw = () => (drawStage(), drawLine());
  draw();
  return listen(draw);
}

function lineRow(video) {
  const look = preview();
  const status = h("span", { class: "quiet" });
  const meter = h("progress", { max: 100, value: 0, "aria-label": t("progress") });
  const end = symbolButton(t("cancel.one", { prompt: video.prompt.slice(0, 60) }), "close", () => {
    if (isActive(videos.get(video.id) ?? video)) cancel(video.id);
    else (mine.delete(video.id), element.remove());
  });
  const open = h("button", { type: "button", class: "what", onclick: () => (watch(video.id), videos.has(video.id) && scrollTo({ top: 0 })) },
    h("span", { class: "thumb" }, look.element), h("span", { class: "grow" }, h("span", { class: "prompt", dir: "auto" }, video.prompt), status));
  const element = h("li", { "data-id": video.id }, open, end, meter);
  return {
    element,
    update(now) {
      status.textContent = progressOf(now);
      status.classList.toggle("bad", now.status === "failed");
      meter.hidden = !isActive(now);
      meter.value = now.progress;
      look.update(now.id);
    },
  };
}

function empty(samples, use) {
  return h("div", { class: "empty" },
    icon("film"),
    h("h2", {}, t("empty.stage")),
    h("p", { class: "quiet" }, t("empty.try")),
    h("div", { class: "row" }, samples.map((each) => h("button", { type: "button", class: "chip", onclick: () => use(each) }, each))),
  );
}

// A player of a finished video.
export function player(video, more = {}) {
  const element = h("video", { controls: true, loop: true, muted: true, playsInline: true, autoplay: !still(), preload: "auto", "aria-label": video.prompt, ...more });
  const [width, height] = video.size.split("x");
  element.style.setProperty("aspect-ratio", `${width} / ${height}`);
  address(content(video.id)).then((url) => (element.src = url), (error) => toast(error.message));
  return element;
}

// The newest videos, small.
export function recent(root) {
  const strip = h("div", { class: "strip" });
  fill(root, h("div", { class: "head" }, h("h2", {}, t("recent")), h("a", { href: "#/library" }, t("all"))), strip);
  let shown = "";
  const draw = () => {
    const found = list().filter((each) => each.status === "completed").slice(0, 8);
    root.hidden = found.length < 2;
    const now = found.map((each) => each.id).join();
    if (now === shown) return;
    shown = now;
    fill(strip, found.map((each) => h("a", { href: `#/clip/${each.id}`, "aria-label": each.prompt }, picture(content(each.id, "thumbnail")))));
  };
  draw();
  return listen(draw);
}
