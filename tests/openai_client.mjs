// What an unmodified OpenAI JavaScript client does against a server: node openai_client.mjs URL, beside its node_modules.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import http from "node:http";

const { default: OpenAI, toFile } = createRequire(process.cwd() + "/")("openai");
const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 1 });
const TINY = { prompt: "a red ball", size: "64x64", num_frames: 5, num_inference_steps: 2, seed: 3 };

async function done(video) {
  let found = video;
  while (found.status === "queued" || found.status === "in_progress") {
    await new Promise((resolve) => setTimeout(resolve, 100));
    found = await client.videos.retrieve(video.id);
  }
  assert.equal(found.status, "completed", JSON.stringify(found));
  return found;
}

async function bytes(video, query) {
  return Buffer.from(await (await client.videos.downloadContent(video.id, query)).arrayBuffer());
}

const video = await done(await client.videos.create(TINY));
assert.equal(video.progress, 100);
assert.equal(video.seconds, "0.625");
const data = await bytes(video);
assert.equal(data.subarray(4, 8).toString(), "ftyp");
assert.equal((await bytes(video, { variant: "thumbnail" })).subarray(0, 4).toString(), "RIFF");

const remixed = await client.videos.remix(video.id, { prompt: "a blue ball", num_inference_steps: 4 });
assert.equal(remixed.remixed_from_video_id, video.id);
const more = { num_frames: 4, num_inference_steps: 2 };
const made = [remixed];
if (client.videos.extend) {
  made.push(await client.videos.extend({ prompt: "on", video: { id: video.id }, ...more }));
  made.push(await client.videos.extend({ prompt: "on", video: await toFile(data, "clip.mp4"), ...more }));
  made.push(await client.videos.edit({ prompt: "blue", video: { id: video.id }, num_inference_steps: 4 }));
}
const keyframes = [{ frame: 4, image: await toFile(await bytes(video, { variant: "thumbnail" }), "a.webp") }];
made.push(await client.videos.create({ ...TINY, keyframes }));
for (const each of made) await done(each);

const listed = [];
for await (const each of client.videos.list({ limit: 2, order: "asc" })) listed.push(each.id);
assert.deepEqual(listed.slice(-made.length - 1), [video, ...made].map((each) => each.id));

await assert.rejects(client.videos.create({ prompt: "x", size: "833x481" }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "size");
  assert.ok(error.requestID);
  return true;
});
await assert.rejects(client.videos.retrieve("video_none"), (error) => error instanceof OpenAI.NotFoundError);
const waiting = await client.videos.create({ ...TINY, num_frames: 17, num_inference_steps: 200 });
await assert.rejects(client.videos.downloadContent(waiting.id), (error) => error instanceof OpenAI.ConflictError);
await client.videos.delete(waiting.id);

// Retries: what stands between answers 503 once, and the client comes again.
let turned = 0;
const gate = http.createServer((request, response) => {
  if (turned++ === 0) return response.writeHead(503, { "retry-after": "1" }).end("{}");
  const onward = http.request(url + request.url, { method: request.method }, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.pipe(response);
  });
  request.pipe(onward);
});
await new Promise((resolve) => gate.listen(0, "127.0.0.1", resolve));
const behind = new OpenAI({ baseURL: `http://127.0.0.1:${gate.address().port}/v1`, apiKey: "none", maxRetries: 2 });
assert.equal((await behind.videos.retrieve(video.id)).id, video.id);
assert.equal(turned, 2);
gate.close();

const picture = await client.images.generate({ prompt: "a ball", num_inference_steps: 2 });
assert.ok(picture.data[0].b64_json);
const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.deepEqual(models, ["demo"]);
for (const each of [video, ...made]) {
  const gone = await client.videos.delete(each.id);
  assert.ok(gone.deleted && gone.object === "video.deleted");
}
console.log("everything is as it should be");
process.exit(0);
