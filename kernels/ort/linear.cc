#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace compressor {
namespace {

constexpr int64_t TASK_WEIGHTS = 1 << 15, TASK_TOKENS = 16, MAX_TASKS = 128;
constexpr int64_t ONE_TASK = 1 << 17;  // so little work is done before a second thread has begun

// Grown, never shrunk, one for each calling thread: at most 128 tokens of the widest layer.
uint8_t* scratch(size_t bytes) {
  thread_local std::vector<uint8_t> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data();
}

// For at most TOKENS_AT_ONCE tokens at a time, from token `start` on: prepare(start, token, tokens, codes, steps,
// arranged) for each of them, then product(first row, last row, arranged, start, tokens, y) for parts of the rows.
template <class Prepare, class Product>
void in_parts(const Matrix& m, const Rounding& r, const float* x, int64_t tokens, float* y, size_t row_bytes,
              const Threads& threads, Prepare&& prepare, Product&& product) {
  const Isa& kernels = isa();
  const int64_t steps = m.columns / std::max<int64_t>(r.block(m.columns), 1);
  const int64_t parts = (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t start = tokens * part / parts, count = tokens * (part + 1) / parts - start;
    uint8_t* arranged = scratch(size_t(count) * row_bytes);
    threads.each(size_t((count + TASK_TOKENS - 1) / TASK_TOKENS), [&](size_t group) {
      thread_local std::vector<float> row;
      row.resize(size_t(m.columns + steps));
      for (int64_t t = int64_t(group) * TASK_TOKENS; t < std::min((int64_t(group) + 1) * TASK_TOKENS, count); ++t) {
        kernels.round(r, x + (start + t) * m.columns, m.columns, row.data(), row.data() + m.columns);
        prepare(start, t, count, row.data(), row.data() + m.columns, arranged);
      }
    });
    const int64_t work = m.rows * m.columns * std::max<int64_t>(count / 4, 1);
    const int64_t tasks = work < ONE_TASK ? 1 : std::clamp<int64_t>(work / TASK_WEIGHTS, 1, MAX_TASKS);
    const int64_t rows = ((m.rows + tasks - 1) / tasks + 15) / 16 * 16;
    threads.each(size_t((m.rows + rows - 1) / rows), [&](size_t task) {
      const int64_t first = int64_t(task) * rows;
      product(first, std::min(first + rows, m.rows), arranged, start, count, y + start * m.rows);
    });
  }
}

void add_bias(const Matrix& m, int64_t first, int64_t last, const float* bias, int64_t tokens, float* y) {
  for (int64_t t = 0; bias && t < tokens; ++t)
    for (int64_t n = first; n < last; ++n) y[t * m.rows + n] += bias[n];
}

}  // namespace

void linear(const Matrix& m, const Rounding& r, const float* x, int64_t tokens, const float* bias, float* y,
            const Threads& threads) {
  const Isa& kernels = isa();
  const int64_t block = r.block(m.columns);
  const bool fp4 = r.rule == Rule::NVFP4 || r.rule == Rule::MXFP4;
  const bool blocks = fp4 || r.rule == Rule::INT_BLOCK;
  if (m.is_fp4 && (blocks || r.rule == Rule::INT_TOKEN) && m.shift() >= 0 && kernels.fp4_gemm) {
    const int64_t row_bytes = kernels.fp4_bytes(m.columns);
    auto prepare = [&](int64_t, int64_t token, int64_t, const float* codes, const float* steps, uint8_t* arranged) {
      kernels.fp4_arrange(codes, steps, m.columns, block, fp4 ? 0.5f : 1.0f, arranged + token * row_bytes);
    };
    auto product = [&](int64_t first, int64_t last, const uint8_t* arranged, int64_t, int64_t count, float* out) {
      if (count == 1)
        kernels.fp4_gemv(m, first, last, arranged, blocks, out);
      else
        kernels.fp4_gemm(m, first, last, arranged, blocks, count, out);
      add_bias(m, first, last, bias, count, out);
    };
    return in_parts(m, r, x, tokens, y, size_t(row_bytes), threads, prepare, product);
  }
  auto prepare = [&](int64_t, int64_t token, int64_t count, float* codes, const float* steps, uint8_t* arranged) {
    if (r.rule != Rule::NONE)
      for (int64_t k = 0; k < m.columns; ++k) codes[k] *= steps[k / block];
    kernels.arrange(m.codes, codes, m.columns, token, count, reinterpret_cast<float*>(arranged));
  };
  auto product = [&](int64_t first, int64_t last, const uint8_t* arranged, int64_t, int64_t count, float* out) {
    const float* rows = reinterpret_cast<const float*>(arranged);
    if (count == 1)
      kernels.gemv(m, first, last, rows, out);
    else
      kernels.gemm(m, first, last, rows, count, out);
    add_bias(m, first, last, bias, count, out);
  };
  in_parts(m, r, x, tokens, y, size_t(padded(m.columns)) * sizeof(float), threads, prepare, product);
}

void integer_linear(const Matrix& m, const Rounding& r, const float* x, int64_t tokens, const float* bias, float* y,
                    const Threads& threads) {
  const Isa& kernels = isa();
  std::vector<float> step(static_cast<size_t>(tokens));
  const int64_t row_bytes = kernels.int_bytes(m.columns);
  auto prepare = [&](int64_t start, int64_t token, int64_t, const float* codes, const float* steps, uint8_t* arranged) {
    step[size_t(start + token)] = *steps;
    kernels.int_arrange(codes, m.columns, arranged + token * row_bytes);
  };
  auto product = [&](int64_t first, int64_t last, const uint8_t* rows, int64_t start, int64_t count, float* out) {
    kernels.int_gemm(m, first, last, rows, count, out);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t n = first; n < last; ++n) {
        float& value = out[t * m.rows + n];
        value = value * step[size_t(start + t)] * m.scale_floats[n];
        if (bias) value += bias[n];
      }
  };
  in_parts(m, r, x, tokens, y, size_t(row_bytes), threads, prepare, product);
}

