// The library as onnxruntime sees it: RegisterCustomOps, and the table of ops.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "op.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace compressor {

extern const Op FP4_LINEAR, INT_LINEAR, FP8_LINEAR, FLOAT_LINEAR, FP4_EMBEDDING, INT_EMBEDDING, SWIGLU, LOWRANK_LINEAR,
    LOWRANK_FFN, SPARSE_LINEAR, MIXED_BIT_MOE, GROUP_QUERY_ATTENTION;
const std::vector<const Op*> OPS = {
    &FP4_LINEAR,     &INT_LINEAR,  &FP8_LINEAR,    &FLOAT_LINEAR,  &FP4_EMBEDDING,         &INT_EMBEDDING, &SWIGLU,
    &LOWRANK_LINEAR, &LOWRANK_FFN, &SPARSE_LINEAR, &MIXED_BIT_MOE, &GROUP_QUERY_ATTENTION,
};

namespace {

const char* const DOMAIN = "ai.compressor";

void check(const OrtApi& api, OrtStatus* status) {
  if (!status) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

struct NodeAttributes final : Attributes {
  const OrtApi& api;
  const OrtKernelInfo* info;
  NodeAttributes(const OrtApi& api, const OrtKernelInfo* info) : api(api), info(info) {}

  int64_t integer(const char* name) const override {
    int64_t value = 0;
    check(api, api.KernelInfoGetAttribute_int64(info, name, &value));
    return value;
  }
  float number(const char* name) const override {
    float value = 0;
    check(api, api.KernelInfoGetAttribute_float(info, name, &value));
    return value;
  }
  std::string text(const char* name) const override {
    size_t size = 0;  // with the terminating zero
    check(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size));
    std::string value(size, '\0');
    check(api, api.KernelInfoGetAttribute_string(info, name, &value[0], &size));
    value.resize(std::strlen(value.c_str()));
    return value;
  }
  bool constant(size_t input) const override {
    int found = 0;
    const OrtValue* value = nullptr;
    check(api, api.KernelInfoGetConstantInput_tensor(info, input, &found, &value));
    return found != 0;
  }
};

struct RuntimeThreads final : Threads {
  const OrtApi& api;
  const OrtKernelContext* context;
  RuntimeThreads(const OrtApi& api, const OrtKernelContext* context) : api(api), context(context) {}
  void run(size_t count, void (*task)(void*, size_t), void* argument) const override {
    check(api, api.KernelContext_ParallelFor(context, task, count, 0, argument));
  }
};

struct Node {  // what onnxruntime keeps of one node
  const OrtApi& api;
  std::unique_ptr<Kernel> kernel;
};

struct RegisteredOp : OrtCustomOp {
  const Op* op;
};
const Op& op_of(const OrtCustomOp* self) { return *static_cast<const RegisteredOp*>(self)->op; }

// No exception may cross into the runtime.
template <class Function>
OrtStatus* guarded(const OrtApi& api, Function&& function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    return api.CreateStatus(FAIL, error.what());
  }
}

Tensor input(const OrtApi& api, const OrtKernelContext* context, size_t index) {
  const OrtValue* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  Tensor tensor;
  if (!value) return tensor;
  OrtShape* shape = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &shape));
  size_t rank = 0;
  check(api, api.GetTensorElementType(shape, &tensor.type));
  check(api, api.GetDimensionsCount(shape, &rank));
  tensor.shape.resize(rank);
  check(api, api.GetDimensions(shape, tensor.shape.data(), rank));
  api.ReleaseTensorTypeAndShapeInfo(shape);
  void* data = nullptr;
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  static const char empty = 0;
  tensor.data = data ? data : &empty;
  return tensor;
}

OrtStatus* create(const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  return guarded(*api, [&] { *kernel = new Node{*api, op_of(self).create(NodeAttributes(*api, info))}; });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  const OrtApi& api = node.api;
  return guarded(api, [&] {
    size_t count = 0;
    check(api, api.KernelContext_GetInputCount(context, &count));
    std::vector<Tensor> inputs(std::max<size_t>(count, MAX_INPUTS));
    for (size_t i = 0; i < count; ++i) inputs[i] = input(api, context, i);
    const auto shapes = node.kernel->shapes(inputs);
    float* outputs[MAX_OUTPUTS] = {};
    for (size_t i = 0; i < shapes.size(); ++i) {
      OrtValue* output = nullptr;
      void* y = nullptr;
      check(api, api.KernelContext_GetOutput(context, i, shapes[i].data(), shapes[i].size(), &output));
      check(api, api.GetTensorMutableData(output, &y));
      outputs[i] = static_cast<float*>(y);
    }
    node.kernel->run(inputs, outputs, RuntimeThreads(api, context));
  });
}

