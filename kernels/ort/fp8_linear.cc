// FP8Linear: kernels/fp8_linear.py for float32 x.
#include "linear.h"

namespace compressor {
namespace {

struct FP8Linear final : OneOutput {
  Rounding rule;

  explicit FP8Linear(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes& attributes) { return std::make_unique<FP8Linear>(attributes); }

}  // namespace

extern const Op FP8_LINEAR = {
    "FP8Linear",
    {{"x", FLOAT32}, {"weight", FLOAT8E4M3FN}, {"weight_scale", FLOAT32}, {"bias", FLOAT32, OPTIONAL}},
    create,
};

namespace {

FP8Linear::FP8Linear(const Attributes& attributes) {
  rule = rounding(FP8_LINEAR.name, attributes.text("activations"), "none, fp8");
  set_hadamard(FP8_LINEAR.name, rule, attributes.integer("hadamard"));
}

std::vector<int64_t> FP8Linear::shape(const std::vector<Tensor>& in) const {
  expect(FP8_LINEAR, in, 1, {FLOAT8E4M3FN}, {-1, -1});
  const int64_t rows = in[1].shape[0], columns = in[1].shape[1];
  expect(FP8_LINEAR, in, 2, {FLOAT32}, {rows, 1});
  if (in[3]) expect(FP8_LINEAR, in, 3, {FLOAT32}, {rows});
  return output_shape(FP8_LINEAR, in[0], columns, rows, rule);
}

void FP8Linear::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  Matrix m;
  m.rows = in[1].shape[0];
  m.columns = m.block = m.row_bytes = in[1].shape[1];
  m.codes = Codes::E4M3;
  m.data = in[1].bytes();
  m.scale_floats = in[2].floats();
  linear(m, rule, in[0].floats(), in[0].elements() / m.columns, in[3].floats(), y, threads);
}

}  // namespace
}  // namespace compressor
