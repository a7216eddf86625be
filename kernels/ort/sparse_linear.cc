// SparseLinear: kernels/sparsify.py, then a linear: float32 or bfloat16 weights, INT4 as MatMulNBits stores it, or FP4.
// Few tokens read the weights of active channels only, from a copy that is made when first needed; many tokens, and
// weights that the graph computes, run the dense product.
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>

#include "linear.h"
#include "sparse_rows.h"

namespace compressor {
namespace {

enum class Format { FLOAT, INT4, NVFP4, MXFP4 };
enum class Tokens { DECODE, ALL, NONE };

struct SparseLinear final : OneOutput {
  Format format;
  Tokens rule;
  bool constant;  // the weight, so that a copy stays true
  mutable std::once_flag once;
  mutable std::unique_ptr<const TurnedMatrix> turned;

  explicit SparseLinear(const Attributes&);
  Matrix matrix(const std::vector<Tensor>&) const;
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
  // Whether token `t` of rows of `length` keeps all of its values.
  bool dense(int64_t t, int64_t length) const {
    return rule == Tokens::NONE || (length > 1 && (rule == Tokens::DECODE || t % length == 0));
  }
};

std::unique_ptr<Kernel> create(const Attributes& attributes) { return std::make_unique<SparseLinear>(attributes); }

}  // namespace

extern const Op SPARSE_LINEAR = {
    "SparseLinear",
    {{"x", FLOAT32},
     {"threshold", FLOAT32},
     {"weight", ANY_TYPE},
     {"weight_scale", ANY_TYPE, OPTIONAL},
     {"weight_global_scale", FLOAT32, OPTIONAL},
     {"bias", FLOAT32, OPTIONAL}},
    create,
};

namespace {

SparseLinear::SparseLinear(const Attributes& attributes) {
  const char* op = SPARSE_LINEAR.name;
  const std::string name = attributes.text("format"), tokens = attributes.text("tokens");
  if (name != "float" && name != "int4" && name != "nvfp4" && name != "mxfp4")
    throw unknown(op, "format", name, "float, int4, nvfp4, mxfp4");
  if (tokens != "decode" && tokens != "all" && tokens != "none")
    throw unknown(op, "tokens", tokens, "decode, all, none");
  format = name == "float" ? Format::FLOAT : name == "int4" ? Format::INT4
         : name == "nvfp4" ? Format::NVFP4 : Format::MXFP4;
  rule = tokens == "decode" ? Tokens::DECODE : tokens == "all" ? Tokens::ALL : Tokens::NONE;
  constant = attributes.constant(2) && (format == Format::FLOAT || attributes.constant(3)) &&
             (format != Format::NVFP4 || attributes.constant(4));
}

Matrix SparseLinear::matrix(const std::vector<Tensor>& in) const {
  const Op& op = SPARSE_LINEAR;
  if (format == Format::FLOAT) return float_matrix(op, in, 2);
  Matrix m;
  if (format != Format::INT4) {
    fp4_matrix(m, in[2], in[3], format == Format::NVFP4 ? in[4] : Tensor());
    return m;
  }
  const int64_t blocks = in[2].shape[1], block = in[2].shape[2] * 2;  // [N, K / block, block / 2]
  Tensor codes = in[2];
  codes.shape = {codes.shape[0], blocks * block / 2};
  Tensor scale = in[3];
  scale.shape = {codes.shape[0], blocks};
  int_matrix(m, codes, scale, 4, block, blocks * block);
  return m;
}

std::vector<int64_t> SparseLinear::shape(const std::vector<Tensor>& in) const {
  const Op& op = SPARSE_LINEAR;
  if (format == Format::FLOAT) {
    expect(op, in, 2, {FLOAT32, BFLOAT16}, {-1, -1});
  } else if (format == Format::INT4) {
    expect(op, in, 2, {UINT8}, {-1, -1, -1});
    if (in[3].elements() != in[2].shape[0] * in[2].shape[1]) expect(op, in, 3, {FLOAT32}, {in[2].shape[0], in[2].shape[1]});
    if (in[3].type != FLOAT32) expect(op, in, 3, {FLOAT32}, {-1, -1});
  } else {
    expect_fp4(op, in, format == Format::NVFP4, 2);
  }
  const Matrix m = matrix(in);
  expect(op, in, 1, {FLOAT32}, {m.columns});
  if (in[5]) expect(op, in, 5, {FLOAT32}, {m.rows});
  return output_shape(op, in[0], m.columns, m.rows, Rounding());
}

void SparseLinear::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  const Matrix m = matrix(in);
  const float *x = in[0].floats(), *threshold = in[1].floats(), *bias = in[5].floats();
  const std::vector<int64_t>& shape = in[0].shape;
  const int64_t tokens = in[0].elements() / m.columns, length = shape.size() > 1 ? shape[shape.size() - 2] : 1;
  const Rounding none;
  if (dense(1, length)) return linear(m, none, x, tokens, bias, y, threads);  // the second token: all tokens
  if (constant && tokens <= SPARSE_TOKENS) {
    std::call_once(once, [&] { turned = std::make_unique<TurnedMatrix>(m, threads); });
    bool whole[SPARSE_TOKENS] = {};
    for (int64_t t = 0; t < tokens; ++t) whole[t] = dense(t, length);
    return (*turned)(x, tokens, threshold, whole, bias, y, threads);
  }
  thread_local std::vector<float> kept;
  for (int64_t start = 0; start < tokens; start += TOKENS_AT_ONCE) {
    const int64_t count = std::min(TOKENS_AT_ONCE, tokens - start);
    kept.assign(x + start * m.columns, x + (start + count) * m.columns);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t k = 0; k < m.columns && !dense(start + t, length); ++k) {
        float& value = kept[size_t(t * m.columns + k)];
        value = std::fabs(value) > threshold[k] ? value : 0.0f;
      }
    linear(m, none, kept.data(), count, bias, y + start * m.rows, threads);
  }
}

}  // namespace
}  // namespace compressor
