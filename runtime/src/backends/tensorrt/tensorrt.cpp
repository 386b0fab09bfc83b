// Compiled once for TensorRT and once for TensorRT-RTX, as far as their headers are there.
#include "backends/tensorrt/tensorrt.hpp"

#include <NvInferRuntime.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "backends/tensorrt/cuda.hpp"
#include "core/error.hpp"
#include "core/files.hpp"
#include "core/log.hpp"
#include "platform/library.hpp"

// The headers of TensorRT-RTX call their version NV_TENSORRT_MAJOR too, which is 1: only this tells the two
// apart.
#if defined(TRT_MAJOR_RTX)
#define HYWU_FLAVOUR tensorrt_rtx
#else
#define HYWU_FLAVOUR tensorrt
#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR < 1003
#error "The headers of TensorRT 10.3 or later are needed"
#endif
#endif

namespace hywu::backends::HYWU_FLAVOUR {
namespace {

using core::Dtype;
using core::Error;
using core::ErrorKind;
using core::show;

#if defined(TRT_MAJOR_RTX)
constexpr const char* backend_name = "tensorrt-rtx";
constexpr const char* product = "TensorRT-RTX";
constexpr const char* library_variable = "HYWU_TENSORRT_RTX_LIBRARY";
#else
constexpr const char* backend_name = "tensorrt";
constexpr const char* product = "TensorRT";
constexpr const char* library_variable = "HYWU_TENSORRT_LIBRARY";
#endif
const std::string header_version =
    std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR);

std::vector<std::string> library_names() {
    const std::string major = std::to_string(NV_TENSORRT_MAJOR), minor = std::to_string(NV_TENSORRT_MINOR);
#if defined(TRT_MAJOR_RTX) && defined(_WIN32)
    return {"tensorrt_rtx_" + major + "_" + minor + ".dll"};
#elif defined(TRT_MAJOR_RTX)
    return {"libtensorrt_rtx.so." + major};
#elif defined(_WIN32)
    return {"nvinfer_" + major + ".dll"};
#else
    return {"libnvinfer.so." + major};
#endif
}

// ---- The library
// -------------------------------------------------------------------------------------------------

// What TensorRT says goes to the log; its last error is kept, because calls that fail give nothing but null
// or false.
class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        try {
            if (severity <= Severity::kERROR && first_error().empty()) first_error() = message;
            const core::LogLevel level =
                severity <= Severity::kWARNING ? core::LogLevel::warning : core::LogLevel::debug;
            if (core::logs(level)) core::log(level, std::string(product) + ": " + message);
        } catch (...) {  // the caller is TensorRT, which no exception may pass
        }
    }

    // What a call that follows fails with is its own.
    static void forget_error() noexcept { first_error().clear(); }
    static std::string take_error() {
        const std::string text = std::exchange(first_error(), {});
        if (text.empty()) return "it gives no reason";
        const std::string quoted = show(text, 300);
        return quoted.substr(1, quoted.size() - 2);
    }

private:
    static std::string& first_error() {
        static thread_local std::string text;
        return text;
    }
};

// The one copy of TensorRT in this process. Never destroyed: engines may outlive everything else.
struct Library {
    std::optional<std::string> missing;
    std::string version, file;
    std::mutex mutex;  // the runtime is for one thread at a time
    Logger logger;
    nvinfer1::IRuntime* runtime = nullptr;

    Library();
    static Library& get() {
        static Library* const instance = new Library;
        return *instance;
    }
};

