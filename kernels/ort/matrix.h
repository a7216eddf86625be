// How a weight matrix is stored, how inputs are rounded, and the kernels that one instruction set offers for both.
//
// T tokens, K in-features, N out-features. A stored row is decoded 32 elements at a time, in an order that suits the
// instruction set; inputs are brought into the same order first ("arranged") and padded with zeros to a multiple of 32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace compressor {

// 4, 6, 2, 1 and 3 bits: codes of a table, little endian, low bits first (6 bits: four codes in three bytes; 3 bits:
// eight). Others: as named.
enum class Codes { NIBBLE, SIX, CRUMB, BIT, THREE, INT8, OFFSET8, E4M3, E5M2, BF16, FP32 };

constexpr int64_t CHUNK = 32;
constexpr int64_t TOKENS_AT_ONCE = 128;  // at most, in one call of a kernel: their inputs stay in the second-level cache
constexpr int64_t padded(int64_t columns) { return (columns + CHUNK - 1) / CHUNK * CHUNK; }
constexpr int64_t chunk_bytes(Codes codes) {
  return codes == Codes::NIBBLE ? 16 : codes == Codes::SIX ? 24 : codes == Codes::CRUMB ? 8
       : codes == Codes::BIT ? 4 : codes == Codes::THREE ? 12
       : codes == Codes::BF16 ? 64 : codes == Codes::FP32 ? 128 : 32;
}

// value[n, k] = decode(codes[n, k]) * scale[n, k / block], used where it lies: nothing is copied or expanded.
struct Matrix {
  int64_t rows = 0, columns = 0;  // N, K
  Codes codes = Codes::NIBBLE;
  const uint8_t* data = nullptr;
  int64_t row_bytes = 0;
  bool is_fp4 = false;  // nibbles of E2M1, which are integers in half steps
  alignas(64) float table[64] = {};  // values of the codes of 1 to 4 and 6 bits; 4 bits: exact in bfloat16

  int64_t block = 0, scales_a_row = 1;
  const uint8_t* scale_bytes = nullptr;  // one byte each, its value in `step` …
  const float* scale_floats = nullptr;   // … or float32; neither: 1
  float step[256] = {};
  float divided_e4m3 = 0;  // the divisor, where bytes are E4M3 over one

  float scale(int64_t row, int64_t index) const {
    int64_t at = row * scales_a_row + index;
    return scale_bytes ? step[scale_bytes[at]] : scale_floats ? scale_floats[at] : 1.0f;
  }
  // log2(block / 16) where that is whole, so that both halves of a chunk have one scale each; 62 for one scale a row.
  int shift() const {
    if (scales_a_row == 1) return 62;
    for (int s = 0; s < 40; ++s)
      if (block == int64_t(16) << s) return s;
    return -1;
  }
};

// A float of few bits, as in kernels/codec.py.
struct FloatFormat {
  const char* name;
  int exponent, mantissa;
  float top;
  int bits() const { return 1 + exponent + mantissa; }
  int lowest() const { return 2 - (1 << (exponent - 1)); }
};
const FloatFormat* float_format(const char* name);              // null where unknown
void float_values(const FloatFormat&, float* values);           // of all 2^bits codes
const float* byte_values(const char* name);                      // of the 256 codes of e4m3, e5m2 or e8m0

enum class Activation { NONE, GELU, GELU_TANH, SILU, RELU };

enum class Rule { NONE, NVFP4, MXFP4, INT_BLOCK, INT_TOKEN, INT_STATIC, FLOAT_TOKEN, FLOAT_STATIC };

// What kernels/activations.py does to a row before the product, in its order and with its bits.
struct Rounding {
  Rule rule = Rule::NONE;
  int bits = 8;                     // integer rules
  int64_t size = 0;                 // of the blocks of int8_block
  FloatFormat format{};             // float rules
  float scale = 1;                  // nvfp4: the divisor; static rules: the step
  bool four_over_six = false;
  int64_t hadamard = 0;
  const float* offset = nullptr;    // [K], subtracted
  const int8_t* shift = nullptr;    // [K], exponents of two
  int64_t block(int64_t columns) const {
    return rule == Rule::NVFP4 ? 16 : rule == Rule::MXFP4 ? 32 : rule == Rule::INT_BLOCK ? size : columns;
  }
};

// The element grid that GPTQ rounds to, as LIMITS of methods/grid.py: lowest and highest code, smallest binade (0:
// integers), spacing over binade.
struct GptqGrid {
  float low, high, binade, unit;
};
constexpr int64_t GPTQ_COLUMNS = 128;

