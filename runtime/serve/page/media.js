// Files that people give: what is taken, where it is dropped, and how it looks.

import { Refused } from "./api.js";
import { button, h, icon, symbolButton, toast } from "./dom.js";
import { t } from "./texts.js";

export const TAKEN = "image/png,image/jpeg,image/webp,image/gif,video/mp4,video/webm";

// Makes an element a place where files, or clips of the library, can be dropped.
export function dropPlace(element, take) {
  let depth = 0;
  const over = (by) => element.classList.toggle("over", (depth = Math.max(0, depth + by)) > 0);
  element.addEventListener("dragenter", () => over(1));
  element.addEventListener("dragleave", () => over(-1));
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    over(-depth);
    const files = [...event.dataTransfer.files];
    const video = event.dataTransfer.getData("text/x-video");
    if (files.length || video) take(files, video);
  });
}

// Checks that a file can be shown here; what cannot is told at once, before anything is sent.
export async function readable(file) {
  const kind = file.type.split("/")[0];
  if (!TAKEN.split(",").includes(file.type)) throw new Refused(400, { message: t("file.kind", { name: file.name }) });
  const url = URL.createObjectURL(file);
  const probe = kind === "image" ? h("img") : h("video", { muted: true, preload: "metadata" });
  try {
    await new Promise((resolve, reject) => {
      probe.addEventListener(kind === "image" ? "load" : "loadeddata", resolve);
      probe.addEventListener("error", reject);
      probe.src = url;
      if (kind === "video") probe.preload = "auto";
    });
  } catch {
    URL.revokeObjectURL(url);
    throw new Refused(400, { message: t("file.broken", { name: file.name }) });
  }
  return { file, url, kind };
}

export const shownFile = (given) => given.kind === "image"
  ? h("img", { src: given.url, alt: given.file.name })
  : h("video", { src: given.url, muted: true, loop: true, autoplay: true, playsInline: true, "aria-label": given.file.name });

// A tile that holds one file or none: a button to choose, a place to drop, and the file with a way to take it out.
export function tile(name, given, change) {
  const take = async (files) => {
    try {
      change(await readable(files[0]));
    } catch (error) {
      toast(error.message);
    }
  };
  const box = h("div", { class: "tile" });
  const input = h("input", { type: "file", accept: TAKEN, hidden: true, "aria-label": name, onchange: () => input.files.length && take(input.files) });
  if (given) {
    box.append(shownFile(given), h("span", { class: "name" }, name), symbolButton(t("file.remove", { name }), "close", () => change(null)));
    box.classList.add("full");
  } else {
    box.append(h("button", { type: "button", onclick: () => input.click() }, icon("picture"), h("span", {}, name)), input);
    dropPlace(box, (files) => files.length && take(files));
  }
  return box;
}

// The frame that a video shows now, as a PNG file.
export function frameOf(video, name) {
  const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(new File([blob], `${name}.png`, { type: "image/png" })), "image/png"));
}