Library::Library() {
    const std::optional<std::string> named = platform::environment(library_variable);
    std::string why;
    const auto library =
        platform::Library::open(named ? std::vector<std::string>{*named} : library_names(), &why);
    if (!library) {
        missing = std::string("the library of ") + product + " " + std::to_string(NV_TENSORRT_MAJOR) +
                  " cannot be opened (" + why + "); " + library_variable + " may name its file";
        return;
    }
    file = library->name();
    auto* const create =
        library->function<void*(void*, std::int32_t) noexcept>("createInferRuntime_INTERNAL");
    std::vector<int> found;
    for (const char* part : {"Major", "Minor", "Patch", "Build"}) {
        const std::string symbol = std::string("getInferLib") + part + "Version";
        auto* const ask = library->function<std::int32_t() noexcept>(symbol.c_str());
        if (ask == nullptr) break;
        found.push_back(ask());
        version += (version.empty() ? "" : ".") + std::to_string(found.back());
    }
    if (create == nullptr || found.size() != 4) {
        missing = file + " is not the library of " + product + " 10.3 or later";
        return;
    }
#if defined(TRT_MAJOR_RTX)
    // Within TensorRT-RTX 1, the layout of classes changed with 1.5.
    const bool fits = found[0] == NV_TENSORRT_MAJOR && (found[1] < 5) == (NV_TENSORRT_MINOR < 5);
#else
    const bool fits = found[0] == NV_TENSORRT_MAJOR;
#endif
    if (!fits) {
        missing =
            file + " is " + product + " " + version + ", and this library was built for " + header_version;
        return;
    }
    runtime = static_cast<nvinfer1::IRuntime*>(create(&logger, NV_TENSORRT_VERSION));
    if (runtime == nullptr) missing = file + " (" + version + ") cannot be set up: " + Logger::take_error();
}

// ---- Sizes and dtypes
// --------------------------------------------------------------------------------------------

std::optional<Dtype> dtype_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
            return Dtype::float32;
        case nvinfer1::DataType::kHALF:
            return Dtype::float16;
        case nvinfer1::DataType::kBF16:
            return Dtype::bfloat16;
        case nvinfer1::DataType::kINT8:
            return Dtype::int8;
        case nvinfer1::DataType::kUINT8:
            return Dtype::uint8;
        case nvinfer1::DataType::kINT32:
            return Dtype::int32;
        case nvinfer1::DataType::kINT64:
            return Dtype::int64;
        case nvinfer1::DataType::kBOOL:
            return Dtype::boolean;
        default:
            return std::nullopt;
    }
}

nvinfer1::Dims dims_of(const std::vector<std::int64_t>& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(std::min<std::size_t>(shape.size(), nvinfer1::Dims::MAX_DIMS));
    std::copy_n(shape.begin(), dims.nbDims, dims.d);
    return dims;
}

std::vector<std::int64_t> shape_of(const nvinfer1::Dims& dims) {
    return dims.nbDims < 0 ? std::vector<std::int64_t>{-1}
                           : std::vector<std::int64_t>(dims.d, dims.d + dims.nbDims);
}

std::string text_of(const std::vector<std::int64_t>& shape) {
    std::string text;
    for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
}

// ---- TensorRT-RTX's cache of compiled kernels
// --------------------------------------------------------------------

#if defined(TRT_MAJOR_RTX)
// `runtime.cache` in the folder of an engine's plans, shared by those who run them. What goes wrong with it
// costs time, and nothing else: it is logged.
class RuntimeCache {
public:
    // The cache of a folder, read when it is first asked for.
    static std::shared_ptr<RuntimeCache> of(const std::filesystem::path& folder,
                                            const nvinfer1::IRuntimeConfig& config) {
        static std::mutex mutex;
        static auto* const caches = new std::map<std::filesystem::path, std::weak_ptr<RuntimeCache>>;
        const std::lock_guard lock(mutex);
        std::weak_ptr<RuntimeCache>& entry = (*caches)[folder];
        std::shared_ptr<RuntimeCache> cache = entry.lock();
        if (cache == nullptr) {
            std::unique_ptr<nvinfer1::IRuntimeCache> made(config.createRuntimeCache());
            if (made == nullptr) return nullptr;
            cache = std::make_shared<RuntimeCache>(folder / "runtime.cache", std::move(made));
            entry = cache;
        }
        return cache;
    }

    RuntimeCache(std::filesystem::path path, std::unique_ptr<nvinfer1::IRuntimeCache> cache)
        : path_(std::move(path)), cache_(std::move(cache)) {
        std::error_code absent;
        if (!std::filesystem::is_regular_file(path_, absent)) return;
        try {
            const core::MappedFile file(path_);
            const std::string_view bytes(reinterpret_cast<const char*>(file.data()), file.size());
            Logger::forget_error();
            if (bytes.empty() || !cache_->deserialize(bytes.data(), bytes.size())) {
                note("cannot be used (" + Logger::take_error() + "), and is made anew");
            } else {
                saved_ = std::hash<std::string_view>()(bytes);
            }
        } catch (const std::system_error& error) {
            note(std::string("cannot be read (") + error.what() + ")");
        }
    }