Rounding rounding(const char* op, const std::string& activations, const char* allowed) {
  const std::string list = std::string(", ") + allowed + ",";
  if (activations.find(',') != std::string::npos || list.find(", " + activations + ",") == std::string::npos)
    throw unknown(op, "activations", activations, allowed);
  Rounding r;
  const size_t end = activations.find("_static");
  const bool fixed = end != std::string::npos;
  const std::string name = activations.substr(0, end);
  if (name == "none") return r;
  if (name == "nvfp4") {
    r.rule = Rule::NVFP4;
  } else if (name == "mxfp4") {
    r.rule = Rule::MXFP4;
  } else if (name == "int8_block") {
    r.rule = Rule::INT_BLOCK;
  } else if (name == "int8" || name == "int6") {
    r.rule = fixed ? Rule::INT_STATIC : Rule::INT_TOKEN;
    r.bits = name == "int8" ? 8 : 6;
  } else {
    r.rule = fixed ? Rule::FLOAT_STATIC : Rule::FLOAT_TOKEN;
    r.format = *float_format(name == "fp8" ? "e4m3" : name.c_str());
  }
  return r;
}

void set_hadamard(const char* op, Rounding& r, int64_t hadamard) {
  if (hadamard < 0 || (hadamard & (hadamard - 1)))
    throw unknown(op, "hadamard", std::to_string(hadamard), "0 and powers of two");
  r.hadamard = hadamard;
}

std::vector<int64_t> output_shape(const Op& op, const Tensor& x, int64_t columns, int64_t rows, const Rounding& r) {
  const auto wrong = [&](const std::string& what) { return Error(std::string(op.name) + ": " + what); };
  const int64_t block = r.block(columns);
  if (x.shape.empty() || x.last() != columns)
    throw wrong("x has " + std::to_string(x.last()) + " features, its weight " + std::to_string(columns) + ".");
  if (r.hadamard && columns % r.hadamard)
    throw wrong("hadamard " + std::to_string(r.hadamard) + " does not divide its " + std::to_string(columns) +
                " features.");
  if (columns % std::max<int64_t>(block, 1))
    throw wrong("blocks of " + std::to_string(block) + " do not divide its " + std::to_string(columns) + " features.");
  std::vector<int64_t> shape = x.shape;
  shape.back() = rows;
  return shape;
}

void expect_fp4(const Op& op, const std::vector<Tensor>& in, bool nvfp4, size_t at) {
  expect(op, in, at, {UINT8}, {-1, -1});
  const int64_t rows = in[at].shape[0], columns = in[at].shape[1] * 2, block = nvfp4 ? 16 : 32;
  // A graph declares the E4M3 scales of a table as the bytes that they are: stock onnxruntime gathers no float8.
  if (nvfp4)
    expect(op, in, at + 1, {FLOAT8E4M3FN, UINT8}, {rows, columns / block});
  else
    expect(op, in, at + 1, {UINT8}, {rows, columns / block});
  if (nvfp4) expect(op, in, at + 2, {FLOAT32}, {1});
  if (columns % block)
    throw Error(std::string(op.name) + ": blocks of " + std::to_string(block) + " do not divide its " +
                std::to_string(columns) + " features.");
}

void expect_words(const Op& op, const std::vector<Tensor>& in, int64_t bits) {
  expect(op, in, 1, {INT32, UINT8}, {-1, (bits + 31) / 32 * (in[1].type == UINT8 ? 4 : 1)});
}

void byte_steps(Matrix& m, const Tensor& scale, const Tensor& divisor) {
  m.scale_bytes = scale.bytes();
  const float* e4m3 = byte_values("e4m3");
  m.divided_e4m3 = *divisor.floats();
  for (int i = 0; i < 256; ++i) m.step[i] = e4m3[i] / m.divided_e4m3;
}

void fp4_matrix(Matrix& m, const Tensor& packed, const Tensor& scale, const Tensor& divisor) {
  m.rows = packed.shape[0];
  m.row_bytes = packed.shape[1];
  m.columns = m.row_bytes * 2;
  m.codes = Codes::NIBBLE;
  m.data = packed.bytes();
  m.is_fp4 = true;
  float_values(*float_format("e2m1"), m.table);
  m.scales_a_row = scale.shape[1];
  m.block = m.columns / m.scales_a_row;
  if (divisor) return byte_steps(m, scale, divisor);
  m.scale_bytes = scale.bytes();
  std::memcpy(m.step, byte_values("e8m0"), sizeof m.step);
}

void int_matrix(Matrix& m, const Tensor& codes, const Tensor& scale, int64_t bits, int64_t group, int64_t columns) {
  m.rows = codes.shape[0];
  m.columns = columns;
  m.data = codes.bytes();
  m.scales_a_row = scale.shape[1];
  m.block = group ? group : columns;
  m.scale_floats = scale.floats();
  if (codes.type == INT8) {
    m.codes = Codes::INT8;
    m.row_bytes = columns;
    return;
  }
  m.row_bytes = codes.shape[1] * (codes.type == UINT8 ? 1 : 4);
  m.codes = bits == 8 ? Codes::OFFSET8 : bits == 4 ? Codes::NIBBLE : bits == 3 ? Codes::THREE
          : bits == 2 ? Codes::CRUMB : Codes::BIT;
  for (int i = 0; i < (1 << std::min<int64_t>(bits, 4)); ++i)
    m.table[i] = bits == 1 ? float(2 * i - 1) : float(i - (1 << (bits - 1)));
}

}  // namespace compressor
