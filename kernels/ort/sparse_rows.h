// Weights turned so that those of an input channel lie side by side, and the product that reads the active ones only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "matrix.h"
#include "threads.h"

namespace compressor {

// A copy of a matrix of floats, or of nibbles with scales, of the same size but for the end of the last tile.
class TurnedMatrix {
 public:
  TurnedMatrix(const Matrix&, const Threads&);
  // y [T, N] of x [T, K] for T <= SPARSE_TOKENS tokens, without what x has at or below the threshold [K]; `dense` [T]:
  // tokens that keep all. bias [N] or null.
  void operator()(const float* x, int64_t tokens, const float* threshold, const bool* dense, const float* bias,
                  float* y, const Threads&) const;

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };
  SparseRows rows_;
  const Isa* isa_;  // whose order of nibbles it has
  std::unique_ptr<uint8_t, Free> memory_;
};

}  // namespace compressor
