// Which instruction set, and the values of small floats.
#include <atomic>
#include <cmath>
#include <cstring>

#include "matrix.h"

namespace compressor {

extern const Isa PORTABLE;
#if defined(__x86_64__)
extern const Isa AVX2, AVX512;
const Isa* const ISAS[] = {&AVX512, &AVX2, &PORTABLE, nullptr};
#else
const Isa* const ISAS[] = {&PORTABLE, nullptr};
#endif

namespace {

const Isa* best() {
  for (const Isa* const* candidate = ISAS;; ++candidate)
    if ((*candidate)->supported()) return *candidate;
}

std::atomic<const Isa*> chosen{nullptr};

const FloatFormat FORMATS[] = {
    {"e2m1", 2, 1, 6.0f},  {"e3m0", 3, 0, 16.0f},  {"e1m2", 1, 2, 3.5f},     {"e3m2", 3, 2, 28.0f},
    {"e2m3", 2, 3, 7.5f},  {"e4m3", 4, 3, 448.0f}, {"e5m2", 5, 2, 57344.0f},
};

}  // namespace

const Isa& isa() {
  const Isa* found = chosen.load(std::memory_order_relaxed);
  if (!found) chosen.store(found = best(), std::memory_order_relaxed);
  return *found;
}

bool use_isa(const char* name) {
  for (const Isa* const* candidate = ISAS; *candidate; ++candidate)
    if (!std::strcmp((*candidate)->name, name) && (*candidate)->supported()) {
      chosen.store(*candidate, std::memory_order_relaxed);
      return true;
    }
  return false;
}

const FloatFormat* float_format(const char* name) {
  for (const FloatFormat& format : FORMATS)
    if (!std::strcmp(format.name, name)) return &format;
  return nullptr;
}

void float_values(const FloatFormat& format, float* values) {
  const int half = 1 << (format.bits() - 1), ones = 1 << format.mantissa;
  for (int index = 0; index < half; ++index) {
    const int binade = index / ones, fraction = index % ones;
    const int exponent = format.lowest() + (binade ? binade : 1) - 1 - format.mantissa;
    float value = std::ldexp(float(fraction + (binade ? ones : 0)), exponent);
    if (value > format.top) value = NAN;
    values[index] = value;
    values[half + index] = -value;
  }
}

const float* byte_values(const char* name) {
  struct Table {
    float values[256];
    explicit Table(const FloatFormat& format) { float_values(format, values); }
    Table() {
      for (int code = 0; code < 256; ++code) values[code] = code == 255 ? INFINITY : std::ldexp(1.0f, code - 127);
    }
  };
  static const Table e4m3(*float_format("e4m3")), e5m2(*float_format("e5m2")), e8m0;
  return !std::strcmp(name, "e4m3") ? e4m3.values : !std::strcmp(name, "e5m2") ? e5m2.values : e8m0.values;
}

}  // namespace compressor