// A matrix turned: the weights that one input channel multiplies lie side by side, in tiles of `width` outputs:
// data [tiles, K, width], scales [tiles, K / block, width]. Outputs beyond N are never read.
constexpr int64_t SPARSE_STEP = 64, SPARSE_WIDTH = 4096;  // width: a multiple of the first, at most the second
constexpr int64_t SPARSE_RUN = 16, SPARSE_TOKENS = 3;

struct SparseRows {
  Matrix stored;  // what it was made of: element and table
  int64_t width = 0, tiles = 0;
  const uint8_t* data = nullptr;
  const uint8_t* scales = nullptr;  // null: none
  Codes scale_codes = Codes::FP32;
  float factor = 1;  // of every sum

  int64_t row_bytes() const { return width / CHUNK * chunk_bytes(stored.codes); }
  int64_t scale_bytes() const { return scales ? width / CHUNK * chunk_bytes(scale_codes) : 0; }
};

// The channels that some token reads, and their inputs x [channels, tokens]; in runs of at most SPARSE_RUN channels of
// one block of scales: run r has channels [first[r], first[r + 1]).
struct ActiveChannels {
  const int32_t* channel;
  const float* x;
  const int32_t* first;
  const int32_t* block;
  int64_t runs, tokens;  // tokens <= SPARSE_TOKENS
};

struct Isa {
  const char* name;
  bool (*supported)();
  // x [K] -> codes [K] on the grid of the rule and one step for each block of them; codes * step is the rounded input.
  void (*round)(const Rounding&, const float* x, int64_t columns, float* codes, float* steps);
  // Row `token` of x [T, K] into its place among T * padded(K) floats.
  void (*arrange)(Codes, const float* x, int64_t columns, int64_t token, int64_t tokens, float* out);
  // y[t, n] of rows [first, last) for arranged x; y has N columns. gemv: T = 1, gemm: T <= TOKENS_AT_ONCE.
  void (*gemv)(const Matrix&, int64_t first, int64_t last, const float* x, float* y);
  void (*gemm)(const Matrix&, int64_t first, int64_t last, const float* x, int64_t tokens, float* y);
  void (*decode)(const Matrix&, int64_t row, float* out);  // one row in its own order, [K]
  // The exact sums of integers |code| <= 128 with int8 codes, as float32; arranged rows have int_bytes(K) bytes.
  int64_t (*int_bytes)(int64_t columns);
  void (*int_arrange)(const float* codes, int64_t columns, void* out);
  void (*int_gemm)(const Matrix&, int64_t first, int64_t last, const void* x, int64_t tokens, float* y);
  // FP4 weights in blocks of 16 and more times codes that are whole multiples of `unit`, at most 128 of them, with a
  // step every `block`: summed as integers. An arranged row has fp4_bytes(K) bytes. gemv: one token; gemm: at most
  // TOKENS_AT_ONCE, `blocks` unless each has one step. All null where floats are as fast.
  int64_t (*fp4_bytes)(int64_t columns);
  void (*fp4_arrange)(const float* codes, const float* steps, int64_t columns, int64_t block, float unit, void* out);
  void (*fp4_gemv)(const Matrix&, int64_t first, int64_t last, const void* x, bool blocks, float* y);
  void (*fp4_gemm)(const Matrix&, int64_t first, int64_t last, const void* x, bool blocks, int64_t tokens, float* y);
  // Rows [first, last) of weight, step, codes and errors [N, K], u [K, K]; K <= GPTQ_COLUMNS (isa_gptq.h).
  void (*gptq)(const float* weight, const float* step, const float* u, int64_t first, int64_t last, int64_t columns,
               const GptqGrid&, float* codes, float* errors);
  // y [D] = softmax(softcap(q . k) + bias) . v for one query [D], already scaled, and keys and values [T, D]; bias [T] or
  // null, softcap 0 for none, scores [T] are scratch.
  void (*attend)(const float* q, const float* k, const float* v, int64_t count, int64_t size, const float* bias,
                 float softcap, float* scores, float* y);
  void (*swiglu)(const float* x, int64_t half, float* y);  // silu(x[i]) * x[half + i]
  // x = act(x), times `factor` unless that is null; `count` of each (isa_activation.h).
  void (*activate)(Activation, float* x, const float* factor, int64_t count);
  const uint8_t* nibble_order;  // element i of a decoded chunk is nibble nibble_order[i] of its bytes
  // The sums over runs [first, last) of the outputs of one tile, in y [tokens, N] (isa_sparse.h).
  void (*sparse)(const SparseRows&, const ActiveChannels&, int64_t tile, int64_t first, int64_t last, float* y);
};

const Isa& isa();                     // the best that this processor has
bool use_isa(const char* name);       // another one, for tests; false where unknown or not supported
extern const Isa* const ISAS[];       // best first, null at the end

}  // namespace compressor
