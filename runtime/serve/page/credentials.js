// The badge that says whether a file carries Content Credentials, and what they say when it is opened.

import { call } from "./api.js";
import { ask, fill, h, icon } from "./dom.js";
import { t } from "./texts.js";
import { reached } from "./videos.js";

// An element that asks the server about a video's file, and then says what it found.
export function credentials(video) {
  const box = h("span", { role: "status" });
  reached(call("/v1/provenance", "POST", { video: { id: video.id } })).then(
    (found) => {
      const kind = found.state === "valid" ? "" : found.state === "tampered" ? "wrong" : "off";
      const parts = [icon("seal"), t(`credentials.${found.state}`)];
      fill(box, kind === "off" ? h("span", { class: "badge off" }, parts) : h("button", { type: "button", class: `badge ${kind}`, onclick: () => open(found) }, parts));
    },
    () => fill(box, h("span", { class: "badge off" }, icon("seal"), t("credentials.missing"))),
  );
  return box;
}

function open(found) {
  const made = found.made ?? {};
  const rows = [
    [t("credentials.signer"), `${found.signer ?? "–"} (${t(found.trusted ? "credentials.trusted" : "credentials.own")})`],
    [t("credentials.by"), found.generator], [t("model"), made.model], [t("seed"), made.seed], [t("settings"), made.settings_hash],
    [t("credentials.from"), found.ingredients?.length || null], [t("credentials.wrong"), found.problems?.join(", ")],
  ].filter(([, value]) => value !== undefined && value !== null && value !== "");
  ask(t("credentials"), () => h("div", { class: "stack facts" },
    h("p", { class: "quiet" }, t("credentials.why")),
    h("dl", {}, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { dir: "auto" }, String(value)))))));
}
