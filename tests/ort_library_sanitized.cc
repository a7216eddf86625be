// Every op through the library's C functions on buffers of exactly their size, for every instruction set of this
// processor and for 1, 2 and 4 threads, whose results must have the same bits. `make test-sanitizers` runs it under the
// address, undefined-behaviour and thread sanitizers. What the numbers are is tested in test_ort_library.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

struct CompressorTensor {
  const void* data;
  int32_t type, rank;
  const int64_t* shape;
};
extern "C" {
void* compressor_create(const char*, const char* const*, const char* const*, int, char*, size_t);
int compressor_run(const void*, const CompressorTensor*, int, float*, int64_t, int, char*, size_t);
void compressor_destroy(void*);
int compressor_gptq(const float*, const float*, const float*, int64_t, int64_t, const float*, float*, float*, int);
int compressor_use_isa(const char*);
}

namespace {

enum { FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BFLOAT16 = 16, E4M3 = 17 };
using Shape = std::vector<int64_t>;
uint32_t state = 1;
uint32_t random_bits() { return state = state * 1664525u + 1013904223u, state >> 8; }

struct Buffer {
  std::unique_ptr<uint8_t[]> bytes;
  int32_t type = 0;
  Shape shape;

  Buffer() = default;
  Buffer(int32_t type, Shape shape, int limit = 256) : type(type), shape(shape) {
    size_t count = 1;
    for (int64_t d : this->shape) count *= size_t(d);
    const size_t size = type == FLOAT || type == INT32 ? 4 : type == INT64 ? 8 : type == BFLOAT16 ? 2 : 1;
    bytes.reset(new uint8_t[count * size]);
    for (size_t i = 0; i < count; ++i) {
      const float value = float(random_bits() % 2000) / 500.0f - 1.999f;
      const int64_t id = random_bits() % 5;
      if (type == FLOAT) std::memcpy(bytes.get() + 4 * i, &value, 4);
      if (type == INT64) std::memcpy(bytes.get() + 8 * i, &id, 8);
      if (type != FLOAT && type != INT64)
        for (size_t b = 0; b < size; ++b) bytes[size * i + b] = uint8_t(int(random_bits()) % limit);
    }
  }
};

struct Case {
  std::string op;
  std::vector<std::pair<std::string, std::string>> attributes;
  std::vector<Buffer> inputs;  // the first is made for each number of tokens
  int64_t columns, rows;
};

std::vector<float> run(const Case& c, const Buffer& x, int64_t elements, int threads) {
  std::vector<const char*> names, values;
  for (auto& [name, value] : c.attributes) names.push_back(name.c_str()), values.push_back(value.c_str());
  char message[512] = "";
  void* kernel = compressor_create(c.op.c_str(), names.data(), values.data(), int(names.size()), message, 512);
  std::vector<CompressorTensor> tensors = {{x.bytes.get(), x.type, int32_t(x.shape.size()), x.shape.data()}};
  for (const Buffer& b : c.inputs)
    tensors.push_back({b.bytes.get(), b.type, int32_t(b.shape.size()), b.shape.data()});
  std::vector<float> y(static_cast<size_t>(elements));
  if (!kernel ||
      !compressor_run(kernel, tensors.data(), int(tensors.size()), y.data(), elements, threads, message, 512)) {
    std::printf("%s: %s\n", c.op.c_str(), message);
    std::exit(1);
  }
  compressor_destroy(kernel);
  return y;
}

std::vector<Case> cases(int64_t n) {
  std::vector<Case> all;
  auto add = [&](std::string op, int64_t k, std::vector<std::pair<std::string, std::string>> attributes) -> auto& {
    all.push_back({op, attributes, {}, k, n});
    return all.back().inputs;
  };
  for (const char* rule : {"none", "nvfp4", "mxfp4", "int8", "int8_block", "fp8"})
    for (const char* format : {"nvfp4", "mxfp4"})
      for (int64_t k : {96, 800}) {
        const bool nv = format[0] == 'n';
        auto& in = add("FP4Linear", k, {{"format", format}, {"activations", rule}, {"four_over_six", "1"},
                                        {"hadamard", k == 96 ? "32" : "0"}});
        in.emplace_back(UINT8, Shape{n, k / 2});
        in.emplace_back(nv ? E4M3 : UINT8, Shape{n, nv ? k / 16 : k / 32}, nv ? 0x7F : 140);
        in.push_back(nv ? Buffer(FLOAT, {1}) : Buffer());
        in.push_back(std::string(rule) == "nvfp4" ? Buffer(FLOAT, {1}) : Buffer());
        in.emplace_back(FLOAT, Shape{n});
      }
  for (int64_t k : {1, 31, 33, 63, 513})
    for (int bits : {1, 2, 3, 4, 8}) {
      auto& in = add("IntLinear", k, {{"bits", std::to_string(bits)}, {"group_size", k == 63 ? "24" : "0"},
                                      {"activations", "none"}, {"packed", "1"}, {"in_features", std::to_string(k)},
                                      {"hadamard", "0"}});
      in.emplace_back(INT32, Shape{n, (k * bits + 31) / 32});
      in.emplace_back(FLOAT, Shape{n, k == 63 ? 3 : 1});
    }
  for (int64_t k : {1, 31, 33, 63, 513}) {
    auto& in = add("IntLinear", k, {{"bits", "8"}, {"group_size", "0"}, {"activations", "int8"}, {"packed", "0"},
                                    {"in_features", std::to_string(k)}, {"hadamard", "0"}});
    in.emplace_back(INT8, Shape{n, k});
    in.emplace_back(FLOAT, Shape{n, 1});
    auto& fp8 = add("FP8Linear", k, {{"activations", "fp8"}, {"hadamard", "0"}});
    fp8.emplace_back(E4M3, Shape{n, k}, 0x7F);
    fp8.emplace_back(FLOAT, Shape{n, 1});
  }
  for (const char* format : {"e2m1", "e3m2", "e5m2"}) {
    const int64_t k = 100, bits = format[1] == '2' ? 4 : format[1] == '3' ? 6 : 8;
    auto& in = add("FloatLinear", k, {{"format", format}, {"activations", "none"}, {"block_size", "20"}});
    in.emplace_back(UINT8, Shape{n, k * bits / 8}, 0x70);
    in.emplace_back(E4M3, Shape{n, 5}, 0x7F);
    in.emplace_back(FLOAT, Shape{1});
  }
  // Factors of 16 and 32 bits, ranks below and above a register; a feed-forward with a gate or dense parts.
  auto factor = [](std::vector<Buffer>& in, int type, int64_t rows, int64_t columns) {
    in.emplace_back(type, Shape{rows, columns}, 0x40);  // below 2 as bfloat16
  };
  for (int type : {FLOAT, BFLOAT16})
    for (int64_t rank : {1, 16, 45}) {
      const int64_t k = 70, wide = 90;
      auto& in = add("LowRankLinear", k, {});
      factor(in, type, rank, k), factor(in, type, n, rank);
      in.push_back(rank == 16 ? Buffer() : Buffer(FLOAT, {n}));
      if (n > rank && n > 4) {  // integers are below 5
        auto& pivoted = add("LowRankLinear", k, {});
        factor(pivoted, type, rank, k), factor(pivoted, type, n - rank, rank);
        pivoted.emplace_back(FLOAT, Shape{n - rank}), pivoted.emplace_back(FLOAT, Shape{rank});
        pivoted.emplace_back(INT64, Shape{n});
      }
      const bool gated = rank != 1, dense = rank == 45;
      auto& ffn = add("LowRankFFN", k, {{"activation", gated ? "silu" : "gelu"}});
      for (bool there : {true, gated})
        if (there) {
          factor(ffn, type, dense ? wide : rank, k);
          ffn.emplace_back();
          if (!dense) ffn.back() = Buffer(type, Shape{wide, rank}, 0x40);
          ffn.push_back(dense ? Buffer() : Buffer(FLOAT, {wide}));
        } else {
          ffn.resize(ffn.size() + 3);
        }
      factor(ffn, type, rank, wide), factor(ffn, type, n, rank);
      ffn.emplace_back(FLOAT, Shape{n});
    }
  // Half of the channels, from a copy that is turned for few tokens; x has a row a token.
  for (const char* format : {"float", "bf16", "int4", "nvfp4", "mxfp4"})
    for (int64_t k : {32, 33, 1760}) {
      const std::string name = format;
      if (k == 33 && name != "float" && name != "bf16") continue;
      auto& in = add("SparseLinear", k, {{"format", name == "bf16" ? "float" : name}, {"tokens", "all"},
                                         {"constant", ""}});
      in.emplace_back(FLOAT, Shape{k});
      if (name == "float") in.emplace_back(FLOAT, Shape{n, k});
      if (name == "bf16") in.emplace_back(BFLOAT16, Shape{n, k}, 0x40);
      if (name == "int4") in.emplace_back(UINT8, Shape{n, k / 32, 16});
      if (name[0] == 'n' || name[0] == 'm') in.emplace_back(UINT8, Shape{n, k / 2});
      if (name[1] == 'l' || name[1] == 'f') in.emplace_back();
      if (name == "int4") in.emplace_back(FLOAT, Shape{n, k / 32});
      if (name == "nvfp4") in.emplace_back(E4M3, Shape{n, k / 16}, 0x7F);
      if (name == "mxfp4") in.emplace_back(UINT8, Shape{n, k / 32}, 140);
      in.push_back(name == "nvfp4" ? Buffer(FLOAT, {1}) : Buffer());
      in.emplace_back(FLOAT, Shape{n});
    }
  add("SwiGLU", 2 * n, {{"name", ""}});
  return all;
}

// The outputs of attention one behind the other: a prompt, or tokens behind `past` ones in a cache that has room.
std::vector<float> attention(int64_t batch, int64_t tokens, int64_t past, int64_t room, int64_t size, int threads) {
  state = 7;
  const int64_t total = past + tokens, held = past + room, kept = held > total ? held : total;
  Case c{"GroupQueryAttention",
         {{"num_heads", "6"}, {"kv_num_heads", "2"}, {"head_size", std::to_string(size)}, {"do_rotary", "1"},
          {"scale", "0.2"}, {"softcap", room ? "20" : "0"}},
         {}, 10 * size, 0};
  c.inputs.resize(2);  // keys and values are behind the queries
  for (int i = 0; i < 2; ++i) c.inputs.emplace_back(FLOAT, Shape{batch, 2, held, size});
  c.inputs.emplace_back(INT32, Shape{batch});
  c.inputs.emplace_back(INT32, Shape{});
  const int32_t positions = int32_t(total);
  std::memcpy(c.inputs.back().bytes.get(), &positions, 4);
  for (int i = 0; i < 2; ++i) c.inputs.emplace_back(FLOAT, Shape{5, size / 2});
  c.inputs.emplace_back(INT64, Shape{batch, tokens});
  c.inputs.emplace_back(FLOAT, Shape{batch, 1, tokens, total});
  const int64_t elements = batch * tokens * 6 * size + 2 * batch * 2 * kept * size;
  return run(c, Buffer(FLOAT, {batch, tokens, 10 * size}), elements, threads);
}

// Experts of five widths, of which nobody chose the second; their bytes end with the last scale.
std::vector<float> mixture(int64_t tokens, int64_t hidden, int64_t wide, int threads) {
  state = 9;
  const std::string bits = "38124";
  std::string layout;
  int64_t bytes = 0;
  for (int64_t b : {1, 2, 3, 4, 8}) {
    const int64_t in = (hidden * b + 31) / 32 * 4 * wide, out = (wide * b + 31) / 32 * 4 * hidden;
    const int64_t steps = (hidden + 31) / 32 * wide * 2, last = (wide + 31) / 32 * hidden * 2;
    for (int64_t n : {b, 2 * in + out + 2 * steps + last, int64_t(0), in, 2 * in, 2 * in + out, 2 * in + out + steps,
                      2 * in + out + 2 * steps})
      layout += (layout.empty() ? "" : " ") + std::to_string(n);
    bytes += 2 * in + out + 2 * steps + last;
  }
  Case c{"MixedBitMoE",
         {{"bits", bits}, {"layout", layout}, {"group_size", "32"}, {"down_group_size", "32"},
          {"hidden", std::to_string(hidden)}, {"intermediate", std::to_string(wide)}, {"activation", "silu"}},
         {}, hidden, hidden};
  Buffer weights(FLOAT, {tokens, 5});
  for (int64_t t = 0; t < tokens; ++t) std::memset(weights.bytes.get() + 4 * (5 * t + 1), 0, 4);
  c.inputs.push_back(std::move(weights));
  c.inputs.emplace_back(UINT8, Shape{bytes}, 0x40);  // scales below 2 as bfloat16
  return run(c, Buffer(FLOAT, {tokens, hidden}), tokens * hidden, threads);
}

// Codes, then errors, of one block of GPTQ.
std::vector<float> round_block(int64_t rows, int64_t columns, int threads) {
  state = 5;
  const Buffer weight(FLOAT, {rows, columns}), u(FLOAT, {columns, columns});
  const std::vector<float> step(size_t(rows * columns), 0.25f), grid = {-6, 6, 1, 0.5};
  std::vector<float> found(size_t(2 * rows * columns));
  const float *w = reinterpret_cast<const float*>(weight.bytes.get()), *f = reinterpret_cast<const float*>(u.bytes.get());
  compressor_gptq(w, step.data(), f, rows, columns, grid.data(), found.data(), found.data() + rows * columns, threads);
  return found;
}

}  // namespace

