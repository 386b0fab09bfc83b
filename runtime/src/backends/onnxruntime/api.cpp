#include "backends/onnxruntime/api.hpp"

#include <algorithm>
#include <string_view>

#include "core/error.hpp"
#include "core/text.hpp"
#include "platform/library.hpp"

namespace hywu::backends::ort {
namespace {

#if defined(_WIN32)
const std::vector<std::string> library_names = {"onnxruntime.dll"};
#elif defined(__APPLE__)
const std::vector<std::string> library_names = {"libonnxruntime.dylib"};
#else
const std::vector<std::string> library_names = {"libonnxruntime.so.1", "libonnxruntime.so"};
#endif

Runtime open_runtime() {
    Runtime result;
    const std::optional<std::string> named = platform::environment("HYWU_ONNXRUNTIME_LIBRARY");
    std::string why;
    const auto library =
        platform::Library::open(named ? std::vector<std::string>{*named} : library_names, &why);
    if (!library) {
        result.missing = "the library of ONNX Runtime cannot be opened (" + why +
                         "); HYWU_ONNXRUNTIME_LIBRARY may name its file";
        return result;
    }
    result.file = library->name();
    auto* const get_base = library->function<const OrtApiBase * ORT_API_CALL()>("OrtGetApiBase");
    const OrtApiBase* const base = get_base != nullptr ? get_base() : nullptr;
    if (base == nullptr) {
        result.missing = library->name() + " is not ONNX Runtime";
        return result;
    }
    result.version = base->GetVersionString();
    const OrtApi* const api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        result.missing = "ONNX Runtime " + result.version + " in " + library->name() + " is older than 1." +
                         std::to_string(ORT_API_VERSION);
        return result;
    }
    // What goes wrong is raised, with more words than the log has.
    OrtStatus* status = api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "hywu", &result.env);
    if (status == nullptr) status = api->DisableTelemetryEvents(result.env);
    char** names = nullptr;
    int count = 0;
    if (status == nullptr) status = api->GetAvailableProviders(&names, &count);
    if (status != nullptr) {
        result.missing = std::string("ONNX Runtime cannot be set up: ") + api->GetErrorMessage(status);
        api->ReleaseStatus(status);
        return result;
    }
    result.providers.assign(names, names + count);
    if (OrtStatus* ignored = api->ReleaseAvailableProviders(names, count)) api->ReleaseStatus(ignored);
    result.api = api;
    return result;
}

}  // namespace

bool Runtime::has(const std::string& provider) const {
    return std::find(providers.begin(), providers.end(), provider) != providers.end();
}

const Runtime& runtime() {
    static const Runtime* const instance = new Runtime(open_runtime());  // for as long as the process lives
    return *instance;
}

std::optional<std::string> failure(OrtStatus* status) {
    if (status == nullptr) return std::nullopt;
    const std::unique_ptr<OrtStatus, Release<OrtStatus, &OrtApi::ReleaseStatus>> held(status);
    std::string message = runtime().api->GetErrorMessage(status);
    message.erase(0, message.find_first_not_of(" \t\r\n"));
    message.resize(std::min(message.find('\n'), message.size()));
    std::string text = core::show(message, 300);  // in quotes, or cut, with an ellipsis at its end
    constexpr std::string_view ellipsis = "\u2026";
    text.resize(text.size() - (core::ends_with(text, ellipsis) ? ellipsis.size() : 1));
    return text.substr(1);
}

void check(OrtStatus* status, const std::string& what) {
    if (const auto message = failure(status)) {
        throw core::Error(core::ErrorKind::engine, "ONNX Runtime: " + what + ": " + *message,
                          "Expected it to run",
                          "Check the bundle with verify=True; if memory ran out, use a smaller size, batch, "
                          "or low_memory=True");
    }
}

ValueHandle wrap(const OrtMemoryInfo& where, const void* data, std::size_t bytes,
                 const std::vector<int64_t>& shape, ONNXTensorElementDataType type) {
    OrtValue* value = nullptr;
    // The API takes a pointer to mutable data; inputs and initializers are read alone.
    check(runtime().api->CreateTensorWithDataAsOrtValue(&where, const_cast<void*>(data), bytes, shape.data(),
                                                        shape.size(), type, &value),
          "a buffer cannot be made");
    return ValueHandle(value);
}

}  // namespace hywu::backends::ort
