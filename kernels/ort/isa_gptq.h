// GPTQ's inner loop: the columns of one block rounded one after another (methods/gptq.py, round_block, whose contract
// holds here). Rows never see each other, so a few at a time stay in the first-level cache. Included as isa_body.h is.

constexpr int64_t GPTQ_ROWS = 16;

// At most GPTQ_ROWS rows of at most GPTQ_COLUMNS columns.
void gptq_rows(const float* weight, const float* step, const float* u, int64_t rows, int64_t columns,
               const GptqGrid& grid, float* codes, float* errors) {
  alignas(64) float w[GPTQ_COLUMNS][GPTQ_ROWS], s[GPTQ_COLUMNS][GPTQ_ROWS], code[GPTQ_COLUMNS][GPTQ_ROWS];
  for (int64_t k = 0; k < columns; ++k)
    for (int64_t r = 0; r < GPTQ_ROWS; ++r) {
      w[k][r] = r < rows ? weight[r * columns + k] : 0.0f;
      s[k][r] = r < rows ? step[r * columns + k] : 1.0f;
    }
  for (int64_t k = 0; k < columns; ++k) {
    alignas(64) float less[GPTQ_ROWS];
    const float pivot = u[k * columns + k];
    for (int64_t r = 0; r < GPTQ_ROWS; ++r) {
      float x = w[k][r] / s[k][r];
      x = x < grid.low ? grid.low : x;
      x = x > grid.high ? grid.high : x;
      // The spacing of a float's grid: the power of two at or below |x|, which its exponent bits spell.
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      bits &= 0x7F800000u;
      float power;
      __builtin_memcpy(&power, &bits, 4);
      const float spacing = grid.binade > 0 ? (power < grid.binade ? grid.binade : power) * grid.unit : 1.0f;
      code[k][r] = __builtin_rintf(x / spacing) * spacing;
      w[k][r] = (w[k][r] - code[k][r] * s[k][r]) / pivot;  // a column that is done holds its errors
      less[r] = -w[k][r];
    }
    constexpr int vectors = GPTQ_ROWS / LANES;
    F e[vectors];
    UNROLL for (int v = 0; v < vectors; ++v) e[v] = load(less + v * LANES);
    for (int64_t j = k + 1; j < columns; ++j) {
      const F factor = splat(u + k * columns + j);
      UNROLL for (int v = 0; v < vectors; ++v) {
        float* corrected = w[j] + v * LANES;
        store(corrected, fma(e[v], factor, load(corrected)));
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < columns; ++k) {
      codes[r * columns + k] = code[k][r];
      errors[r * columns + k] = w[k][r];
    }
}

void gptq(const float* weight, const float* step, const float* u, int64_t first, int64_t last, int64_t columns,
          const GptqGrid& grid, float* codes, float* errors) {
  for (int64_t row = first; row < last; row += GPTQ_ROWS) {
    const int64_t at = row * columns, rows = last - row < GPTQ_ROWS ? last - row : GPTQ_ROWS;
    gptq_rows(weight + at, step + at, u, rows, columns, grid, codes + at, errors + at);
  }
}
