// Plain C++ for any processor: the slow twin that the other instruction sets are tested against.
#include <type_traits>

#include "matrix.h"

namespace compressor {
namespace {

constexpr int LANES = 4, TOKENS = 3, ROWS = 2;
struct F {
  float v[LANES];
};
inline F zero() { return {}; }
inline F splat(const float* p) { return {{*p, *p, *p, *p}}; }
inline F pair(const float* a, const float*) { return splat(a); }
inline F load(const float* p) {
  F f;
  __builtin_memcpy(&f, p, sizeof f);
  return f;
}
inline void store(float* p, F f) { __builtin_memcpy(p, &f, sizeof f); }
inline F mul(F a, F b) {
  for (int i = 0; i < LANES; ++i) a.v[i] *= b.v[i];
  return a;
}
inline F fma(F a, F b, F c) {
  for (int i = 0; i < LANES; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

#include "isa_scalar.h"

using Nibble = Scalar<Codes::NIBBLE>;
template <Codes C> using Int8 = Scalar<C>;
template <Codes C> using Byte = Scalar<C>;
constexpr const uint8_t* NIBBLE_ORDER = NATURAL_ORDER;

#include "isa_body.h"

bool always() { return true; }

}  // namespace

extern const Isa PORTABLE = {"portable", always, round, arrange, gemv, gemm, decode};

}  // namespace compressor
