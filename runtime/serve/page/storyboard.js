// Storyboard: cards on a timeline. Each has a prompt, and perhaps a picture or clip that it begins with; what stands
// between two cards is the model's to fill. Cards move and stretch by pointer and by keys alike.

import { content, file, make } from "./api.js";
import { modelOf, forecast, settings, sizeOf } from "./compose.js";
import { areaFor, button, choice, duration, field, fill, fresh, h, icon, symbolButton, toast } from "./dom.js";
import { dropPlace, readable, shownFile, tile } from "./media.js";
import { queue, watch } from "./queue.js";
import { t } from "./texts.js";
import { attempt, listen, state, take, videos } from "./videos.js";

const STEP = 0.1; // seconds: what a key moves, and what a pointer snaps to
const SHORTEST = 0.3;
const KEPT = "storyboard";

// Cards in the order in which they were made; `file` does not outlive a reload.
const board = { cards: [], chosen: null, ratio: "own", quality: "standard", ...JSON.parse(sessionStorage.getItem(KEPT) ?? "{}") };
const keep = () => sessionStorage.setItem(KEPT, JSON.stringify({ ...board, cards: board.cards.map(({ given, ...rest }) => rest) }));
const round = (value) => Math.round(value * 10) / 10;
const inOrder = () => [...board.cards].sort((a, b) => a.from - b.from);
const end = () => Math.max(0, ...board.cards.map((each) => each.to));

// How far a card may reach: up to its neighbours.
function room(card) {
  const others = inOrder().filter((each) => each !== card);
  const before = others.filter((each) => each.to <= card.from + STEP / 2).at(-1);
  const after = others.find((each) => each.from >= card.to - STEP / 2);
  return [before?.to ?? 0, after?.from ?? Infinity];
}

// Moves a card by seconds, or one of its edges; it stops at its neighbours.
export function shift(card, by, edge = null) {
  const [least, most] = room(card);
  if (edge === "from") card.from = round(Math.min(Math.max(card.from + by, least), card.to - SHORTEST));
  else if (edge === "to") card.to = round(Math.max(Math.min(card.to + by, most), card.from + SHORTEST));
  else {
    const allowed = Math.min(Math.max(by, least - card.from), most - card.to);
    card.from = round(card.from + allowed);
    card.to = round(card.to + allowed);
  }
}

function request(model) {
  const asked = settings({ ratio: board.ratio, quality: board.quality }, model);
  asked.storyboard = inOrder().map((card) => {
    const plain = { from: card.from, to: card.to, prompt: card.prompt };
    if (card.given) plain[card.given.kind === "image" ? "image" : "clip"] = card.given.file;
    return plain;
  });
  return asked;
}

// The place; returns what ends it.
export function storyboard(root) {
  const form = h("form", { class: "board card" });
  const side = h("div", { class: "side" });
  fill(root, h("div", { class: "title" }, h("h1", {}, t("place.storyboard")), h("p", { class: "quiet" }, t("board.why"))), form, h("div", { class: "column" }, side));
  const ends = [queue(side)];
  let drawn = false;
  const draw = () => {
    drawn = state.models.length > 0;
    if (!drawn) return fill(form, h("p", { class: "quiet" }, t("loading")));
    return drawBoard(form, modelOf(null));
  };
  draw();
  ends.push(listen(() => drawn || draw()));
  return () => ends.forEach((each) => each());
}

