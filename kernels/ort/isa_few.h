// Decoders of codes of 1, 2 and 3 bits, over an instruction set's look_up, which makes an F of eight codes a word: those
// that begin in bit shift[i] of word[i]. Included as isa_body.h is.

// The bits of eight codes lie in one word of 32, which is looked at from eight places.
template <Codes C>
struct Few {
  static constexpr Codes CODES = C;
  static constexpr bool PAIRED = false;
  static constexpr float FACTOR = 1;
  static constexpr int BITS = C == Codes::BIT ? 1 : C == Codes::CRUMB ? 2 : 3;
  static constexpr int WORDS = LANES / 8, LAST = int(chunk_bytes(C)) - 4;
  F values;  // a look-up sees bits of the next codes too

  explicit Few(const Matrix& m) {
    float table[LANES];
    for (int i = 0; i < LANES; ++i) table[i] = m.table[i & ((1 << BITS) - 1)];
    values = load(table);
  }

  void operator()(const uint8_t* p, F* out) const {
    _Pragma("GCC unroll 4") for (int v = 0; v < CHUNK / LANES; ++v) {
      int word[WORDS], shift[WORDS];
      _Pragma("GCC unroll 2") for (int i = 0; i < WORDS; ++i) {
        const int byte = (v * WORDS + i) * BITS, first = byte < LAST ? byte : LAST;  // no byte behind the chunk is read
        __builtin_memcpy(word + i, p + first, 4);
        shift[i] = 8 * (byte - first);
      }
      out[v] = look_up<BITS>(values, word, shift);
    }
  }
};
