// IntLinear: kernels/int_linear.py for float32 x. With integer activations the sums are exact, as in the node's body.
#include "linear.h"

namespace compressor {
namespace {

struct IntLinear final : OneOutput {
  int64_t bits, group, columns;
  bool packed;
  Rounding rule;

  explicit IntLinear(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes& attributes) { return std::make_unique<IntLinear>(attributes); }

}  // namespace

extern const Op INT_LINEAR = {
    "IntLinear",
    {{"x", FLOAT32},
     {"weight", ANY_TYPE},
     {"weight_scale", FLOAT32},
     {"bias", FLOAT32, OPTIONAL},
     {"input_scale", FLOAT32, OPTIONAL},
     {"input_offset", FLOAT32, OPTIONAL}},
    create,
};

namespace {

IntLinear::IntLinear(const Attributes& attributes) {
  const char* op = INT_LINEAR.name;
  bits = attributes.integer("bits");
  group = attributes.integer("group_size");
  columns = attributes.integer("in_features");
  packed = attributes.integer("packed") != 0;
  rule = rounding(op, attributes.text("activations"), "none, int8, int6, int8_static, int6_static");
  set_hadamard(op, rule, attributes.integer("hadamard"));
  if (packed && bits != 1 && bits != 2 && bits != 3 && bits != 4 && bits != 8)
    throw unknown(op, "bits", std::to_string(bits), "1, 2, 3, 4, 8");
  if (group < 0 || columns < 1) throw unknown(op, "group_size", std::to_string(group), "0 and above");
}

std::vector<int64_t> IntLinear::shape(const std::vector<Tensor>& in) const {
  const Op& op = INT_LINEAR;
  if (packed)
    expect_words(op, in, columns * bits);
  else
    expect(op, in, 1, {INT8}, {-1, columns});
  const int64_t rows = in[1].shape[0];
  expect(op, in, 2, {FLOAT32}, {rows, group ? (columns + group - 1) / group : 1});
  if (in[3]) expect(op, in, 3, {FLOAT32}, {rows});
  if (rule.rule == Rule::INT_STATIC) expect(op, in, 4, {FLOAT32}, {1});
  if (in[5]) expect(op, in, 5, {FLOAT32}, {columns});
  return output_shape(op, in[0], columns, rows, rule);
}

void IntLinear::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  Matrix m;
  int_matrix(m, in[1], in[2], bits, group, columns);
  Rounding r = rule;
  if (r.rule == Rule::INT_STATIC) r.scale = *in[4].floats();
  r.offset = in[5].floats();
  auto product = r.rule == Rule::NONE || packed || group ? linear : integer_linear;
  product(m, r, in[0].floats(), in[0].elements() / columns, in[3].floats(), y, threads);
}

}  // namespace
}  // namespace compressor
