#include "backends/onnxruntime/onnxruntime.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <set>
#include <stdexcept>
#include <utility>

#include "backends/onnxruntime/api.hpp"
#include "backends/onnxruntime/cuda.hpp"
#include "core/array.hpp"
#include "core/error.hpp"
#include "core/text.hpp"

namespace hywu::backends {
namespace {

using core::Dtype;
using core::Error;
using core::ErrorKind;
using core::show;
using ort::check;
using ort::runtime;

ONNXTensorElementDataType onnx_type(Dtype dtype) {
    switch (dtype) {
        case Dtype::boolean:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
        case Dtype::uint8:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        case Dtype::int8:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
        case Dtype::int32:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        case Dtype::int64:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        case Dtype::float16:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case Dtype::bfloat16:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
        case Dtype::float32:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case Dtype::float64:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

// Ends the names of graphs whose INT8 products may be computed in integers. In others these would saturate
// on CPUs that have AVX2 but not VNNI, which add two of them in 16 bits.
constexpr std::string_view integer_products = ".ort-cpu.onnx";

// As ONNX Runtime's Python API writes a type.
std::string type_text(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
            return "tensor(float)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
            return "tensor(uint8)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
            return "tensor(int8)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
            return "tensor(int32)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
            return "tensor(int64)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
            return "tensor(bool)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
            return "tensor(float16)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
            return "tensor(bfloat16)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
            return "tensor(double)";
        default:
            return "another type (" + std::to_string(static_cast<int>(type)) + ")";
    }
}

Error no_memory(Dtype dtype, const std::vector<int64_t>& shape) {
    std::string sizes;
    for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    return Error(ErrorKind::device,
                 "There is no memory for a tensor " + std::string(core::name(dtype)) + " [" + sizes + "]",
                 "Expected the buffers to fit", "Use a smaller size or batch");
}

// A buffer that ONNX Runtime can be bound to.
class OrtTensor : public DeviceTensor {
public:
    OrtTensor(Dtype dtype, std::vector<int64_t> shape) : DeviceTensor(dtype, std::move(shape)) {}
    const OrtValue* value() const noexcept { return value_.get(); }

protected:
    void wrap(const OrtMemoryInfo& where, void* data) {
        value_ = ort::wrap(where, data, bytes(), shape(), onnx_type(dtype()));
    }
    void check_size(std::size_t size) const {
        if (size != bytes()) {
            throw std::logic_error(std::to_string(size) + " bytes for a tensor of " +
                                   std::to_string(bytes()));
        }
    }

private:
    ort::ValueHandle value_;
};

class HostTensor final : public OrtTensor {
public:
    HostTensor(Dtype dtype, const std::vector<int64_t>& shape, const OrtMemoryInfo& where)
        : OrtTensor(dtype, shape), memory_(dtype, shape) {
        wrap(where, memory_.data());
    }
    void write(const void* data, std::size_t size) override {
        check_size(size);
        if (size != 0) std::memcpy(memory_.data(), data, size);
    }
    void read(void* data, std::size_t size) override {
        check_size(size);
        if (size != 0) std::memcpy(data, memory_.data(), size);
    }
    void wipe() override {
        if (bytes() != 0) std::memset(memory_.data(), 0, bytes());
    }
    std::optional<bool> finite() override { return core::all_finite(dtype(), memory_.data(), bytes()); }

private:
    core::Array memory_;
};

class CudaTensor final : public OrtTensor {
public:
    CudaTensor(Dtype dtype, const std::vector<int64_t>& shape, const OrtMemoryInfo& where, int device)
        : OrtTensor(dtype, shape), cuda_(ort::Cuda::instance()), device_(device) {
        cuda_.use(device_);
        memory_ = cuda_.allocate(std::max<std::size_t>(bytes(), 1));
        try {
            cuda_.zero(memory_, bytes());
            wrap(where, memory_);
        } catch (...) {
            cuda_.free(memory_);
            throw;
        }
    }
    ~CudaTensor() override { cuda_.free(memory_); }
    void write(const void* data, std::size_t size) override {
        check_size(size);
        cuda_.use(device_);
        cuda_.to_device(memory_, data, size);
    }
    void read(void* data, std::size_t size) override {
        check_size(size);
        cuda_.use(device_);
        cuda_.to_host(data, memory_, size);
    }
    void wipe() override {
        cuda_.use(device_);
        cuda_.zero(memory_, bytes());
    }
    std::optional<bool> finite() override { return std::nullopt; }

private:
    const ort::Cuda& cuda_;
    int device_;
    void* memory_ = nullptr;
};

// A graph's input or output, as the graph says.
struct Port {
    std::string name;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::vector<int64_t> shape;     // -1: dynamic
    std::vector<std::string> axes;  // names of dynamic axes

    bool takes(const DeviceTensor& tensor) const {
        if (type != onnx_type(tensor.dtype()) || shape.size() != tensor.shape().size()) return false;
        for (std::size_t i = 0; i < shape.size(); ++i) {
            if (shape[i] >= 0 && shape[i] != tensor.shape()[i]) return false;
        }
        return true;
    }
};

std::string words(const Port* port) {
    if (port == nullptr) return "nothing";
    std::string sizes;
    for (std::size_t i = 0; i < port->shape.size(); ++i) {
        const std::string size = port->shape[i] >= 0     ? std::to_string(port->shape[i])
                                 : port->axes[i].empty() ? "None"
                                                         : port->axes[i];
        sizes += (i ? ", " : "") + size;
    }
    return type_text(port->type) + " [" + sizes + "]";
}

std::string words(const DeviceTensor* tensor) {
    if (tensor == nullptr) return "nothing";
    std::string sizes;
    for (const int64_t size : tensor->shape()) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    return std::string(core::name(tensor->dtype())) + " [" + sizes + "]";
}

class OrtSessionHolder final : public Session, public std::enable_shared_from_this<OrtSessionHolder> {
public:
    OrtSessionHolder(ort::SessionHandle session, std::string label, std::vector<core::Weight> weights,
                     std::vector<ort::ValueHandle> values)
        : weights_(std::move(weights)),
          values_(std::move(values)),
          session_(std::move(session)),
          label_(std::move(label)) {
        inputs_ = ports(runtime().api->SessionGetInputCount, runtime().api->SessionGetInputName,
                        runtime().api->SessionGetInputTypeInfo);
        outputs_ = ports(runtime().api->SessionGetOutputCount, runtime().api->SessionGetOutputName,
                         runtime().api->SessionGetOutputTypeInfo);
    }

    std::unique_ptr<Binding> bind(const TensorMap& inputs, const TensorMap& outputs) override;
    OrtSession* get() const noexcept { return session_.get(); }
    const std::string& label() const noexcept { return label_; }

private:
    template <class Count, class Name, class Info>
    std::vector<Port> ports(Count count_of, Name name_of, Info info_of) const;
    void check_ports(const char* side, const std::vector<Port>& ports, const TensorMap& tensors) const;

    // ONNX Runtime uses this memory without a copy: it goes after the session.
    const std::vector<core::Weight> weights_;
    const std::vector<ort::ValueHandle> values_;
    const ort::SessionHandle session_;
    const std::string label_;
    std::vector<Port> inputs_, outputs_;
};

class OrtBindingHolder final : public Binding {
public:
    OrtBindingHolder(std::shared_ptr<const OrtSessionHolder> session, const TensorMap& inputs,
                     const TensorMap& outputs)
        : session_(std::move(session)) {
        const OrtApi& api = *runtime().api;
        const std::string what = "graph " + session_->label() + " does not take its tensors";
        OrtIoBinding* binding = nullptr;
        check(api.CreateIoBinding(session_->get(), &binding), what);
        binding_.reset(binding);
        for (const auto& [name, tensor] : inputs) {
            check(api.BindInput(binding, name.c_str(), static_cast<const OrtTensor*>(tensor)->value()), what);
        }
        for (const auto& [name, tensor] : outputs) {
            check(api.BindOutput(binding, name.c_str(), static_cast<const OrtTensor*>(tensor)->value()),
                  what);
        }
    }
    void run() override {
        const OrtApi& api = *runtime().api;
        OrtStatus* status = api.RunWithBinding(session_->get(), nullptr, binding_.get());
        if (status == nullptr) status = api.SynchronizeBoundOutputs(binding_.get());
        if (status != nullptr) check(status, "graph " + session_->label() + " failed");
    }

private:
    std::shared_ptr<const OrtSessionHolder> session_;
    ort::BindingHandle binding_;
};

template <class Count, class Name, class Info>
std::vector<Port> OrtSessionHolder::ports(Count count_of, Name name_of, Info info_of) const {
    const OrtApi& api = *runtime().api;
    const std::string what = "graph " + label_ + " cannot be described";
    OrtAllocator* allocator = nullptr;
    check(api.GetAllocatorWithDefaultOptions(&allocator), what);
    std::size_t count = 0;
    check(count_of(session_.get(), &count), what);
    std::vector<Port> result(count);
    for (std::size_t i = 0; i < count; ++i) {
        Port& port = result[i];
        char* name = nullptr;
        check(name_of(session_.get(), i, allocator, &name), what);
        const std::unique_ptr<char, std::function<void(char*)>> held(
            name, [&](char* text) { ort::failure(api.AllocatorFree(allocator, text)); });
        port.name = name;
        OrtTypeInfo* raw = nullptr;
        check(info_of(session_.get(), i, &raw), what);
        const ort::TypeInfo info(raw);
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        check(api.CastTypeInfoToTensorInfo(raw, &tensor), what);
        if (tensor == nullptr) continue;  // no tensor: fits none
        std::size_t rank = 0;
        check(api.GetTensorElementType(tensor, &port.type), what);
        check(api.GetDimensionsCount(tensor, &rank), what);
        std::vector<const char*> axes(rank);
        port.shape.resize(rank);
        check(api.GetDimensions(tensor, port.shape.data(), rank), what);
        check(api.GetSymbolicDimensions(tensor, axes.data(), rank), what);
        port.axes.assign(axes.begin(), axes.end());
    }
    return result;
}

std::unique_ptr<Binding> OrtSessionHolder::bind(const TensorMap& inputs, const TensorMap& outputs) {
    check_ports("input", inputs_, inputs);
    check_ports("output", outputs_, outputs);
    return std::make_unique<OrtBindingHolder>(shared_from_this(), inputs, outputs);
}

void OrtSessionHolder::check_ports(const char* side, const std::vector<Port>& ports,
                                   const TensorMap& tensors) const {
    std::set<std::string> names;
    for (const Port& port : ports) names.insert(port.name);
    for (const auto& [name, tensor] : tensors) names.insert(name);
    for (const std::string& name : names) {
        const auto port =
            std::find_if(ports.begin(), ports.end(), [&](const Port& p) { return p.name == name; });
        const auto tensor = tensors.find(name);
        const Port* const found = port == ports.end() ? nullptr : &*port;
        const DeviceTensor* const given = tensor == tensors.end() ? nullptr : tensor->second;
        if (found == nullptr || given == nullptr || !found->takes(*given)) {
            throw Error(ErrorKind::bundle,
                        label_ + " has for " + side + " " + show(name) + ": " + words(found),
                        "The manifest says " + words(given), "Export the bundle again");
        }
    }
}

ort::MemoryInfo memory_info(const std::optional<int>& cuda) {
    OrtMemoryInfo* info = nullptr;
    if (cuda) {
        check(runtime().api->CreateMemoryInfo("Cuda", OrtDeviceAllocator, *cuda, OrtMemTypeDefault, &info),
              "CUDA memory cannot be described");
    } else {
        check(runtime().api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &info),
              "memory cannot be described");
    }
    return ort::MemoryInfo(info);
}

class OnnxRuntime final : public Backend {
public:
    OnnxRuntime(std::string name, const Options& options)
        : name_(std::move(name)),
          threads_(options.threads),
          cuda_(name_ == "ort-cuda" ? std::optional<int>(options.device.value_or(0)) : std::nullopt),
          host_(memory_info({})),
          device_(memory_info(cuda_)) {}

