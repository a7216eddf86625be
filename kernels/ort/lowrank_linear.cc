// LowRankLinear: kernels/lowrank_linear.py for float32 x; and the product that LowRankFFN shares.
#include <algorithm>

#include "linear.h"

namespace compressor {

Matrix float_matrix(const Op& op, const std::vector<Tensor>& in, size_t at) {
  expect(op, in, at, {FLOAT32, BFLOAT16}, {-1, -1});
  Matrix m;
  const bool half = in[at].type == BFLOAT16;
  m.rows = in[at].shape[0];
  m.columns = m.block = in[at].shape[1];
  m.codes = half ? Codes::BF16 : Codes::FP32;
  m.row_bytes = m.columns * (half ? 2 : 4);
  m.data = in[at].bytes();
  return m;
}

namespace {

struct LowRankLinear final : OneOutput {
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes&) { return std::make_unique<LowRankLinear>(); }

}  // namespace

extern const Op LOWRANK_LINEAR = {
    "LowRankLinear",
    {{"x", FLOAT32},
     {"down", ANY_TYPE},
     {"up", ANY_TYPE},
     {"bias", FLOAT32, OPTIONAL},
     {"down_bias", FLOAT32, OPTIONAL},
     {"order", INT64, OPTIONAL}},
    create,
};

LowRank low_rank(const Op& op, const std::vector<Tensor>& in, size_t at) {
  LowRank made;
  if (!in[at]) return made;
  made.down = float_matrix(op, in, at);
  made.columns = made.down.columns;
  made.rows = made.down.rows;
  if (in[at + 1]) {
    made.rank = made.rows;
    made.up = float_matrix(op, in, at + 1);
    made.rows = made.up.rows;
    expect(op, in, at + 1, {FLOAT32, BFLOAT16}, {-1, made.rank});
  }
  if (in[at + 2]) expect(op, in, at + 2, {FLOAT32}, {made.rows});
  made.bias = in[at + 2].floats();
  return made;
}

void low_rank_linear(const LowRank& m, const float* x, int64_t tokens, float* z, float* y, const Threads& threads) {
  const Rounding none;
  if (!m.rank) return linear(m.down, none, x, tokens, m.bias, y, threads);
  linear(m.down, none, x, tokens, nullptr, z, threads);
  linear(m.up, none, z, tokens, m.bias, y, threads);
}

namespace {

// N: with `order` z holds outputs too, and each output is one of its numbers or of up's.
int64_t outputs(const LowRank& m, const std::vector<Tensor>& in) {
  const Op& op = LOWRANK_LINEAR;
  if (in[4]) expect(op, in, 4, {FLOAT32}, {m.rank});
  if (!in[5]) {
    if (in[4]) throw Error("LowRankLinear: down_bias is of outputs that z holds, which `order` must name.");
    return m.rows;
  }
  const int64_t count = m.rank + m.rows;
  expect(op, in, 5, {INT64}, {count});
  const int64_t* order = static_cast<const int64_t*>(in[5].data);
  for (int64_t n = 0; n < count; ++n)
    if (order[n] < 0 || order[n] >= count)
      throw Error("LowRankLinear: order[" + std::to_string(n) + "] is " + std::to_string(order[n]) +
                  "; there are outputs 0 to " + std::to_string(count - 1) + ".");
  return count;
}

std::vector<int64_t> LowRankLinear::shape(const std::vector<Tensor>& in) const {
  const LowRank m = low_rank(LOWRANK_LINEAR, in, 1);
  return output_shape(LOWRANK_LINEAR, in[0], m.columns, outputs(m, in), Rounding());
}

void LowRankLinear::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  const LowRank m = low_rank(LOWRANK_LINEAR, in, 1);
  const int64_t* order = static_cast<const int64_t*>(in[5].data);
  const int64_t tokens = in[0].elements() / m.columns, width = m.rows + (order ? m.rank : 0);
  const int64_t most = std::min(tokens, TOKENS_AT_ONCE);
  thread_local std::vector<float> memory;  // as `scratch` of linear.cc: grown, never shrunk
  memory.resize(std::max(memory.size(), size_t(most * (order ? width : m.rank))));
  float *const z = memory.data(), *const rest = z + most * m.rank;
  const Rounding none;
  for (int64_t start = 0; start < tokens; start += most) {
    const int64_t count = std::min(most, tokens - start);
    const float* x = in[0].floats() + start * m.columns;
    float* to = y + start * width;
    if (!order) {
      low_rank_linear(m, x, count, z, to, threads);
      continue;
    }
    linear(m.down, none, x, count, in[4].floats(), z, threads);
    linear(m.up, none, z, count, m.bias, rest, threads);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t n = 0; n < width; ++n)
        to[t * width + n] = order[n] < m.rank ? z[t * m.rank + order[n]] : rest[t * m.rows + order[n] - m.rank];
  }
}

}  // namespace
}  // namespace compressor
