// Activation functions (kernels/lowrank_ffn.py), in loops that the compiler turns into vectors: no calls, no branches.
// Included as isa_body.h is.

template <Activation KIND>
inline float activated(float x) {
  if constexpr (KIND == Activation::RELU) return x < 0 ? 0.0f : x;
  if constexpr (KIND == Activation::SILU) return x / (1.0f + exponential(-x));
  if constexpr (KIND == Activation::GELU_TANH)  // x (1 + tanh u) / 2 = x / (1 + e^-2u)
    return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
  if constexpr (KIND == Activation::GELU) {  // erf by Abramowitz and Stegun 7.1.26, off by at most 1.5e-7
    const float z = (x < 0 ? -x : x) * 0.7071067812f, t = 1.0f / (1.0f + 0.3275911f * z);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float tail = p * exponential(-z * z);  // 1 - erf z
    return 0.5f * x * (x < 0 ? tail : 2.0f - tail);
  }
  return x;
}

template <Activation KIND>
void activate_with(float* x, const float* factor, int64_t count) {
  if (factor)
    for (int64_t i = 0; i < count; ++i) x[i] = activated<KIND>(x[i]) * factor[i];
  else
    for (int64_t i = 0; i < count; ++i) x[i] = activated<KIND>(x[i]);
}

void activate(Activation kind, float* x, const float* factor, int64_t count) {
  switch (kind) {
    case Activation::NONE: return activate_with<Activation::NONE>(x, factor, count);
    case Activation::GELU: return activate_with<Activation::GELU>(x, factor, count);
    case Activation::GELU_TANH: return activate_with<Activation::GELU_TANH>(x, factor, count);
    case Activation::SILU: return activate_with<Activation::SILU>(x, factor, count);
    case Activation::RELU: return activate_with<Activation::RELU>(x, factor, count);
  }
}
