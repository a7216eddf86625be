// A product that reads the weights of active channels only (SparseRows). Included behind isa_body.h.
//
// A run of channels meets 64 outputs at a time, whose sums are in registers meanwhile. Rows of codes are shorter than a
// page, so what the run behind it will read is asked for; rows of floats are as long, and processors do that by themselves.

template <class Decoder, class Scale, bool SCALED, int TOKENS_HERE>
void sparse_with(
    const SparseRows& m, const ActiveChannels& active, int64_t tile, int64_t first, int64_t last, float* y) {
  constexpr int CHUNKS = TOKENS_HERE == 1 ? SPARSE_STEP / CHUNK : 1, WIDE = CHUNKS * VECTORS;
  constexpr int64_t STEP = CHUNKS * CHUNK, BYTES = chunk_bytes(Decoder::CODES);
  const Decoder decode(m.stored);
  const Scale scale(m.stored);
  const int64_t row_bytes = m.row_bytes(), scale_bytes = m.scale_bytes();
  const int64_t count = active.first[active.runs];
  const uint8_t* rows = m.data + tile * m.stored.columns * row_bytes;
  const uint8_t* scales = m.scales + tile * m.stored.scales_a_row * scale_bytes;
  alignas(64) float sums[TOKENS_HERE][SPARSE_WIDTH];
  for (int t = 0; t < TOKENS_HERE; ++t) __builtin_memset(sums[t], 0, size_t(m.width) * sizeof(float));
  for (int64_t run = first; run < last; ++run) {
    const int64_t start = active.first[run], here = active.first[run + 1] - start;
    const float* x = active.x + start * TOKENS_HERE;
    const uint8_t *from[SPARSE_RUN], *next[SPARSE_RUN];
    for (int64_t i = 0; i < here; ++i) {
      const int64_t later = start + here + i < count ? start + here + i : count - 1;
      from[i] = rows + active.channel[start + i] * row_bytes;
      next[i] = rows + active.channel[later] * row_bytes;
    }
    for (int64_t n = 0; n < m.width; n += STEP) {
      const int64_t at = n / CHUNK * BYTES;
      F acc[TOKENS_HERE][WIDE];
      UNROLL for (int t = 0; t < TOKENS_HERE; ++t)
        UNROLL for (int v = 0; v < WIDE; ++v) acc[t][v] = SCALED ? zero() : load(sums[t] + n + v * LANES);
      for (int64_t i = 0; i < here; ++i) {
        if constexpr (SCALED) __builtin_prefetch(next[i] + at);
        UNROLL for (int c = 0; c < CHUNKS; ++c) {
          F w[VECTORS];
          decode(from[i] + at + c * BYTES, w);
          UNROLL for (int t = 0; t < TOKENS_HERE; ++t) {
            const F in = splat(x + i * TOKENS_HERE + t);
            UNROLL for (int v = 0; v < VECTORS; ++v)
              acc[t][c * VECTORS + v] = fma(w[v], in, acc[t][c * VECTORS + v]);
          }
        }
      }
      if constexpr (SCALED)
        UNROLL for (int c = 0; c < CHUNKS; ++c) {
          F s[VECTORS];
          scale(scales + active.block[run] * scale_bytes + (n / CHUNK + c) * chunk_bytes(Scale::CODES), s);
          UNROLL for (int t = 0; t < TOKENS_HERE; ++t)
            UNROLL for (int v = 0; v < VECTORS; ++v) {
              float* sum = sums[t] + n + c * CHUNK + v * LANES;
              store(sum, fma(acc[t][c * VECTORS + v], s[v], load(sum)));
            }
        }
      else
        UNROLL for (int t = 0; t < TOKENS_HERE; ++t)
          UNROLL for (int v = 0; v < WIDE; ++v) store(sums[t] + n + v * LANES, acc[t][v]);
    }
  }
  const int64_t begin = tile * m.width, left = m.stored.rows - begin, wide = left < m.width ? left : m.width;
  const float factor = m.factor * Scale::FACTOR;
  for (int t = 0; t < TOKENS_HERE; ++t)
    for (int64_t n = 0; n < wide; ++n) y[t * m.stored.rows + begin + n] = sums[t][n] * factor;
}

template <class Decoder, class Scale, bool SCALED>
void sparse_of(
    const SparseRows& m, const ActiveChannels& active, int64_t tile, int64_t first, int64_t last, float* y) {
  static_assert(SPARSE_TOKENS == 3, "one case for each number of tokens");
  if (active.tokens == 1) return sparse_with<Decoder, Scale, SCALED, 1>(m, active, tile, first, last, y);
  if (active.tokens == 2) return sparse_with<Decoder, Scale, SCALED, 2>(m, active, tile, first, last, y);
  sparse_with<Decoder, Scale, SCALED, 3>(m, active, tile, first, last, y);
}

void sparse(const SparseRows& m, const ActiveChannels& active, int64_t tile, int64_t first, int64_t last, float* y) {
  using None = Float<Codes::FP32>;
  const auto with = m.stored.codes == Codes::FP32     ? sparse_of<Float<Codes::FP32>, None, false>
                    : m.stored.codes == Codes::BF16   ? sparse_of<Float<Codes::BF16>, None, false>
                    : m.scale_codes == Codes::E4M3    ? sparse_of<Nibble, Byte<Codes::E4M3>, true>
                    : m.scale_codes == Codes::BF16    ? sparse_of<Nibble, Float<Codes::BF16>, true>
                                                      : sparse_of<Nibble, Float<Codes::FP32>, true>;
  with(m, active, tile, first, last, y);
}