function drawBoard(form, model) {
  const each = round(Math.max(0.6, model.defaults.num_frames / model.defaults.fps));
  const lane = h("div", { class: "lane", role: "group", "aria-label": t("board.lane") });
  const desk = h("div", { class: "desk" });
  const foretell = forecast(form, () => {
    const asked = request(model);
    return { ...asked, storyboard: asked.storyboard.map(({ from, to, prompt }) => ({ from, to, prompt: prompt.trim() || "-" })) };
  });
  const at = { lane, desk, each, model, foretell };
  at.draw = () => (keep(), drawLane(at), drawDesk(at), board.cards.length && foretell());
  at.add = (from = null, values = {}) => {
    const start = round(from ?? end());
    const card = { id: fresh("card") + Date.now(), from: start, to: round(start + each), prompt: "", ...values };
    const after = inOrder().find((other) => other.to > start);
    if (after && after.from < card.to) {
      const later = end();
      Object.assign(card, after.from - start >= SHORTEST ? { to: after.from } : { from: later, to: round(later + each) });
    }
    board.cards.push(card);
    board.chosen = card.id;
    at.draw();
    desk.querySelector("textarea")?.focus();
  };
  lane.addEventListener("dblclick", (event) => {
    if (event.target !== lane && !event.target.matches(".gap")) return;
    at.add(((event.clientX - lane.getBoundingClientRect().left) / lane.clientWidth) * span(at));
  });
  dropPlace(lane, (files, video) => dropped(at, files, video));
  fill(form,
    h("div", { class: "scroller", tabIndex: 0, role: "region", "aria-label": t("board.lane") }, ruler(at), lane),
    h("div", { class: "row spread" }, button(t("board.add"), "add", () => at.add()), h("p", { class: "quiet small" }, t("board.keys"))),
    desk,
    h("div", { class: "pair" },
      choice(t("ratio"), ["own", "tall", "square"].map((name) => [name, t(`ratio.${name}`), sizeOf(name, model).join(" × ")]), board.ratio, (value) => ((board.ratio = value), at.draw())),
      choice(t("quality"), ["draft", "standard", "final"].map((name) => [name, t(`quality.${name}`)]), board.quality, (value) => ((board.quality = value), at.draw()))),
    h("div", { class: "go" }, h("p", { class: "forecast", role: "status" }), h("button", { class: "button first big", type: "submit" }, icon("play"), h("span", {}, t("board.make")))),
  );
  form.onsubmit = (event) => {
    event.preventDefault();
    submit(form, model);
  };
  at.draw();
}

const span = (at) => Math.max(end() + at.each * 0.75, at.each * 4);

function ruler(at) {
  const element = h("div", { class: "ruler", "aria-hidden": "true" });
  at.ruler = element;
  return element;
}

function drawLane(at) {
  const whole = span(at);
  const every = [0.5, 1, 2, 5, 10, 30].find((value) => whole / value <= 12) ?? 60;
  const marks = Array.from({ length: Math.floor(whole / every) + 1 }, (_, n) => h("span", { style: { left: `${((n * every) / whole) * 100}%` } }, duration(n * every)));
  fill(at.ruler, marks);
  const ordered = inOrder();
  const pieces = [];
  ordered.forEach((card, place) => {
    const before = place ? ordered[place - 1].to : 0;
    if (card.from - before > STEP / 2) pieces.push(gap(before, card.from, whole, place === 0));
    pieces.push(cardElement(at, card, place, whole));
  });
  if (!ordered.length) pieces.push(h("p", { class: "hint" }, t("board.empty")));
  const focused = document.activeElement?.dataset?.key;
  fill(at.lane, pieces);
  if (focused) at.lane.querySelector(`[data-key="${focused}"]`)?.focus();
}

function gap(from, to, whole, first) {
  return h("div", { class: "gap", style: { left: `${(from / whole) * 100}%`, width: `${((to - from) / whole) * 100}%` } }, h("span", {}, t(first ? "board.before" : "board.gap")));
}

function cardElement(at, card, place, whole) {
  const name = t("board.card", { n: place + 1, from: card.from, to: card.to, prompt: card.prompt || t("board.unwritten") });
  const body = h("button", { type: "button", class: "body", "aria-label": name, "data-key": card.id, "aria-pressed": String(board.chosen === card.id), onclick: () => ((board.chosen = card.id), at.draw()) },
    card.given && shownFile(card.given), h("span", { class: "prompt", dir: "auto" }, card.prompt || t("board.unwritten")), h("small", {}, `${card.from}–${card.to} s`));
  const element = h("div", { class: `piece${board.chosen === card.id ? " chosen" : ""}`, style: { left: `${(card.from / whole) * 100}%`, width: `${((card.to - card.from) / whole) * 100}%` } },
    handle(at, card, "from"), body, handle(at, card, "to"));
  body.addEventListener("keydown", (event) => moved(at, card, event, null));
  drag(at, body, card, null, whole);
  dropPlace(element, (files, video) => dropped(at, files, video, card));
  return element;
}