RegisteredOp described(const Op& op) {
  RegisteredOp out{};
  out.version = API_VERSION;
  out.op = &op;
  out.GetName = [](const OrtCustomOp* self) { return op_of(self).name; };
  out.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
  out.GetInputType = [](const OrtCustomOp* self, size_t i) { return op_of(self).inputs[i].type; };
  out.GetInputTypeCount = [](const OrtCustomOp* self) { return op_of(self).inputs.size(); };
  out.GetOutputType = [](const OrtCustomOp*, size_t) -> int32_t { return FLOAT32; };
  out.GetOutputTypeCount = [](const OrtCustomOp* self) { return op_of(self).outputs; };
  out.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  out.GetInputCharacteristic = [](const OrtCustomOp* self, size_t i) { return op_of(self).inputs[i].presence; };
  out.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int32_t { return REQUIRED; };
  out.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int32_t { return 0; };
  out.CreateKernelV2 = create;
  out.KernelComputeV2 = compute;
  return out;
}

// One domain for each runtime in the process, kept: sessions hold pointers into it.
OrtCustomOpDomain* domain_of(const OrtApiBase* runtime, const OrtApi& api) {
  static std::mutex mutex;
  static std::map<const OrtApiBase*, OrtCustomOpDomain*> domains;
  static std::vector<RegisteredOp>* ops = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (!ops) {
    ops = new std::vector<RegisteredOp>;
    for (const Op* op : OPS) ops->push_back(described(*op));
  }
  OrtCustomOpDomain*& domain = domains[runtime];
  if (!domain) {
    check(api, api.CreateCustomOpDomain(DOMAIN, &domain));
    for (const RegisteredOp& op : *ops) check(api, api.CustomOpDomain_Add(domain, &op));
  }
  return domain;
}

}  // namespace

void expect(const Op& op, const std::vector<Tensor>& inputs, size_t index, std::initializer_list<int32_t> types,
            std::initializer_list<int64_t> shape) {
  const Tensor& t = inputs[index];
  bool fits = t.shape.size() == shape.size(), known = false;
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape.begin()[i] < 0 || shape.begin()[i] == t.shape[i];
  for (int32_t type : types) known = known || type == t.type;
  if (t && known && fits) return;  // each call of a kernel passes here: no word is written before something is wrong
  const std::string where = std::string(op.name) + ": " + op.inputs[index].name;
  if (!t) throw Error(where + " is missing, which these attributes need.");
  if (!known) throw Error(where + " has element type " + std::to_string(t.type) + ", which this op does not read.");
  std::string found, wanted;
  for (int64_t d : t.shape) found += (found.empty() ? "" : ", ") + std::to_string(d);
  for (int64_t d : shape) wanted += (wanted.empty() ? "" : ", ") + (d < 0 ? std::string("any") : std::to_string(d));
  throw Error(where + " has shape [" + found + "], expected [" + wanted + "].");
}

Error unknown(const char* op, const char* attribute, const std::string& found, const char* allowed) {
  return Error(std::string(op) + ": " + attribute + " is '" + found + "', this library knows " + allowed +
               "; install the compressor that wrote the model, or run without the library.");
}

}  // namespace compressor

EXPORT compressor::OrtStatus* RegisterCustomOps(
    compressor::OrtSessionOptions* options, const compressor::OrtApiBase* runtime) {
  using namespace compressor;
  const OrtApi* api = runtime->GetApi(API_VERSION);
  if (!api) {
    const OrtApi* first = runtime->GetApi(1);  // its first slots are those of every version
    return first->CreateStatus(
        NOT_IMPLEMENTED, ("The compressor ops need onnxruntime 1.17 or newer and this is " +
                          std::string(runtime->GetVersionString()) +
                          "; update it, or leave the library out: the model runs without it.").c_str());
  }
  return guarded(*api, [&] { check(*api, api->AddCustomOpDomain(options, domain_of(runtime, *api))); });
}
