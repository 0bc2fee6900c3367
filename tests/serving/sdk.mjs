// What OpenAI's package for JavaScript gets from a server; prints it as JSON.
import { createReadStream } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "any", maxRetries: 3 });
const prompt = "a red circle";
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const drawn = await client.images.generate({ prompt, n: 2, seed: 7 });
const types = [];
let completed = "";
for await (const event of await client.images.generate({ prompt, stream: true, partial_images: 2, seed: 7 })) {
  types.push(event.type);
  completed = event.b64_json;
}
const edited = await client.images.edit({ image: createReadStream("image.png"), prompt });
let error = null;
try {
  await client.images.generate({ prompt, size: "1024x1024" });
} catch (caught) {
  error = { status: caught.status, code: caught.code, param: caught.param, has_id: Boolean(caught.requestID) };
}
console.log(
  JSON.stringify({
    models,
    seeds: drawn.data.map((image) => image.seed),
    types,
    completed_equals_generated: completed === drawn.data[0].b64_json,
    edited_bytes: Buffer.from(edited.data[0].b64_json, "base64").length,
    error,
  }),
);
