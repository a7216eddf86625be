// FP4 weights times integers: INT8 inputs, or FP4 inputs in half steps. The products of 16 neighbours are summed exactly
// and multiplied once by both scales. Included as isa_body.h is, in 256-bit vectors, over an instruction set's
// dot(acc, u, x), which adds products of unsigned u and signed x within each 32 bits; finish(acc), their int32 sums; and
// start_of(s), from which sums begin at s.
//
// Weights are moved up by 12 half steps to be unsigned; 12 times the sum of the inputs is where a sum starts.

constexpr int64_t FP4_CHUNK = 64, FP4_BLOCKS = 4;  // codes, and blocks of 16 of them
constexpr int64_t FP4_PANEL = 1024;                // columns whose weights stay in the first-level cache
constexpr int FP4_ROWS = 8, FP4_GROUPS = 2;        // rows to a vector of sums, vectors that share an input
constexpr int FP4_OFFSET = 12;

// 64 inputs: those of even k, then those of odd k, so that 32 bits are four of one block. Where sums begin: in `start`
// those of each half of a block, in `whole` those of a block.
struct FP4Chunk {
  int8_t x[FP4_CHUNK];
  int32_t start[2 * FP4_BLOCKS], whole[FP4_BLOCKS];
  float steps[FP4_BLOCKS];
};

inline int64_t fp4_chunks(int64_t columns) { return (columns + FP4_CHUNK - 1) / FP4_CHUNK; }

int64_t fp4_bytes(int64_t columns) { return fp4_chunks(columns) * int64_t(sizeof(FP4Chunk)); }

void fp4_arrange(const float* codes, const float* steps, int64_t columns, int64_t block, float unit, void* out) {
  FP4Chunk* chunk = static_cast<FP4Chunk*>(out);
  const float parts = 1 / unit;
  for (int64_t k = 0; k < columns; k += FP4_CHUNK, ++chunk) {
    float padded[FP4_CHUNK] = {};
    const int64_t count = columns - k < FP4_CHUNK ? columns - k : FP4_CHUNK;
    const float* from = codes + k;
    if (count < FP4_CHUNK) from = static_cast<float*>(__builtin_memcpy(padded, from, size_t(count) * sizeof(float)));
    for (int i = 0; i < 32; ++i) {
      chunk->x[i] = int8_t(int(from[2 * i] * parts));
      chunk->x[32 + i] = int8_t(int(from[2 * i + 1] * parts));
    }
    for (int b = 0; b < FP4_BLOCKS; ++b) {
      int32_t sums[2] = {};
      for (int i = 0; i < 8; ++i) sums[i / 4] += chunk->x[8 * b + i] + chunk->x[32 + 8 * b + i];
      for (int half = 0; half < 2; ++half) chunk->start[2 * b + half] = start_of(-FP4_OFFSET * sums[half]);
      chunk->whole[b] = start_of(-FP4_OFFSET * (sums[0] + sums[1]));
      chunk->steps[b] = 16 * b < count ? steps[(k + 16 * b) / block] * (unit * 0.5f) : 0.0f;
    }
  }
}

// The scales of `count` blocks of 16 of a row, from block `first` on, as floats; zeros behind the last one.
inline void fp4_scales(const Matrix& m, int64_t row, int64_t first, int64_t count, float* out) {
  const int64_t there = m.columns / 16 - first < count ? m.columns / 16 - first : count;
  const int shift = m.shift();
  int64_t i = 0;
  if (m.divided_e4m3) {
    const float factor = 256 / m.divided_e4m3;
    const uint8_t* bytes = m.scale_bytes + row * m.scales_a_row + first;
    for (; i + LANES <= there; i += LANES) store(out + i, mul(from_float8<true>(bytes + i), splat(&factor)));
  }
  for (; i < there; ++i) out[i] = m.scale(row, (first + i) >> shift);
  for (; i < count; ++i) out[i] = 0;
}

struct FP4Codes {
  __m256i table;
  FP4Codes(const Matrix& m) {
    alignas(16) uint8_t values[16];
    for (int i = 0; i < 16; ++i) values[i] = uint8_t(int(m.table[i] * 2) + FP4_OFFSET);
    table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
  }
  // 64 codes in the order of FP4Chunk.
  void operator()(const uint8_t* from, __m256i* even, __m256i* odd) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), low = _mm256_set1_epi8(15);
    *even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
    *odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
  }
};

// The bytes of chunk c of a row, which `tail` holds where the row ends within it.
inline const uint8_t* fp4_chunk(const Matrix& m, int64_t row, int64_t c, uint8_t* tail) {
  const uint8_t* codes = m.data + row * m.row_bytes + c * 32;
  if ((c + 1) * FP4_CHUNK <= m.columns) return codes;
  __builtin_memset(tail, 0, 32);
  return static_cast<uint8_t*>(__builtin_memcpy(tail, codes, size_t(m.row_bytes - c * 32)));
}

