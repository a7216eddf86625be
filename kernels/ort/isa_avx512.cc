// AVX-512 (F, BW, DQ, VL and VNNI): 16 floats a register, 32 registers.
#include <immintrin.h>

#include <type_traits>

#include "matrix.h"

namespace compressor {
namespace {

constexpr int LANES = 16, TOKENS = 6, ROWS = 4;  // 6 tokens * 4 rows = 24 accumulators
using F = __m512;
inline F zero() { return _mm512_setzero_ps(); }
inline F splat(const float* p) { return _mm512_set1_ps(*p); }
inline F pair(const float* a, const float* b) { return _mm512_mask_broadcastss_ps(splat(a), 0xFF00, _mm_load_ss(b)); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F f) { _mm512_storeu_ps(p, f); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline __m256 halves(F a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
// The sums of four registers.
inline void store_sums(const F* a, float* out, bool add) {
  const __m256 low = _mm256_hadd_ps(halves(a[0]), halves(a[1])), high = _mm256_hadd_ps(halves(a[2]), halves(a[3]));
  const __m256 pairs = _mm256_hadd_ps(low, high);
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, add ? _mm_add_ps(_mm_loadu_ps(out), s) : s);
}

#include "isa_scalar.h"

// One permute looks up 16 codes: the low nibbles of 16 bytes, then the high ones.
constexpr uint8_t NIBBLE_ORDER[CHUNK] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                         1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

struct Nibble {
  static constexpr Codes CODES = Codes::NIBBLE;
  static constexpr bool PAIRED = true;  // either register holds halves of both blocks of 16
  static constexpr float FACTOR = 1;
  F table;
  explicit Nibble(const Matrix& m) : table(load(m.table)) {}

  void operator()(const uint8_t* p, F* out) const {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    out[0] = _mm512_permutexvar_ps(codes, table);  // reads the low four bits only
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
  }
};

template <int BITS>
inline F look_up(F values, const int* word, const int* shift) {  // it sees four bits
  const __m256i own = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
  const auto both = [](__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); };
  const __m512i words = both(_mm256_set1_epi32(word[0]), _mm256_set1_epi32(word[1]));
  const __m512i at = both(_mm256_set1_epi32(shift[0]), _mm256_set1_epi32(shift[1]));
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_add_epi32(both(own, own), at)), values);
}
template <bool OFFSET_BINARY>
inline F from_int8(const uint8_t* p) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (OFFSET_BINARY) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(char(0x80)));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
template <bool E4M3>
inline F from_float8(const uint8_t* p) {
  __m256i half = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  half = _mm256_slli_epi16(half, 8);
  if (E4M3) {
    half = _mm256_and_si256(_mm256_srai_epi16(half, 1), _mm256_set1_epi16(short(0xBFFF)));
  }
  return _mm512_cvtph_ps(half);
}
inline F from_bf16(const uint8_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
#include "isa_bytes.h"
#include "isa_few.h"
#include "isa_floats.h"

// VNNI multiplies unsigned by signed bytes, so inputs are moved up by 128.
using X = uint8_t;
using I = __m512i;
using W = __m512i;
constexpr int INT_STEP = 64, OFFSET = 128;
inline I int_zero() { return _mm512_setzero_si512(); }
inline W int_load(const int8_t* p) { return _mm512_loadu_si512(p); }
inline I int_dot(I acc, const X* x, W w) { return _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(x), w); }
inline I int_sum_up(I acc, W w) { return _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), w); }
inline int32_t int_sum(I acc) { return _mm512_reduce_add_epi32(acc); }

#include "isa_body.h"
#include "isa_activation.h"
#include "isa_attention.h"
#include "isa_gptq.h"
#include "isa_sparse.h"
#include "isa_integers.h"

inline __m256i dot(__m256i acc, __m256i u, __m256i x) { return _mm256_dpbusd_epi32(acc, u, x); }
inline __m256i finish(__m256i acc) { return acc; }
inline int32_t start_of(int32_t sum) { return sum; }

#include "isa_fp4.h"

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const Isa AVX512 = {"avx512vnni", supported, round, arrange, gemv, gemm, decode, int_bytes, int_arrange,
                           int_gemm, fp4_bytes, fp4_arrange, fp4_gemv, fp4_gemm, gptq, attend, swiglu, activate, NIBBLE_ORDER, sparse};

}  // namespace compressor
