#include "sparse_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace compressor {
namespace {

constexpr int64_t ONE_TASK = 1 << 17;     // weights: so few are read before a second thread has begun
constexpr int64_t TASKS = 16;             // at least, where there is more to read than that
// Rows of a page: a processor foresees what is behind the present line of a row, but not beyond a page. Four at a time:
// of more it loses track.
constexpr int64_t ROW_BYTES = 4096, FLOAT_RUN = 4;
constexpr size_t HUGE_PAGE = 1 << 21;

// Rows are read in no order that a processor foresees, so each page costs a look-up: large ones where there are any.
uint8_t* allocate(size_t bytes) {
  const size_t page = bytes < 4 * HUGE_PAGE ? 64 : HUGE_PAGE, whole = (bytes + page - 1) / page * page;
  void* memory = std::aligned_alloc(page, whole);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (page == HUGE_PAGE) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  return static_cast<uint8_t*>(memory);
}

// Elements of `size` bytes of outputs [start, start + width): out [count, width] of from [N, count], zeros beyond N.
template <class Element>
void turn(const uint8_t* from, int64_t rows, int64_t count, int64_t start, int64_t width, uint8_t* to) {
  constexpr int64_t LINE = 64 / sizeof(Element);  // lines are read and written whole: most of them share few places
  for (int64_t n = 0; n < width; n += LINE)
    for (int64_t k = 0; k < count; k += LINE) {
      Element in[LINE][LINE] = {}, out[LINE];
      const int64_t wide = std::min(LINE, count - k), there = std::clamp<int64_t>(rows - start - n, 0, LINE);
      for (int64_t i = 0; i < there; ++i)
        std::memcpy(in[i], from + ((start + n + i) * count + k) * int64_t(sizeof(Element)), size_t(wide) * sizeof(Element));
      for (int64_t j = 0; j < wide; ++j) {
        for (int64_t i = 0; i < LINE; ++i) out[i] = in[i][j];
        std::memcpy(to + ((k + j) * width + n) * int64_t(sizeof(Element)), out, sizeof out);
      }
    }
}

void turn_nibbles(const Matrix& m, const uint8_t* order, int64_t start, int64_t width, uint8_t* out) {
  const int64_t row_bytes = width / 2;
  for (int64_t n = 0; n < width; n += CHUNK, out += CHUNK / 2)
    for (int64_t pair = 0; pair * 2 < m.columns; ++pair) {
      uint8_t bytes[CHUNK];
      for (int i = 0; i < CHUNK; ++i)
        bytes[order[i]] = start + n + i < m.rows ? m.data[(start + n + i) * m.row_bytes + pair] : 0;
      uint8_t* even = out + 2 * pair * row_bytes;
      for (int i = 0; i < CHUNK / 2; ++i) even[i] = uint8_t((bytes[2 * i] & 15) | bytes[2 * i + 1] << 4);
      if (2 * pair + 1 < m.columns)
        for (int i = 0; i < CHUNK / 2; ++i)
          even[row_bytes + i] = uint8_t(bytes[2 * i] >> 4 | (bytes[2 * i + 1] & 0xF0));
    }
}

// Powers of two, which bfloat16 holds: [count, width] of bytes [N, count].
void turn_e8m0(const uint8_t* from, int64_t rows, int64_t count, int64_t start, int64_t width, uint8_t* to) {
  const float* values = byte_values("e8m0");
  for (int64_t k = 0; k < count; ++k)
    for (int64_t n = 0; n < width; ++n, to += 2) {
      const float value = start + n < rows ? values[from[(start + n) * count + k]] : 0.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const uint16_t half = uint16_t(bits >> 16);
      std::memcpy(to, &half, 2);
    }
}

// The active channels of one call, kept for the next one of this thread.
struct Channels {
  std::vector<int32_t> channel, first, block;
  std::vector<float> x;

  ActiveChannels find(const float* in, int64_t tokens, const Matrix& m, const float* threshold, const bool* dense) {
    const int64_t columns = m.columns, block_size = m.scales_a_row == 1 ? columns : m.block;
    const int32_t run = m.scale_bytes || m.scale_floats ? SPARSE_RUN : FLOAT_RUN;
    channel.resize(size_t(columns));
    x.resize(size_t(columns * tokens));
    first.clear(), block.clear();
    int32_t count = 0;
    for (int64_t b = 0; b * block_size < columns; ++b) {
      const int32_t begin = count;
      const int64_t end = std::min((b + 1) * block_size, columns);
      for (int64_t k = b * block_size; k < end; ++k) {  // without a branch: half of them would be guessed wrong
        bool any = false;
        for (int64_t t = 0; t < tokens; ++t) {
          const float value = in[t * columns + k];
          const bool keep = dense[t] || std::fabs(value) > threshold[k];
          x[size_t(count * tokens + t)] = keep ? value : 0.0f;
          any = any || keep;
        }
        channel[size_t(count)] = int32_t(k);
        count += any;
      }
      for (int32_t at = begin; at < count; at += run) first.push_back(at), block.push_back(int32_t(b));
    }
    first.push_back(count);
    return {channel.data(), x.data(), first.data(), block.data(), int64_t(block.size()), tokens};
  }
};

}  // namespace

