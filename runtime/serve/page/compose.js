// Compose: a prompt, what goes with it, and the button that makes the video.

import { Refused, call, make } from "./api.js";
import { areaFor, button, bytes, choice, duration, field, fill, grow, h, icon, symbolButton, toast } from "./dom.js";
import { dropPlace, readable, tile } from "./media.js";
import { queue, recent, watch } from "./queue.js";
import { t } from "./texts.js";
import { attempt, listen, reached, state, take } from "./videos.js";

const KEPT = "compose"; // in sessionStorage: a reload keeps what was written
const RATIOS = ["own", "tall", "square", "classic", "wide"];
const QUALITIES = ["draft", "standard", "final"];
const FINAL = 2; // times the model's own steps
const SAMPLES = ["sample.1", "sample.2", "sample.3"];
const FRESH = {
  prompt: "", expanded: null, negative: "", model: null, ratio: "own", width: null, height: null, seconds: null,
  quality: "standard", seed: null, locked: false, count: 1, steps: null, guidance: null, loop: false,
};

const draft = { ...FRESH, ...JSON.parse(sessionStorage.getItem(KEPT) ?? "{}"), first: null, last: null, keys: [] };
const keep = () => sessionStorage.setItem(KEPT, JSON.stringify({ ...draft, first: undefined, last: undefined, keys: undefined }));
const anySeed = () => Math.floor(Math.random() * 2 ** 31);

// Takes over what another place wants to be made here.
export function prefill(values) {
  Object.assign(draft, values);
  keep();
}

export const modelOf = (name) => state.models.find((each) => each.id === name) ?? state.models[0];

// Width and height of a ratio, about as many pixels as the model's own size, in steps that it makes.
export function sizeOf(ratio, model) {
  const { width, height } = model.defaults;
  const { height: down, width: across } = model.multiples;
  const wide = { own: null, tall: null, square: 1, classic: 4 / 3, wide: 21 / 9 }[ratio];
  const fit = (value, step) => Math.max(step, Math.round(value / step) * step);
  if (ratio === "own") return [width, height];
  if (ratio === "tall") return [fit(height, across), fit(width, down)];
  return [fit(Math.sqrt(width * height * wide), across), fit(Math.sqrt((width * height) / wide), down)];
}

const ownSeconds = (model) => model.defaults.num_frames / model.defaults.fps;

// What is asked of the server for settings like those in the draft; files are left out where only a guess is wanted.
export function settings(from, model) {
  const [width, height] = from.width && from.height ? [from.width, from.height] : sizeOf(from.ratio, model);
  const asked = { model: model.id, size: `${width}x${height}` };
  if (from.negative?.trim()) asked.negative_prompt = from.negative;
  if (from.quality === "draft") asked.draft = true;
  const steps = from.steps ?? (from.quality === "final" ? FINAL * model.defaults.steps : null);
  if (steps) asked.num_inference_steps = steps;
  if (from.guidance !== null && from.guidance !== undefined) asked.guidance_scale = from.guidance;
  return asked;
}

function request(model) {
  const asked = { ...settings(draft, model), prompt: draft.expanded ?? draft.prompt, seconds: String(draft.seconds ?? ownSeconds(model)) };
  if (draft.loop) asked.loop = true;
  if (draft.first) asked.input_reference = draft.first.file;
  if (draft.last) asked.last_frame = draft.last.file;
  if (draft.keys.length) asked.keyframes = draft.keys.map((each) => ({ time: each.time, image: each.file }));
  return asked;
}

// The same without what a guess does not need.
const planned = ({ input_reference, last_frame, keyframes, prompt, ...rest }) => ({ ...rest, prompt: prompt.trim() || "-" });

// The place; returns what ends it.
export function compose(root) {
  const form = h("form", { class: "composer card" });
  const side = h("div", { class: "side" });
  const newest = h("section", { class: "recent" });
  fill(root, h("h1", { class: "hidden" }, t("place.create")), form, h("div", { class: "column" }, side, newest));
  const use = (text) => {
    prefill({ prompt: text, expanded: null });
    draw();
    form.querySelector("textarea").focus();
  };
  const ends = [queue(side, SAMPLES.map((each) => t(each)), use), recent(newest)];
  let drawn = false;
  const draw = () => {
    drawn = state.models.length > 0;
    if (drawn) drawForm(form, modelOf(draft.model), draw);
    else fill(form, h("p", { class: "quiet" }, t(state.offline ? "offline" : "loading")));
  };
  const paste = async (event) => {
    const file = [...(event.clipboardData?.files ?? [])][0];
    if (file) await place(file).then(draw);
  };
  const place = async (file) => {
    try {
      const found = await readable(file);
      if (!draft.first) draft.first = found;
      else if (!draft.last && found.kind === "image") draft.last = found;
      else draft.keys.push({ ...found, time: 1 });
    } catch (error) {
      toast(error.message);
    }
  };
  dropPlace(form, async (files) => {
    for (const file of files) await place(file);
    draw();
  });
  document.addEventListener("paste", paste);
  draw();
  ends.push(listen(() => drawn || draw()), () => document.removeEventListener("paste", paste));
  return () => ends.forEach((end) => end());
}

