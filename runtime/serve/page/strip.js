// The strip under a clip: which frames were given and which were made, where they meet, and handles to cut a part out.

import { duration, field, fill, h } from "./dom.js";
import { t } from "./texts.js";
import { videos } from "./videos.js";

// The spans of a video, [from, to, "given" or "made"] in frames, and the frames at which they meet.
export function spans(video) {
  const count = video.num_frames;
  const parent = videos.get(video.remixed_from_video_id);
  const seams = (video.receipt?.seams ?? []).map((each) => each.frame);
  if (video.task === "extend" && seams.length) return [[0, seams[0] + 1, "given"], [seams[0] + 1, count, "made"]];
  if (video.task === "prepend" && seams.length) return [[0, seams[0], "made"], [seams[0], count, "given"]];
  if (video.task === "connect" && seams.length > 1) return [[0, seams[0] + 1, "given"], [seams[0] + 1, seams.at(-1), "made"], [seams.at(-1), count, "given"]];
  if (video.task === "extend" && parent) return [[0, parent.num_frames, "given"], [parent.num_frames, count, "made"]];
  return [[0, count, "made"]];
}

export function strip(film, video) {
  const count = video.num_frames;
  const found = spans(video);
  let part = null;
  const place = (frame) => `${(frame / count) * 100}%`;
  const head = h("i", { class: "playhead" });
  const shade = h("div", { class: "kept", hidden: true });
  const edges = ["from", "to"].map((name) => edgeOf(name));
  const rail = h("div", { class: "rail" },
    found.map(([from, to, kind]) => h("span", { class: `span ${found.length > 1 ? kind : ""}`, style: { left: place(from), width: place(to - from) }, title: found.length > 1 ? t(`span.${kind}`) : "" })),
    found.slice(1).map(([from]) => h("i", { class: "seam", style: { left: place(from) }, title: t("seam", { frame: from }) })),
    shade, head, edges);
  const legend = found.length > 1 && h("p", { class: "legend quiet small" }, h("span", { class: "given" }, t("span.given")), h("span", { class: "made" }, t("span.made")), h("span", { class: "seam" }, t("seam.at", { s: duration(found[1][0] / video.fps) })));
  const element = h("div", { class: "strip-box" }, rail, legend);
  const numbers = {};

  rail.addEventListener("pointerdown", (event) => {
    if (event.target.matches(".cut")) return;
    film.currentTime = ((event.clientX - rail.getBoundingClientRect().left) / rail.clientWidth) * (film.duration || 0);
  });
  film.addEventListener("timeupdate", () => {
    head.style.setProperty("left", `${(film.currentTime / (film.duration || 1)) * 100}%`);
    if (part && !film.paused && (film.currentTime * video.fps >= part.to || film.currentTime * video.fps < part.from - 1)) film.currentTime = part.from / video.fps;
  });

  function edgeOf(name) {
    const element = h("div", { class: `cut ${name}`, role: "slider", tabIndex: 0, hidden: true, "aria-label": t(`trim.${name}`), "aria-valuemin": 0, "aria-valuemax": count });
    element.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageUp: 5, PageDown: -5 }[event.key];
      if (!by) return;
      event.preventDefault();
      set(name, part[name] + by);
    });
    element.addEventListener("pointerdown", (down) => {
      element.setPointerCapture(down.pointerId);
      const move = (event) => set(name, Math.round(((event.clientX - rail.getBoundingClientRect().left) / rail.clientWidth) * count));
      element.addEventListener("pointermove", move);
      element.addEventListener("lostpointercapture", () => element.removeEventListener("pointermove", move), { once: true });
    });
    return element;
  }

  function set(name, frame) {
    if (name === "from") part.from = Math.max(0, Math.min(frame, part.to - 1));
    else part.to = Math.min(count, Math.max(frame, part.from + 1));
    film.currentTime = (name === "from" ? part.from : part.to - 1) / video.fps;
    draw();
  }

  function draw() {
    shade.hidden = !part;
    for (const edge of edges) edge.hidden = !part;
    if (!part) return;
    shade.style.setProperty("left", place(part.from));
    shade.style.setProperty("width", place(part.to - part.from));
    ["from", "to"].forEach((name, at) => {
      edges[at].style.setProperty("left", place(part[name]));
      edges[at].setAttribute("aria-valuenow", part[name]);
      edges[at].setAttribute("aria-valuetext", t("frame.n", { n: part[name] }));
      if (numbers[name]) numbers[name].value = part[name];
    });
  }

  return {
    element,
    // The part that is cut out, {from, to} in frames up to before `to`; null for the whole.
    part: () => (part && (part.from > 0 || part.to < count) ? { ...part } : null),
    trim(on) {
      part = on ? (part ?? { from: 0, to: count }) : null;
      draw();
    },
    inputs() {
      const row = h("div", { class: "pair" });
      for (const name of ["from", "to"]) {
        numbers[name] = h("input", { type: "number", min: 0, max: count, value: part[name], onchange: (event) => set(name, Number(event.target.value)) });
        row.append(field(t(`trim.${name}`), numbers[name]));
      }
      return row;
    },
  };
}
