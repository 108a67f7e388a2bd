// One clip: what it shows, how it was made, what can be made of it.

import { call, content, download } from "./api.js";
import { ask, bytes, button, duration, fill, h, icon, symbolButton, toast } from "./dom.js";
import { pickGrid } from "./compare.js";
import { prefill } from "./compose.js";
import { credentials } from "./credentials.js";
import { connectDialog, isDraft } from "./library.js";
import { extendForm, finishForm, loopForm, remixForm } from "./making.js";
import { frameOf, readable } from "./media.js";
import { player, progressOf, watch } from "./queue.js";
import { strip } from "./strip.js";
import { t } from "./texts.js";
import { attempt, isActive, listen, refresh, remove, videos } from "./videos.js";

const FORMATS = ["mp4", "webm", "gif"];

// The place; returns what ends it.
export function clip(root, id) {
  let shown = "";
  const draw = () => {
    const video = videos.get(id);
    const now = video ? `${video.status} ${Boolean(video.receipt)}` : "gone";
    if (now === shown) return;
    shown = now;
    if (!video) fill(root, h("div", { class: "empty" }, icon("film"), h("h1", {}, t("clip.gone")), h("a", { class: "button", href: "#/library" }, t("place.library"))));
    else if (video.status === "completed") drawClip(root, video);
    else if (isActive(video)) {
      watch(id);
      location.hash = "#/create";
    } else fill(root, h("div", { class: "empty" }, icon("close"), h("h1", {}, t(video.status)), h("p", { class: "quiet" }, progressOf(video)), h("p", { dir: "auto" }, video.prompt)));
  };
  const known = videos.get(id);
  if (known) draw();
  else fill(root, h("p", { class: "quiet" }, t("loading")));
  if (!known?.receipt) refresh(id).then(draw, draw);
  return listen(() => (shown || videos.has(id)) && draw());
}

function drawClip(root, video) {
  const film = player(video);
  const rail = strip(film, video);
  const desk = h("div", { class: "desk", "aria-live": "polite" });
  const part = () => rail.part();
  const forms = {
    remix: () => remixForm(video, part),
    extend: () => extendForm(video, part),
    loop: () => loopForm(video, part),
    finish: () => finishForm(video),
    connect: () => h("div", { class: "stack" }, h("p", { class: "quiet" }, t("connect.with")), pickGrid((other) => connectDialog(video.id, other), video.id)),
    trim: () => trimDesk(video, rail, open),
  };
  const symbols = { remix: "remix", extend: "extend", loop: "loop", connect: "connect", trim: "trim", finish: "finish" };
  const buttons = {};
  function open(name) {
    for (const [each, element] of Object.entries(buttons)) element.setAttribute("aria-expanded", String(each === name));
    if (name === "trim") rail.trim(true);
    fill(desk, h("div", { class: "head" }, h("h2", {}, t(name)), symbolButton(t("close"), "close", () => (fill(desk), buttons[name].setAttribute("aria-expanded", "false"), buttons[name].focus()))), forms[name]());
    desk.querySelector("textarea, input, button:not(.symbol)")?.focus({ preventScroll: true });
    desk.scrollIntoView({ block: "nearest" });
  }
  for (const name of Object.keys(forms)) if (name !== "finish" || isDraft(video)) buttons[name] = button(t(name), symbols[name], () => open(name), { "aria-expanded": "false" });

  fill(root,
    h("a", { class: "back", href: "#/library" }, icon("back"), h("span", {}, t("place.library"))),
    h("div", { class: "show" }, h("div", { class: "screen completed" }, film), rail.element),
    h("aside", {},
      h("h1", { class: "prompt", dir: "auto" }, video.prompt || t("no.prompt")),
      h("div", { class: "row" }, credentials(video), lineage(video)),
      h("div", { class: "actions" }, Object.values(buttons), button(t("use"), "use", () => useDialog(video, film)), h("a", { class: "button", href: `#/compare/${video.id}${video.remixed_from_video_id ? `/${video.remixed_from_video_id}` : ""}` }, icon("compare"), h("span", {}, t("compare")))),
      desk,
      h("div", { class: "row" }, FORMATS.map((format) => button(format, "down", () => save(video, format), { "aria-label": t("download", { format }) })),
        button(t("copy.curl"), "copy", () => copy(asCurl(video))), button(t("copy.python"), "copy", () => copy(asPython(video))),
        button(t("delete"), "bin", () => (remove([video.id]), (location.hash = "#/library")), { class: "button quiet-button" })),
      table(t("settings"), settingsOf(video)),
      receiptOf(video)));
}

function lineage(video) {
  if (!video.remixed_from_video_id) return null;
  return h("a", { class: "chip", href: `#/clip/${video.remixed_from_video_id}` }, t("made.from"));
}

function trimDesk(video, rail, open) {
  return h("div", { class: "stack" }, h("p", { class: "quiet" }, t("trim.why")), rail.inputs(),
    h("div", { class: "row" }, ["extend", "loop", "remix"].map((name) => button(t(`trim.${name}`), null, () => open(name))),
      button(t("trim.save"), "down", () => save(video, "mp4", rail.part()))),
    button(t("trim.all"), "close", () => rail.trim(false), { class: "button plain" }));
}

async function save(video, format, part = null) {
  const [asked, name] = part ? [`&from=${part.from}&to=${part.to}`, `-${part.from}-${part.to}`] : ["", ""];
  await attempt(() => download(`${content(video.id)}?format=${format}${asked}`, `${video.id}${name}.${format}`).then(() => true));
}