int main() {
  int checked = 0;
  for (const char* isa : {"portable", "avx2", "avx512vnni"}) {
    if (!compressor_use_isa(isa)) continue;
    for (int64_t n : {1, 33, 130})
      for (const Case& c : cases(n))
        for (int64_t tokens : {1, 2, 7, 131}) {
          const Buffer x(FLOAT, {tokens, c.columns});
          const std::vector<float> one = run(c, x, tokens * n, 1);
          for (int threads : {2, 4}) {
            const std::vector<float> other = run(c, x, tokens * n, threads);
            if (std::memcmp(one.data(), other.data(), one.size() * sizeof(float))) {
              std::printf("%s with %s: %d threads give other bits\n", c.op.c_str(), isa, threads);
              return 1;
            }
            ++checked;
          }
        }
    for (int64_t n : {1, 33, 130})
      for (int64_t k : {1, 63, 128}) {
        const std::vector<float> one = round_block(n, k, 1), other = round_block(n, k, 4);
        if (std::memcmp(one.data(), other.data(), one.size() * sizeof(float))) {
          std::printf("gptq with %s: 4 threads give other bits\n", isa);
          return 1;
        }
        ++checked;
      }
    for (int64_t tokens : {0, 1, 2, 7, 33, 301})
      for (int64_t hidden : {33, 64}) {
        const std::vector<float> one = mixture(tokens, hidden, 70, 1), other = mixture(tokens, hidden, 70, 4);
        if (tokens && std::memcmp(one.data(), other.data(), one.size() * sizeof(float))) {
          std::printf("MixedBitMoE with %s: 4 threads give other bits\n", isa);
          return 1;
        }
        ++checked;
      }
    for (int64_t batch : {1, 3})
      for (int64_t tokens : {1, 7, 40})
        for (int64_t past : {0, 33})
          for (int64_t size : {16, 40, 64}) {
            const std::vector<float> one = attention(batch, tokens, past, past ? 50 : 0, size, 1);
            for (int threads : {2, 4}) {
              const std::vector<float> other = attention(batch, tokens, past, past ? 50 : 0, size, threads);
              if (std::memcmp(one.data(), other.data(), one.size() * sizeof(float))) {
                std::printf("attention with %s: %d threads give other bits\n", isa, threads);
                return 1;
              }
              ++checked;
            }
          }
    const int64_t k = 96;
    Case table{"FP4Embedding", {{"format", "nvfp4"}}, {}, k, 5};
    table.inputs.emplace_back(UINT8, Shape{5, k / 2});
    table.inputs.emplace_back(E4M3, Shape{5, k / 16}, 0x7F);
    table.inputs.emplace_back(FLOAT, Shape{1});
    run(table, Buffer(INT64, {7}), 7 * k, 1);
    // Two sessions at once: one gets the pool, the other works alone.
    const std::vector<Case> shared = cases(130);
    const Buffer x(FLOAT, {40, shared[0].columns});
    std::thread other([&] { run(shared[0], x, 40 * 130, 4); });
    run(shared[0], x, 40 * 130, 4);
    other.join();
  }
  std::printf("%d runs agree\n", checked);
}
