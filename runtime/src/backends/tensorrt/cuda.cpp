#include "backends/tensorrt/cuda.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.hpp"
#include "core/log.hpp"
#include "platform/library.hpp"

namespace hywu::backends::cuda {

using core::Error;
using core::ErrorKind;

namespace {

constexpr const char* elsewhere =
    "Use the backend ort-cpu, which works here, or a machine with an NVIDIA GPU";

// The driver's functions. The names with a suffix are the versions that the headers mean by the plain name.
struct Driver {
    std::optional<std::string> missing;

    decltype(&cuInit) init = nullptr;
    decltype(&cuGetErrorName) error_name = nullptr;
    decltype(&cuGetErrorString) error_text = nullptr;
    decltype(&cuDeviceGetCount) device_count = nullptr;
    decltype(&cuDeviceGet) device = nullptr;
    decltype(&cuDeviceGetName) device_name = nullptr;
    decltype(&cuDeviceGetAttribute) device_attribute = nullptr;
    decltype(&cuDevicePrimaryCtxRetain) retain = nullptr;
    decltype(&cuDevicePrimaryCtxRelease) release = nullptr;
    decltype(&cuCtxPushCurrent) push = nullptr;
    decltype(&cuCtxPopCurrent) pop = nullptr;
    decltype(&cuMemAlloc) allocate = nullptr;
    decltype(&cuMemFree) free = nullptr;
    decltype(&cuMemHostAlloc) allocate_host = nullptr;
    decltype(&cuMemFreeHost) free_host = nullptr;
    decltype(&cuMemcpyHtoDAsync) to_device = nullptr;
    decltype(&cuMemcpyDtoHAsync) to_host = nullptr;
    decltype(&cuMemcpyDtoDAsync) copy = nullptr;
    decltype(&cuMemsetD8Async) fill = nullptr;
    decltype(&cuStreamCreate) create_stream = nullptr;
    decltype(&cuStreamDestroy) destroy_stream = nullptr;
    decltype(&cuStreamSynchronize) synchronize = nullptr;
    decltype(&cuStreamBeginCapture) begin_capture = nullptr;
    decltype(&cuStreamEndCapture) end_capture = nullptr;
    decltype(&cuGraphInstantiateWithFlags) instantiate = nullptr;
    decltype(&cuGraphDestroy) destroy_graph = nullptr;
    decltype(&cuGraphExecDestroy) destroy_executable = nullptr;
    decltype(&cuGraphLaunch) launch = nullptr;
    decltype(&cuEventCreate) create_event = nullptr;
    decltype(&cuEventDestroy) destroy_event = nullptr;
    decltype(&cuEventRecord) record = nullptr;
    decltype(&cuEventSynchronize) wait = nullptr;

