// FP4Embedding and IntEmbedding: the rows of kernels/fp4_embedding.py and kernels/int_embedding.py, decoded in place.
#include "linear.h"

namespace compressor {
namespace {

// `float32 y[i] = row ids[i]`; a negative id counts from the end, as in ONNX and torch.
void gather(const Op& op, const Matrix& m, const Tensor& ids, float* y) {
  for (int64_t i = 0; i < ids.elements(); ++i) {
    const int64_t id = ids.type == INT64 ? static_cast<const int64_t*>(ids.data)[i]
                                         : static_cast<const int32_t*>(ids.data)[i];
    if (id < -m.rows || id >= m.rows)
      throw Error(std::string(op.name) + ": id " + std::to_string(id) + " is not one of the table's " +
                  std::to_string(m.rows) + " rows.");
    isa().decode(m, id < 0 ? id + m.rows : id, y + i * m.columns);
  }
}

std::vector<int64_t> output_shape(const Op& op, const std::vector<Tensor>& in, int64_t columns) {
  std::vector<int64_t> shape = in[0].shape;
  if (in[0].type != INT64 && in[0].type != INT32)
    throw Error(std::string(op.name) + ": ids must be int64 or int32, got element type " +
                std::to_string(in[0].type) + ".");
  shape.push_back(columns);
  return shape;
}

struct FP4Embedding final : OneOutput {
  bool nvfp4;

  explicit FP4Embedding(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

struct IntEmbedding final : OneOutput {
  int64_t bits, group, columns;

  explicit IntEmbedding(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

template <class Made>
std::unique_ptr<Kernel> create(const Attributes& attributes) {
  return std::make_unique<Made>(attributes);
}

}  // namespace

extern const Op FP4_EMBEDDING = {
    "FP4Embedding",
    {{"ids", ANY_TYPE}, {"weight_packed", UINT8}, {"weight_scale", ANY_TYPE},
     {"weight_global_scale", FLOAT32, OPTIONAL}},
    create<FP4Embedding>,
};
extern const Op INT_EMBEDDING = {
    "IntEmbedding",
    {{"ids", ANY_TYPE}, {"weight_packed", ANY_TYPE}, {"weight_scale", FLOAT32}},
    create<IntEmbedding>,
};

namespace {

FP4Embedding::FP4Embedding(const Attributes& attributes) {
  const std::string format = attributes.text("format");
  if (format != "nvfp4" && format != "mxfp4") throw unknown(FP4_EMBEDDING.name, "format", format, "nvfp4, mxfp4");
  nvfp4 = format == "nvfp4";
}

std::vector<int64_t> FP4Embedding::shape(const std::vector<Tensor>& in) const {
  expect_fp4(FP4_EMBEDDING, in, nvfp4);
  return output_shape(FP4_EMBEDDING, in, in[1].shape[1] * 2);
}

void FP4Embedding::run(const std::vector<Tensor>& in, float* y, const Threads&) const {
  Matrix m;
  fp4_matrix(m, in[1], in[2], nvfp4 ? in[3] : Tensor());
  gather(FP4_EMBEDDING, m, in[0], y);
}

IntEmbedding::IntEmbedding(const Attributes& attributes) {
  bits = attributes.integer("bits");
  group = attributes.integer("group_size");
  columns = attributes.integer("in_features");
  if (bits != 2 && bits != 4 && bits != 8) throw unknown(INT_EMBEDDING.name, "bits", std::to_string(bits), "2, 4, 8");
  if (group < 0) throw unknown(INT_EMBEDDING.name, "group_size", std::to_string(group), "0 and above");
}

std::vector<int64_t> IntEmbedding::shape(const std::vector<Tensor>& in) const {
  expect_words(INT_EMBEDDING, in, columns * bits);
  expect(INT_EMBEDDING, in, 2, {FLOAT32}, {in[1].shape[0], group ? (columns + group - 1) / group : 1});
  return output_shape(INT_EMBEDDING, in, columns);
}

void IntEmbedding::run(const std::vector<Tensor>& in, float* y, const Threads&) const {
  Matrix m;
  int_matrix(m, in[1], in[2], bits, group, columns);
  gather(INT_EMBEDDING, m, in[0], y);
}

}  // namespace
}  // namespace compressor