    nvinfer1::IRuntimeCache& get() const noexcept { return *cache_; }

    // Writes the file, if there is something new: whole, or not at all.
    void save() noexcept {
        try {
            const std::lock_guard lock(mutex_);
            const std::unique_ptr<nvinfer1::IHostMemory> memory(cache_->serialize());
            if (memory == nullptr || memory->size() == 0) return;
            const std::string_view bytes(static_cast<const char*>(memory->data()), memory->size());
            const std::size_t hash = std::hash<std::string_view>()(bytes);
            if (hash == saved_) return;
            saved_ = hash;
            core::write_atomically(path_, {bytes});
        } catch (const std::exception& error) {
            note(std::string("cannot be written (") + error.what() + ")");
        }
    }

private:
    void note(const std::string& what) const noexcept {
        try {
            core::log(core::LogLevel::info, core::display(path_) + " " + what);
        } catch (...) {  // from the application's own callback
        }
    }

    std::filesystem::path path_;
    std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
    std::mutex mutex_;
    std::size_t saved_ = 0;
};
#endif

// ---- Engines, calls, steps
// ---------------------------------------------------------------------------------------

class Engine;

// An engine with addresses for all it reads and writes.
class Call final : public Binding {
public:
    Call(std::shared_ptr<Engine> engine, std::unique_ptr<nvinfer1::IExecutionContext> context,
         std::shared_ptr<cuda::Stream> stream, std::shared_ptr<const cuda::Memory> scratch)
        : engine_(std::move(engine)),
          context_(std::move(context)),
          stream_(std::move(stream)),
          scratch_(std::move(scratch)) {}
    ~Call() override;

    void run() override {
        const cuda::Current current(*stream_->device());
        enqueue();
        settle();
    }
    // Puts the graph on the stream. The device is current.
    void enqueue();
    // After it ran for the first time: keeps what was compiled for it.
    void settle();

    const std::shared_ptr<cuda::Stream>& stream() const noexcept { return stream_; }

private:
    std::shared_ptr<Engine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::shared_ptr<cuda::Stream> stream_;
    std::shared_ptr<const cuda::Memory> scratch_;
    bool settled_ = false;
};

