// Exact products of integers, written over an instruction set's accumulator I, which takes INT_STEP products of X and
// int8 at a time. X holds the code plus OFFSET; OFFSET times the sum of the weights is taken away in the end.
// Included as isa_body.h is.

inline int64_t int_padded(int64_t columns) { return (columns + INT_STEP - 1) / INT_STEP * INT_STEP; }

int64_t int_bytes(int64_t columns) { return int_padded(columns) * int64_t(sizeof(X)); }

void int_arrange(const float* codes, int64_t columns, void* out) {
  X* to = static_cast<X*>(out);
  for (int64_t k = 0; k < columns; ++k) to[k] = X(int(codes[k]) + OFFSET);
  for (int64_t k = columns; k < int_padded(columns); ++k) to[k] = X(OFFSET);
}

// M tokens, N rows of weights.
template <int M, int N>
inline void int_block(const Matrix& m, int64_t row, const X* x, float* y) {
  const int8_t* w = reinterpret_cast<const int8_t*>(m.data) + row * m.columns;
  const int64_t width = int_padded(m.columns), whole = m.columns / INT_STEP * INT_STEP;
  I acc[M][N], weights[N];
  for (int n = 0; n < N; ++n) {
    weights[n] = int_zero();
    for (int t = 0; t < M; ++t) acc[t][n] = int_zero();
  }
  auto step = [&](const int8_t* const* from, int64_t k) {
    for (int n = 0; n < N; ++n) {
      const W loaded = int_load(from[n]);
      if constexpr (OFFSET != 0) weights[n] = int_sum_up(weights[n], loaded);
      for (int t = 0; t < M; ++t) acc[t][n] = int_dot(acc[t][n], x + t * width + k, loaded);
    }
  };
  const int8_t* from[N];
  for (int64_t k = 0; k < whole; k += INT_STEP) {
    for (int n = 0; n < N; ++n) from[n] = w + n * m.columns + k;
    step(from, k);
  }
  if (whole < m.columns) {
    int8_t tail[N][INT_STEP] = {};
    for (int n = 0; n < N; ++n) {
      __builtin_memcpy(tail[n], w + n * m.columns + whole, size_t(m.columns - whole));
      from[n] = tail[n];
    }
    step(from, whole);
  }
  for (int t = 0; t < M; ++t)
    for (int n = 0; n < N; ++n) {
      int32_t sum = int_sum(acc[t][n]);
      if constexpr (OFFSET != 0) sum -= OFFSET * int_sum(weights[n]);
      y[t * m.rows + n] = float(sum);
    }
}

template <int N>
void int_tile(const Matrix& m, int64_t row, const X* x, int64_t tokens, float* y) {
  const int64_t width = int_padded(m.columns);
  int64_t t = 0;
  for (; t + TOKENS <= tokens; t += TOKENS) int_block<TOKENS, N>(m, row, x + t * width, y + t * m.rows);
  for (; t < tokens; ++t) int_block<1, N>(m, row, x + t * width, y + t * m.rows);
}

void int_gemm(const Matrix& m, int64_t first, int64_t last, const void* x, int64_t tokens, float* y) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) int_tile<4>(m, row, static_cast<const X*>(x), tokens, y + row);
  for (; row < last; ++row) int_tile<1>(m, row, static_cast<const X*>(x), tokens, y + row);
}
