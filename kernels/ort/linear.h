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

// `activations` of an op -> rule; `allowed` is what the op takes, separated by ", ". Raises Error.
Rounding rounding(const char* op, const std::string& activations, const char* allowed);
void set_hadamard(const char* op, Rounding&, int64_t hadamard);

// x's shape with N in place of K. Raises Error where K differs.
std::vector<int64_t> output_shape(const Op&, const Tensor& x, int64_t columns, int64_t rows);

// The values of E2M1 and the steps of NVFP4 (divisor given) or MXFP4 blocks into `m`.
void fp4_matrix(Matrix& m, const Tensor& packed, const Tensor& scale, const Tensor& divisor);
// Offset-binary words or int8 with float scales into `m`.
void int_matrix(Matrix& m, const Tensor& codes, const Tensor& scale, int64_t bits, int64_t group, int64_t columns);

}  // namespace compressor