// --- one token: a vector of sums belongs to one row ------------------------------------------------------------------

template <int R>
inline void fp4_rows(const Matrix& m, const FP4Codes& decode, int64_t row, const FP4Chunk* x, float* y) {
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const int64_t chunks = fp4_chunks(m.columns), panel = FP4_PANEL / FP4_CHUNK;
  float scales[R][FP4_PANEL / 16];
  __m256 acc[R];
  UNROLL for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_ps();
  for (int64_t start = 0; start < chunks; start += panel) {
    const int64_t end = chunks - start < panel ? chunks : start + panel;
    for (int r = 0; r < R; ++r) fp4_scales(m, row + r, start * FP4_BLOCKS, (end - start) * FP4_BLOCKS, scales[r]);
    const auto add = [&](int r, const uint8_t* codes, int64_t c) {
      __m256i even, odd;
      decode(codes, &even, &odd);
      const __m256i* in = reinterpret_cast<const __m256i*>(x[c].x);
      __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[c].start));
      sum = finish(dot(dot(sum, even, _mm256_loadu_si256(in)), odd, _mm256_loadu_si256(in + 1)));
      const __m128 steps = _mm_mul_ps(_mm_loadu_ps(scales[r] + (c - start) * FP4_BLOCKS), _mm_loadu_ps(x[c].steps));
      const __m256 step = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(steps), twice);
      acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), step, acc[r]);
    };
    const uint8_t* codes = m.data + row * m.row_bytes;
    const int64_t whole = end * FP4_CHUNK <= m.columns ? end : end - 1;
    for (int64_t c = start; c < whole; ++c) {
      // The rows of the next step: rows of 512 bytes and more are too far apart for the processor to foresee them.
      UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(codes + (R + r) * m.row_bytes + c * 32);
      UNROLL for (int r = 0; r < R; ++r) add(r, codes + r * m.row_bytes + c * 32, c);
    }
    uint8_t tail[32];
    if (whole < end)
      UNROLL for (int r = 0; r < R; ++r) add(r, fp4_chunk(m, row + r, whole, tail), whole);
  }
  UNROLL for (int r = 0; r < R; ++r) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(acc[r]), _mm256_extractf128_ps(acc[r], 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    y[row + r] = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
}

void fp4_gemv(const Matrix& m, int64_t first, int64_t last, const void* x, float* y) {
  const FP4Codes decode(m);
  const FP4Chunk* chunks = static_cast<const FP4Chunk*>(x);
  int64_t row = first;
  for (; row + 4 <= last; row += 4) fp4_rows<4>(m, decode, row, chunks, y);
  for (; row < last; ++row) fp4_rows<1>(m, decode, row, chunks, y);
}

// --- many tokens: each 32 bits of a vector of sums belong to a row ----------------------------------------------------

// Eight rows of eight 32-bit words -> each word of all eight rows.
inline void transpose(const __m256i* in, uint8_t* out, int64_t stride) {
  __m256i a[8], b[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(in[i], in[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4)
    UNROLL for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  UNROLL for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * stride), _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + 4) * stride),
                        _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
  }
}

// The weights of eight rows within a panel: 16 vectors of four codes of each row a chunk, and a vector of their scales a
// block. Rows from `last` on are zeros.
struct FP4Panel {
  alignas(32) uint8_t codes[FP4_PANEL / 4][32];
  alignas(32) float scales[FP4_PANEL / 16][FP4_ROWS];

  void fill(const Matrix& m, const FP4Codes& decode, int64_t row, int64_t last, int64_t start, int64_t end) {
    float scale[FP4_ROWS][FP4_PANEL / 16];
    const int64_t blocks = (end - start) * FP4_BLOCKS;
    for (int r = 0; r < FP4_ROWS; ++r)
      if (row + r < last)
        fp4_scales(m, row + r, start * FP4_BLOCKS, blocks, scale[r]);
      else
        __builtin_memset(scale[r], 0, sizeof scale[r]);
    for (int64_t b = 0; b < blocks; ++b)
      for (int r = 0; r < FP4_ROWS; ++r) scales[b][r] = scale[r][b];
    for (int64_t c = start; c < end; ++c) {
      __m256i even[FP4_ROWS], odd[FP4_ROWS];
      uint8_t tail[32];
      for (int r = 0; r < FP4_ROWS; ++r) decode(fp4_chunk(m, row + r < last ? row + r : row, c, tail), even + r, odd + r);
      transpose(even, codes[(c - start) * 16], 32);
      transpose(odd, codes[(c - start) * 16 + 8], 32);
    }
  }
};

