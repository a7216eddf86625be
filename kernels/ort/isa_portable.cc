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
inline void store_sums(const F* a, float* out, bool add) {
  for (int i = 0; i < 4; ++i) out[i] = add ? out[i] + sum(a[i]) : sum(a[i]);
}

#include "isa_scalar.h"

using Nibble = Scalar<Codes::NIBBLE>;
template <Codes C> using Few = Scalar<C>;
template <Codes C> using Int8 = Scalar<C>;
template <Codes C> using Byte = Scalar<C>;
constexpr const uint8_t* NIBBLE_ORDER = NATURAL_ORDER;

inline F from_bf16(const uint8_t* p) {
  F f;
  for (int i = 0; i < LANES; ++i) {
    const uint32_t bits = uint32_t(p[2 * i]) << 16 | uint32_t(p[2 * i + 1]) << 24;
    __builtin_memcpy(&f.v[i], &bits, 4);
  }
  return f;
}
#include "isa_floats.h"

using X = int16_t;
constexpr int INT_STEP = 16, OFFSET = 0;
struct I {
  int32_t v[INT_STEP];
};
using W = const int8_t*;
inline I int_zero() { return {}; }
inline W int_load(const int8_t* p) { return p; }
inline I int_dot(I acc, const X* x, W w) {
  for (int i = 0; i < INT_STEP; ++i) acc.v[i] += int32_t(x[i]) * w[i];
  return acc;
}
inline int32_t int_sum(const I& acc) {
  int32_t sum = 0;
  for (int32_t v : acc.v) sum += v;
  return sum;
}

#include "isa_body.h"
#include "isa_activation.h"
#include "isa_attention.h"
#include "isa_gptq.h"
#include "isa_sparse.h"
#include "isa_integers.h"

bool always() { return true; }

}  // namespace

extern const Isa PORTABLE = {"portable", always, round, arrange, gemv, gemm, decode, int_bytes, int_arrange, int_gemm,
                             nullptr, nullptr, nullptr, nullptr, gptq, attend, swiglu, activate, NIBBLE_ORDER, sparse};

}  // namespace compressor
