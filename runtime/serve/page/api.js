// The server: requests with the key where it wants one, its events, and the addresses of pictures and videos.

import { ask, field, h } from "./dom.js";
import { t } from "./texts.js";

const KEY = "key"; // in sessionStorage: it is this tab's, and gone with it
const LARGEST = 24 * 2 ** 20; // bytes of files that travel inside JSON

// An answer that is no success, in the server's words.
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = error?.code;
    this.param = error?.param;
  }
}

// No answer at all.
export class Lost extends Error {}

const key = () => sessionStorage.getItem(KEY);
const headers = () => (key() ? { authorization: `Bearer ${key()}` } : {});

let asking = null;

// Asks for the key, once for all who wait for it.
function askKey(wrong) {
  asking ??= ask(t("key.title"), (close) => {
    const input = h("input", { type: "password", autocomplete: "off", required: true, spellcheck: false });
    return h("form", { class: "stack", onsubmit: (event) => (event.preventDefault(), close(input.value.trim())) },
      h("p", { class: "quiet" }, t(wrong ? "key.wrong" : "key.why")),
      field(t("key.label"), input),
      h("button", { class: "button first" }, t("key.use")),
    );
  }).then((given) => {
    asking = null;
    if (given) sessionStorage.setItem(KEY, given);
    return given;
  });
  return asking;
}

async function send(path, options = {}) {
  for (;;) {
    const used = key();
    let answer;
    try {
      answer = await fetch(path, { ...options, headers: { ...options.headers, ...headers() } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost(t("lost"));
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => null);
    if (answer.status !== 401) throw new Refused(answer.status, told?.error);
    if (used !== key()) continue; // somebody else was told a new one meanwhile
    if (!(await askKey(used !== null))) throw new Refused(401, told?.error);
  }
}

// The JSON that a path answers with.
export async function call(path, method = "GET", body = undefined, options = {}) {
  const asked = { method, ...options };
  if (body instanceof FormData) asked.body = body;
  else if (body !== undefined) {
    asked.body = JSON.stringify(body);
    asked.headers = { "content-type": "application/json" };
  }
  return (await send(path, asked)).json();
}

// Makes a video: `fields` may hold files. Those at the top travel as a form, those deeper as data: URLs.
export async function make(path, fields) {
  const plain = await inlined(fields, true);
  if (!Object.values(plain).some((value) => value instanceof Blob)) return call(path, "POST", plain);
  const form = new FormData();
  for (const [name, value] of Object.entries(plain)) {
    if (value === undefined || value === null) continue;
    form.append(name, value instanceof Blob ? value : typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return call(path, "POST", form);
}

async function inlined(value, top = false) {
  if (Array.isArray(value)) return Promise.all(value.map((each) => inlined(each)));
  if (value instanceof Blob) {
    if (value.size > LARGEST) throw new Refused(413, { message: t("file.large", { n: LARGEST / 2 ** 20 }) });
    return dataUrl(value);
  }
  if (value === null || typeof value !== "object") return value;
  const pairs = Object.entries(value).map(async ([name, each]) => [name, top && each instanceof Blob ? each : await inlined(each)]);
  return Object.fromEntries(await Promise.all(pairs));
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// Yields {event, data, id} of a job as they come; `last` is the id after which to go on. Ends with the stream.
export async function* events(video, last, signal) {
  const answer = await send(`/v1/videos/${video}/events`, { signal, headers: last ? { "last-event-id": last } : {} });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Lost(t("lost"));
    });
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const found = { event: "message", data: "", id: null };
      for (const line of part.split("\n")) {
        const at = line.indexOf(":");
        if (at > 0) found[line.slice(0, at)] = line.slice(at + 1).trimStart();
      }
      if (found.data) yield { ...found, data: JSON.parse(found.data) };
    }
  }
}

const kept = new Map(); // path -> blob: URL, where a key is needed
const KEPT = 240;

// The address of a file for <img> and <video>: its own where no key is needed, otherwise a blob's.
export async function address(path) {
  if (!key()) return path;
  if (!kept.has(path)) {
    kept.set(path, send(path).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob)));
    kept.get(path).catch(() => kept.delete(path));
    if (kept.size > KEPT) {
      const [oldest, url] = kept.entries().next().value;
      kept.delete(oldest);
      url.then(URL.revokeObjectURL, () => {});
    }
  }
  return kept.get(path);
}

export const content = (id, variant = "video") => `/v1/videos/${id}/content${variant === "video" ? "" : `?variant=${variant}`}`;

export const file = async (path) => (await send(path)).blob();

// Shows a picture when it comes near the window.
export function picture(path, alt = "") {
  const image = h("img", { alt, decoding: "async", loading: "lazy", draggable: false });
  if (!key()) image.src = path;
  else seen(image, () => address(path).then((url) => (image.src = url), () => {}));
  return image;
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    entry.target.dispatchEvent(new Event("near"));
  }
}, { rootMargin: "400px" });

function seen(element, act) {
  element.addEventListener("near", act, { once: true });
  near.observe(element);
}

// Saves a file under a name.
export async function download(path, name) {
  const url = URL.createObjectURL(await file(path));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
