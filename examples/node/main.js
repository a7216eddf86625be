// Text from a compressed folder in Node: node examples/node/main.js FOLDER [PROMPT] [--tokens N] [--json]
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

import { describe, generate, Speed, TextStream } from "../generate.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { tokens: { type: "string", default: "64" }, json: { type: "boolean", default: false } },
});
const [folder, prompt = "The capital of France is"] = positionals;
const count = Number(values.tokens);
if (!folder || !Number.isInteger(count) || count < 1) {
  console.error("usage: node examples/node/main.js FOLDER [PROMPT] [--tokens N] [--json]   (N: 1 or more)");
  process.exit(2);
}

const read = async (name) => JSON.parse(await readFile(join(folder, name), "utf8"));
const loading = performance.now();
const tokenizer = new Tokenizer(await read("tokenizer.json"), await read("tokenizer_config.json"));
const session = await ort.InferenceSession.create(join(folder, "model.onnx"), { logSeverityLevel: 3 });
const generation = await read("generation_config.json").catch(() => ({}));
const model = describe(session, await read("config.json"), generation);
const loadMs = performance.now() - loading;

const { ids } = tokenizer.encode(prompt);
const stream = new TextStream(tokenizer);
const speed = new Speed();
if (!values.json) process.stdout.write(prompt);
for await (const token of generate(ort, session, model, ids, count)) {
  speed.tick();
  const piece = stream.add(token);
  if (!values.json) process.stdout.write(piece);
}
const figures = { loadMs, firstTokenMs: speed.firstTokenMs, tokensPerSecond: speed.tokensPerSecond };
const peakMB = (process.resourceUsage().maxRSS * 1024) / 1e6;
if (values.json) {
  console.log(JSON.stringify({ prompt: ids, tokens: stream.ids, ...figures, peakMB }));
} else {
  const rate = speed.tokensPerSecond?.toFixed(1) ?? "-";
  console.log(`\n\nloaded in ${loadMs.toFixed(0)} ms, first token ${speed.firstTokenMs.toFixed(0)} ms, ${rate} tokens/s`);
}
