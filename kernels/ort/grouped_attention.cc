// GroupQueryAttention: com.microsoft's operator of that name behind its RotaryEmbedding, which are this node's body, for
// float32 and an additive mask over all keys. Not read: the lengths of rows (`seqlens_k`), which the mask says already.
//
// A node of ours, and not the stock one, because onnxruntime's multiplies one token with its keys as a matrix product
// whose second factor it packs each time. The reference in torch: exporters/onnx_attention.py.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "op.h"

namespace compressor {
namespace {

enum : size_t { QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LAST, TOTAL, COS, SIN, POSITIONS, BIAS };

constexpr int64_t ONE_TASK = 1 << 17;  // multiply-adds that are done before a second thread has begun
constexpr int64_t TASK_QUERIES = 16;
constexpr float MASKED = -1e38f;

struct GroupQueryAttention final : Kernel {
  int64_t heads, kv_heads, rotary;
  float scale, softcap;

  explicit GroupQueryAttention(const Attributes&);
  std::vector<std::vector<int64_t>> shapes(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* const* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes& attributes) {
  return std::make_unique<GroupQueryAttention>(attributes);
}

}  // namespace

extern const Op GROUP_QUERY_ATTENTION = {
    "GroupQueryAttention",
    {{"query", FLOAT32},
     {"key", FLOAT32, OPTIONAL},
     {"value", FLOAT32, OPTIONAL},
     {"past_key", FLOAT32},
     {"past_value", FLOAT32},
     {"seqlens_k", INT32},
     {"total_sequence_length", INT32},
     {"cos_cache", FLOAT32, OPTIONAL},
     {"sin_cache", FLOAT32, OPTIONAL},
     {"position_ids", INT64, OPTIONAL},
     {"attention_bias", FLOAT32, OPTIONAL}},
    create,
    3,
};

namespace {

GroupQueryAttention::GroupQueryAttention(const Attributes& attributes) {
  heads = attributes.integer("num_heads");
  kv_heads = attributes.integer("kv_num_heads");
  rotary = attributes.integer("do_rotary");
  scale = attributes.number("scale");
  softcap = attributes.number("softcap");
  const char* op = GROUP_QUERY_ATTENTION.name;
  if (kv_heads < 1 || heads % kv_heads)
    throw unknown(op, "num_heads", std::to_string(heads), "multiples of kv_num_heads");
}

std::vector<std::vector<int64_t>> GroupQueryAttention::shapes(const std::vector<Tensor>& in) const {
  const Op& op = GROUP_QUERY_ATTENTION;
  expect(op, in, TOTAL, {INT32}, {});
  expect(op, in, QUERY, {FLOAT32}, {-1, -1, -1});
  const int64_t batch = in[QUERY].shape[0], tokens = in[QUERY].shape[1];
  expect(op, in, PAST_KEY, {FLOAT32}, {batch, kv_heads, -1, -1});
  const int64_t held = in[PAST_KEY].shape[2], size = in[PAST_KEY].shape[3];
  const int64_t total = *static_cast<const int32_t*>(in[TOTAL].data);
  expect(op, in, PAST_VALUE, {FLOAT32}, {batch, kv_heads, held, size});
  const int64_t packed = in[KEY] ? 0 : 2 * kv_heads;
  expect(op, in, QUERY, {FLOAT32}, {batch, tokens, (heads + packed) * size});
  for (size_t i : {KEY, VALUE})
    if (!packed) expect(op, in, i, {FLOAT32}, {batch, tokens, kv_heads * size});
  if (total < tokens || total - tokens > held)
    throw Error(std::string(op.name) + ": " + std::to_string(total) + " positions are not " + std::to_string(tokens) +
                " new ones behind at most " + std::to_string(held) + ".");
  if (rotary) {
    for (size_t i : {COS, SIN}) expect(op, in, i, {FLOAT32}, {-1, size / 2});
    expect(op, in, POSITIONS, {INT64}, {batch, tokens});
    const int64_t* rows = static_cast<const int64_t*>(in[POSITIONS].data);
    for (int64_t i = 0; i < batch * tokens; ++i)
      if (rows[i] < 0 || rows[i] >= std::min(in[COS].shape[0], in[SIN].shape[0]))
        throw Error(std::string(op.name) + ": position " + std::to_string(rows[i]) + " has no angle.");
  }
  if (in[BIAS]) {
    expect(op, in, BIAS, {FLOAT32}, {-1, -1, tokens, total});
    const auto fits = [&](int64_t d, int64_t whole) { return in[BIAS].shape[size_t(d)] == 1 || in[BIAS].shape[size_t(d)] == whole; };
    if (!fits(0, batch) || !fits(1, heads)) expect(op, in, BIAS, {FLOAT32}, {batch, heads, tokens, total});
  }
  const int64_t kept = std::max(total, held);
  return {{batch, tokens, heads * size}, {batch, kv_heads, kept, size}, {batch, kv_heads, kept, size}};
}

// One head of one token, its two halves turned by the angles of its position.
struct Turn {
  const float *cos, *sin;
  const int64_t* positions;
  int64_t half;