// M tokens times all groups of rows: y [M, FP4_GROUPS * 8] (+)=. Inputs have a step a block, or one a token.
template <int M, bool BLOCKS>
inline void fp4_block(const FP4Panel* w, const FP4Chunk* x, int64_t stride, int64_t chunks, float* y, bool add) {
  __m256 acc[M][FP4_GROUPS];
  UNROLL for (int t = 0; t < M; ++t)
    UNROLL for (int n = 0; n < FP4_GROUPS; ++n) acc[t][n] = _mm256_setzero_ps();
  for (int64_t c = 0; c < chunks; ++c)
    for (int b = 0; b < FP4_BLOCKS; ++b) {
      __m256i sum[M][FP4_GROUPS];
      UNROLL for (int t = 0; t < M; ++t)
        UNROLL for (int n = 0; n < FP4_GROUPS; ++n) sum[t][n] = _mm256_set1_epi32(x[t * stride + c].whole[b]);
      UNROLL for (int i = 0; i < 4; ++i) {
        const int word = (i & 2) * 4 + 2 * b + (i & 1);
        __m256i codes[FP4_GROUPS];
        UNROLL for (int n = 0; n < FP4_GROUPS; ++n)
          codes[n] = _mm256_load_si256(reinterpret_cast<const __m256i*>(w[n].codes[c * 16 + word]));
        UNROLL for (int t = 0; t < M; ++t) {
          int32_t four;
          __builtin_memcpy(&four, x[t * stride + c].x + 4 * word, 4);
          const __m256i in = _mm256_set1_epi32(four);
          UNROLL for (int n = 0; n < FP4_GROUPS; ++n) sum[t][n] = dot(sum[t][n], codes[n], in);
        }
      }
      UNROLL for (int n = 0; n < FP4_GROUPS; ++n) {
        const __m256 scale = _mm256_load_ps(w[n].scales[c * FP4_BLOCKS + b]);
        UNROLL for (int t = 0; t < M; ++t) {
          const __m256 step = _mm256_broadcast_ss(x[t * stride + c].steps + b);
          acc[t][n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(finish(sum[t][n])),
                                      BLOCKS ? _mm256_mul_ps(scale, step) : scale, acc[t][n]);
        }
      }
    }
  UNROLL for (int t = 0; t < M; ++t) {
    const __m256 step = _mm256_broadcast_ss(x[t * stride].steps);
    UNROLL for (int n = 0; n < FP4_GROUPS; ++n) {
      float* out = y + (t * FP4_GROUPS + n) * FP4_ROWS;
      const __m256 sum = BLOCKS ? acc[t][n] : _mm256_mul_ps(acc[t][n], step);
      _mm256_storeu_ps(out, add ? _mm256_add_ps(_mm256_loadu_ps(out), sum) : sum);
    }
  }
}

template <bool BLOCKS>
void fp4_tiles(const Matrix& m, int64_t first, int64_t last, const FP4Chunk* x, int64_t tokens, float* y) {
  constexpr int TILE_ROWS = FP4_GROUPS * FP4_ROWS;
  const FP4Codes decode(m);
  const int64_t chunks = fp4_chunks(m.columns), panel = FP4_PANEL / FP4_CHUNK;
  FP4Panel w[FP4_GROUPS];
  float sums[TOKENS_AT_ONCE * TILE_ROWS];
  for (int64_t row = first; row < last; row += TILE_ROWS) {
    const int64_t rows = last - row < TILE_ROWS ? last - row : TILE_ROWS;
    for (int64_t start = 0; start < chunks; start += panel) {
      const int64_t count = chunks - start < panel ? chunks - start : panel;
      for (int n = 0; n < FP4_GROUPS; ++n) {
        const int64_t at = row + n * FP4_ROWS < last ? row + n * FP4_ROWS : row;  // a group beyond the end is left out
        w[n].fill(m, decode, at, last, start, start + count);
      }
      int64_t t = 0;
      const auto block = [&](auto M) {
        const FP4Chunk* from = x + t * chunks + start;
        fp4_block<decltype(M)::value, BLOCKS>(w, from, chunks, count, sums + t * TILE_ROWS, start > 0);
        t += M;
      };
      while (t + 3 <= tokens) block(std::integral_constant<int, 3>());
      while (t < tokens) block(std::integral_constant<int, 1>());
    }
    for (int64_t t = 0; t < tokens; ++t)
      __builtin_memcpy(y + t * m.rows + row, sums + t * TILE_ROWS, size_t(rows) * sizeof(float));
  }
}

void fp4_gemm(const Matrix& m, int64_t first, int64_t last, const void* x, bool blocks, int64_t tokens, float* y) {
  const FP4Chunk* chunks = static_cast<const FP4Chunk*>(x);
  if (blocks)
    fp4_tiles<true>(m, first, last, chunks, tokens, y);
  else
    fp4_tiles<false>(m, first, last, chunks, tokens, y);
}
