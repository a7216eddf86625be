// The kernels of one instruction set, written over its vector F of LANES floats and its decoders.
//
// Included inside an anonymous namespace by isa_*.cc, each compiled with its own flags: nothing here may have linkage,
// or the linker could pick a copy that the processor cannot run. Contraction of a*b+c is off (setup.py), so rounding
// has the same bits everywhere; the dot products ask for their fused multiply-adds by name.

constexpr int VECTORS = CHUNK / LANES;  // in a chunk
constexpr int TILE = 8;                 // weight rows decoded together
constexpr int64_t PANEL = 512;          // columns of a tile: weights stay in the first cache, 128 inputs in the second

enum class Scales { ROW, BYTES, FLOATS };

// Loops over registers: gcc leaves some of them rolled, with the registers in memory.
#define UNROLL _Pragma("GCC unroll 16")

// w * x summed into acc, with scale *s0 for the first 16 elements of the chunk and *s1 for the others.
template <class Decoder>
inline F add_scaled(const F* w, const F* x, const float* s0, const float* s1, F acc) {
  if constexpr (Decoder::PAIRED) {
    F part = mul(w[0], x[0]);
    UNROLL for (int v = 1; v < VECTORS; ++v) part = fma(w[v], x[v], part);
    return fma(part, pair(s0, s1), acc);
  } else {
    constexpr int n = VECTORS / 2;
    UNROLL for (int half = 0; half < 2; ++half) {
      F part = mul(w[half * n], x[half * n]);
      UNROLL for (int v = 1; v < n; ++v) part = fma(w[half * n + v], x[half * n + v], part);
      acc = fma(part, splat(half ? s1 : s0), acc);
    }
    return acc;
  }
}

// The scales of one row, which `at` finds by the number of their block.
template <Scales KIND>
struct RowScales {
  const float* step;
  const uint8_t* bytes;
  RowScales() = default;
  RowScales(const Matrix& m, int64_t row)
      : step(KIND == Scales::BYTES ? m.step : KIND == Scales::ROW ? nullptr : m.scale_floats + row * m.scales_a_row),
        bytes(KIND == Scales::BYTES ? m.scale_bytes + row * m.scales_a_row : nullptr) {}
  const float* at(int64_t index) const { return step + (KIND == Scales::BYTES ? bytes[index] : index); }
};