// A deserialized plan.
class Engine final : public Session, public std::enable_shared_from_this<Engine> {
public:
    Engine(std::shared_ptr<const cuda::Device> device, std::filesystem::path file,
           std::unique_ptr<nvinfer1::ICudaEngine> engine)
        : device_(std::move(device)), file_(std::move(file)), engine_(std::move(engine)) {
#if defined(TRT_MAJOR_RTX)
        config_.reset(engine_->createRuntimeConfig());
        if (config_ == nullptr) throw refused("cannot be configured: " + Logger::take_error());
        config_->setExecutionContextAllocationStrategy(
            nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
        // Kernels for a size are compiled before it first runs: a captured step keeps those that it was
        // captured with.
        config_->setDynamicShapesKernelSpecializationStrategy(
            nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
        cache_ = RuntimeCache::of(file_.parent_path(), *config_);
        if (cache_ != nullptr && !config_->setRuntimeCache(cache_->get())) cache_ = nullptr;
#endif
    }
    ~Engine() override {
        try {
            const cuda::Current current(*device_);
#if defined(TRT_MAJOR_RTX)
            if (cache_ != nullptr) cache_->save();
            config_.reset();
#endif
            engine_.reset();
        } catch (const Error&) {  // the device is lost: nothing can be freed on it
            static_cast<void>(engine_.release());
        }
    }

    std::unique_ptr<Binding> bind(const TensorMap& inputs, const TensorMap& outputs) override;

    std::string name() const { return core::display(file_.filename()); }
    const std::shared_ptr<const cuda::Device>& device() const noexcept { return device_; }
    void save_cache() noexcept {
#if defined(TRT_MAJOR_RTX)
        if (cache_ != nullptr) cache_->save();
#endif
    }

private:
    Error refused(const std::string& what) const {
        return Error(ErrorKind::engine, std::string("The engine ") + show(name()) + " " + what,
                     "Expected a plan that was built from this bundle",
                     "Build the engine anew with `hywu build`");
    }
    Error differs(const std::string& what, const std::string& expected) const {
        return Error(ErrorKind::bundle, std::string("The engine ") + show(name()) + " " + what, expected,
                     "Build the engine anew with `hywu build`");
    }
    std::string range(const char* tensor) const;
    cuda::Tensor& check(const char* tensor, const TensorMap& given, bool input) const;

    std::shared_ptr<const cuda::Device> device_;
    std::filesystem::path file_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
#if defined(TRT_MAJOR_RTX)
    std::shared_ptr<RuntimeCache> cache_;
    std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
#endif
    std::mutex mutex_;  // contexts are made one at a time
};

Call::~Call() {
    try {
        const cuda::Current current(*stream_->device());
        stream_->synchronize();
        context_.reset();
    } catch (const Error&) {
        static_cast<void>(context_.release());
    }
}

void Call::enqueue() {
    Logger::forget_error();
    if (context_->enqueueV3(reinterpret_cast<cudaStream_t>(stream_->get()))) return;
    throw Error(ErrorKind::engine,
                std::string(product) + " cannot run " + show(engine_->name()) + ": " + Logger::take_error(),
                "Expected it to run", "If memory ran out, use a smaller size or batch, or low_memory=True");
}

void Call::settle() {
    if (settled_) return;
    settled_ = true;
    engine_->save_cache();
}

std::string Engine::range(const char* tensor) const {
    const auto shape = [&](nvinfer1::OptProfileSelector which) {
        return text_of(shape_of(engine_->getProfileShape(tensor, 0, which)));
    };
    return shape(nvinfer1::OptProfileSelector::kMIN) + " to " + shape(nvinfer1::OptProfileSelector::kMAX);
}

cuda::Tensor& Engine::check(const char* tensor, const TensorMap& given, bool input) const {
    const std::string what = std::string(input ? "input " : "output ") + show(tensor);
    const auto found = given.find(tensor);
    if (found == given.end()) throw differs("has an " + what, "The manifest's graph has none of this name");
    if (engine_->getTensorLocation(tensor) != nvinfer1::TensorLocation::kDEVICE)
        throw differs("wants " + what + " in host memory", "Expected values that stay on the GPU");
    const std::optional<Dtype> dtype = dtype_of(engine_->getTensorDataType(tensor));
    if (dtype != found->second->dtype()) {
        throw differs(
            "has " + what + " of dtype " + (dtype ? std::string(core::name(*dtype)) : "that is not known"),
            "The manifest says " + std::string(core::name(found->second->dtype())));
    }
    // Tensors of one backend are all of this class.
    return static_cast<cuda::Tensor&>(*found->second);
}

std::unique_ptr<Binding> Engine::bind(const TensorMap& inputs, const TensorMap& outputs) {
    const cuda::Current current(*device_);
    const std::lock_guard lock(mutex_);
    Logger::forget_error();
    // Memory for what lies between inputs and outputs is ours, so that graphs that run in turn can share it.
#if defined(TRT_MAJOR_RTX)
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext(config_.get()));
#else
    std::unique_ptr<nvinfer1::IExecutionContext> context(
        engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#endif
    if (context == nullptr) throw refused("cannot be set up: " + Logger::take_error());

    std::vector<std::pair<const char*, cuda::Tensor*>> read, written;
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
        const char* const tensor = engine_->getIOTensorName(i);
        const bool input = engine_->getTensorIOMode(tensor) == nvinfer1::TensorIOMode::kINPUT;
        (input ? read : written).emplace_back(tensor, &check(tensor, input ? inputs : outputs, input));
    }
    for (const auto& [given, bound] : {std::pair(&inputs, &read), std::pair(&outputs, &written)}) {
        std::set<std::string> names;
        for (const auto& item : *bound) names.insert(item.first);
        for (const auto& item : *given) {
            if (names.count(item.first) == 0)
                throw differs("has no tensor " + show(item.first), "The manifest's graph has one");
        }
    }
    for (const auto& [tensor, buffer] : read) {
        if (!context->setInputShape(tensor, dims_of(buffer->shape()))) {
            throw Error(ErrorKind::input, show(tensor) + " is " + text_of(buffer->shape()),
                        "The engine " + show(name()) + " takes " + range(tensor),
                        "Use a size within it, or build an engine for this size with `hywu build`");
        }
    }
    for (const auto& [tensor, buffer] : written) {
        const std::vector<std::int64_t> shape = shape_of(context->getTensorShape(tensor));
        if (shape != buffer->shape())
            throw differs("makes " + show(tensor) + " " + text_of(shape),
                          "The manifest says " + text_of(buffer->shape()));
    }
    for (const auto* bound : {&read, &written}) {
        for (const auto& [tensor, buffer] : *bound) {
            if (!context->setTensorAddress(tensor, buffer->memory().pointer()))
                throw refused("does not take the address of " + show(tensor) + ": " + Logger::take_error());
        }
    }
    const std::shared_ptr<cuda::Stream> stream = (read.empty() ? written : read).at(0).second->stream();
#if defined(TRT_MAJOR_RTX)
    const std::size_t needed =
        static_cast<std::size_t>(std::max<std::int64_t>(engine_->getDeviceMemorySizeV2(), 0));
#else
    std::size_t needed = context->updateDeviceMemorySizeForShapes();
    if (needed == 0)
        needed = static_cast<std::size_t>(std::max<std::int64_t>(engine_->getDeviceMemorySizeV2(), 0));
#endif
    std::shared_ptr<const cuda::Memory> scratch;
    if (needed > 0) {
        scratch = stream->scratch(needed);
        context->setDeviceMemoryV2(scratch->pointer(), static_cast<std::int64_t>(scratch->bytes()));
    }
    return std::make_unique<Call>(shared_from_this(), std::move(context), stream, std::move(scratch));
}

// The calls of a step, and the copies that carry its results to where the next one reads them. The first run
// is an ordinary one, after which TensorRT has set everything up; the second is captured, and replayed from
// then on, whatever the request: addresses stay, and only what lies there changes.
class Step final : public Binding {
public:
    Step(std::shared_ptr<cuda::Stream> stream, std::vector<Call*> calls,
         std::vector<std::pair<cuda::Tensor*, cuda::Tensor*>> copies)
        : stream_(std::move(stream)), calls_(std::move(calls)), copies_(std::move(copies)) {}

