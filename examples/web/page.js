// The page: loads ../model/ once, then streams text from the prompt. Everything comes from the page's own server.
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

import { describe, generate, Speed, TextStream } from "../generate.js";

const MODEL = new URL("../model/", import.meta.url);
const WEIGHTS = "model.safetensors"; // the graph's external data
const at = (id) => document.getElementById(id);

let stopped = true;

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function get(name, optional = false) {
  const response = await fetch(new URL(name, MODEL));
  if (optional && response.status === 404) return undefined;
  if (!response.ok) throw new Error(`${name}: the server answers ${response.status}; is the folder a compressed one?`);
  return response;
}

const json = async (name, optional) => (await get(name, optional))?.json();

/** The bytes of a file; the bar shows how many are there. */
async function bytes(name) {
  const response = await get(name);
  const size = Number(response.headers.get("content-length"));
  if (!size) throw new Error(`${name}: the server does not say how long it is; use one that sends files as they are.`);
  const whole = new Uint8Array(size);
  let done = 0;
  for await (const part of parts(response.body)) {
    whole.set(part, done);
    done += part.length;
    at("bar").value = done / size;
    say(`loading ${name}: ${(done / 1e6).toFixed(0)} of ${(size / 1e6).toFixed(0)} MB`);
  }
  return whole;
}

async function* parts(body) {
  const reader = body.getReader(); // not every browser iterates over a stream
  for (let part; !(part = await reader.read()).done; ) yield part.value;
}

async function load() {
  const start = performance.now();
  ort.env.logLevel = "error";
  // Threads need a page that its server isolates from other origins; serve.js sends the headers for it.
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  ort.env.wasm.proxy = true; // in a worker, so that the page stays alive meanwhile
  const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
  const [config, generation] = [await json("config.json"), await json("generation_config.json", true)];
  const graph = await bytes("model.onnx");
  const data = await bytes(WEIGHTS);
  say("preparing the graph");
  at("bar").removeAttribute("value");
  const session = await ort.InferenceSession.create(graph, {
    executionProviders: ["wasm"],
    externalData: [{ path: WEIGHTS, data }],
  });
  at("bar").hidden = true;
  at("about").textContent += ` ${(data.length / 1e6).toFixed(0)} MB of weights.`;
  const threads = ort.env.wasm.numThreads;
  const seconds = (performance.now() - start) / 1000;
  document.body.dataset.loadMs = seconds * 1000;
  say(`ready in ${seconds.toFixed(1)} s, ${threads} ${threads === 1 ? "thread" : "threads"}`);
  return { tokenizer, session, model: describe(session, config, generation) };
}

async function write({ tokenizer, session, model }) {
  const prompt = at("prompt").value;
  const { ids } = tokenizer.encode(prompt);
  if (!ids.length) return say("type a few words first");
  const output = at("output");
  output.replaceChildren(Object.assign(document.createElement("em"), { textContent: prompt }));
  const stream = new TextStream(tokenizer);
  const speed = new Speed();
  say("reading the prompt");
  for await (const token of generate(ort, session, model, ids, Number(at("count").value))) {
    speed.tick();
    output.append(stream.add(token));
    const rate = speed.tokensPerSecond === undefined ? "" : `, ${speed.tokensPerSecond.toFixed(1)} tokens/s`;
    say(`${speed.tokens} tokens, first after ${speed.firstTokenMs.toFixed(0)} ms${rate}`);
    if (stopped) break;
  }
  Object.assign(output.dataset, {
    prompt: JSON.stringify(ids),
    tokens: JSON.stringify(stream.ids),
    firstTokenMs: speed.firstTokenMs,
    tokensPerSecond: speed.tokensPerSecond,
  });
}

function failed(error) {
  console.error(error);
  say(String(error?.message ?? error), true);
}

async function start() {
  const loaded = await load();
  const go = at("go");
  const idle = (yes) => {
    stopped = yes;
    go.textContent = yes ? "Write" : "Stop";
    document.body.dataset.state = yes ? "ready" : "writing";
  };
  go.disabled = false;
  idle(true);
  at("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!stopped) {
      stopped = true;
      return;
    }
    idle(false);
    await write(loaded).catch(failed);
    idle(true);
  });
}

start().catch((error) => {
  document.body.dataset.state = "failed";
  failed(error);
});
