// A CUDA driver with one or more pretended GPUs. Work on a stream is done as late as CUDA may do it: when
// something waits.
#include "fake_cuda.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

struct CUctx_st {};
struct CUstream_st {
    std::deque<std::function<void()>> pending;
    bool capturing = false, spoiled = false;
    std::vector<std::function<void()>> captured;
};
struct CUevent_st {
    CUstream stream = nullptr;
    std::size_t left = 0;  // pending work of the stream up to the event
};
struct CUgraph_st {
    std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
    std::vector<std::function<void()>> work;
};

namespace {

FakeCuda state;
CUctx_st context;
std::recursive_mutex mutex;  // the fake is one device, whose work is done one piece at a time
thread_local int depth = 0;
std::map<std::uintptr_t, std::size_t> device_memory, pinned_memory;

int environment(const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value != nullptr ? std::atoi(value) : otherwise;
}

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)); }

void drain(CUstream stream, std::size_t left) {
    while (stream->pending.size() > left) {
        const auto work = std::move(stream->pending.front());
        stream->pending.pop_front();
        work();
    }
}

}  // namespace

void FakeCuda::reset() { captures = launches = device_copies = host_writes = most_pending = 0; }

bool FakeCuda::pinned_is_zero() const {
    for (const auto& [address, size] : pinned_memory) {
        const auto* memory = reinterpret_cast<const unsigned char*>(address);
        if (std::any_of(memory, memory + size, [](unsigned char byte) { return byte != 0; })) return false;
    }
    return true;
}

FakeCuda* fake_cuda() {
    state.contexts = depth;
    return &state;
}

void fake_cuda_enqueue(CUstream stream, std::function<void()> work) {
    const std::lock_guard lock(mutex);
    if (stream->capturing) {
        stream->captured.push_back(std::move(work));
    } else {
        stream->pending.push_back(std::move(work));
    }
}

void fake_cuda_invalidate(CUstream stream) { stream->spoiled = stream->capturing; }

bool fake_cuda_owns(const void* address, std::size_t bytes) {
    const std::lock_guard lock(mutex);
    const auto start = reinterpret_cast<std::uintptr_t>(address);
    auto found = device_memory.upper_bound(start);
    if (found == device_memory.begin()) return false;
    --found;
    return start + bytes <= found->first + found->second;
}

extern "C" {

CUresult cuInit(unsigned int) {
    return environment("FAKE_CUDA_GPUS", 1) > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
    switch (error) {
        case CUDA_ERROR_OUT_OF_MEMORY:
            *text = "CUDA_ERROR_OUT_OF_MEMORY";
            break;
        case CUDA_ERROR_NO_DEVICE:
            *text = "CUDA_ERROR_NO_DEVICE";
            break;
        case CUDA_ERROR_STREAM_CAPTURE_INVALIDATED:
            *text = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
            break;
        default:
            *text = "CUDA_ERROR_INVALID_VALUE";
    }
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_NO_DEVICE ? "no CUDA-capable device is detected" : "a fake says so";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    *count = environment("FAKE_CUDA_GPUS", 1);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
    *device = index;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice) {
    std::strncpy(name, "Pretended GPU", static_cast<std::size_t>(length));
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 9;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* result, CUdevice) {
    *result = &context;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

CUresult cuCtxPushCurrent(CUcontext) {
    ++depth;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* result) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --depth;
    *result = &context;
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    const std::lock_guard lock(mutex);
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (state.bytes + bytes > state.limit) return CUDA_ERROR_OUT_OF_MEMORY;
    // What was there before is not zero.
    auto* const block = static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 511) / 256 * 256));
    if (block == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(block, 0xa5, (bytes + 511) / 256 * 256);
    *address = reinterpret_cast<std::uintptr_t>(block) + state.misalign;
    device_memory[static_cast<std::uintptr_t>(*address)] = bytes;
    state.bytes += bytes;
    ++state.allocations;
    return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr address) {
    const std::lock_guard lock(mutex);
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    const auto found = device_memory.find(static_cast<std::uintptr_t>(address));
    if (found == device_memory.end()) return CUDA_ERROR_INVALID_VALUE;
    state.bytes -= found->second;
    --state.allocations;
    device_memory.erase(found);
    std::free(pointer(address / 256 * 256));
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned int) {
    const std::lock_guard lock(mutex);
    *address = std::calloc(bytes, 1);
    if (*address == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    pinned_memory[reinterpret_cast<std::uintptr_t>(*address)] = bytes;
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* address) {
    const std::lock_guard lock(mutex);
    pinned_memory.erase(reinterpret_cast<std::uintptr_t>(address));
    std::free(address);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (!fake_cuda_owns(pointer(target), bytes)) return CUDA_ERROR_INVALID_VALUE;
    ++state.host_writes;
    fake_cuda_enqueue(stream, [=] { std::memcpy(pointer(target), source, bytes); });
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (!fake_cuda_owns(pointer(source), bytes)) return CUDA_ERROR_INVALID_VALUE;
    fake_cuda_enqueue(stream, [=] { std::memcpy(target, pointer(source), bytes); });
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (!fake_cuda_owns(pointer(source), bytes) || !fake_cuda_owns(pointer(target), bytes))
        return CUDA_ERROR_INVALID_VALUE;
    ++state.device_copies;
    fake_cuda_enqueue(stream, [=] { std::memcpy(pointer(target), pointer(source), bytes); });
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t bytes, CUstream stream) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (!fake_cuda_owns(pointer(target), bytes)) return CUDA_ERROR_INVALID_VALUE;
    fake_cuda_enqueue(stream, [=] { std::memset(pointer(target), value, bytes); });
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned int) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    *stream = new CUstream_st;
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
    const std::lock_guard lock(mutex);
    drain(stream, 0);
    delete stream;
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
    const std::lock_guard lock(mutex);
    if (stream->capturing) {  // what CUDA does not allow
        stream->spoiled = true;
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    drain(stream, 0);
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
    if (stream->capturing) return CUDA_ERROR_INVALID_VALUE;
    stream->capturing = true;
    stream->spoiled = false;
    stream->captured.clear();
    ++state.captures;
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    if (!stream->capturing) return CUDA_ERROR_INVALID_VALUE;
    stream->capturing = false;
    *graph = nullptr;
    if (stream->spoiled) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = new CUgraph_st{std::move(stream->captured)};
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    *executable = new CUgraphExec_st{graph->work};
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
    delete graph;
    return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
    delete executable;
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    ++state.launches;
    fake_cuda_enqueue(stream, [executable] {
        for (const auto& work : executable->work) work();
    });
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned int) {
    *event = new CUevent_st;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
    delete event;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    const std::lock_guard lock(mutex);
    event->stream = stream;
    stream->pending.emplace_back([event] { event->left = 1; });
    event->left = 0;
    state.most_pending = std::max(state.most_pending, static_cast<int>(stream->pending.size()));
    return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
    const std::lock_guard lock(mutex);
    while (event->left == 0 && !event->stream->pending.empty())
        drain(event->stream, event->stream->pending.size() - 1);
    return CUDA_SUCCESS;
}

}  // extern "C"