    std::string_view name() const override { return name_; }

    std::unique_ptr<DeviceTensor> allocate(Dtype dtype, const std::vector<int64_t>& shape) override {
        try {
            const std::size_t count = core::count(shape);
            if (count > (std::size_t{1} << 46) / core::item_size(dtype)) throw no_memory(dtype, shape);
            if (cuda_) return std::make_unique<CudaTensor>(dtype, shape, *device_, *cuda_);
            return std::make_unique<HostTensor>(dtype, shape, *device_);
        } catch (const std::bad_alloc&) {
            throw no_memory(dtype, shape);
        } catch (const std::length_error&) {
            throw no_memory(dtype, shape);
        }
    }

    std::shared_ptr<Session> load(const std::filesystem::path& file,
                                  const std::vector<core::Weight>& weights) override {
        return load_stage(file, weights, 0);
    }

    // Buffers are all on the backend's own device: ONNX Runtime copies what a session on another one reads
    // and makes.
    std::shared_ptr<Session> load_stage(const std::filesystem::path& file,
                                        const std::vector<core::Weight>& weights,
                                        std::int64_t stage) override {
        const OrtApi& api = *runtime().api;
        const std::string label = file.filename().u8string();
        OrtSessionOptions* raw = nullptr;
        check(api.CreateSessionOptions(&raw), "options cannot be made");
        const ort::SessionOptions options(raw);
        // These and no others: the Python runtime sets the same, and so the results are the same bytes.
        check(api.SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_FATAL), "options cannot be made");
        // Each session has threads of its own. Waiting for work in a loop, as they do after a run by default,
        // those of one graph would take the cores from the next.
        check(api.AddSessionConfigEntry(raw, "session.force_spinning_stop", "1"), "options cannot be made");
        if (!core::ends_with(label, integer_products)) {
            check(api.AddSessionConfigEntry(raw, "session.disable_quant_qdq", "1"), "options cannot be made");
        }
        if (threads_) {
            check(api.SetIntraOpNumThreads(raw, *threads_), "the threads cannot be set");
            check(api.SetInterOpNumThreads(raw, 1), "the threads cannot be set");
        }
        if (cuda_) add_cuda(raw, stage_device(stage));
        std::vector<ort::ValueHandle> values;
        std::vector<const char*> names;
        std::vector<const OrtValue*> pointers;
        for (const core::Weight& weight : weights) {
            values.push_back(
                ort::wrap(*host_, weight.data, weight.bytes, weight.shape, onnx_type(weight.dtype)));
            names.push_back(weight.name.c_str());
            pointers.push_back(values.back().get());
        }
        if (!values.empty()) {
            check(api.AddExternalInitializers(raw, names.data(), pointers.data(), values.size()),
                  "the weights of graph " + label + " cannot be given");
        }
        OrtSession* session = nullptr;
        if (const auto message =
                ort::failure(api.CreateSession(runtime().env, file.c_str(), raw, &session))) {
            throw Error(
                ErrorKind::bundle, label + " cannot be loaded: " + *message,
                "Expected an ONNX graph that ONNX Runtime takes",
                "Check the bundle with verify=True (`hywu inspect --verify`), and copy or export it again");
        }
        return std::make_shared<OrtSessionHolder>(ort::SessionHandle(session), label, weights,
                                                  std::move(values));
    }

private:
    int stage_device(std::int64_t stage) const {
        const std::int64_t other = *cuda_ + stage;
        return stage != 0 && other < ort::Cuda::instance().devices() ? static_cast<int>(other) : *cuda_;
    }

