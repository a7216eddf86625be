// The same kernels for callers without onnxruntime: plain C functions, called through ctypes by kernels/native.py.
#include <cstdlib>
#include <cstring>

#include "matrix.h"
#include "op.h"
#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace compressor;

namespace {

struct NamedAttributes final : Attributes {
  const char* const* names;
  const char* const* values;
  int count;
  NamedAttributes(const char* const* names, const char* const* values, int count)
      : names(names), values(values), count(count) {}

  std::string text(const char* name) const override {
    for (int i = 0; i < count; ++i)
      if (!std::strcmp(names[i], name)) return values[i];
    throw Error(std::string("attribute ") + name + " is missing.");
  }
  float number(const char* name) const override { return std::strtof(text(name).c_str(), nullptr); }
  int64_t integer(const char* name) const override { return std::strtoll(text(name).c_str(), nullptr, 10); }
  bool constant(size_t) const override {  // callers say so by an attribute of that name
    for (int i = 0; i < count; ++i)
      if (!std::strcmp(names[i], "constant")) return true;
    return false;
  }
};

template <class Function>
bool guarded(char* message, size_t size, Function&& function) {
  try {
    function();
    return true;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), size - 1);
    message[size - 1] = '\0';
    return false;
  }
}

}  // namespace

struct CompressorTensor {
  const void* data;  // null where an optional input is left out
  int32_t type;      // ElementType of abi.h
  int32_t rank;
  const int64_t* shape;
};

// A kernel for these attributes, or null and a sentence in `message`.
EXPORT Kernel* compressor_create(const char* name, const char* const* names, const char* const* values, int count,
                                 char* message, size_t size) {
  Kernel* kernel = nullptr;
  guarded(message, size, [&] {
    for (const Op* op : OPS)
      if (!std::strcmp(op->name, name)) kernel = op->create(NamedAttributes(names, values, count)).release();
    if (!kernel) throw Error(std::string("this library has no op ") + name + ".");
  });
  return kernel;
}

// y has the shape that the op's contract says and `elements` floats, several outputs one behind the other. 1, or 0 and a
// sentence in `message`.
EXPORT int compressor_run(const Kernel* kernel, const CompressorTensor* tensors, int count, float* y, int64_t elements,
                          int threads, char* message, size_t size) {
  return guarded(message, size, [&] {
    std::vector<Tensor> inputs(size_t(count < MAX_INPUTS ? MAX_INPUTS : count));
    for (int i = 0; i < count; ++i) {
      const CompressorTensor& t = tensors[i];
      inputs[size_t(i)] = {t.data, t.type, std::vector<int64_t>(t.shape, t.shape + t.rank)};
    }
    float* outputs[MAX_OUTPUTS] = {};
    int64_t expected = 0, output = 0;
    for (const std::vector<int64_t>& shape : kernel->shapes(inputs)) {
      int64_t size = 1;
      for (int64_t d : shape) size *= d;
      outputs[output++] = y + expected;
      expected += size;
    }
    if (expected != elements) throw Error("the output has another size.");
    kernel->run(inputs, outputs, OwnThreads(threads));
  });
}

EXPORT void compressor_destroy(Kernel* kernel) { delete kernel; }

// One block of GPTQ: codes and errors [rows, columns] of weight and step of that shape and u [columns, columns]; grid:
// the four numbers of GptqGrid. 0, and nothing done, for more than GPTQ_COLUMNS columns.
EXPORT int compressor_gptq(const float* weight, const float* step, const float* u, int64_t rows, int64_t columns,
                           const float* grid, float* codes, float* errors, int threads) {
  constexpr int64_t TASK = 64;
  if (columns > GPTQ_COLUMNS) return 0;
  const GptqGrid limits = {grid[0], grid[1], grid[2], grid[3]};
  OwnThreads(threads).each(size_t((rows + TASK - 1) / TASK), [&](size_t task) {
    const int64_t first = int64_t(task) * TASK, last = first + TASK < rows ? first + TASK : rows;
    isa().gptq(weight, step, u, first, last, columns, limits, codes, errors);
  });
  return 1;
}

// The instruction set in use, and another one for tests: 0 where this processor does not have it.
EXPORT const char* compressor_isa() { return isa().name; }
EXPORT int compressor_use_isa(const char* name) { return use_isa(name); }