async function useDialog(video, film) {
  const how = await ask(t("use"), (close) => h("div", { class: "stack" },
    h("p", { class: "quiet" }, t("use.why")),
    ["settings", "first", "last"].map((each) => button(t(`use.${each}`), null, () => close(each)))));
  if (!how) return;
  const [width, height] = video.size.split("x").map(Number);
  const values = { prompt: video.prompt, expanded: null, negative: video.negative_prompt ?? "", seed: video.seed, locked: true, width, height, steps: video.num_inference_steps, guidance: video.guidance_scale, model: video.model, seconds: Number(video.seconds) };
  if (how === "settings") prefill(values);
  else {
    film.pause();
    prefill({ prompt: video.prompt, expanded: null, [how]: await readable(await frameOf(film, video.id)) });
  }
  location.hash = "#/create";
}

function asked(video) {
  const fields = { prompt: video.prompt, model: video.model, size: video.size, num_frames: video.num_frames, fps: video.fps, num_inference_steps: video.num_inference_steps, guidance_scale: video.guidance_scale, seed: video.seed };
  if (video.negative_prompt) fields.negative_prompt = video.negative_prompt;
  return fields;
}

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// What makes a video of the same settings from a command line; the key is the reader's to fill in.
export function asCurl(video) {
  const lines = [`curl ${location.origin}/v1/videos`, "-H 'content-type: application/json'"];
  if (sessionStorage.getItem("key")) lines.push('-H "authorization: Bearer $KEY"');
  return [...lines, `-d ${shell(JSON.stringify(asked(video)))}`].join(" \\\n  ");
}

// The same with the runtime's own client.
export function asPython(video) {
  const { prompt, ...rest } = asked(video);
  const given = Object.entries(rest).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  const key = sessionStorage.getItem("key") ? ', key="..."' : "";
  return `import runtime\n\nwith runtime.Client(${JSON.stringify(location.origin)}${key}) as client:\n    video = client.create(${[JSON.stringify(prompt), ...given].join(", ")})\n    client.save(client.wait(video), "video.mp4")\n`;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast(t("copied"));
  } catch {
    ask(t("copy.by.hand"), () => h("textarea", { readOnly: true, rows: 8, value: text, "aria-label": t("copy.by.hand") }));
  }
}

function table(title, rows) {
  return h("section", { class: "facts" }, h("h2", {}, title), h("dl", {}, rows.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { dir: "auto" }, value)))));
}

function settingsOf(video) {
  return [
    [t("model"), video.model], [t("size"), video.size.replace("x", " × ")], [t("length"), `${duration(video.seconds)} · ${t("frames.n", { n: video.num_frames, fps: video.fps })}`],
    [t("steps"), video.num_inference_steps], [t("guidance"), video.guidance_scale], [t("seed"), video.seed], [t("negative"), video.negative_prompt],
    [t("kind"), t(`kind.${video.task === "prepend" ? "extend" : video.task}`)],
  ].map(([name, value]) => [name, value === undefined || value === null ? value : String(value)]);
}

const STAGES = ["load", "text", "encode", "denoise", "decode", "save"];

function receiptOf(video) {
  const receipt = video.receipt;
  if (!receipt) return null;
  const stages = STAGES.filter((name) => receipt.stages[name]).map((name) => [name, receipt.stages[name].seconds]);
  const measured = stages.reduce((sum, [name, seconds]) => sum + (name === "load" ? 0 : seconds), 0);
  const peak = Math.max(0, ...Object.values(receipt.stages).map((each) => each.peak_bytes ?? 0));
  const foreseen = receipt.predicted;
  const most = Math.max(...stages.map(([, seconds]) => seconds));
  const exact = receipt.approximations.length === 0;
  const rows = [
    [t("receipt.time"), duration(measured)], [t("receipt.foreseen"), foreseen && duration(foreseen.seconds.total)],
    [t("receipt.peak"), peak ? bytes(peak) : null], [t("receipt.foreseen.peak"), foreseen && bytes(Math.max(...Object.values(foreseen.peak_bytes)))],
    [t("receipt.psnr"), receipt.quality?.measured ? `${receipt.quality.measured.psnr.toFixed(1)} dB` : null],
    [t("receipt.machine"), `${receipt.device} · ${receipt.dtype} · ${receipt.engine}`], [t("receipt.made"), new Date(receipt.created).toLocaleString(document.documentElement.lang)],
    [t("receipt.weights"), receipt.model_hash],
  ];
  return h("section", { class: "receipt" },
    table(t("receipt"), rows),
    h("p", { class: exact ? "exact" : "" }, icon(exact ? "check" : "finish"), exact ? t("receipt.exact") : t("receipt.approximated")),
    h("ul", { class: "notes" }, [...receipt.approximations, ...receipt.notes].map((each) => h("li", { dir: "auto" }, each)),
      receipt.seams.map((each) => h("li", {}, t("receipt.seam", { frame: each.frame, detail: each.detail, fade: each.fade })))),
    h("ul", { class: "stages", "aria-label": t("receipt.stages") }, stages.map(([name, seconds]) => h("li", {}, h("span", {}, t(`stage.${name}`)), h("i", { style: { width: `${Math.max(1, (seconds / most) * 100)}%` } }), h("span", {}, duration(seconds))))),
    Object.entries(receipt.expanded).map(([from, to]) => h("p", { class: "quiet", dir: "auto" }, `${t("expanded")}: ${to}`)));
}
