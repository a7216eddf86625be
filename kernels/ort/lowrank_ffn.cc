// LowRankFFN: kernels/lowrank_ffn.py for float32 x. The hidden activations of at most 128 tokens exist at a time.
#include <algorithm>

#include "linear.h"

namespace compressor {
namespace {

constexpr int64_t TASK_TOKENS = 8, ALONE = 1 << 13;  // so few activations are not worth a second thread

struct LowRankFFN final : OneOutput {
  Activation activation;

  explicit LowRankFFN(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes& attributes) { return std::make_unique<LowRankFFN>(attributes); }

}  // namespace

extern const Op LOWRANK_FFN = {
    "LowRankFFN",
    {{"x", FLOAT32},
     {"in_down", ANY_TYPE},
     {"in_up", ANY_TYPE, OPTIONAL},
     {"in_bias", FLOAT32, OPTIONAL},
     {"mul_down", ANY_TYPE, OPTIONAL},
     {"mul_up", ANY_TYPE, OPTIONAL},
     {"mul_bias", FLOAT32, OPTIONAL},
     {"out_down", ANY_TYPE},
     {"out_up", ANY_TYPE, OPTIONAL},
     {"out_bias", FLOAT32, OPTIONAL}},
    create,
};

namespace {

LowRankFFN::LowRankFFN(const Attributes& attributes) {
  const std::string name = attributes.text("activation");
  const char* const names[] = {"gelu", "gelu_tanh", "silu", "relu"};
  const Activation kinds[] = {Activation::GELU, Activation::GELU_TANH, Activation::SILU, Activation::RELU};
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) {
      activation = kinds[i];
      return;
    }
  throw unknown(LOWRANK_FFN.name, "activation", name, "gelu, gelu_tanh, silu, relu");
}

std::vector<int64_t> LowRankFFN::shape(const std::vector<Tensor>& in) const {
  const Op& op = LOWRANK_FFN;
  const LowRank first = low_rank(op, in, 1), gate = low_rank(op, in, 4), last = low_rank(op, in, 7);
  if (first.rows != last.columns || (in[4] && (gate.rows != first.rows || gate.columns != first.columns)))
    throw Error("LowRankFFN: its linears are " + std::to_string(first.rows) + " x " + std::to_string(first.columns) +
                (in[4] ? ", " + std::to_string(gate.rows) + " x " + std::to_string(gate.columns) : std::string()) +
                " and " + std::to_string(last.rows) + " x " + std::to_string(last.columns) +
                ", which do not follow one another.");
  return output_shape(op, in[0], first.columns, last.rows, Rounding());
}

void LowRankFFN::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  const Op& op = LOWRANK_FFN;
  const LowRank first = low_rank(op, in, 1), gate = low_rank(op, in, 4), last = low_rank(op, in, 7);
  const int64_t tokens = in[0].elements() / first.columns, width = first.rows;
  const int64_t most = std::min(tokens, TOKENS_AT_ONCE), rank = std::max({first.rank, gate.rank, last.rank});
  thread_local std::vector<float> memory;  // as `scratch` of linear.cc: grown, never shrunk
  const size_t needed = size_t(most * (rank + width * (in[4] ? 2 : 1)));
  if (memory.size() < needed) memory.resize(needed);
  float *const z = memory.data(), *const hidden = z + most * rank, *const factor = hidden + most * width;
  for (int64_t start = 0; start < tokens; start += most) {
    const int64_t count = std::min(most, tokens - start), values = count * width;
    const float* x = in[0].floats() + start * first.columns;
    low_rank_linear(first, x, count, z, hidden, threads);
    if (in[4]) low_rank_linear(gate, x, count, z, factor, threads);
    const int64_t share = values < ALONE ? values : TASK_TOKENS * width;
    threads.each(size_t((values + share - 1) / share), [&](size_t task) {
      const int64_t from = int64_t(task) * share;
      isa().activate(activation, hidden + from, in[4] ? factor + from : nullptr, std::min(share, values - from));
    });
    low_rank_linear(last, hidden, count, z, y + start * last.rows, threads);
  }
}

}  // namespace
}  // namespace compressor
