// What an op is to this library: its name and inputs, how a kernel is made from attributes, and what a kernel does.
// The glue to onnxruntime (library.cc) and to ctypes (entry.cc) knows nothing else, so one op is one file and one row
// of the table in library.cc.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"
#include "matrix.h"
#include "threads.h"

namespace compressor {

// A sentence for the user; it becomes the status of the session or of the call.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Tensor {
  const void* data = nullptr;  // null: an optional input that is not there
  int32_t type = 0;
  std::vector<int64_t> shape;

  explicit operator bool() const { return data != nullptr; }
  int64_t last() const { return shape.empty() ? 1 : shape.back(); }
  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  const float* floats() const { return static_cast<const float*>(data); }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }
};

struct Attributes {
  virtual ~Attributes() = default;
  virtual int64_t integer(const char* name) const = 0;
  virtual float number(const char* name) const = 0;
  virtual std::string text(const char* name) const = 0;
  // Whether the kernel belongs to one node of which this input never changes.
  virtual bool constant(size_t input) const = 0;
};

struct Kernel {
  virtual ~Kernel() = default;
  // Of the float32 outputs; checks the inputs. Raises Error.
  virtual std::vector<std::vector<int64_t>> shapes(const std::vector<Tensor>& inputs) const = 0;
  virtual void run(const std::vector<Tensor>& inputs, float* const* outputs, const Threads& threads) const = 0;
};

struct OneOutput : Kernel {
  virtual std::vector<int64_t> shape(const std::vector<Tensor>& inputs) const = 0;
  virtual void run(const std::vector<Tensor>& inputs, float* y, const Threads& threads) const = 0;

  std::vector<std::vector<int64_t>> shapes(const std::vector<Tensor>& inputs) const final { return {shape(inputs)}; }
  void run(const std::vector<Tensor>& inputs, float* const* outputs, const Threads& threads) const final {
    run(inputs, outputs[0], threads);
  }
};

constexpr size_t MAX_OUTPUTS = 3;
constexpr int MAX_INPUTS = 11;  // kernels index up to here: inputs left out at the end are not there

struct Input {
  const char* name;
  int32_t type;  // of onnxruntime, ANY_TYPE where the op takes several
  int32_t presence = REQUIRED;
};

struct Op {
  const char* name;
  std::vector<Input> inputs;
  std::unique_ptr<Kernel> (*create)(const Attributes&);  // raises Error for a value that it does not know
  size_t outputs = 1;
};
extern const std::vector<const Op*> OPS;  // library.cc

// Raises Error unless `tensor` has this type and shape; -1 stands for any size.
void expect(const Op& op, const std::vector<Tensor>& inputs, size_t index, std::initializer_list<int32_t> types,
            std::initializer_list<int64_t> shape);
// "fp4_linear: format is 'x'; this library knows a, b; …"
Error unknown(const char* op, const char* attribute, const std::string& found, const char* allowed);

}  // namespace compressor