function drawForm(form, model, redraw) {
  const change = (name, after) => (event) => {
    const { type, value, checked } = event.target;
    draft[name] = type === "checkbox" ? checked : type === "number" || type === "range" ? (value === "" ? null : Number(value)) : value;
    keep();
    after?.();
    foretell();
  };
  const foretell = forecast(form, () => planned(request(model)));
  fill(form,
    promptPart(model, change, redraw),
    framesPart(redraw),
    shapePart(model, redraw),
    lengthPart(model, change),
    h("div", { class: "pair" }, choice(t("quality"), QUALITIES.map((each) => [each, t(`quality.${each}`), t(`quality.${each}.why`)]), draft.quality, (value) => ((draft.quality = value), keep(), foretell())),
      choice(t("count"), [1, 2, 4].map((each) => [each, String(each), t("count.n", { n: each })]), draft.count, (value) => ((draft.count = value), keep()))),
    seedPart(change),
    morePart(model, change, redraw),
    h("div", { class: "go" },
      h("p", { class: "forecast", role: "status" }),
      h("button", { class: "button first big", type: "submit" }, icon("play"), h("span", {}, t("make"))),
    ),
  );
  form.onsubmit = (event) => {
    event.preventDefault();
    submit(form, model);
  };
  form.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  };
  foretell();
}

function promptPart(model, change, redraw) {
  const area = areaFor(draft.prompt, { required: true, rows: 4, class: "main", placeholder: t("prompt.example"), oninput: change("prompt") });
  const expand = button(t("expand"), "expand", async () => {
    if (!draft.prompt.trim()) return area.focus();
    expand.disabled = true;
    const found = await attempt(() => call("/v1/prompts/expand", "POST", { prompt: draft.prompt, model: model.id }));
    expand.disabled = false;
    if (!found) return;
    if (found.expanded === draft.prompt) toast(t("expand.same"));
    prefill({ expanded: found.expanded });
    redraw();
  }, { class: "button plain" });
  const parts = [field(t("prompt"), area, { class: "field prompt" }), h("div", { class: "row spread" }, expand, h("kbd", { class: "quiet" }, t("keys.make")))];
  if (draft.expanded !== null) {
    parts.splice(1, 0, h("div", { class: "expanded" },
      field(t("expanded"), areaFor(draft.expanded, { oninput: change("expanded") })),
      button(t("expand.drop"), "close", () => (prefill({ expanded: null }), redraw()), { class: "button plain" })));
  }
  const negative = areaFor(draft.negative, { rows: 2, oninput: change("negative") });
  parts.push(h("details", { open: draft.negative !== "", ontoggle: () => grow(negative) }, h("summary", {}, t("negative")), field(t("negative.label"), negative)));
  return parts;
}

function framesPart(redraw) {
  const set = (name) => (given) => ((draft[name] = given), redraw());
  const tiles = [tile(t("frame.first"), draft.first, set("first"))];
  draft.keys.forEach((each, place) => {
    const box = tile(t("frame.key.n", { n: place + 1 }), each, () => (draft.keys.splice(place, 1), redraw()));
    const time = h("input", { type: "number", min: 0, step: 0.1, value: each.time, "aria-label": t("frame.time", { n: place + 1 }), oninput: () => (each.time = Number(time.value)) });
    tiles.push(h("div", { class: "keyed" }, box, time));
  });
  if (draft.keys.length < 4) tiles.push(tile(t("frame.key"), null, (given) => (draft.keys.push({ ...given, time: 1 }), redraw())));
  tiles.push(tile(t("frame.last"), draft.last, set("last")));
  return h("fieldset", { class: "frames" }, h("legend", {}, t("frames")), h("div", { class: "tiles" }, tiles), h("p", { class: "quiet small" }, t("frames.why")));
}

