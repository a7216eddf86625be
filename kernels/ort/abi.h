// onnxruntime's C interface, as far as this library uses it, by slot number.
//
// The headers of onnxruntime are in no package; the C interface is public and append-only, so a slot keeps its number
// for ever. Everything here exists since API version 17 (onnxruntime 1.17); each slot was read in version 29 of the
// public header. tests/test_ort_library.py loads the library into the pinned runtime and into an older one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace compressor {

constexpr uint32_t API_VERSION = 17;  // the first with KernelContext_ParallelFor

enum ElementType : int32_t {
  ANY_TYPE = 0, FLOAT32 = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BFLOAT16 = 16, FLOAT8E4M3FN = 17, FLOAT8E5M2 = 19,
};
enum StatusCode : int32_t { FAIL = 1, INVALID_ARGUMENT = 2, NOT_IMPLEMENTED = 9 };
enum Presence : int32_t { REQUIRED = 0, OPTIONAL = 1 };

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtShape;  // OrtTensorTypeAndShapeInfo
struct OrtCustomOp;

struct OrtApi {
  OrtStatus* (*CreateStatus)(int32_t code, const char* message);  // 0
  void* unused_1;
  const char* (*GetErrorMessage)(const OrtStatus*);  // 2
  void* unused_3[23];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain**);            // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);             // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);              // 28
  void* unused_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);  // 51
  void* unused_52[8];
  OrtStatus* (*GetTensorElementType)(const OrtShape*, int32_t*);               // 60
  OrtStatus* (*GetDimensionsCount)(const OrtShape*, size_t*);                  // 61
  OrtStatus* (*GetDimensions)(const OrtShape*, int64_t*, size_t count);        // 62
  void* unused_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtShape**);  // 65
  void* unused_66[19];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo*, const char* name, float*);                  // 85
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char* name, int64_t*);               // 86
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo*, const char* name, char*, size_t* size);   // 87
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext*, size_t*);                                // 88
  void* unused_89;
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t index, const OrtValue**);              // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t index, const int64_t*, size_t, OrtValue**); // 91
  void* unused_92;
  void (*ReleaseStatus)(OrtStatus*);  // 93
  void* unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtShape*);  // 99
  void* unused_100[149];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(
      const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue**);  // 249
  void* unused_250[24];
  OrtStatus* (*KernelContext_ParallelFor)(
      const OrtKernelContext*, void (*task)(void*, size_t), size_t total, size_t batches, void* argument);  // 274
};

#define SLOT(name, number) static_assert(offsetof(OrtApi, name) == (number) * sizeof(void*), #name)
SLOT(GetErrorMessage, 2);
SLOT(CreateCustomOpDomain, 26);
SLOT(CustomOpDomain_Add, 27);
SLOT(AddCustomOpDomain, 28);
SLOT(GetTensorMutableData, 51);
SLOT(GetTensorElementType, 60);
SLOT(GetDimensionsCount, 61);
SLOT(GetDimensions, 62);
SLOT(GetTensorTypeAndShape, 65);
SLOT(KernelInfoGetAttribute_float, 85);
SLOT(KernelInfoGetAttribute_int64, 86);
SLOT(KernelInfoGetAttribute_string, 87);
SLOT(KernelContext_GetInputCount, 88);
SLOT(KernelContext_GetInput, 90);
SLOT(KernelContext_GetOutput, 91);
SLOT(ReleaseStatus, 93);
SLOT(ReleaseTensorTypeAndShapeInfo, 99);
SLOT(KernelInfoGetConstantInput_tensor, 249);
SLOT(KernelContext_ParallelFor, 274);
#undef SLOT

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null where the runtime is older
  const char* (*GetVersionString)();
};

// Callbacks of one op; those left null are optional or replaced by their V2.
struct OrtCustomOp {
  uint32_t version;
  void* CreateKernel;
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int32_t (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int32_t (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void* KernelCompute;
  void (*KernelDestroy)(void* kernel);
  int32_t (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int32_t (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int32_t (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  void* variadic[4];
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  void* InferOutputShapeFn;
  void* versions[2];
  void* inplace_and_alias[4];
};
static_assert(offsetof(OrtCustomOp, KernelDestroy) == 9 * sizeof(void*), "OrtCustomOp");
static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 17 * sizeof(void*), "OrtCustomOp");
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*), "OrtCustomOp");

}  // namespace compressor
