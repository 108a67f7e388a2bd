// Compare: two videos in step with one another, side by side or under a wipe.

import { address, content, picture } from "./api.js";
import { ask, button, choice, duration, fill, h, icon, still, symbolButton, toast } from "./dom.js";
import { t } from "./texts.js";
import { list, listen, refresh, state, videos } from "./videos.js";

const APART = 0.04; // seconds: more than this and the second is set anew
const pair = [null, null];
let mode = "side";

// The place; returns what ends it.
export function compare(root, first, second) {
  if (first) [pair[0], pair[1]] = [first, second ?? null];
  let end = () => {};
  const draw = () => {
    end();
    const chosen = pair.map((id) => videos.get(id));
    fill(root,
      h("div", { class: "title" }, h("h1", {}, t("place.compare")), h("p", { class: "quiet" }, t("compare.why"))),
      h("div", { class: "sides" }, [0, 1].map((side) => sideOf(side, chosen[side], draw))),
      h("div", { class: "arena" }));
    end = chosen[0] && chosen[1] ? arena(root.querySelector(".arena"), chosen) : () => {};
  };
  draw();
  for (const id of pair) if (id && !videos.has(id)) refresh(id).then(draw, () => {});
  let known = state.loaded;
  const heard = listen(() => !known && state.loaded && ((known = true), draw()));
  return () => (end(), heard());
}

function sideOf(side, video, redraw) {
  const letter = "AB"[side];
  const pick = async () => {
    const found = await ask(t("compare.pick", { side: letter }), (close) => pickGrid(close));
    if (found) (pair[side] = found), redraw();
  };
  return h("div", { class: "side-of" }, h("b", {}, letter),
    video ? h("p", { class: "prompt grow", dir: "auto" }, video.prompt) : h("p", { class: "quiet grow" }, t("compare.none")),
    button(t(video ? "compare.change" : "compare.choose"), null, pick));
}

// A grid of finished videos of which one is chosen.
export function pickGrid(close, except = null) {
  const found = list().filter((each) => each.status === "completed" && each.id !== except).slice(0, 60);
  if (!found.length) return h("p", { class: "quiet" }, t("library.empty"));
  return h("div", { class: "pick-grid" }, found.map((each) =>
    h("button", { type: "button", "aria-label": each.prompt, title: each.prompt, onclick: () => close(each.id) }, picture(content(each.id, "thumbnail")))));
}

function arena(root, [one, two]) {
  const film = (video, letter) => {
    const element = h("video", { loop: true, muted: true, playsInline: true, preload: "auto", "aria-label": `${letter}: ${video.prompt}` });
    address(content(video.id)).then((url) => (element.src = url), (error) => toast(error.message));
    return element;
  };
  const a = film(one, "A");
  const b = film(two, "B");
  const [width, height] = one.size.split("x");
  const wipe = h("input", { type: "range", class: "wipe", min: 0, max: 100, step: 0.5, value: 50, "aria-label": t("compare.wipe"), oninput: place });
  const edge = h("i", { class: "wipe-edge" });
  const screens = h("div", { class: "screens" }, h("figure", {}, a, h("figcaption", {}, "A")), h("figure", { class: "b" }, b, h("figcaption", {}, "B")), edge, wipe);
  screens.style.setProperty("--ratio", `${width} / ${height}`);
  const time = h("input", { type: "range", min: 0, max: 1, step: 0.001, value: 0, "aria-label": t("compare.time"), oninput: () => seek(Number(time.value) * length()) });
  const clock = h("output", { class: "quiet" });
  const toggle = symbolButton(t("play"), "play", () => (a.paused ? play() : pause()));
  const length = () => Math.max(a.duration || 0, b.duration || 0) || 1;
  const frame = 1 / (one.fps || 8);

  function place() {
    screens.style.setProperty("--wipe", `${wipe.value}%`);
  }
  function seek(seconds) {
    for (const each of [a, b]) each.currentTime = Math.min(seconds, (each.duration || 0) - 0.001);
  }
  function play() {
    seek(a.currentTime);
    for (const each of [a, b]) each.play().catch(() => {});
  }
  function pause() {
    a.pause();
    b.pause();
    seek(a.currentTime);
  }
  const name = () => {
    const text = t(a.paused ? "play" : "pause");
    toggle.setAttribute("aria-label", text);
    toggle.title = text;
    fill(toggle, icon(a.paused ? "play" : "pause"));
  };
  a.addEventListener("play", name);
  a.addEventListener("pause", name);

  let running = 0;
  const tick = () => {
    running = requestAnimationFrame(tick);
    if (a.readyState < 1) return;
    const wanted = Math.min(a.currentTime, (b.duration || 0) - 0.001);
    if (Math.abs(b.currentTime - wanted) > APART && !b.seeking && !a.seeking) b.currentTime = wanted;
    if (!a.paused && b.paused && wanted === a.currentTime) b.play().catch(() => {});
    if (document.activeElement !== time) time.value = a.currentTime / length();
    clock.textContent = `${duration(a.currentTime.toFixed(1))} / ${duration(length())}`;
  };
  const setMode = (value) => {
    mode = value;
    screens.classList.toggle("wiping", value === "wipe");
  };
  const step = (by) => (pause(), seek(Math.max(0, a.currentTime + by * frame)));
  fill(root, screens, h("div", { class: "transport" },
    symbolButton(t("frame.before"), "back", () => step(-1)), toggle, symbolButton(t("frame.after"), "on", () => step(1)),
    time, clock, choice(t("compare.mode"), [["side", t("compare.side")], ["wipe", t("compare.wipe")]], mode, setMode)));
  setMode(mode);
  place();
  tick();
  if (!still()) b.addEventListener("canplay", play, { once: true });
  return () => cancelAnimationFrame(running);
}
