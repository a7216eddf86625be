// FloatLinear: kernels/float_linear.py for float32 x.
#include "linear.h"

namespace compressor {
namespace {

struct FloatLinear final : OneOutput {
  FloatFormat format;
  int64_t block;
  Rounding rule;

  explicit FloatLinear(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes& attributes) { return std::make_unique<FloatLinear>(attributes); }

}  // namespace

extern const Op FLOAT_LINEAR = {
    "FloatLinear",
    {{"x", FLOAT32},
     {"weight_packed", UINT8},
     {"weight_scale", ANY_TYPE},
     {"weight_global_scale", FLOAT32, OPTIONAL},
     {"input_scale", FLOAT32, OPTIONAL},
     {"input_shift", INT8, OPTIONAL},
     {"bias", FLOAT32, OPTIONAL}},
    create,
};

namespace {

FloatLinear::FloatLinear(const Attributes& attributes) {
  const char* op = FLOAT_LINEAR.name;
  const std::string name = attributes.text("format");
  const FloatFormat* found = float_format(name.c_str());
  if (!found) throw unknown(op, "format", name, "e2m1, e3m0, e1m2, e3m2, e2m3, e4m3, e5m2");
  format = *found;
  block = attributes.integer("block_size");
  rule = rounding(op, attributes.text("activations"),
                  "none, e2m1_static, e3m0_static, e1m2_static, e3m2_static, e2m3_static, e4m3_static, e5m2_static");
}

std::vector<int64_t> FloatLinear::shape(const std::vector<Tensor>& in) const {
  const Op& op = FLOAT_LINEAR;
  expect(op, in, 1, {UINT8}, {-1, -1});
  const int64_t rows = in[1].shape[0], columns = in[1].shape[1] * 8 / format.bits();
  if (block) {
    if (block < 0 || columns % block)
      throw Error("FloatLinear: block_size " + std::to_string(block) + " does not divide " + std::to_string(columns) +
                  " features.");
    expect(op, in, 2, {FLOAT8E4M3FN}, {rows, columns / block});
    expect(op, in, 3, {FLOAT32}, {1});
  } else {
    expect(op, in, 2, {FLOAT32}, {rows, 1});
  }
  if (rule.rule != Rule::NONE) expect(op, in, 4, {FLOAT32}, {1});
  if (in[5]) expect(op, in, 5, {INT8}, {columns});
  if (in[6]) expect(op, in, 6, {FLOAT32}, {rows});
  return output_shape(op, in[0], columns, rows, rule);
}

void FloatLinear::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  Matrix m;
  m.rows = in[1].shape[0];
  m.row_bytes = in[1].shape[1];
  m.columns = m.row_bytes * 8 / format.bits();
  m.data = in[1].bytes();
  if (format.bits() == 8) {
    m.codes = format.mantissa == 3 ? Codes::E4M3 : Codes::E5M2;
  } else {
    m.codes = format.bits() == 6 ? Codes::SIX : Codes::NIBBLE;
    float_values(format, m.table);
  }
  m.block = block ? block : m.columns;
  m.scales_a_row = m.columns / m.block;
  if (block)
    byte_steps(m, in[2], in[3]);
  else
    m.scale_floats = in[2].floats();
  Rounding r = rule;
  if (r.rule != Rule::NONE) r.scale = *in[4].floats();
  r.shift = static_cast<const int8_t*>(in[5].data);
  linear(m, r, in[0].floats(), in[0].elements() / m.columns, in[6].floats(), y, threads);
}

}  // namespace
}  // namespace compressor
