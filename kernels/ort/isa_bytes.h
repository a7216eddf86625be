// Decoders of codes of one byte, over an instruction set's from_int8 and from_float8, which turn LANES bytes into an F.
// Included as isa_body.h is.

template <Codes C>
struct Int8 {
  static constexpr Codes CODES = C;
  static constexpr bool PAIRED = false;
  static constexpr float FACTOR = 1;
  explicit Int8(const Matrix&) {}

  void operator()(const uint8_t* p, F* out) const {
    for (int v = 0; v < CHUNK / LANES; ++v, p += LANES) out[v] = from_int8<C == Codes::OFFSET8>(p);
  }
};

// E5M2 is the upper half of a float16; E4M3 one bit further down is a float16 too, 2^8 times smaller.
template <Codes C>
struct Byte {
  static constexpr Codes CODES = C;
  static constexpr bool PAIRED = false;
  static constexpr float FACTOR = C == Codes::E4M3 ? 256 : 1;
  explicit Byte(const Matrix&) {}

  void operator()(const uint8_t* p, F* out) const {
    for (int v = 0; v < CHUNK / LANES; ++v, p += LANES) out[v] = from_float8<C == Codes::E4M3>(p);
  }
};
