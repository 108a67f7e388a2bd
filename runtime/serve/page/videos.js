// What the server knows of our videos, kept fresh: events of the one that is watched, polls of the rest.

import { Lost, Refused, call, events } from "./api.js";
import { toast } from "./dom.js";
import { t } from "./texts.js";

const FIRST = 40; // videos in the first page: enough to fill a window
const PAGE = 100;
const AGAIN = 4000; // ms between two looks at what other tabs made
const ACTIVE = ["queued", "in_progress"];

export const videos = new Map(); // id -> video, newest first by `list`
export const previews = new Map(); // id -> data: URL of the latest look
export const state = { loaded: false, all: false, offline: false, models: [] };
const listeners = new Set();

// Calls `heard` after each change; returns what ends that.
export function listen(heard) {
  listeners.add(heard);
  return () => listeners.delete(heard);
}

let told = false;
function tell() {
  if (told) return;
  told = true;
  queueMicrotask(() => {
    told = false;
    for (const heard of [...listeners]) heard();
  });
}

export const isActive = (video) => ACTIVE.includes(video.status);
export const list = () => [...videos.values()].sort((a, b) => b.created_at - a.created_at || b.order - a.order);
export const active = () => list().filter(isActive).sort((a, b) => (b.status === "in_progress") - (a.status === "in_progress") || (a.queue_position ?? 0) - (b.queue_position ?? 0) || a.order - b.order);

let order = 0;

// Takes a video's newest object; one that has ended never goes back.
export function take(video, newest = true) {
  const known = videos.get(video.id);
  if (known && !isActive(known) && isActive(video)) return known;
  const merged = { ...known, ...video, order: known?.order ?? (newest ? (order += 1) : -(order += 1)) };
  videos.set(video.id, merged);
  if (!isActive(merged)) previews.delete(video.id);
  tell();
  return merged;
}

function drop(id) {
  videos.delete(id);
  tell();
}

function reach(offline) {
  if (state.offline === offline) return;
  state.offline = offline;
  tell();
}

// Runs a request; remembers whether the server could be reached.
export async function reached(promise) {
  try {
    const found = await promise;
    reach(false);
    return found;
  } catch (error) {
    if (error instanceof Lost) reach(true);
    throw error;
  }
}

// Reads the whole library, page after page; the first page is enough to begin.
async function load() {
  let after = "";
  for (let limit = FIRST; ; limit = PAGE) {
    const page = await reached(call(`/v1/videos?limit=${limit}${after}`));
    for (const video of page.data) take(video, false);
    state.loaded = true;
    tell();
    if (!page.has_more || !page.last_id) break;
    after = `&after=${page.last_id}`;
  }
  state.all = true;
  tell();
}

async function look() {
  const page = await reached(call("/v1/videos?limit=20"));
  for (const video of page.data.reverse()) take(video);
}

export async function refresh(id) {
  try {
    return take(await reached(call(`/v1/videos/${id}`)));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) drop(id);
    throw error;
  }
}

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Follows the running video by its events, and goes on after a break where it was; polls while there are none.
async function follow() {
  for (;;) {
    const video = document.hidden ? undefined : active()[0];
    if (!video) {
      await wait(300);
      continue;
    }
    const ended = new AbortController();
    const away = () => document.hidden && ended.abort();
    document.addEventListener("visibilitychange", away);
    // Another may run by now: then this stream gives way.
    const other = listen(() => {
      const first = active()[0];
      if (first?.id !== video.id && video.status === "queued") ended.abort();
    });
    try {
      for await (const found of events(video.id, marks.get(video.id), ended.signal)) {
        reach(false);
        if (found.id) marks.set(video.id, found.id);
        if (found.event === "preview") {
          previews.set(video.id, found.data.image);
          tell();
        } else if (found.data.status === "deleted") drop(video.id);
        else take(found.data);
        if (found.event === "done") break;
      }
      if (videos.has(video.id)) await refresh(video.id);
    } catch (error) {
      if (error instanceof Lost) reach(true);
      await wait(500);
    } finally {
      ended.abort();
      other();
      document.removeEventListener("visibilitychange", away);
    }
  }
}

const marks = new Map(); // id -> id of the last event that came

// Polls what no stream tells of: those that wait, and what other tabs made.
async function poll() {
  let looked = 0;
  for (;;) {
    await wait(document.hidden ? 3000 : active().length ? 1000 : 1500);
    try {
      if (!state.loaded) await load();
      else if (Date.now() - looked > AGAIN || state.offline) {
        looked = Date.now();
        await look();
      }
      for (const video of active().slice(0, 8)) await refresh(video.id);
    } catch {
      await wait(500); // the bar says that the server cannot be reached
    }
  }
}

async function findModels() {
  while (!state.models.length) {
    try {
      state.models = (await reached(call("/v1/models"))).data;
      tell();
    } catch {
      // the bar says so
    }
    if (!state.models.length) await wait(700);
  }
}

// Reads what there is, and keeps it fresh from then on.
export async function start() {
  findModels();
  await load().catch(() => {});
  poll();
  follow();
}

// What can be done to a video. Each tells the person what went wrong, and returns whether it went right.

export async function attempt(work) {
  try {
    return await reached(work());
  } catch (error) {
    toast(error.message);
    return null;
  }
}

export const cancel = (id) => attempt(async () => take(await call(`/v1/videos/${id}/cancel`, "POST")));

const UNDO = 30; // seconds in which a deleted video can be had back

// Deletes videos, and offers them back for a while.
export async function remove(ids) {
  const gone = [];
  for (const id of ids) {
    const video = videos.get(id);
    if (await attempt(() => call(`/v1/videos/${id}?undo=${UNDO}`, "DELETE"))) gone.push(video);
    drop(id);
  }
  if (!gone.length) return;
  toast(t("deleted", { n: gone.length }), t("undo"), async () => {
    for (const { id, order } of gone) {
      const back = await attempt(() => call(`/v1/videos/${id}/restore`, "POST"));
      if (back) videos.set(id, { ...back, order });
    }
    tell();
  }, UNDO / 3);
}