    Driver();
    std::string describe(CUresult result) const;

private:
    template <class Function>
    void find(const platform::Library& library, Function*& function, const char* symbol) {
        function = library.function<Function>(symbol);
        if (function == nullptr && !missing)
            missing = library.name() + " has no " + symbol + ": the NVIDIA driver is too old";
    }
};

Driver::Driver() {
#if defined(_WIN32)
    const std::vector<std::string> names = {"nvcuda.dll"};
#else
    const std::vector<std::string> names = {"libcuda.so.1"};
#endif
    const std::optional<std::string> named = platform::environment("HYWU_CUDA_LIBRARY");
    std::string why;
    const auto library = platform::Library::open(named ? std::vector<std::string>{*named} : names, &why);
    if (!library) {
        missing = "there is no NVIDIA driver (" + why + ")";
        return;
    }
    find(*library, init, "cuInit");
    find(*library, error_name, "cuGetErrorName");
    find(*library, error_text, "cuGetErrorString");
    find(*library, device_count, "cuDeviceGetCount");
    find(*library, device, "cuDeviceGet");
    find(*library, device_name, "cuDeviceGetName");
    find(*library, device_attribute, "cuDeviceGetAttribute");
    find(*library, retain, "cuDevicePrimaryCtxRetain");
    find(*library, release, "cuDevicePrimaryCtxRelease_v2");
    find(*library, push, "cuCtxPushCurrent_v2");
    find(*library, pop, "cuCtxPopCurrent_v2");
    find(*library, allocate, "cuMemAlloc_v2");
    find(*library, free, "cuMemFree_v2");
    find(*library, allocate_host, "cuMemHostAlloc");
    find(*library, free_host, "cuMemFreeHost");
    find(*library, to_device, "cuMemcpyHtoDAsync_v2");
    find(*library, to_host, "cuMemcpyDtoHAsync_v2");
    find(*library, copy, "cuMemcpyDtoDAsync_v2");
    find(*library, fill, "cuMemsetD8Async");
    find(*library, create_stream, "cuStreamCreate");
    find(*library, destroy_stream, "cuStreamDestroy_v2");
    find(*library, synchronize, "cuStreamSynchronize");
    find(*library, begin_capture, "cuStreamBeginCapture_v2");
    find(*library, end_capture, "cuStreamEndCapture");
    find(*library, instantiate, "cuGraphInstantiateWithFlags");
    find(*library, destroy_graph, "cuGraphDestroy");
    find(*library, destroy_executable, "cuGraphExecDestroy");
    find(*library, launch, "cuGraphLaunch");
    find(*library, create_event, "cuEventCreate");
    find(*library, destroy_event, "cuEventDestroy_v2");
    find(*library, record, "cuEventRecord");
    find(*library, wait, "cuEventSynchronize");
    if (missing) return;
    int count = 0;
    CUresult result = init(0);
    if (result == CUDA_SUCCESS) result = device_count(&count);
    if (result != CUDA_SUCCESS) {
        missing = "the NVIDIA driver finds no usable GPU (" + describe(result) + ")";
    } else if (count == 0) {
        missing = "the NVIDIA driver finds no GPU";
    }
}

std::string Driver::describe(CUresult result) const {
    const char *name = nullptr, *text = nullptr;
    if (error_name != nullptr) error_name(result, &name);
    if (error_text != nullptr) error_text(result, &text);
    return (name != nullptr ? name : "CUDA error " + std::to_string(static_cast<int>(result))) +
           std::string(text != nullptr ? std::string(": ") + text : "");
}

// Never destroyed: memory may be freed while the process ends.
const Driver& loaded() {
    static const Driver* const instance = new Driver;
    return *instance;
}

const Driver& driver() {
    const Driver& instance = loaded();
    if (instance.missing) {
        throw Error(ErrorKind::device, "CUDA cannot be used: " + *instance.missing,
                    "Expected an NVIDIA GPU and its driver", elsewhere);
    }
    return instance;
}

void check(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    throw Error(ErrorKind::engine,
                std::string("CUDA cannot ") + what + " (" + loaded().describe(result) + ")",
                "Expected the device to run what it is given",
                "Load the bundle in a new process; look for other programs that use the GPU, and for its "
                "driver's messages");
}

void check_memory(CUresult result, std::size_t bytes) {
    if (result == CUDA_SUCCESS) return;
    throw Error(ErrorKind::device,
                "The GPU has no memory for a buffer of " + std::to_string(bytes) + " bytes (" +
                    loaded().describe(result) + ")",
                "Expected room for the graphs and their buffers",
                "Use a smaller size or batch, or low_memory=True");
}

}  // namespace

std::optional<std::string> missing() { return loaded().missing; }

Device::Device(int index) : index_(index) {
    const Driver& d = driver();
    int count = 0;
    check(d.device_count(&count), "count the GPUs");
    if (index < 0 || index >= count) {
        throw Error(ErrorKind::device, "There is no GPU " + std::to_string(index),
                    "This machine has " + std::to_string(count) + ", counted from 0", "Choose one of these");
    }
    check(d.device(&device_, index), "open the GPU");
    char text[256] = {};
    check(d.device_name(text, sizeof text - 1, device_), "name the GPU");
    name_ = text;
    check(d.device_attribute(&major_, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_),
          "describe the GPU");
    check(d.device_attribute(&minor_, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_),
          "describe the GPU");
    const CUresult retained = d.retain(&context_, device_);
    if (retained == CUDA_ERROR_OUT_OF_MEMORY) check_memory(retained, 0);
    check(retained, "open the GPU");
}

Device::~Device() { loaded().release(device_); }

Current::Current(const Device& device) {
    check(driver().push(device.context()), "use the GPU in this thread");
}

Current::~Current() {
    CUcontext ignored = nullptr;
    loaded().pop(&ignored);
}

Memory::Memory(std::shared_ptr<const Device> device, std::size_t bytes)
    : device_(std::move(device)), bytes_(bytes) {
    const Current current(*device_);
    check_memory(driver().allocate(&address_, std::max<std::size_t>(bytes, 1)), bytes);
    if (address_ % alignment == 0) return;
    loaded().free(address_);
    throw Error(ErrorKind::device, "The driver gave memory at an address that is no multiple of 256",
                "TensorRT needs that alignment, and CUDA promises it", elsewhere);
}

Memory::~Memory() {
    try {
        const Current current(*device_);
        loaded().free(address_);
    } catch (const Error&) {  // the device is lost, and its memory with it
    }
}

Graph::~Graph() {
    try {
        const Current current(*device_);
        loaded().destroy_executable(executable_);
    } catch (const Error&) {
    }
}

Stream::Stream(std::shared_ptr<const Device> device) : device_(std::move(device)) {
    const Driver& d = driver();
    const Current current(*device_);
    check(d.create_stream(&stream_, CU_STREAM_NON_BLOCKING), "make a stream");
    void* pinned = nullptr;
    CUresult result = d.allocate_host(&pinned, staging_bytes, 0);
    for (CUevent& event : events_) {
        if (result == CUDA_SUCCESS) result = d.create_event(&event, CU_EVENT_DISABLE_TIMING);
    }
    staging_ = static_cast<std::byte*>(pinned);
    if (result == CUDA_SUCCESS) return;
    for (const CUevent event : events_) {
        if (event != nullptr) d.destroy_event(event);
    }
    if (pinned != nullptr) d.free_host(pinned);
    d.destroy_stream(stream_);
    check_memory(result, staging_bytes);
}

Stream::~Stream() {
    const Driver& d = loaded();
    try {
        const Current current(*device_);
        d.synchronize(stream_);
        std::memset(staging_, 0, dirty_);
        for (const CUevent event : events_) d.destroy_event(event);
        d.free_host(staging_);
        d.destroy_stream(stream_);
    } catch (const Error&) {
    }
}

void Stream::to_device(CUdeviceptr target, const void* source, std::size_t bytes) {
    const Driver& d = driver();
    if (bytes > largest_staged) {
        check(d.to_device(target, source, bytes, stream_), "copy to the GPU");
        synchronize();  // memory that is not pinned may be read later, on devices that share it with the host
        return;
    }
    if (staged_ + bytes > staging_bytes) synchronize();
    std::memcpy(staging_ + staged_, source, bytes);
    check(d.to_device(target, staging_ + staged_, bytes, stream_), "copy to the GPU");
    staged_ += (bytes + 63) / 64 * 64;
    dirty_ = std::max(dirty_, std::min(staged_, staging_bytes));
}

void Stream::to_host(void* target, CUdeviceptr source, std::size_t bytes) {
    check(driver().to_host(target, source, bytes, stream_), "copy from the GPU");
    synchronize();
}

void Stream::copy(CUdeviceptr target, CUdeviceptr source, std::size_t bytes) {
    check(driver().copy(target, source, bytes, stream_), "copy on the GPU");
}

void Stream::zero(CUdeviceptr target, std::size_t bytes) {
    check(driver().fill(target, 0, bytes, stream_), "fill memory of the GPU");
}

void Stream::synchronize() {
    check(driver().synchronize(stream_), "finish what was asked of it");
    staged_ = 0;
}

void Stream::forget() {
    if (dirty_ == 0) return;
    synchronize();
    std::memset(staging_, 0, dirty_);
    dirty_ = 0;
}

std::shared_ptr<const Memory> Stream::scratch(std::size_t bytes) {
    if (scratch_ == nullptr || scratch_->bytes() < bytes)
        scratch_ = std::make_shared<const Memory>(device_, bytes);
    return scratch_;
}

void Stream::begin_capture() {
    // What other threads do on the device in the meantime is no part of it, and is not disturbed by it.
    check(driver().begin_capture(stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "capture a step");
}

std::unique_ptr<Graph> Stream::end_capture(std::string* why) {
    const Driver& d = driver();
    CUgraph graph = nullptr;
    CUresult result = d.end_capture(stream_, &graph);
    CUgraphExec executable = nullptr;
    if (result == CUDA_SUCCESS && graph != nullptr && why != nullptr)
        result = d.instantiate(&executable, graph, 0);
    if (graph != nullptr) d.destroy_graph(graph);
    if (why == nullptr) return nullptr;
    if (result == CUDA_SUCCESS && executable != nullptr) return std::make_unique<Graph>(device_, executable);
    *why = d.describe(result);
    return nullptr;
}

void Stream::launch(const Graph& graph) { check(driver().launch(graph.get(), stream_), "run a step"); }

void Stream::pace() {
    const Driver& d = driver();
    check(d.record(events_[paced_ % 2], stream_), "mark a step");
    if (paced_ > 0) check(d.wait(events_[(paced_ - 1) % 2]), "finish a step");
    ++paced_;
}

Tensor::Tensor(std::shared_ptr<Stream> stream, core::Dtype dtype, std::vector<std::int64_t> shape)
    : DeviceTensor(dtype, std::move(shape)), stream_(std::move(stream)), memory_(stream_->device(), bytes()) {
    const Current current(*stream_->device());
    stream_->zero(memory_.address(), bytes());
}

Tensor::~Tensor() {
    try {
        const Current current(*stream_->device());
        stream_->synchronize();
    } catch (const Error&) {  // the device is lost, and nothing runs on it
    }
}

void Tensor::write(const void* data, std::size_t size) {
    const Current current(*stream_->device());
    stream_->to_device(memory_.address(), data, size);
}

void Tensor::read(void* data, std::size_t size) {
    const Current current(*stream_->device());
    stream_->to_host(data, memory_.address(), size);
}

void Tensor::wipe() {
    const Current current(*stream_->device());
    stream_->zero(memory_.address(), bytes());
    stream_->forget();
}

}  // namespace hywu::backends::cuda