    void add_cuda(OrtSessionOptions* options, int device) const {
        const OrtApi& api = *runtime().api;
        const auto refused = [&](OrtStatus* status) {
            if (const auto message = ort::failure(status)) {
                throw Error(
                    ErrorKind::device,
                    "CUDA device " + std::to_string(device) + " cannot be used by ONNX Runtime: " + *message,
                    "Expected a GPU with its driver, CUDA and cuDNN",
                    "Check `hywu doctor`, or use backend=\"ort-cpu\"");
            }
        };
        OrtCUDAProviderOptionsV2* raw = nullptr;
        refused(api.CreateCUDAProviderOptions(&raw));
        const ort::CudaOptions cuda(raw);
        const char* const key = "device_id";
        const std::string number = std::to_string(device);
        const char* const value = number.c_str();
        refused(api.UpdateCUDAProviderOptions(raw, &key, &value, 1));
        refused(api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, raw));
    }

    const std::string name_;
    const std::optional<int> threads_, cuda_;
    const ort::MemoryInfo host_, device_;
};

std::optional<std::string> missing(const std::string& name) {
    const ort::Runtime& found = runtime();
    if (found.api == nullptr) return found.missing;
    if (name != "ort-cuda") return std::nullopt;
    if (!found.has("CUDAExecutionProvider")) {
        std::string have;
        for (const std::string& provider : found.providers) have += (have.empty() ? "" : ", ") + provider;
        return "ONNX Runtime " + found.version + " has " + have + ", not CUDA (onnxruntime-gpu has it)";
    }
    const std::string cuda = ort::Cuda::missing();
    return cuda.empty() ? std::nullopt : std::optional<std::string>(cuda);
}

}  // namespace

std::vector<Entry> onnxruntime_entries() {
    std::vector<Entry> entries;
    for (const char* name : {"ort-cuda", "ort-cpu"}) {
        entries.push_back(
            {name, [name] { return missing(name); },
             [name](const Options& options) { return std::make_unique<OnnxRuntime>(name, options); },
             [] { return runtime().version; }});
    }
    return entries;
}

}  // namespace hywu::backends
