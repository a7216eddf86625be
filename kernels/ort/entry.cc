// The same kernels for callers without onnxruntime: plain C functions, called through ctypes by kernels/native.py.
#include <cstdlib>
#include <cstring>

#include "op.h"

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
  int64_t integer(const char* name) const override { return std::strtoll(text(name).c_str(), nullptr, 10); }
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

// y has the shape that the op's contract says and `elements` floats. 1, or 0 and a sentence in `message`.
EXPORT int compressor_run(const Kernel* kernel, const CompressorTensor* tensors, int count, float* y, int64_t elements,
                          int threads, char* message, size_t size) {
  return guarded(message, size, [&] {
    std::vector<Tensor> inputs(size_t(count < MAX_INPUTS ? MAX_INPUTS : count));
    for (int i = 0; i < count; ++i) {
      const CompressorTensor& t = tensors[i];
      inputs[size_t(i)] = {t.data, t.type, std::vector<int64_t>(t.shape, t.shape + t.rank)};
    }
    int64_t expected = 1;
    for (int64_t d : kernel->shape(inputs)) expected *= d;
    if (expected != elements) throw Error("the output has another size.");
    kernel->run(inputs, y, OwnThreads(threads));
  });
}

EXPORT void compressor_destroy(Kernel* kernel) { delete kernel; }

// The instruction set in use, and another one for tests: 0 where this processor does not have it.
EXPORT const char* compressor_isa() { return isa().name; }
EXPORT int compressor_use_isa(const char* name) { return use_isa(name); }
