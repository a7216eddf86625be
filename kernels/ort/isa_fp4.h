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
constexpr int64_t FP4_AHEAD = 4096;                // bytes

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

// The scales of eight blocks of 16 of a row from block `first` on, zeros behind the last one; E4M3 ones over 256.
template <bool E4M3>
inline __m256 fp4_scales(const Matrix& m, int64_t row, int64_t first) {
  const int64_t there = m.columns / 16 - first;
  if constexpr (E4M3) {
    const uint8_t* from = m.scale_bytes + row * m.scales_a_row + first;
    __m128i bytes = _mm_setzero_si128();
    if (there >= 8)
      bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    else if (there == 4)
      bytes = _mm_loadu_si32(from);
    else
      __builtin_memcpy(&bytes, from, size_t(there));
    // One bit further down, E4M3 is a float16 2^8 times smaller.
    const __m128i half = _mm_srai_epi16(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes), 1);
    return _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(short(0xBFFF))));
  } else {
    const int shift = m.shift();
    alignas(32) float scales[8] = {};
    for (int64_t i = 0; i < 8 && i < there; ++i) scales[i] = m.scale(row, (first + i) >> shift);
    return _mm256_load_ps(scales);
  }
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

template <int R, bool E4M3, bool BLOCKS>
inline void fp4_rows(const Matrix& m, const FP4Codes& decode, int64_t row, const FP4Chunk* x, float* y) {
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const int64_t chunks = fp4_chunks(m.columns), whole = m.columns / FP4_CHUNK;
  __m256 acc[R];
  UNROLL for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_ps();
  const auto add = [&](int r, const uint8_t* codes, __m128 scales, const FP4Chunk& in) {
    __m256i even, odd;
    decode(codes, &even, &odd);
    const __m256i* bytes = reinterpret_cast<const __m256i*>(in.x);
    __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in.start));
    sum = finish(dot(dot(sum, even, _mm256_loadu_si256(bytes)), odd, _mm256_loadu_si256(bytes + 1)));
    const __m128 steps = BLOCKS ? _mm_mul_ps(scales, _mm_loadu_ps(in.steps)) : scales;
    const __m256 step = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(steps), twice);
    acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), step, acc[r]);
  };
  const uint8_t* codes = m.data + row * m.row_bytes;
  int64_t c = 0;
  for (; c + 2 <= whole; c += 2)
    UNROLL for (int r = 0; r < R; ++r) {
      // Memory answers after some 100 ns: what is asked for now is read a few rows later.
      __builtin_prefetch(codes + FP4_AHEAD + (c * R + 2 * r) * 32);
      const __m256 scales = fp4_scales<E4M3>(m, row + r, c * FP4_BLOCKS);
      add(r, codes + r * m.row_bytes + c * 32, _mm256_castps256_ps128(scales), x[c]);
      add(r, codes + r * m.row_bytes + c * 32 + 32, _mm256_extractf128_ps(scales, 1), x[c + 1]);
    }
  for (; c < chunks; ++c)
    UNROLL for (int r = 0; r < R; ++r) {
      alignas(32) uint8_t tail[32];
      const __m256 scales = fp4_scales<E4M3>(m, row + r, c * FP4_BLOCKS);
      add(r, fp4_chunk(m, row + r, c, tail), _mm256_castps256_ps128(scales), x[c]);
    }
  const float factor = (E4M3 ? 256 / m.divided_e4m3 : 1) * (BLOCKS ? 1 : x->steps[0]);
  UNROLL for (int r = 0; r < R; ++r) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(acc[r]), _mm256_extractf128_ps(acc[r], 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    y[row + r] = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s))) * factor;
  }
}

template <bool E4M3, bool BLOCKS>
void fp4_gemv_with(const Matrix& m, int64_t first, int64_t last, const FP4Chunk* x, float* y) {
  const FP4Codes decode(m);
  int64_t row = first;
  for (; row + 4 <= last; row += 4) fp4_rows<4, E4M3, BLOCKS>(m, decode, row, x, y);
  for (; row < last; ++row) fp4_rows<1, E4M3, BLOCKS>(m, decode, row, x, y);
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
  alignas(32) float scales[FP4_PANEL / 16 + 4][FP4_ROWS];  // written eight blocks at a time

  template <bool E4M3>
  void fill(const Matrix& m, const FP4Codes& decode, int64_t row, int64_t last, int64_t start, int64_t end) {
    const __m256 factor = _mm256_set1_ps(E4M3 ? 256 / m.divided_e4m3 : 1);
    for (int64_t b = start * FP4_BLOCKS; b < end * FP4_BLOCKS; b += 8)
      for (int r = 0; r < FP4_ROWS; ++r) {
        alignas(32) float eight[8] = {};
        if (row + r < last) _mm256_store_ps(eight, _mm256_mul_ps(fp4_scales<E4M3>(m, row + r, b), factor));
        for (int i = 0; i < 8; ++i) scales[b - start * FP4_BLOCKS + i][r] = eight[i];
      }
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

template <bool E4M3, bool BLOCKS>
void fp4_gemm_with(const Matrix& m, int64_t first, int64_t last, const FP4Chunk* x, int64_t tokens, float* y) {
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
        w[n].fill<E4M3>(m, decode, at, last, start, start + count);
      }
      int64_t t = 0;
      const auto block = [&](auto M) {
        const FP4Chunk* from = x + t * chunks + start;
        fp4_block<decltype(M)::value, BLOCKS>(w, from, chunks, count, sums + t * TILE_ROWS, start > 0);
        t += M;
      };
      while (t + 4 <= tokens) block(std::integral_constant<int, 4>());
      while (t < tokens) block(std::integral_constant<int, 1>());
    }
    for (int64_t t = 0; t < tokens; ++t)
      __builtin_memcpy(y + t * m.rows + row, sums + t * TILE_ROWS, size_t(rows) * sizeof(float));
  }
}

// --- which of them ----------------------------------------------------------------------------------------------------

template <class Function>
void fp4_with(const Matrix& m, bool blocks, Function&& function) {
  const std::true_type yes;
  const std::false_type no;
  if (m.divided_e4m3 != 0 && m.shift() == 0) return blocks ? function(yes, yes) : function(yes, no);
  return blocks ? function(no, yes) : function(no, no);
}

void fp4_gemv(const Matrix& m, int64_t first, int64_t last, const void* x, bool blocks, float* y) {
  fp4_with(m, blocks, [&](auto e4m3, auto each) {
    fp4_gemv_with<e4m3, each>(m, first, last, static_cast<const FP4Chunk*>(x), y);
  });
}

void fp4_gemm(const Matrix& m, int64_t first, int64_t last, const void* x, bool blocks, int64_t tokens, float* y) {
  fp4_with(m, blocks, [&](auto e4m3, auto each) {
    fp4_gemm_with<e4m3, each>(m, first, last, static_cast<const FP4Chunk*>(x), tokens, y);
  });
}
