// SwiGLU: kernels/swiglu.py, whose contract holds here for float32 x.
#include "op.h"

namespace compressor {
namespace {

constexpr int64_t TASK_VALUES = 1 << 14;  // of the output

struct SwiGLU final : Kernel {
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
};

std::unique_ptr<Kernel> create(const Attributes&) { return std::make_unique<SwiGLU>(); }

}  // namespace

extern const Op SWIGLU = {"SwiGLU", {{"x", FLOAT32}}, create};

namespace {

std::vector<int64_t> SwiGLU::shape(const std::vector<Tensor>& in) const {
  std::vector<int64_t> shape = in[0].shape;
  if (shape.empty() || shape.back() % 2)
    throw Error("SwiGLU: x has " + std::to_string(in[0].last()) + " features, which are no two halves.");
  shape.back() /= 2;
  return shape;
}

void SwiGLU::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  const int64_t half = in[0].last() / 2, tokens = half ? in[0].elements() / half / 2 : 0;
  const int64_t each = half < TASK_VALUES ? TASK_VALUES / (half ? half : 1) : 1;
  threads.each(size_t((tokens + each - 1) / each), [&](size_t task) {
    const int64_t first = int64_t(task) * each, last = first + each < tokens ? first + each : tokens;
    for (int64_t t = first; t < last; ++t) isa().swiglu(in[0].floats() + t * 2 * half, half, y + t * half);
  });
}

}  // namespace
}  // namespace compressor
