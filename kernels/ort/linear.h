// y = round(x) . W^T + b over threads, for every op that multiplies with a stored matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"
#include "op.h"
#include "threads.h"

namespace compressor {

// y [T, N] for x [T, K]; float32 sums of what kernels/*.py multiplies. bias [N] or null.
void linear(const Matrix&, const Rounding&, const float* x, int64_t tokens, const float* bias, float* y,
            const Threads&);

// The same for int8 codes [N, K] and a rule of integers: exact int32 sums, then (sum * step) * scale + bias.
void integer_linear(const Matrix&, const Rounding&, const float* x, int64_t tokens, const float* bias, float* y,
                    const Threads&);

// `activations` of an op -> rule; `allowed` is what the op takes, separated by ", ". Raises Error.
Rounding rounding(const char* op, const std::string& activations, const char* allowed);
void set_hadamard(const char* op, Rounding&, int64_t hadamard);

// x's shape with N in place of K. Raises Error where K differs or blocks of the rounding do not divide it.
std::vector<int64_t> output_shape(const Op&, const Tensor& x, int64_t columns, int64_t rows, const Rounding&);

// A linear of three inputs from number `at` on: down [R, K], up [N, R] and bias [N] or, where up is left out, a dense
// [N, K] and its bias; factors are float32 or bfloat16. Empty where the first is left out.
struct LowRank {
  Matrix down, up;
  const float* bias = nullptr;
  int64_t rank = 0, columns = 0, rows = 0;  // rank 0: no `up`
};
LowRank low_rank(const Op&, const std::vector<Tensor>& inputs, size_t at);
// y [T, N]; `z` has room for T * rank floats.
void low_rank_linear(const LowRank&, const float* x, int64_t tokens, float* z, float* y, const Threads&);

// Input `at`, [N, K] of float32 or bfloat16.
Matrix float_matrix(const Op&, const std::vector<Tensor>& inputs, size_t at);
// Inputs 1 to 3 of an op with FP4 weights; or those from `at` on.
void expect_fp4(const Op&, const std::vector<Tensor>& inputs, bool nvfp4, size_t at = 1);
// Input 1: rows of so many bits in words of 32, which a graph declares as the bytes that they are.
void expect_words(const Op&, const std::vector<Tensor>& inputs, int64_t bits);
// E4M3 block scales over a divisor into `m`.
void byte_steps(Matrix& m, const Tensor& scale, const Tensor& divisor);
// The values of E2M1 and the steps of NVFP4 (divisor given) or MXFP4 blocks into `m`.
void fp4_matrix(Matrix& m, const Tensor& packed, const Tensor& scale, const Tensor& divisor);
// Offset-binary words or int8 with float scales into `m`.
void int_matrix(Matrix& m, const Tensor& codes, const Tensor& scale, int64_t bits, int64_t group, int64_t columns);

}  // namespace compressor
