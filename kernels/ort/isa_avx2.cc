// AVX2, FMA and F16C: 8 floats a register, 16 registers.
#include <immintrin.h>

#include <type_traits>

#include "matrix.h"

namespace compressor {
namespace {

constexpr int LANES = 8, TOKENS = 3, ROWS = 4;  // 3 tokens * 4 rows = 12 accumulators
using F = __m256;
inline F zero() { return _mm256_setzero_ps(); }
inline F splat(const float* p) { return _mm256_broadcast_ss(p); }
inline F pair(const float* a, const float*) { return splat(a); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F f) { _mm256_storeu_ps(p, f); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// The sums of four registers.
inline void store_sums(const F* a, float* out, bool add) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, add ? _mm_add_ps(_mm_loadu_ps(out), s) : s);
}

#include "isa_scalar.h"

// Two byte shuffles give the upper 16 bits of 32 floats: a value of the table is exact in bfloat16. The low nibbles of
// 16 bytes go to one half of the register, the high nibbles to the other; a mask and a shift then part neighbours.
constexpr uint8_t NIBBLE_ORDER[CHUNK] = {0,  4,  8,  12, 1,  5,  9,  13, 2,  6,  10, 14, 3,  7,  11, 15,
                                         16, 20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31};

struct Nibble {
  static constexpr Codes CODES = Codes::NIBBLE;
  static constexpr bool PAIRED = false;
  static constexpr float FACTOR = 1;
  __m256i low, high;

  explicit Nibble(const Matrix& m) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &m.table[i], 4);
      bytes[0][i] = uint8_t(bits >> 16);
      bytes[1][i] = uint8_t(bits >> 24);
    }
    low = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[0])));
    high = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[1])));
  }

  void operator()(const uint8_t* p, F* out) const {
    const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4), odd = _mm256_set1_epi32(int(0xFFFF0000));
    __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    codes = _mm256_and_si256(_mm256_srlv_epi32(codes, shifts), _mm256_set1_epi8(15));
    const __m256i a = _mm256_shuffle_epi8(low, codes), b = _mm256_shuffle_epi8(high, codes);
    const __m256i first = _mm256_unpacklo_epi8(a, b), second = _mm256_unpackhi_epi8(a, b);
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(first, odd));
    out[2] = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
    out[3] = _mm256_castsi256_ps(_mm256_and_si256(second, odd));
  }
};

template <int BITS>
inline F look_up(F values, const int* word, const int* shift) {  // it sees three bits
  const __m256i own = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
  const __m256i at = _mm256_add_epi32(own, _mm256_set1_epi32(*shift));
  return _mm256_permutevar8x32_ps(values, _mm256_srlv_epi32(_mm256_set1_epi32(*word), at));
}
template <bool OFFSET_BINARY>
inline F from_int8(const uint8_t* p) {
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if (OFFSET_BINARY) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(char(0x80)));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
template <bool E4M3>
inline F from_float8(const uint8_t* p) {
  __m128i half = _mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if (E4M3) {
    half = _mm_and_si128(_mm_srai_epi16(half, 1), _mm_set1_epi16(short(0xBFFF)));
  }
  return _mm256_cvtph_ps(half);
}
inline F from_bf16(const uint8_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
#include "isa_bytes.h"
#include "isa_few.h"
#include "isa_floats.h"

using X = int16_t;
using I = __m256i;
using W = __m256i;
constexpr int INT_STEP = 16, OFFSET = 0;
inline I int_zero() { return _mm256_setzero_si256(); }
inline W int_load(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I int_dot(I acc, const X* x, W w) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), w));
}
inline int32_t int_sum(I acc) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

#include "isa_body.h"
#include "isa_activation.h"
#include "isa_attention.h"
#include "isa_gptq.h"
#include "isa_sparse.h"
#include "isa_integers.h"

// Sums of 16 bits, two in each 32: at most 24 * 128 * 8 each, of which the start takes away what does not fit.
inline __m256i dot(__m256i acc, __m256i u, __m256i x) {
  acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, x));
  __asm__("" : "+x"(acc));  // or gcc sums products first, which it has no registers for
  return acc;
}
inline __m256i finish(__m256i acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
inline int32_t start_of(int32_t sum) { return sum & 0xFFFF; }

#include "isa_fp4.h"

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

extern const Isa AVX2 = {"avx2", supported, round, arrange, gemv, gemm, decode, int_bytes, int_arrange, int_gemm,
                         fp4_bytes, fp4_arrange, fp4_gemv, fp4_gemm, gptq, attend, swiglu, activate, NIBBLE_ORDER, sparse};

}  // namespace compressor
