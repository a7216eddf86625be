// FP4Linear: kernels/fp4_linear.py, whose contract holds here for float32 x.
#include "linear.h"

namespace compressor {
namespace {

struct FP4Linear final : Kernel {
  bool nvfp4;
  Rounding rule;

  explicit FP4Linear(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes& attributes) { return std::make_unique<FP4Linear>(attributes); }

}  // namespace

extern const Op FP4_LINEAR = {
    "FP4Linear",
    {{"x", FLOAT32},
     {"weight_packed", UINT8},
     {"weight_scale", ANY_TYPE},
     {"weight_global_scale", FLOAT32, OPTIONAL},
     {"input_global_scale", FLOAT32, OPTIONAL},
     {"bias", FLOAT32, OPTIONAL}},
    create,
};

namespace {

FP4Linear::FP4Linear(const Attributes& attributes) {
  const char* op = FP4_LINEAR.name;
  const std::string format = attributes.text("format");
  if (format != "nvfp4" && format != "mxfp4") throw unknown(op, "format", format, "nvfp4, mxfp4");
  nvfp4 = format == "nvfp4";
  rule = rounding(op, attributes.text("activations"), "none, nvfp4, mxfp4, int8, int8_block, fp8");
  rule.size = nvfp4 ? 16 : 32;
  rule.four_over_six = attributes.integer("four_over_six") != 0;
  set_hadamard(op, rule, attributes.integer("hadamard"));
}

std::vector<int64_t> FP4Linear::shape(const std::vector<Tensor>& in) const {
  const Op& op = FP4_LINEAR;
  expect_fp4(op, in, nvfp4);
  const int64_t rows = in[1].shape[0], columns = in[1].shape[1] * 2;
  if (rule.rule == Rule::NVFP4) expect(op, in, 4, {FLOAT32}, {1});
  if (in[5]) expect(op, in, 5, {FLOAT32}, {rows});
  return output_shape(op, in[0], columns, rows, rule);
}

void FP4Linear::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  Matrix m;
  fp4_matrix(m, in[1], in[2], nvfp4 ? in[3] : Tensor());
  Rounding r = rule;
  if (r.rule == Rule::NVFP4) r.scale = *in[4].floats();
  linear(m, r, in[0].floats(), in[0].elements() / m.columns, in[5].floats(), y, threads);
}

}  // namespace
}  // namespace compressor