TurnedMatrix::TurnedMatrix(const Matrix& m, const Threads& threads) : isa_(&isa()) {
  rows_.stored = m;
  const int64_t most = std::min(ROW_BYTES / chunk_bytes(m.codes) * CHUNK, SPARSE_WIDTH);
  rows_.tiles = (m.rows + most - 1) / most;
  rows_.width = ((m.rows + rows_.tiles - 1) / rows_.tiles + SPARSE_STEP - 1) / SPARSE_STEP * SPARSE_STEP;
  const bool scaled = m.scale_bytes || m.scale_floats;
  if (m.divided_e4m3 != 0)
    rows_.scale_codes = Codes::E4M3, rows_.factor = 1 / m.divided_e4m3;
  else if (m.scale_bytes)
    rows_.scale_codes = Codes::BF16;
  const int64_t data = m.columns * rows_.row_bytes();
  const int64_t scales = scaled ? m.scales_a_row * rows_.width / CHUNK * chunk_bytes(rows_.scale_codes) : 0;
  memory_.reset(allocate(size_t(rows_.tiles * (data + scales))));
  rows_.data = memory_.get();
  if (scaled) rows_.scales = memory_.get() + rows_.tiles * data;
  threads.each(size_t(rows_.tiles), [&](size_t tile) {
    const int64_t start = int64_t(tile) * rows_.width;
    uint8_t *to = memory_.get() + int64_t(tile) * data, *steps = memory_.get() + rows_.tiles * data + int64_t(tile) * scales;
    if (m.codes == Codes::FP32) turn<uint32_t>(m.data, m.rows, m.columns, start, rows_.width, to);
    if (m.codes == Codes::BF16) turn<uint16_t>(m.data, m.rows, m.columns, start, rows_.width, to);
    if (m.codes == Codes::NIBBLE) turn_nibbles(m, isa_->nibble_order, start, rows_.width, to);
    if (!scaled) return;
    const auto turn_scales = [&](auto turner, const void* from) {
      turner(static_cast<const uint8_t*>(from), m.rows, m.scales_a_row, start, rows_.width, steps);
    };
    if (rows_.scale_codes == Codes::FP32) turn_scales(turn<uint32_t>, m.scale_floats);
    if (rows_.scale_codes == Codes::E4M3) turn_scales(turn<uint8_t>, m.scale_bytes);
    if (rows_.scale_codes == Codes::BF16) turn_scales(turn_e8m0, m.scale_bytes);
  });
}

void TurnedMatrix::operator()(const float* x, int64_t tokens, const float* threshold, const bool* dense,
                              const float* bias, float* y, const Threads& threads) const {
  thread_local Channels channels;
  thread_local std::vector<float> sums;
  const Matrix& m = rows_.stored;
  const ActiveChannels active = channels.find(x, tokens, m, threshold, dense);
  const int64_t read = active.first[active.runs] * m.rows, size = tokens * m.rows;
  // Where tiles are few, each is several tasks with channels of their own; their sums are added in order.
  const int64_t parts = read < ONE_TASK ? 1 : (TASKS + rows_.tiles - 1) / rows_.tiles;
  sums.resize(std::max(sums.size(), size_t((parts - 1) * size)));
  float* other = sums.data();
  const auto part_of = [&](int64_t part) { return part ? other + (part - 1) * size : y; };
  const auto tile = [&](int64_t task) {
    const int64_t part = task / rows_.tiles, from = active.runs * part / parts, to = active.runs * (part + 1) / parts;
    isa_->sparse(rows_, active, task % rows_.tiles, from, to, part_of(part));
  };
  if (read < ONE_TASK)
    for (int64_t task = 0; task < rows_.tiles; ++task) tile(task);
  else
    threads.each(size_t(rows_.tiles * parts), [&](size_t task) { tile(int64_t(task)); });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) y[i] += part_of(part)[i];
  for (int64_t t = 0; bias && t < tokens; ++t)
    for (int64_t n = 0; n < m.rows; ++n) y[t * m.rows + n] += bias[n];
}

}  // namespace compressor
