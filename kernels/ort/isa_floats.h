// Decoders of weights that are floats already, over an instruction set's from_bf16. Included as isa_body.h is.

template <Codes C>
struct Float {
  static constexpr Codes CODES = C;
  static constexpr bool PAIRED = false;
  static constexpr float FACTOR = 1;
  explicit Float(const Matrix&) {}

  void operator()(const uint8_t* p, F* out) const {
    for (int v = 0; v < CHUNK / LANES; ++v)
      if constexpr (C == Codes::BF16)
        out[v] = from_bf16(p + v * LANES * 2);
      else
        out[v] = load(reinterpret_cast<const float*>(p) + v * LANES);
  }
};