function shapePart(model, redraw) {
  const choices = RATIOS.map((ratio) => {
    const [width, height] = sizeOf(ratio, model);
    const scale = 24 / Math.max(width, height);
    const box = h("i", { style: { width: `${width * scale}px`, height: `${height * scale}px` } });
    return [ratio, [h("span", { class: "shape" }, box), h("small", {}, t(`ratio.${ratio}`))], `${t(`ratio.${ratio}`)}, ${width} × ${height}`];
  });
  return choice(t("ratio"), choices, draft.width ? null : draft.ratio, (value) => (prefill({ ratio: value, width: null, height: null }), redraw()), "shapes");
}

function lengthPart(model, change) {
  const own = ownSeconds(model);
  const value = draft.seconds ?? Math.round(own * 10) / 10;
  const shown = h("output", {}, duration(value));
  const range = h("input", { type: "range", min: Math.max(0.5, Math.round(own * 2) / 8), max: Math.ceil(own * 6), step: 0.1, value, oninput: (event) => {
    shown.textContent = duration(event.target.value);
    change("seconds")(event);
  } });
  return h("div", { class: "length" }, field(t("length"), range), shown);
}

function seedPart(change) {
  const input = h("input", { type: "number", min: 0, step: 1, value: draft.seed ?? "", placeholder: t("seed.any"), oninput: change("seed") });
  const lock = symbolButton(t("seed.lock"), draft.locked ? "lock" : "open", () => {
    draft.locked = !draft.locked;
    keep();
    lock.setAttribute("aria-pressed", draft.locked);
    fill(lock, icon(draft.locked ? "lock" : "open"));
  }, { "aria-pressed": String(draft.locked) });
  const dice = symbolButton(t("seed.dice"), "dice", () => {
    draft.seed = anySeed();
    input.value = draft.seed;
    keep();
  });
  return h("div", { class: "seed" }, field(t("seed"), input), dice, lock);
}

function morePart(model, change, redraw) {
  const number = (name, text, more) => field(text, h("input", { type: "number", value: draft[name] ?? "", oninput: change(name), ...more }));
  const { steps, guidance } = model.defaults;
  const [width, height] = sizeOf(draft.ratio, model);
  const models = state.models.length < 2 ? null : field(t("model"), h("select", { onchange: (event) => (prefill({ ...draft, model: event.target.value, seconds: null, width: null, height: null, steps: null }), redraw()) },
    state.models.map((each) => h("option", { value: each.id, selected: each.id === model.id }, each.id))));
  const { height: down, width: across } = model.multiples;
  return h("details", { class: "more" }, h("summary", {}, t("more")),
    h("div", { class: "grid" }, models,
      number("steps", t("steps"), { min: 1, max: 1000, placeholder: steps }),
      number("guidance", t("guidance"), { step: 0.1, placeholder: guidance }),
      number("width", t("width"), { min: across, step: 2, placeholder: width }),
      number("height", t("height"), { min: down, step: 2, placeholder: height })),
    h("label", { class: "check" }, h("input", { type: "checkbox", checked: draft.loop, onchange: change("loop") }), t("loop.make")));
}

// Shows the planner's prediction for what is asked, a moment after it last changed; the newest question wins.
export function forecast(form, asked) {
  let timer = 0;
  let newest = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const mine = (newest += 1);
      const line = form.querySelector(".forecast");
      try {
        const plan = await reached(call("/v1/plan", "POST", asked()));
        if (mine !== newest) return;
        fill(line, plan.predicted.fits ? t("forecast", { s: duration(plan.predicted.seconds.total), memory: bytes(plan.predicted.peak_bytes) }) : plan.predicted.reason);
        line.classList.toggle("bad", !plan.predicted.fits);
      } catch (error) {
        if (mine !== newest) return;
        fill(line, error instanceof Refused && error.status === 400 ? error.message : "");
        line.classList.add("bad");
      }
    }, 250);
  };
}

async function submit(form, model) {
  const go = form.querySelector("[type=submit]");
  go.disabled = true;
  if (!draft.locked || draft.seed === null) draft.seed = anySeed();
  form.querySelector(".seed input").value = draft.seed;
  keep();
  for (let place = 0; place < draft.count; place += 1) {
    const made = await attempt(() => make("/v1/videos", { ...request(model), seed: draft.seed + place }));
    if (!made) break;
    take(made);
    if (place === 0) watch(made.id);
  }
  go.disabled = false;
}
