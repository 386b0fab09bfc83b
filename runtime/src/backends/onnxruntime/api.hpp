// ONNX Runtime's library, opened when it is first needed: this library starts without it.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace hywu::backends::ort {

// The one copy of ONNX Runtime in this process.
struct Runtime {
    const OrtApi* api = nullptr;  // null if there is none
    OrtEnv* env = nullptr;
    std::string version, file;
    std::string missing;                 // why there is none
    std::vector<std::string> providers;  // "CPUExecutionProvider", …

    bool has(const std::string& provider) const;
};

// Opens the library at the first call; the file that the environment variable HYWU_ONNXRUNTIME_LIBRARY names,
// or libonnxruntime as the system finds it. Never throws for a library that is not there.
const Runtime& runtime();

// Frees what the C API hands out.
template <class T, void (ORT_API_CALL* OrtApi::*release)(T*)>
struct Release {
    void operator()(T* handle) const noexcept { (runtime().api->*release)(handle); }
};
using SessionOptions =
    std::unique_ptr<OrtSessionOptions, Release<OrtSessionOptions, &OrtApi::ReleaseSessionOptions>>;
using SessionHandle = std::unique_ptr<OrtSession, Release<OrtSession, &OrtApi::ReleaseSession>>;
using ValueHandle = std::unique_ptr<OrtValue, Release<OrtValue, &OrtApi::ReleaseValue>>;
using MemoryInfo = std::unique_ptr<OrtMemoryInfo, Release<OrtMemoryInfo, &OrtApi::ReleaseMemoryInfo>>;
using BindingHandle = std::unique_ptr<OrtIoBinding, Release<OrtIoBinding, &OrtApi::ReleaseIoBinding>>;
using TypeInfo = std::unique_ptr<OrtTypeInfo, Release<OrtTypeInfo, &OrtApi::ReleaseTypeInfo>>;
using CudaOptions = std::unique_ptr<OrtCUDAProviderOptionsV2,
                                    Release<OrtCUDAProviderOptionsV2, &OrtApi::ReleaseCUDAProviderOptions>>;

// The first line of a failure's message, or nothing; frees the status.
std::optional<std::string> failure(OrtStatus* status);

// An OrtValue over memory that somebody else holds.
ValueHandle wrap(const OrtMemoryInfo& where, const void* data, std::size_t bytes,
                 const std::vector<int64_t>& shape, ONNXTensorElementDataType type);

// Throws Error(engine), "ONNX Runtime: <what>: <message>", if the status is a failure; frees it.
void check(OrtStatus* status, const std::string& what);

}  // namespace hywu::backends::ort
