// What is made of a finished video: remix, extend, loop, connect, finish; each is a small form.

import { call } from "./api.js";
import { areaFor, choice, duration, field, h, icon, toast } from "./dom.js";
import { modelOf } from "./compose.js";
import { watch } from "./queue.js";
import { t } from "./texts.js";
import { attempt, take, videos } from "./videos.js";

const STRENGTHS = [[0.35, "remix.subtle"], [0.6, "remix.clear"], [0.85, "remix.strong"]];

async function send(path, fields, close) {
  const made = await attempt(() => call(path, "POST", fields));
  if (!made) return;
  take(made);
  watch(made.id);
  close?.(made);
  toast(t("queued"));
  location.hash = "#/create";
}

// A form whose button sends what `fields` gives to a path.
function formOf(parts, text, path, fields, close) {
  return h("form", { class: "stack", onsubmit: async (event) => {
    event.preventDefault();
    const go = event.target.querySelector("[type=submit]");
    go.disabled = true;
    await send(path, fields(), close);
    go.disabled = false;
  } }, parts, h("button", { type: "submit", class: "button first" }, icon("play"), h("span", {}, text)));
}

// How long new frames go on: up to the model's own length, in seconds.
function lengthField(video, chosen, change) {
  const { defaults } = modelOf(video.model);
  const own = defaults.num_frames / defaults.fps;
  const shown = h("output", {}, duration(chosen));
  return h("div", { class: "length" },
    field(t("length.new"), h("input", { type: "range", min: 0.5, max: Math.ceil(own * 2), step: 0.1, value: chosen, oninput: (event) => {
      shown.textContent = duration(event.target.value);
      change(Number(event.target.value));
    } })), shown);
}

const steps = (video) => ({ num_inference_steps: video.num_inference_steps, model: video.model });
const cut = (part) => (part ? { clip: part } : {});

// The forms take the video, the part of it that is used ({from, to} in frames, or null), and what to do when it is sent.

export function remixForm(video, part, close) {
  const prompt = areaFor(video.prompt, { required: true });
  let strength = 0.6;
  const shown = h("output", {}, strength.toFixed(2));
  const range = h("input", { type: "range", min: 0.05, max: 1, step: 0.05, value: strength, oninput: () => set(Number(range.value)) });
  const names = choice(t("remix.how"), STRENGTHS.map(([value, name]) => [value, t(name)]), strength, (value) => set(value));
  function set(value) {
    strength = value;
    range.value = value;
    shown.textContent = value.toFixed(2);
    for (const input of names.querySelectorAll("input")) input.checked = Number(input.value) === value;
  }
  return formOf([field(t("remix.prompt"), prompt), names, h("div", { class: "length" }, field(t("remix.strength"), range), shown)],
    t("remix"), `/v1/videos/${video.id}/remix`, () => ({ prompt: prompt.value, strength, ...steps(video), ...cut(part()) }), close);
}

export function extendForm(video, part, close) {
  const prompt = areaFor(video.prompt, { required: true });
  let direction = "forward";
  let seconds = 1;
  return formOf([
    choice(t("extend.where"), [["forward", t("extend.forward")], ["backward", t("extend.backward")]], direction, (value) => (direction = value)),
    lengthField(video, seconds, (value) => (seconds = value)),
    field(t("extend.prompt"), prompt),
  ], t("extend"), "/v1/videos/extensions", () => ({ prompt: prompt.value, direction, seconds: String(seconds), video: { id: video.id }, ...steps(video), ...cut(part()) }), close);
}

export function loopForm(video, part, close) {
  const prompt = areaFor(video.prompt, { required: true });
  let seconds = 1;
  return formOf([h("p", { class: "quiet" }, t("loop.why")), lengthField(video, seconds, (value) => (seconds = value)), field(t("prompt.short"), prompt)],
    t("loop"), "/v1/videos", () => ({ prompt: prompt.value, loop: true, seconds: String(seconds), video: { id: video.id }, ...steps(video), ...cut(part()) }), close);
}

export function connectForm(first, second, close) {
  const one = videos.get(first);
  const prompt = areaFor(one.prompt, { required: true });
  let seconds = 1;
  return formOf([lengthField(one, seconds, (value) => (seconds = value)), field(t("connect.prompt"), prompt)],
    t("connect"), "/v1/videos/connections", () => ({ prompt: prompt.value, seconds: String(seconds), videos: [{ id: first }, { id: second }], ...steps(one) }), close);
}

export function finishForm(video, close) {
  const [width, height] = (video.final_size ?? video.size).split("x");
  return formOf([h("p", { class: "quiet" }, t("finish.why", { size: `${width} × ${height}` }))], t("finish"), `/v1/videos/${video.id}/finish`, () => ({}), close);
}