  void operator()(int64_t token, const float* x, float* y) const {
    if (!cos) return void(std::memcpy(y, x, size_t(2 * half) * sizeof(float)));
    const float *c = cos + positions[token] * half, *s = sin + positions[token] * half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      y[i] = a * c[i] - b * s[i];
      y[half + i] = b * c[i] + a * s[i];
    }
  }
};

void GroupQueryAttention::run(const std::vector<Tensor>& in, float* const* y, const Threads& threads) const {
  const int64_t batch = in[QUERY].shape[0], tokens = in[QUERY].shape[1], width = in[QUERY].shape[2];
  const int64_t held = in[PAST_KEY].shape[2], size = in[PAST_KEY].shape[3];
  const int64_t total = *static_cast<const int32_t*>(in[TOTAL].data), past = total - tokens;
  const int64_t kept = std::max(total, held), group = heads / kv_heads;
  const Turn turn = {rotary ? in[COS].floats() : nullptr, in[SIN].floats(),
                     static_cast<const int64_t*>(in[POSITIONS].data), size / 2};
  const float* query = in[QUERY].floats();
  const float* key = in[KEY] ? in[KEY].floats() : query + heads * size;
  const float* value = in[KEY] ? in[VALUE].floats() : query + (heads + kv_heads) * size;
  const int64_t kv_width = in[KEY] ? kv_heads * size : width;

  auto join = [&](size_t head) {  // of all texts
    const int64_t first = int64_t(head) / kv_heads * tokens, at = int64_t(head) % kv_heads * size;
    for (size_t part : {0, 1}) {
      const float* from = in[PAST_KEY + part].floats() + int64_t(head) * held * size;
      float* to = y[1 + part] + int64_t(head) * kept * size;
      if (from != to) {
        std::memcpy(to, from, size_t(past * size) * sizeof(float));
        std::memset(to + total * size, 0, size_t((kept - total) * size) * sizeof(float));
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const float* x = (part ? value : key) + (first + t) * kv_width + at;
        float* row = to + (past + t) * size;
        if (part)
          std::memcpy(row, x, size_t(size) * sizeof(float));
        else
          turn(first + t, x, row);
      }
    }
  };
  const int64_t parts = (tokens + TASK_QUERIES - 1) / TASK_QUERIES;
  auto attend = [&](size_t task) {
    const int64_t row = int64_t(task) / parts, start = int64_t(task) % parts * TASK_QUERIES;  // of batch * heads
    const int64_t text = row / heads, head = row % heads, cached = text * kv_heads + head / group;
    thread_local std::vector<float> scratch;
    scratch.resize(size_t(size + total));
    const Tensor& given = in[BIAS];
    const float* mask = nullptr;
    if (given) {
      const int64_t b = given.shape[0] == 1 ? 0 : text, h = given.shape[1] == 1 ? 0 : head;
      mask = given.floats() + (b * given.shape[1] + h) * tokens * total;
    }
    for (int64_t t = start; t < std::min(start + TASK_QUERIES, tokens); ++t) {
      const int64_t token = text * tokens + t;
      turn(token, query + token * width + head * size, scratch.data());
      for (int64_t d = 0; d < size; ++d) scratch[size_t(d)] *= scale;
      int64_t seen = mask ? total : past + t + 1;
      if (mask) {  // what is masked behind the last key weighs nothing, unless all is masked and weighs the same
        const float* bias = mask + t * total;
        while (seen && bias[seen - 1] <= MASKED) --seen;
        seen = seen ? seen : total;
      }
      isa().attend(scratch.data(), y[1] + cached * kept * size, y[2] + cached * kept * size, seen, size,
                   mask ? mask + t * total : nullptr, softcap, scratch.data() + size,
                   y[0] + (token * heads + head) * size);
    }
  };
  const size_t joins = size_t(batch * kv_heads), attends = size_t(batch * heads * parts);
  if (batch * heads * tokens * total * size * 2 < ONE_TASK) {
    for (size_t i = 0; i < joins; ++i) join(i);
    for (size_t i = 0; i < attends; ++i) attend(i);
    return;
  }
  const int64_t copied = y[1] == in[PAST_KEY].floats() ? tokens : total;
  if (batch * kv_heads * copied * size < ONE_TASK)
    for (size_t i = 0; i < joins; ++i) join(i);
  else
    threads.each(joins, join);
  threads.each(attends, attend);
}

}  // namespace
}  // namespace compressor