    ~Step() override {
        try {
            const cuda::Current current(*stream_->device());
            stream_->synchronize();  // the graph may be under way
        } catch (const Error&) {
        }
    }

    void run() override {
        const cuda::Current current(*stream_->device());
        if (graph_ == nullptr && warm_ && !refused_) capture();
        if (graph_ != nullptr) {
            stream_->launch(*graph_);
        } else {
            enqueue();
            if (!warm_) {
                for (Call* call : calls_) call->settle();
            }
            warm_ = true;
        }
        stream_->pace();
    }

private:
    void enqueue() {
        for (Call* call : calls_) call->enqueue();
        for (const auto& [from, to] : copies_)
            stream_->copy(to->memory().address(), from->memory().address(), from->bytes());
    }
    void capture() {
        std::string why;
        try {
            graph_ = stream_->capture([this] { enqueue(); }, &why);
        } catch (const Error& error) {
            why = error.wrong();
        }
        if (graph_ != nullptr) return;
        refused_ = true;
        core::log(core::LogLevel::warning,
                  "the step cannot be captured as a CUDA graph, and runs call by call: " + why);
    }

    std::shared_ptr<cuda::Stream> stream_;
    std::vector<Call*> calls_;
    std::vector<std::pair<cuda::Tensor*, cuda::Tensor*>> copies_;
    std::unique_ptr<cuda::Graph> graph_;
    bool warm_ = false, refused_ = false;
};

class TensorRt final : public Backend {
public:
    explicit TensorRt(const Options& options)
        : device_(std::make_shared<cuda::Device>(options.device.value_or(0))),
          stream_(std::make_shared<cuda::Stream>(device_)) {
        core::log(core::LogLevel::info,
                  std::string(product) + " " + Library::get().version + " on " + here());
    }

