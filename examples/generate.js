// Greedy text from a compressed folder: the same code in the browser and in Node.
//
// `ort` is onnxruntime-web or onnxruntime-node; both make sessions and tensors of the same shape. The names of the graph's
// inputs and outputs are those of every exported folder: input_ids, attention_mask, position_ids, past_key_values.N.key
// and .value -> logits, present.N.key and .value. An input that a graph does not have is not fed.

/** What generate() needs to know about a model, from its session and its config.json. */
export function describe(session, config, generation = {}) {
  const ends = generation.eos_token_id ?? config.eos_token_id ?? [];
  return {
    inputs: new Set(session.inputNames),
    past: session.inputNames.filter((name) => name.startsWith("past_key_values.")),
    heads: config.num_key_value_heads ?? config.num_attention_heads,
    headSize: config.head_dim ?? config.hidden_size / config.num_attention_heads,
    ends: new Set([ends].flat()),
  };
}

/** The index of the largest of `count` values that start at `offset`; the first one where several are equal. */
export function argmax(values, offset, count) {
  let best = offset;
  for (let i = offset + 1; i < offset + count; i++) if (values[i] > values[best]) best = i;
  return best - offset;
}

/** The inputs of one run: `ids` follow `seen` tokens whose keys and values are in `cache`, which is empty at first. */
export function feeds(ort, model, ids, seen, cache) {
  const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const all = {
    input_ids: int64(ids),
    attention_mask: int64(new Array(seen + ids.length).fill(1)),
    position_ids: int64(ids.map((_, i) => seen + i)),
  };
  const chosen = Object.fromEntries(Object.entries(all).filter(([name]) => model.inputs.has(name)));
  for (const name of model.past) {
    chosen[name] = cache[name] ?? new ort.Tensor("float32", new Float32Array(0), [1, model.heads, 0, model.headSize]);
  }
  return chosen;
}

/** Token ids after `ids`, one at a time: at most `count`, ending with the first end token. */
export async function* generate(ort, session, model, ids, count) {
  let cache = {};
  let seen = 0;
  let next = ids;
  for (let i = 0; i < count; i++) {
    const outputs = await session.run(feeds(ort, model, next, seen, cache));
    seen += next.length;
    cache = Object.fromEntries(model.past.map((n) => [n, outputs[n.replace("past_key_values", "present")]]));
    const { data, dims } = outputs.logits;
    const token = argmax(data, data.length - dims[2], dims[2]);
    yield token;
    if (model.ends.has(token)) return;
    next = [token];
  }
}

/** Turns tokens into text piece by piece; a character that several tokens make up is held back until it is whole. */
export class TextStream {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.ids = [];
    this.length = 0;
  }

  /** The text that this token adds, which may be none. */
  add(token) {
    this.ids.push(token);
    const text = this.tokenizer.decode(this.ids, { skip_special_tokens: true });
    if (text.endsWith("\uFFFD")) return "";
    const piece = text.slice(this.length);
    this.length = text.length;
    return piece;
  }
}

/** Milliseconds to the first token and tokens per second after it; tick() at each token. */
export class Speed {
  constructor(now = () => performance.now()) {
    this.now = now;
    this.start = now();
    this.tokens = 0;
  }

  tick() {
    this.last = this.now();
    if (this.tokens++ === 0) this.first = this.last;
  }

  get firstTokenMs() {
    return this.tokens ? this.first - this.start : undefined;
  }

  get tokensPerSecond() {
    return this.tokens > 1 ? ((this.tokens - 1) * 1000) / (this.last - this.first) : undefined;
  }
}
