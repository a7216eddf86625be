// One token times FP4 weights where the input is FP4 in blocks of the same size: integers in half steps, with an exact
// dot product a block and one multiplication by both scales. 256-bit vectors; byte_dot(a, b) is the instruction set's
// sum of four products of unsigned a and signed b in each 32 bits. Included inside an anonymous namespace.
//
// For many tokens the same exact products run through gemm: with a scale every 16 elements, integers save nothing there.

// Of one chunk of 32 codes: their magnitudes and values in the order in which nibbles are decoded (even k, then odd),
// and a quarter (of two half steps) of the step of the block that each 32 bits of the sum belong to.
struct FP4Chunk {
  uint8_t magnitudes[CHUNK];
  int8_t values[CHUNK];
  float steps[8];
};

int64_t fp4_bytes(int64_t columns) { return padded(columns) / CHUNK * int64_t(sizeof(FP4Chunk)); }

void fp4_arrange(const float* codes, const float* steps, int64_t columns, int64_t block, void* out) {
  FP4Chunk* chunk = static_cast<FP4Chunk*>(out);
  for (int64_t k = 0; k < columns; k += CHUNK, ++chunk) {
    *chunk = {};
    for (int i = 0; i < CHUNK; ++i) {
      const int64_t column = k + (i < 16 ? 2 * i : 2 * (i - 16) + 1);
      const int value = column < columns ? int(codes[column] * 2) : 0;
      chunk->values[i] = int8_t(value);
      chunk->magnitudes[i] = uint8_t(value < 0 ? -value : value);
    }
    for (int i = 0; i < 8; ++i) {
      const int64_t column = k + (i & 2) * 8;  // 32 bits hold [first, first, second, second] twice
      chunk->steps[i] = column < columns ? steps[column / block] * 0.25f : 0.0f;
    }
  }
}

template <int R>
inline void fp4_rows(const Matrix& m, __m256i table, int64_t row, const FP4Chunk* x, float* y) {
  const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
  const int64_t whole = m.columns / CHUNK;
  const int shift = m.shift();
  __m256 acc[R];
  const uint8_t* codes[R];
  RowScales<Scales::BYTES> scales[R];
  UNROLL for (int r = 0; r < R; ++r) {
    acc[r] = _mm256_setzero_ps();
    codes[r] = m.data + (row + r) * m.row_bytes;
    scales[r] = RowScales<Scales::BYTES>(m, row + r);
  }
  const auto add = [&](int r, const uint8_t* from, int64_t c, int64_t second) {
    __m256i w = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    w = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srlv_epi32(w, shifts), _mm256_set1_epi8(15)));
    w = _mm256_sign_epi8(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[c].values)));
    const __m256i sums = byte_dot(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[c].magnitudes)), w);
    const __m256 s0 = _mm256_broadcast_ss(scales[r].at((2 * c) >> shift)), s1 = _mm256_broadcast_ss(scales[r].at(second));
    const __m256 step = _mm256_mul_ps(_mm256_blend_ps(s0, s1, 0xCC), _mm256_loadu_ps(x[c].steps));
    acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), step, acc[r]);
  };
  for (int64_t c = 0; c < whole; ++c)
    UNROLL for (int r = 0; r < R; ++r) add(r, codes[r] + c * 16, c, (2 * c + 1) >> shift);
  if (m.columns % CHUNK)
    UNROLL for (int r = 0; r < R; ++r) {
      uint8_t tail[16] = {};
      __builtin_memcpy(tail, codes[r] + whole * 16, size_t(m.row_bytes - whole * 16));
      add(r, tail, whole, (2 * whole) >> shift);  // of one block; the step of the other is 0
    }
  UNROLL for (int r = 0; r < R; ++r) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(acc[r]), _mm256_extractf128_ps(acc[r], 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    y[row + r] = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
}

void fp4_gemv(const Matrix& m, int64_t first, int64_t last, const void* x, float* y) {
  alignas(16) int8_t values[16];
  for (int i = 0; i < 16; ++i) values[i] = int8_t(m.table[i] * 2);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
  const FP4Chunk* chunks = static_cast<const FP4Chunk*>(x);
  int64_t row = first;
  for (; row + 4 <= last; row += 4) fp4_rows<4>(m, table, row, chunks, y);
  for (; row < last; ++row) fp4_rows<1>(m, table, row, chunks, y);
}
