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
    {{"x", FLOAT32}, {"down", ANY_TYPE}, {"up", ANY_TYPE}, {"bias", FLOAT32, OPTIONAL}},
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

std::vector<int64_t> LowRankLinear::shape(const std::vector<Tensor>& in) const {
  const LowRank m = low_rank(LOWRANK_LINEAR, in, 1);
  return output_shape(LOWRANK_LINEAR, in[0], m.columns, m.rows, Rounding());
}

void LowRankLinear::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  const LowRank m = low_rank(LOWRANK_LINEAR, in, 1);
  thread_local std::vector<float> z;
  const int64_t tokens = in[0].elements() / m.columns;
  for (int64_t start = 0; start < tokens; start += TOKENS_AT_ONCE) {
    const int64_t count = std::min(TOKENS_AT_ONCE, tokens - start);
    z.resize(std::max(z.size(), size_t(count * m.rank)));
    low_rank_linear(m, in[0].floats() + start * m.columns, count, z.data(), y + start * m.rows, threads);
  }
}

}  // namespace
}  // namespace compressor
