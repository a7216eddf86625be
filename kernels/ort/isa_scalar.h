// Decoders without vector instructions, for codes that are rare or for processors that have none. See isa_body.h.

constexpr uint8_t NATURAL_ORDER[CHUNK] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                          16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

template <Codes C>
struct Scalar {
  static constexpr Codes CODES = C;
  static constexpr bool PAIRED = false;
  static constexpr float FACTOR = 1;
  const float* table;
  explicit Scalar(const Matrix& m)
      : table(C == Codes::E4M3 ? byte_values("e4m3") : C == Codes::E5M2 ? byte_values("e5m2") : m.table) {}

  void operator()(const uint8_t* p, F* out) const {
    alignas(64) float v[CHUNK];
    for (int i = 0; i < CHUNK; ++i) {
      if constexpr (C == Codes::NIBBLE) v[i] = table[p[i / 2] >> (i % 2 * 4) & 15];
      if constexpr (C == Codes::CRUMB) v[i] = table[p[i / 4] >> (i % 4 * 2) & 3];
      if constexpr (C == Codes::BIT) v[i] = table[p[i / 8] >> (i % 8) & 1];
      if constexpr (C == Codes::INT8) v[i] = float(int8_t(p[i]));
      if constexpr (C == Codes::OFFSET8) v[i] = float(p[i]) - 128.0f;
      if constexpr (C == Codes::E4M3 || C == Codes::E5M2) v[i] = table[p[i]];
    }
    if constexpr (C == Codes::THREE)
      for (int i = 0; i < CHUNK; i += 8, p += 3) {
        const uint32_t word = p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16;
        for (int j = 0; j < 8; ++j) v[i + j] = table[word >> (3 * j) & 7];
      }
    if constexpr (C == Codes::SIX)
      for (int i = 0; i < CHUNK; i += 4, p += 3) {
        const uint32_t word = p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16;
        for (int j = 0; j < 4; ++j) v[i + j] = table[word >> (6 * j) & 63];
      }
    for (int n = 0; n < CHUNK / LANES; ++n) out[n] = load(v + n * LANES);
  }
};