    std::string_view name() const override { return backend_name; }
    std::optional<core::Target> target() const override {
        return core::Target{backend_name, Library::get().version, device_->capability(), device_->name()};
    }
    bool copies_state() const override { return true; }

    std::shared_ptr<Session> load(const std::filesystem::path& file,
                                  const std::vector<core::Weight>&) override;

    std::unique_ptr<DeviceTensor> allocate(Dtype dtype, const std::vector<std::int64_t>& shape) override {
        return std::make_unique<cuda::Tensor>(stream_, dtype, shape);
    }

    std::unique_ptr<Binding> sequence(std::vector<Binding*> bindings,
                                      std::vector<std::pair<DeviceTensor*, DeviceTensor*>> copies) override {
        // Bindings and tensors of this backend are all of these classes.
        std::vector<Call*> calls;
        for (Binding* binding : bindings) calls.push_back(static_cast<Call*>(binding));
        std::vector<std::pair<cuda::Tensor*, cuda::Tensor*>> moves;
        for (const auto& [from, to] : copies)
            moves.emplace_back(static_cast<cuda::Tensor*>(from), static_cast<cuda::Tensor*>(to));
        return std::make_unique<Step>(stream_, std::move(calls), std::move(moves));
    }

private:
    Error not_loaded(const std::filesystem::path& file, const std::string& reason) const;
    std::string here() const { return device_->name() + ", compute capability " + device_->capability(); }

    std::shared_ptr<const cuda::Device> device_;
    std::shared_ptr<cuda::Stream> stream_;
};

// A plan that cannot be loaded: where it was the GPU's fault, a better plan would not help.
Error TensorRt::not_loaded(const std::filesystem::path& file, const std::string& reason) const {
    const std::string wrong = "The plan " + core::display(file.parent_path().filename() / file.filename()) +
                              " cannot be loaded: " + reason;
    const auto says = [&](const char* words) { return reason.find(words) != std::string::npos; };
    if (says("cudaError 35") || says("CUDA error 35") || says("driver version is insufficient") ||
        says("no CUDA-capable")) {
        return Error(ErrorKind::device, wrong, "Expected an NVIDIA GPU with a driver that suits this version",
                     "Update the driver, or use the backend ort-cpu");
    }
    if (says("out of memory") || says("Out of memory") || says("OutOfMemory")) {
        return Error(ErrorKind::device, wrong, "Expected the graphs to fit the GPU's memory",
                     "Use a smaller size or batch, or low_memory=True");
    }
    return Error(ErrorKind::engine, wrong,
                 "Expected a whole plan of " + std::string(product) + " " + Library::get().version +
                     " for a GPU of " + device_->capability(),
                 "Build the engine again with `hywu build`");
}

std::shared_ptr<Session> TensorRt::load(const std::filesystem::path& file, const std::vector<core::Weight>&) {
    Library& library = Library::get();
    const cuda::Current current(*device_);
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::string reason;
    try {
        if (std::filesystem::file_size(file) == 0) {
            reason = "it is empty";
        } else {
            const core::MappedFile plan(file);
            const std::lock_guard lock(library.mutex);
            Logger::forget_error();
            engine.reset(library.runtime->deserializeCudaEngine(plan.data(), plan.size()));
            if (engine == nullptr) reason = Logger::take_error();
        }
    } catch (const std::system_error& error) {
        throw Error(ErrorKind::bundle,
                    "The engine " + show(core::display(file)) + " cannot be read: " + error.what(),
                    "Expected a plan file", "Copy the bundle anew, or build the engine with `hywu build`");
    }
    if (engine == nullptr) throw not_loaded(file, reason);
    return std::make_shared<Engine>(device_, file, std::move(engine));
}

}  // namespace

Entry entry() {
    const auto missing = []() -> std::optional<std::string> {
        if (auto reason = cuda::missing()) return reason;
        return Library::get().missing;
    };
    return {backend_name, missing,
            [](const Options& options) -> std::unique_ptr<Backend> {
                return std::make_unique<TensorRt>(options);
            },
            [] { return Library::get().version; }};
}

}  // namespace hywu::backends::HYWU_FLAVOUR
