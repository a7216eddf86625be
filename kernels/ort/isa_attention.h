// Attention of a few queries to all keys of one head. Included as isa_body.h is, after its vector type and `exponential`.

// The products of q [size] with four rows of k.
inline void four_products(const float* q, const float* k, int64_t size, float* out) {
  F acc[4] = {zero(), zero(), zero(), zero()};
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) {
    const F in = load(q + d);
    UNROLL for (int i = 0; i < 4; ++i) acc[i] = fma(in, load(k + i * size + d), acc[i]);
  }
  store_sums(acc, out, false);
  for (; d < size; ++d)
    for (int i = 0; i < 4; ++i) out[i] += q[d] * k[i * size + d];
}

// y [N * LANES] = sum of p[t] * v[t], over rows of v that are `size` apart.
template <int N>
inline void weighted(const float* p, const float* v, int64_t count, int64_t size, float* y) {
  F acc[N];
  UNROLL for (int n = 0; n < N; ++n) acc[n] = zero();
  for (int64_t t = 0; t < count; ++t) {
    const F w = splat(p + t);
    UNROLL for (int n = 0; n < N; ++n) acc[n] = fma(w, load(v + t * size + n * LANES), acc[n]);
  }
  UNROLL for (int n = 0; n < N; ++n) store(y + n * LANES, acc[n]);
}

void attend(const float* q, const float* k, const float* v, int64_t count, int64_t size, const float* bias,
            float softcap, float* scores, float* y) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) four_products(q, k + t * size, size, scores + t);
  for (; t < count; ++t) {
    float sum = 0;
    for (int64_t d = 0; d < size; ++d) sum += q[d] * k[t * size + d];
    scores[t] = sum;
  }
  if (softcap != 0)
    for (t = 0; t < count; ++t) {
      const float e = exponential(2 * scores[t] / softcap);
      scores[t] = softcap * (1 - 2 / (e + 1));  // of the hyperbolic tangent
    }
  if (bias)
    for (t = 0; t < count; ++t) scores[t] += bias[t];
  constexpr int64_t n = 16;  // side by side: a compiler keeps the order of a single one
  float tops[n], sums[n] = {};
  for (float& top : tops) top = scores[0];
  for (t = 0; t + n <= count; t += n)
    for (int64_t i = 0; i < n; ++i) tops[i] = tops[i] > scores[t + i] ? tops[i] : scores[t + i];
  for (int64_t i = 0; t + i < count; ++i) tops[i] = tops[i] > scores[t + i] ? tops[i] : scores[t + i];
  float top = tops[0];
  for (float other : tops) top = top > other ? top : other;
  for (t = 0; t < count; ++t) scores[t] = exponential(scores[t] - top);
  for (t = 0; t + n <= count; t += n)
    for (int64_t i = 0; i < n; ++i) sums[i] += scores[t + i];
  for (int64_t i = 0; t + i < count; ++i) sums[i] += scores[t + i];
  float total = 0;
  for (float sum : sums) total += sum;
  int64_t d = 0;
  for (; d + 8 * LANES <= size; d += 8 * LANES) weighted<8>(scores, v + d, count, size, y + d);
  for (; d + 4 * LANES <= size; d += 4 * LANES) weighted<4>(scores, v + d, count, size, y + d);
  for (; d + LANES <= size; d += LANES) weighted<1>(scores, v + d, count, size, y + d);
  for (; d < size; ++d) {
    float sum = 0;
    for (t = 0; t < count; ++t) sum += scores[t] * v[t * size + d];
    y[d] = sum;
  }
  for (d = 0; d < size; ++d) y[d] /= total;
}
