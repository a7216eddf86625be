// MixedBitMoE: kernels/mixed_bit_moe.py for float32 x. Reads the experts that some token chose, and no other.
//
// A job is one expert with at most TOKENS_AT_ONCE of its tokens; jobs go in rounds, whose hidden activations fit a cache.
// Within a round there are three loops over threads: inputs and (gate, up) rows of all jobs, down rows of all jobs, and
// columns of y, to which a token's experts are added in their order.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "linear.h"

namespace compressor {
namespace {

constexpr int64_t ROUND_TOKENS = 256;         // of jobs that go together, unless one alone has more
constexpr int64_t TASK_WEIGHTS = 1 << 15;     // a task's, of one matrix
constexpr int64_t SUM_COLUMNS = 256, ALONE = 1 << 16;  // so little work is done before a second thread has begun

// Where one width keeps an expert's tensors: bytes of an expert, and offsets within it.
struct Layout {
  int64_t bytes = 0, codes[3] = {}, scales[3] = {};  // gate, up, down
};

struct MixedBitMoE final : OneOutput {
  std::vector<int> bits;         // [E]
  std::vector<int64_t> start;    // [E], bytes
  Layout layout[9];              // by width
  int64_t hidden, intermediate, group[3], total = 0;
  Activation activation;

  explicit MixedBitMoE(const Attributes&);
  std::vector<int64_t> shape(const std::vector<Tensor>&) const override;
  void run(const std::vector<Tensor>&, float* y, const Threads&) const override;
  Matrix rows_of(const uint8_t* experts, int expert, int which, int64_t first, int64_t last,
                 std::vector<float>& scales) const;
};

std::unique_ptr<Kernel> create(const Attributes& attributes) { return std::make_unique<MixedBitMoE>(attributes); }

}  // namespace

extern const Op MIXED_BIT_MOE = {
    "MixedBitMoE",
    {{"x", FLOAT32}, {"weights", FLOAT32}, {"experts", UINT8}},
    create,
};

namespace {

int64_t words(int64_t columns, int64_t bits) { return (columns * bits + 31) / 32 * 4; }  // bytes of a row

MixedBitMoE::MixedBitMoE(const Attributes& attributes) {
  const char* op = MIXED_BIT_MOE.name;
  const std::string name = attributes.text("activation"), digits = attributes.text("bits");
  const char* const names[] = {"gelu", "gelu_tanh", "silu", "relu"};
  const Activation kinds[] = {Activation::GELU, Activation::GELU_TANH, Activation::SILU, Activation::RELU};
  const auto found = std::find(names, names + 4, name);
  if (found == names + 4) throw unknown(op, "activation", name, "gelu, gelu_tanh, silu, relu");
  activation = kinds[found - names];
  hidden = attributes.integer("hidden");
  intermediate = attributes.integer("intermediate");
  group[0] = group[1] = attributes.integer("group_size");
  group[2] = attributes.integer("down_group_size");
  if (group[0] < 0 || group[2] < 0) throw unknown(op, "group_size", std::to_string(group[0]), "0 and above");
  if (hidden < 1) throw unknown(op, "hidden", std::to_string(hidden), "1 and above");
  if (intermediate < 1) throw unknown(op, "intermediate", std::to_string(intermediate), "1 and above");

  const std::string text = attributes.text("layout");
  const char* at = text.c_str();
  const auto next = [&](int64_t& value) {
    char* end = nullptr;
    value = std::strtoll(at, &end, 10);
    if (end == at || value < 0) throw unknown(op, "layout", text, "eight numbers for each width");
    at = end;
  };
  while (*at) {
    int64_t width = 0;
    next(width);
    if (width < 1 || width > 8) throw unknown(op, "layout", text, "widths of 1 to 8");
    Layout& own = layout[width];
    next(own.bytes);
    for (int64_t& offset : own.codes) next(offset);
    for (int64_t& offset : own.scales) next(offset);
  }
  for (char digit : digits) {
    const int width = digit - '0';
    if (width != 1 && width != 2 && width != 3 && width != 4 && width != 8)
      throw unknown(op, "bits", digits, "1, 2, 3, 4, 8, a digit for each expert");
    if (!layout[width].bytes) throw unknown(op, "layout", text, "a place for every width in bits");
    bits.push_back(width);
    start.push_back(total);
    total += layout[width].bytes;
  }
}

std::vector<int64_t> MixedBitMoE::shape(const std::vector<Tensor>& in) const {
  const Op& op = MIXED_BIT_MOE;
  expect(op, in, 0, {FLOAT32}, {-1, hidden});
  expect(op, in, 1, {FLOAT32}, {in[0].shape[0], int64_t(bits.size())});
  expect(op, in, 2, {UINT8}, {total});
  for (int width = 1; width <= 8; ++width)
    for (int which = 0; which < 3 && layout[width].bytes; ++which) {
      const int64_t rows = which == 2 ? hidden : intermediate, columns = which == 2 ? intermediate : hidden;
      const int64_t groups = group[which] ? (columns + group[which] - 1) / group[which] : 1;
      const Layout& own = layout[width];
      if (own.codes[which] + rows * words(columns, width) > own.bytes || own.scales[which] + rows * groups * 2 > own.bytes)
        throw Error("MixedBitMoE: experts of " + std::to_string(own.bytes) + " bytes at " + std::to_string(width) +
                    " bits do not hold three matrices of " + std::to_string(intermediate) + " x " +
                    std::to_string(hidden) + ".");
    }
  return in[0].shape;
}

// Rows [first, last) of one matrix of an expert, as rows 0 to last - first; `scales` holds their scales as float32.
Matrix MixedBitMoE::rows_of(const uint8_t* experts, int expert, int which, int64_t first, int64_t last,
                            std::vector<float>& scales) const {
  const int width = bits[size_t(expert)];
  const Layout& own = layout[width];
  const int64_t columns = which == 2 ? intermediate : hidden;
  const int64_t groups = group[which] ? (columns + group[which] - 1) / group[which] : 1;
  const uint8_t* base = experts + start[size_t(expert)];
  scales.resize(size_t((last - first) * groups));
  const uint8_t* from = base + own.scales[which] + first * groups * 2;
  for (size_t i = 0; i < scales.size(); ++i) {
    const uint32_t value = uint32_t(from[2 * i]) << 16 | uint32_t(from[2 * i + 1]) << 24;  // bfloat16
    std::memcpy(&scales[i], &value, 4);
  }
  const int64_t row_bytes = words(columns, width);
  Matrix m;
  const Tensor codes{base + own.codes[which] + first * row_bytes, UINT8, {last - first, row_bytes}};
  int_matrix(m, codes, Tensor{scales.data(), FLOAT32, {last - first, groups}}, width, group[which], columns);
  return m;
}

// Rows a task takes of a matrix with so many columns.
int64_t task_rows(int64_t columns) { return std::max<int64_t>(TASK_WEIGHTS / columns, 1) / 16 * 16 + 16; }

void multiply(Matrix& m, int64_t stride, const float* x, int64_t tokens, float* y) {
  const int64_t rows = m.rows;
  m.rows = stride;  // of y
  if (tokens == 1)
    isa().gemv(m, 0, rows, x, y);
  else
    isa().gemm(m, 0, rows, x, tokens, y);
}

struct Job {
  int expert;
  int64_t first, count;  // its tokens among those of the round, and its rows in every buffer
  Codes codes;
};

void MixedBitMoE::run(const std::vector<Tensor>& in, float* y, const Threads& threads) const {
  const int64_t tokens = in[0].shape[0], count = int64_t(bits.size());
  const float *x = in[0].floats(), *weights = in[1].floats();
  const uint8_t* experts = in[2].bytes();
  std::fill_n(y, tokens * hidden, 0.0f);

  thread_local std::vector<float> arranged, gate, up, out;  // grown, never shrunk
  std::vector<int64_t> token;                               // of each row of the buffers
  std::vector<Job> jobs;
  const auto round = [&] {
    const int64_t rows = int64_t(token.size()), wide = padded(hidden), narrow = padded(intermediate);
    const auto grown = [](std::vector<float>& memory, int64_t size) {
      if (int64_t(memory.size()) < size) memory.resize(size_t(size));
      return memory.data();
    };
    float *const a = grown(arranged, rows * std::max(wide, narrow)), *const g = grown(gate, rows * intermediate);
    float *const u = grown(up, rows * intermediate), *const o = grown(out, rows * hidden);
    const bool alone = rows * hidden * intermediate < ALONE;
    const auto each = [&](int64_t tasks, auto&& task) {
      if (!alone) return threads.each(size_t(tasks), [&](size_t i) { task(int64_t(i)); });
      for (int64_t i = 0; i < tasks; ++i) task(i);
    };
    const auto job_of = [&](int64_t row) -> const Job& {
      return *std::find_if(jobs.begin(), jobs.end(), [&](const Job& j) { return row < j.first + j.count; });
    };
    const Isa& kernels = isa();
    each(rows, [&](int64_t row) {
      const Job& j = job_of(row);
      kernels.arrange(j.codes, x + token[size_t(row)] * hidden, hidden, row - j.first, j.count, a + j.first * wide);
    });
    const int64_t gate_rows = task_rows(hidden), gate_tasks = (intermediate + gate_rows - 1) / gate_rows;
    each(int64_t(jobs.size()) * gate_tasks, [&](int64_t task) {
      thread_local std::vector<float> scales;
      const Job& j = jobs[size_t(task / gate_tasks)];
      const int64_t first = task % gate_tasks * gate_rows, last = std::min(first + gate_rows, intermediate);
      for (int which = 0; which < 2; ++which) {
        Matrix m = rows_of(experts, j.expert, which, first, last, scales);
        multiply(m, intermediate, a + j.first * wide, j.count, (which ? u : g) + j.first * intermediate + first);
      }
      for (int64_t row = j.first; row < j.first + j.count; ++row)
        kernels.activate(activation, g + row * intermediate + first, u + row * intermediate + first, last - first);
    });
    each(rows, [&](int64_t row) {
      const Job& j = job_of(row);
      kernels.arrange(j.codes, g + row * intermediate, intermediate, row - j.first, j.count, a + j.first * narrow);
    });
    const int64_t down_rows = task_rows(intermediate), down_tasks = (hidden + down_rows - 1) / down_rows;
    each(int64_t(jobs.size()) * down_tasks, [&](int64_t task) {
      thread_local std::vector<float> scales;
      const Job& j = jobs[size_t(task / down_tasks)];
      const int64_t first = task % down_tasks * down_rows, last = std::min(first + down_rows, hidden);
      Matrix m = rows_of(experts, j.expert, 2, first, last, scales);
      multiply(m, hidden, a + j.first * narrow, j.count, o + j.first * hidden + first);
    });
    each((hidden + SUM_COLUMNS - 1) / SUM_COLUMNS, [&](int64_t task) {
      const int64_t first = task * SUM_COLUMNS, last = std::min(first + SUM_COLUMNS, hidden);
      for (const Job& j : jobs)
        for (int64_t row = j.first; row < j.first + j.count; ++row) {
          const int64_t t = token[size_t(row)];
          const float weight = weights[t * count + j.expert];
          for (int64_t k = first; k < last; ++k) y[t * hidden + k] += weight * o[row * hidden + k];
        }
    });
    token.clear();
    jobs.clear();
  };

  for (int expert = 0; expert < int(count); ++expert) {
    Codes codes = Codes::FP32;  // what is arranged for one width fits every width but 4 bits
    if (bits[size_t(expert)] == 4) codes = Codes::NIBBLE;
    int64_t from = int64_t(token.size());
    const auto job = [&] {
      if (const int64_t more = int64_t(token.size()) - from) jobs.push_back({expert, from, more, codes});
      from = int64_t(token.size());
    };
    for (int64_t t = 0; t < tokens; ++t) {
      if (weights[t * count + expert] == 0) continue;
      token.push_back(t);
      if (int64_t(token.size()) - from < TOKENS_AT_ONCE) continue;
      job();
      if (int64_t(token.size()) >= ROUND_TOKENS) round(), from = 0;
    }
    job();
    if (int64_t(token.size()) >= ROUND_TOKENS) round();
  }
  if (!jobs.empty()) round();
}

}  // namespace
}  // namespace compressor