// R rows times one arranged x.
template <class Decoder, Scales KIND, int R>
inline void dot_rows(const Matrix& m, const Decoder& decode, int64_t row, const float* x, float* y) {
  constexpr int64_t bytes = chunk_bytes(Decoder::CODES);
  const int64_t whole = m.columns / CHUNK;
  const int shift = m.shift();
  F acc[R];
  const uint8_t* codes[R];
  RowScales<KIND> scales[R];
  UNROLL for (int r = 0; r < R; ++r) {
    acc[r] = zero();
    codes[r] = m.data + (row + r) * m.row_bytes;
    scales[r] = RowScales<KIND>(m, row + r);
  }
  const auto add = [&](int r, const uint8_t* from, int64_t first, int64_t second, const F* in) {
    F w[VECTORS];
    decode(from, w);
    if constexpr (KIND == Scales::ROW)
      UNROLL for (int v = 0; v < VECTORS; ++v) acc[r] = fma(w[v], in[v], acc[r]);
    else
      acc[r] = add_scaled<Decoder>(w, in, scales[r].at(first), scales[r].at(second), acc[r]);
  };
  for (int64_t c = 0; c < whole; ++c) {
    F in[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) in[v] = load(x + c * CHUNK + v * LANES);
    const int64_t first = (2 * c) >> shift, second = (2 * c + 1) >> shift;
    // The rows of the next step: rows of 512 bytes and more are too far apart for the processor to foresee them.
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(codes[r] + c * bytes + R * m.row_bytes);
    UNROLL for (int r = 0; r < R; ++r) add(r, codes[r] + c * bytes, first, second, in);
  }
  if (m.columns % CHUNK) {
    F in[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) in[v] = load(x + whole * CHUNK + v * LANES);
    const int64_t first = (2 * whole) >> shift, second = (2 * whole + 1) >> shift;
    UNROLL for (int r = 0; r < R; ++r) {
      uint8_t tail[bytes] = {};
      __builtin_memcpy(tail, codes[r] + whole * bytes, size_t(m.row_bytes - whole * bytes));
      add(r, tail, first, second < m.scales_a_row ? second : first, in);  // the second half may lie beyond K
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    const float s = KIND == Scales::ROW ? m.scale(row + r, 0) : 1.0f;
    y[row + r] = sum(acc[r]) * (s * Decoder::FACTOR);
  }
}

template <class Decoder, Scales KIND>
void gemv_with(const Matrix& m, int64_t first, int64_t last, const float* x, float* y) {
  const Decoder decode(m);
  int64_t row = first;
  for (; row + ROWS <= last; row += ROWS) dot_rows<Decoder, KIND, ROWS>(m, decode, row, x, y);
  for (; row < last; ++row) dot_rows<Decoder, KIND, 1>(m, decode, row, x, y);
}

// Columns [k, k + count) of one row, scaled, in arranged order. k is a multiple of CHUNK; zeros beyond K.
template <class Decoder>
void decode_row(const Matrix& m, const Decoder& decode, int64_t row, int64_t k, int64_t count, float* out) {
  constexpr int64_t bytes = chunk_bytes(Decoder::CODES);
  const int shift = m.shift();
  for (int64_t c = k / CHUNK; c < (k + count) / CHUNK; ++c, out += CHUNK) {
    const uint8_t* codes = m.data + row * m.row_bytes + c * bytes;
    uint8_t tail[bytes] = {};
    if ((c + 1) * CHUNK > m.columns) {
      __builtin_memcpy(tail, codes, size_t(m.row_bytes - c * bytes));
      codes = tail;
    }
    F w[VECTORS];
    decode(codes, w);
    float scales[CHUNK];
    for (int i = 0; i < CHUNK; ++i) scales[i] = 0.0f;
    if (shift >= 0) {
      const int64_t first = (2 * c) >> shift, second = (2 * c + 1) >> shift;
      const float s0 = m.scale(row, first) * Decoder::FACTOR;
      const float s1 = second < m.scales_a_row ? m.scale(row, second) * Decoder::FACTOR : 0.0f;
      for (int v = 0; v < VECTORS; ++v) {
        F s = Decoder::PAIRED ? pair(&s0, &s1) : splat(v < VECTORS / 2 ? &s0 : &s1);
        store(out + v * LANES, mul(w[v], s));
      }
      continue;
    }
    const uint8_t* order = Decoder::CODES == Codes::NIBBLE ? NIBBLE_ORDER : NATURAL_ORDER;
    for (int i = 0; i < CHUNK; ++i) {
      const int64_t column = c * CHUNK + order[i];
      if (column < m.columns) scales[i] = m.scale(row, column / m.block) * Decoder::FACTOR;
    }
    for (int v = 0; v < VECTORS; ++v) store(out + v * LANES, mul(w[v], load(scales + v * LANES)));
  }
}

// y[t, n] (+)= x[t] . w[n] for M tokens and N rows; w [N, PANEL], x [M, count].
template <int M, int N>
inline void block(const float* w, const float* x, int64_t count, float* y, int64_t columns, bool add) {
  F acc[M][N];
  UNROLL for (int t = 0; t < M; ++t)
    UNROLL for (int n = 0; n < N; ++n) acc[t][n] = zero();
  for (int64_t k = 0; k < count; k += LANES) {
    F in[M];
    UNROLL for (int t = 0; t < M; ++t) in[t] = load(x + t * count + k);
    UNROLL for (int n = 0; n < N; ++n) {
      const F weight = load(w + n * PANEL + k);
      UNROLL for (int t = 0; t < M; ++t) acc[t][n] = fma(in[t], weight, acc[t][n]);
    }
  }
  UNROLL for (int t = 0; t < M; ++t) {
    float* out = y + t * columns;
    if constexpr (N == 4)
      store_sums(acc[t], out, add);
    else
      UNROLL for (int n = 0; n < N; ++n) out[n] = add ? out[n] + sum(acc[t][n]) : sum(acc[t][n]);
  }
}

// `rows` decoded rows times all tokens: a few tokens at a time meet every row while they are in the first-level cache.
template <int M>
inline void rows_of(const float* w, int64_t rows, const float* x, int64_t count, float* y, int64_t columns, bool add) {
  int64_t n = 0;
  for (; n + 4 <= rows; n += 4) block<M, 4>(w + n * PANEL, x, count, y + n, columns, add);
  for (; n < rows; ++n) block<M, 1>(w + n * PANEL, x, count, y + n, columns, add);
}

template <class Decoder>
void gemm_with(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t tokens, float* y) {
  const Decoder decode(m);
  const int64_t width = padded(m.columns);
  alignas(64) float w[TILE * PANEL], sums[TOKENS_AT_ONCE * TILE];  // y's own rows may fight for lines of a cache
  for (int64_t row = first; row < last; row += TILE) {
    const int64_t rows = last - row < TILE ? last - row : TILE;
    for (int64_t k = 0; k < width; k += PANEL) {
      const int64_t count = width - k < PANEL ? width - k : PANEL;
      for (int64_t n = 0; n < rows; ++n) decode_row(m, decode, row + n, k, count, w + n * PANEL);
      const float* from = x + k * tokens;
      int64_t t = 0;
      for (; t + TOKENS <= tokens; t += TOKENS)
        rows_of<TOKENS>(w, rows, from + t * count, count, sums + t * TILE, TILE, k > 0);
      for (; t < tokens; ++t) rows_of<1>(w, rows, from + t * count, count, sums + t * TILE, TILE, k > 0);
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t n = 0; n < rows; ++n) y[t * m.rows + row + n] = sums[t * TILE + n];
  }
}

// --- which decoder --------------------------------------------------------------------------------------------------

template <class Function>
void with_decoder(const Matrix& m, Function&& function) {
  switch (m.codes) {
    case Codes::NIBBLE: return function(static_cast<Nibble*>(nullptr));
    case Codes::SIX: return function(static_cast<Scalar<Codes::SIX>*>(nullptr));
    case Codes::CRUMB: return function(static_cast<Few<Codes::CRUMB>*>(nullptr));
    case Codes::BIT: return function(static_cast<Few<Codes::BIT>*>(nullptr));
    case Codes::THREE: return function(static_cast<Few<Codes::THREE>*>(nullptr));
    case Codes::INT8: return function(static_cast<Int8<Codes::INT8>*>(nullptr));
    case Codes::OFFSET8: return function(static_cast<Int8<Codes::OFFSET8>*>(nullptr));
    case Codes::E4M3: return function(static_cast<Byte<Codes::E4M3>*>(nullptr));
    case Codes::E5M2: return function(static_cast<Byte<Codes::E5M2>*>(nullptr));
    case Codes::BF16: return function(static_cast<Float<Codes::BF16>*>(nullptr));
    case Codes::FP32: return function(static_cast<Float<Codes::FP32>*>(nullptr));
  }
}

void gemm(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t tokens, float* y) {
  with_decoder(m, [&](auto* d) { gemm_with<std::remove_pointer_t<decltype(d)>>(m, first, last, x, tokens, y); });
}

void gemv(const Matrix& m, int64_t first, int64_t last, const float* x, float* y) {
  if (m.shift() < 0) return gemm(m, first, last, x, 1, y);
  with_decoder(m, [&](auto* d) {
    using Decoder = std::remove_pointer_t<decltype(d)>;
    if (m.scales_a_row == 1)
      gemv_with<Decoder, Scales::ROW>(m, first, last, x, y);
    else if (m.scale_bytes)
      gemv_with<Decoder, Scales::BYTES>(m, first, last, x, y);
    else
      gemv_with<Decoder, Scales::FLOATS>(m, first, last, x, y);
  });
}

// Panel by panel, within a panel token by token: rows a power of two apart would fight for the same lines of a cache.
void arrange(Codes codes, const float* x, int64_t columns, int64_t token, int64_t tokens, float* out) {
  const uint8_t* order = codes == Codes::NIBBLE ? NIBBLE_ORDER : NATURAL_ORDER;
  const int64_t width = padded(columns);
  for (int64_t panel = 0; panel < width; panel += PANEL) {
    const int64_t count = width - panel < PANEL ? width - panel : PANEL;
    float* to = out + panel * tokens + token * count;
    for (int64_t k = panel; k < panel + count; k += CHUNK, to += CHUNK) {
      if (k + CHUNK > columns)
        for (int i = 0; i < CHUNK; ++i) to[i] = k + order[i] < columns ? x[k + order[i]] : 0.0f;
      else if (codes == Codes::NIBBLE)
        _Pragma("GCC unroll 32") for (int i = 0; i < CHUNK; ++i) to[i] = x[k + NIBBLE_ORDER[i]];
      else
        __builtin_memcpy(to, x + k, CHUNK * sizeof(float));
    }
  }
}

void decode(const Matrix& m, int64_t row, float* out) {
  const uint8_t* order = m.codes == Codes::NIBBLE ? NIBBLE_ORDER : NATURAL_ORDER;
  with_decoder(m, [&](auto* d) {
    const std::remove_pointer_t<decltype(d)> decoder(m);
    for (int64_t k = 0; k < m.columns; k += CHUNK) {
      alignas(64) float chunk[CHUNK];
      decode_row(m, decoder, row, k, CHUNK, chunk);
      for (int i = 0; i < CHUNK; ++i)
        if (k + order[i] < m.columns) out[k + order[i]] = chunk[i];
    }
  });
}

// --- SwiGLU -------------------------------------------------------------------------------------------------------

inline float power_of_two(int exponent) {  // of a normal number
  const uint32_t bits = uint32_t(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// e^x to 1e-7 of itself: e^r of the rest r after whole powers of two, by Cephes' polynomial.
inline float exponential(float x) {
  x = x > -87.0f ? x : -87.0f;
  x = x < 88.0f ? x : 88.0f;
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = ((p * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r;
  p = (p + 1.6666665459e-1f) * r + 5.0000001201e-1f;
  return (p * (r * r) + r + 1.0f) * power_of_two(int(n));
}

void swiglu(const float* x, int64_t half, float* y) {
  for (int64_t i = 0; i < half; ++i) y[i] = x[i] / (1.0f + exponential(-x[i])) * x[half + i];
}

// --- rounding of inputs, as kernels/activations.py ------------------------------------------------------------------

// The nearest value of a float of few bits, ties to even, saturating.
struct Grid {
  float top, lowest, unit, ones;
  explicit Grid(const FloatFormat& f)
      : top(f.top), lowest(power_of_two(f.lowest())), unit(power_of_two(-f.mantissa)), ones(power_of_two(f.mantissa)) {}
  float operator()(float v) const {
    v = v < -top ? -top : v;
    v = v > top ? top : v;
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    bits &= 0x7F800000u;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    power = power < lowest ? lowest : power;
    __builtin_memcpy(&bits, &power, 4);
    bits = 0x7F000000u - bits;  // of 1 / power
    float inverse;
    __builtin_memcpy(&inverse, &bits, 4);
    return __builtin_rintf(v * inverse * ones) * (power * unit);
  }
};

inline float largest(const float* x, int64_t count) {
  constexpr int64_t n = 16;  // maxima side by side: a compiler keeps the order of a single one
  float tops[n] = {};
  const auto take = [&](int64_t at, int64_t i) {
    const float a = __builtin_fabsf(x[at + i]);
    tops[i] = tops[i] > a ? tops[i] : a;
  };
  for (int64_t at = 0; at + n <= count; at += n)
    for (int64_t i = 0; i < n; ++i) take(at, i);
  for (int64_t i = 0; i < count % n; ++i) take(count - count % n, i);
  float top = 0;
  for (float t : tops) top = top > t ? top : t;
  return top;
}

void rotate(float* x, int64_t columns, int64_t size) {
  const float scale = float(__builtin_pow(double(size), -0.5));
  for (int64_t at = 0; at < columns; at += size) {
    float* b = x + at;
    for (int64_t half = size / 2; half; half /= 2)
      for (int64_t i = 0; i < size; i += 2 * half)
        for (int64_t j = i; j < i + half; ++j) {
          const float p = b[j], q = b[j + half];
          b[j] = p + q;
          b[j + half] = p - q;
        }
    for (int64_t j = 0; j < size; ++j) b[j] *= scale;
  }
}

float nvfp4_block(const float* x, float divisor, float top, const Grid& e2m1, const Grid& e4m3, float* codes) {
  float scale = e4m3(divisor * (largest(x, 16) / top));
  scale = scale == 0 ? 0.125f : scale;
  const float step = scale / divisor;
  for (int i = 0; i < 16; ++i) codes[i] = e2m1(x[i] / step);
  return step;
}

// Sum of the squared errors, halves added until one is left: the order that activations.py defines.
float error(const float* x, const float* codes, float step) {
  float e[16];
  for (int i = 0; i < 16; ++i) {
    const float d = codes[i] * step - x[i];
    e[i] = d * d;
  }
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) e[i] += e[i + half];
  return e[0];
}

float mxfp4_step(float top) {
  uint32_t bits;
  __builtin_memcpy(&bits, &top, 4);
  int code = int((bits + (1u << 21)) >> 23) - 2;
  code = code < 0 ? 0 : code > 254 ? 254 : code;
  return code ? power_of_two(code - 127) : 5.877471754111438e-39f;
}

void round_blocks(const Rounding& r, int64_t columns, float* x, float* steps) {
  const Grid e2m1({"e2m1", 2, 1, 6.0f}), e4m3({"e4m3", 4, 3, 448.0f});
  switch (r.rule) {
    case Rule::NONE: {
      steps[0] = 1;
      return;
    }
    case Rule::NVFP4: {
      for (int64_t b = 0; b < columns / 16; ++b, x += 16) {
        float six[16], four[16];
        const float* best = six;
        steps[b] = nvfp4_block(x, r.scale, 6.0f, e2m1, e4m3, six);
        if (r.four_over_six) {
          const float step = nvfp4_block(x, r.scale, 4.0f, e2m1, e4m3, four);
          if (error(x, four, step) < error(x, six, steps[b])) {
            best = four;
            steps[b] = step;
          }
        }
        for (int i = 0; i < 16; ++i) x[i] = best[i];
      }
      return;
    }
    case Rule::MXFP4: {
      for (int64_t b = 0; b < columns / 32; ++b, x += 32) {
        const float step = steps[b] = mxfp4_step(largest(x, 32));
        for (int i = 0; i < 32; ++i) x[i] = e2m1(x[i] / step);
      }
      return;
    }
    case Rule::INT_BLOCK: {
      for (int64_t b = 0; b < columns / r.size; ++b, x += r.size) {
        const float top = largest(x, r.size), quotient = 127 / top;
        const float inverse = quotient > 3.402823466e+38f ? 0 : quotient;  // of zeros, and of what is next to them
        steps[b] = top / 127;
        for (int64_t i = 0; i < r.size; ++i) x[i] = __builtin_rintf(x[i] * inverse);
      }
      return;
    }
    case Rule::INT_TOKEN:
    case Rule::INT_STATIC: {
      const float top = float(1 << (r.bits - 1));
      float step = r.rule == Rule::INT_STATIC ? r.scale : largest(x, columns) / (top - 0.5f);
      steps[0] = step = step == 0 && r.rule == Rule::INT_TOKEN ? 1.1920928955078125e-07f : step;
      for (int64_t k = 0; k < columns; ++k) {
        float v = __builtin_rintf(x[k] / step);
        v = v < -top ? -top : v;
        x[k] = v > top - 1 ? top - 1 : v;
      }
      return;
    }
    case Rule::FLOAT_TOKEN:
    case Rule::FLOAT_STATIC: {
      const Grid own(r.format);
      float step = r.rule == Rule::FLOAT_STATIC ? r.scale : largest(x, columns) / r.format.top;
      steps[0] = step = step == 0 && r.rule == Rule::FLOAT_TOKEN ? 1.1920928955078125e-07f : step;
      for (int64_t k = 0; k < columns; ++k) x[k] = own(x[k] / step);
      return;
    }
  }
}

void round(const Rounding& r, const float* x, int64_t columns, float* codes, float* steps) {
  __builtin_memcpy(codes, x, size_t(columns) * sizeof(float));
  if (r.hadamard) rotate(codes, columns, r.hadamard);
  if (r.offset)
    for (int64_t k = 0; k < columns; ++k) codes[k] -= r.offset[k];
  if (r.shift)
    for (int64_t k = 0; k < columns; ++k) codes[k] *= power_of_two(r.shift[k]);
  round_blocks(r, columns, codes, steps);
}
