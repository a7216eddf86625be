// node --test examples/generate.test.js: the parts that need neither a model nor a package.
import assert from "node:assert/strict";
import { test } from "node:test";

import { argmax, describe, feeds, generate, Speed, TextStream } from "./generate.js";
import { fileOf } from "./web/serve.js";

const ort = {
  Tensor: class {
    constructor(type, data, dims) {
      Object.assign(this, { type, data, dims });
    }
  },
};
const CONFIG = { num_attention_heads: 4, num_key_value_heads: 2, hidden_size: 32, eos_token_id: 9 };
const PAST = ["past_key_values.0.key", "past_key_values.0.value"];

/** A session of a model whose next token is the last one plus one; `runs` keeps what it was fed. */
function counting(vocabulary = 10) {
  const runs = [];
  const run = async (fed) => {
    runs.push(fed);
    const ids = Array.from(fed.input_ids.data, Number);
    const data = new Float32Array(ids.length * vocabulary);
    ids.forEach((id, i) => (data[i * vocabulary + ((id + 1) % vocabulary)] = 1));
    const seen = fed.attention_mask.dims[1];
    const cache = (name) => new ort.Tensor("float32", new Float32Array(0), [name, seen]);
    return {
      logits: new ort.Tensor("float32", data, [1, ids.length, vocabulary]),
      "present.0.key": cache("key"),
      "present.0.value": cache("value"),
    };
  };
  return { runs, run, inputNames: ["input_ids", "attention_mask", "position_ids", ...PAST] };
}

async function all(generator) {
  const tokens = [];
  for await (const token of generator) tokens.push(token);
  return tokens;
}

test("argmax is within its range, and the first of equals", () => {
  assert.equal(argmax([9, 1, 5, 5, 8], 1, 3), 1);
  assert.equal(argmax([0, 0, 0], 0, 3), 0);
});

test("what a model is told to be", () => {
  const model = describe(counting(), CONFIG);
  assert.deepEqual([model.past, model.heads, model.headSize, [...model.ends]], [PAST, 2, 8, [9]]);
  assert.equal(describe(counting(), { ...CONFIG, head_dim: 16 }).headSize, 16);
  assert.deepEqual([...describe(counting(), CONFIG, { eos_token_id: [1, 2] }).ends], [1, 2]);
  assert.deepEqual([...describe(counting(), { ...CONFIG, eos_token_id: null }).ends], []);
});

test("the first run has the prompt and an empty cache, the next one token and the cache", async () => {
  const session = counting();
  const model = describe(session, CONFIG);
  assert.deepEqual(await all(generate(ort, session, model, [3, 4], 3)), [5, 6, 7]);
  const [first, second, third] = session.runs;
  assert.deepEqual(first.input_ids.dims, [1, 2]);
  assert.deepEqual(first[PAST[0]].dims, [1, 2, 0, 8]);
  assert.deepEqual([...second.input_ids.data, ...second.position_ids.data], [5n, 2n]);
  assert.deepEqual(second.attention_mask.data, BigInt64Array.of(1n, 1n, 1n));
  assert.deepEqual([second[PAST[0]].dims, second[PAST[1]].dims], [["key", 2], ["value", 2]]);
  assert.deepEqual([third.position_ids.data[0], third[PAST[0]].dims[1]], [3n, 3]);
});

test("an end token is the last", async () => {
  const session = counting();
  assert.deepEqual(await all(generate(ort, session, describe(session, CONFIG), [6], 10)), [7, 8, 9]);
});

test("an input that the graph does not have is not fed", () => {
  const session = { inputNames: ["input_ids", "attention_mask", ...PAST] };
  const fed = feeds(ort, describe(session, CONFIG), [1], 0, {});
  assert.deepEqual(Object.keys(fed), session.inputNames);
});

test("a character of several tokens appears when it is whole", () => {
  const bytes = [0x61, 0xc3, 0xa9, 0x62]; // "a", the two bytes of "é", "b"
  const tokenizer = { decode: (ids) => new TextDecoder().decode(Uint8Array.from(ids)) };
  const stream = new TextStream(tokenizer);
  assert.deepEqual(bytes.map((byte) => stream.add(byte)), ["a", "", "é", "b"]);
  assert.deepEqual(stream.ids, bytes);
});

test("the first token is not part of the rate", () => {
  const times = [0, 500, 600, 700];
  const speed = new Speed(() => times.shift());
  assert.deepEqual([speed.firstTokenMs, speed.tokensPerSecond], [undefined, undefined]);
  for (let i = 0; i < 3; i++) speed.tick();
  assert.deepEqual([speed.firstTokenMs, speed.tokensPerSecond], [500, 10]);
});

test("nothing outside the two folders is served", () => {
  assert.match(fileOf("/web/", "/small"), /examples[/\\]web[/\\]index\.html$/);
  assert.equal(fileOf("/model/model.onnx", "/small"), "/small/model.onnx");
  for (const path of ["/../README.md", "/%2e%2e/README.md", "/model/../etc/passwd", "/model//etc/passwd"]) {
    assert.equal(fileOf(path, "/small"), undefined, path);
  }
});
