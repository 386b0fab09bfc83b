#include "backends/onnxruntime/cuda.hpp"

#include "core/error.hpp"
#include "platform/library.hpp"

namespace hywu::backends::ort {

struct CudaLibrary {
    Cuda cuda;
    std::string missing;

    CudaLibrary() {
#if defined(_WIN32)
        const std::vector<std::string> names = {"cudart64_13.dll", "cudart64_12.dll"};
#else
        const std::vector<std::string> names = {"libcudart.so.13", "libcudart.so.12", "libcudart.so"};
#endif
        const auto library = platform::Library::open(names, &missing);
        if (!library) {
            missing = "the CUDA runtime cannot be opened (" + missing + ")";
            return;
        }
        cuda.count_ = library->function<int(int*)>("cudaGetDeviceCount");
        cuda.set_device_ = library->function<int(int)>("cudaSetDevice");
        cuda.malloc_ = library->function<int(void**, std::size_t)>("cudaMalloc");
        cuda.free_ = library->function<int(void*)>("cudaFree");
        cuda.copy_ = library->function<int(void*, const void*, std::size_t, int)>("cudaMemcpy");
        cuda.set_ = library->function<int(void*, int, std::size_t)>("cudaMemset");
        cuda.synchronize_ = library->function<int()>("cudaDeviceSynchronize");
        cuda.error_text_ = library->function<const char*(int)>("cudaGetErrorString");
        const bool whole = cuda.count_ && cuda.set_device_ && cuda.malloc_ && cuda.free_ && cuda.copy_ &&
                           cuda.set_ && cuda.synchronize_ && cuda.error_text_;
        if (!whole) missing = library->name() + " is not the CUDA runtime";
    }

    static const CudaLibrary& get() {
        static const CudaLibrary* const instance = new CudaLibrary;
        return *instance;
    }
};

std::string Cuda::missing() { return CudaLibrary::get().missing; }

const Cuda& Cuda::instance() {
    const CudaLibrary& library = CudaLibrary::get();
    if (!library.missing.empty()) {
        throw core::Error(core::ErrorKind::device, "CUDA cannot be used: " + library.missing,
                          "Expected the CUDA runtime that onnxruntime-gpu was built for",
                          "Install it, or use ort-cpu");
    }
    return library.cuda;
}

void Cuda::check(int code, const char* what) const {
    if (code == 0) return;
    throw core::Error(core::ErrorKind::device, std::string("CUDA: ") + what + ": " + error_text_(code),
                      "Expected a GPU with its driver and enough memory",
                      "Check the device; if memory ran out, use a smaller size or batch");
}

namespace {
constexpr int host_to_device = 1, device_to_host = 2;  // cudaMemcpyKind
}

int Cuda::devices() const noexcept {
    int count = 0;
    return count_(&count) == 0 ? count : 0;
}

void Cuda::use(int device) const { check(set_device_(device), "the device cannot be used"); }

void* Cuda::allocate(std::size_t bytes) const {
    void* memory = nullptr;
    check(malloc_(&memory, bytes), "a buffer cannot be made");
    return memory;
}

void Cuda::free(void* memory) const noexcept { free_(memory); }

void Cuda::to_device(void* device, const void* host, std::size_t bytes) const {
    check(copy_(device, host, bytes, host_to_device), "a buffer cannot be written");
    // A copy from pageable memory may return while its last part is under way, and ONNX Runtime's stream
    // would not wait.
    check(synchronize_(), "a buffer cannot be written");
}

void Cuda::to_host(void* host, const void* device, std::size_t bytes) const {
    check(copy_(host, device, bytes, device_to_host), "a buffer cannot be read");
}

void Cuda::zero(void* device, std::size_t bytes) const {
    check(set_(device, 0, bytes), "a buffer cannot be cleared");
    check(synchronize_(), "a buffer cannot be cleared");
}

}  // namespace hywu::backends::ort