function handle(at, card, edge) {
  const element = h("div", { class: `edge ${edge}`, role: "slider", tabIndex: 0, "data-key": `${card.id}-${edge}`, "aria-label": t(`board.${edge}`), "aria-valuenow": card[edge], "aria-valuemin": 0, "aria-valuemax": round(span(at)), "aria-valuetext": duration(card[edge]) });
  element.addEventListener("keydown", (event) => moved(at, card, event, edge));
  drag(at, element, card, edge, span(at));
  return element;
}

// Keys: arrows move by a tenth of a second, with Shift by one; Alt with arrows moves a card's end; Delete takes it away.
function moved(at, card, event, edge) {
  const sign = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
  if (sign) shift(card, sign * (event.shiftKey ? 1 : STEP), edge ?? (event.altKey ? "to" : null));
  else if (event.key === "Delete" || event.key === "Backspace") removeCard(at, card);
  else return;
  event.preventDefault();
  at.draw();
}

function drag(at, element, card, edge, whole) {
  element.addEventListener("pointerdown", (down) => {
    if (down.button) return;
    const { from, to } = card;
    const perPixel = whole / at.lane.clientWidth;
    let far = false;
    const move = (event) => {
      far ||= Math.abs(event.clientX - down.clientX) > 3;
      if (!far) return;
      const by = (event.clientX - down.clientX) * perPixel;
      Object.assign(card, { from, to });
      shift(card, round(by), edge);
      const piece = element.closest(".piece");
      piece.style.setProperty("left", `${(card.from / whole) * 100}%`);
      piece.style.setProperty("width", `${((card.to - card.from) / whole) * 100}%`);
    };
    const up = () => {
      element.removeEventListener("pointermove", move);
      if (far) {
        board.chosen = card.id;
        at.draw();
      }
    };
    element.setPointerCapture(down.pointerId);
    element.addEventListener("pointermove", move);
    element.addEventListener("lostpointercapture", up, { once: true });
  });
}

function removeCard(at, card) {
  const place = board.cards.indexOf(card);
  board.cards.splice(place, 1);
  board.chosen = board.cards[0]?.id ?? null;
  toast(t("board.removed"), t("undo"), () => (board.cards.splice(place, 0, card), (board.chosen = card.id), at.draw()));
}

function drawDesk(at) {
  const card = board.cards.find((each) => each.id === board.chosen);
  if (!card) return fill(at.desk);
  if (at.desk.dataset.card === card.id && at.desk.contains(document.activeElement)) return null;
  at.desk.dataset.card = card.id;
  const time = (edge) => h("input", { type: "number", step: STEP, min: 0, value: card[edge], onchange: (event) => (shift(card, Number(event.target.value) - card[edge], edge), (event.target.value = card[edge]), at.draw()) });
  const area = areaFor(card.prompt, { placeholder: t("prompt.example"), oninput: () => ((card.prompt = area.value), at.draw()) });
  const place = inOrder().indexOf(card) + 1;
  return fill(at.desk,
    h("h2", {}, t("board.n", { n: place })),
    h("div", { class: "desk-grid" },
      tile(t("board.media"), card.given ?? null, (given) => ((card.given = given), delete at.desk.dataset.card, at.draw())),
      field(t("board.prompt"), area),
      h("div", { class: "times" }, field(t("board.from"), time("from")), field(t("board.to"), time("to")),
        symbolButton(t("board.remove"), "bin", () => (removeCard(at, card), at.draw())))),
  );
}

// A file or a clip of the library falls on a card, or on the lane: then it makes a card.
async function dropped(at, files, video, card = null) {
  try {
    const blob = files[0] ?? (video && new File([await file(content(video))], `${video}.mp4`, { type: "video/mp4" }));
    const given = await readable(blob);
    if (card) Object.assign(card, { given });
    else at.add(null, { given, prompt: videos.get(video)?.prompt ?? "" });
    delete at.desk.dataset.card;
    at.draw();
  } catch (error) {
    toast(error.message);
  }
}

async function submit(form, model) {
  const unwritten = inOrder().find((each) => !each.prompt.trim());
  if (!board.cards.length || unwritten) {
    toast(t(unwritten ? "board.write" : "board.none"));
    return;
  }
  const go = form.querySelector("[type=submit]");
  go.disabled = true;
  const made = await attempt(() => make("/v1/videos", request(model)));
  go.disabled = false;
  if (!made) return;
  take(made);
  watch(made.id);
}
