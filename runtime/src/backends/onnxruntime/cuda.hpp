// The few calls of the CUDA runtime that device buffers need, from the library that ONNX Runtime's CUDA
// provider uses.
#pragma once

#include <cstddef>
#include <string>

namespace hywu::backends::ort {

// Throws Error(device) where CUDA's library or the device is not there, or memory runs out.
class Cuda {
public:
    // The runtime's library, opened at the first call. Throws Error(device).
    static const Cuda& instance();
    // Why it cannot be used, or nothing.
    static std::string missing();

    // How many devices there are.
    int devices() const noexcept;
    void use(int device) const;
    void* allocate(std::size_t bytes) const;
    void free(void* memory) const noexcept;
    void to_device(void* device, const void* host, std::size_t bytes) const;
    void to_host(void* host, const void* device, std::size_t bytes) const;
    void zero(void* device, std::size_t bytes) const;

private:
    friend struct CudaLibrary;
    int (*count_)(int*) = nullptr;
    int (*set_device_)(int) = nullptr;
    int (*malloc_)(void**, std::size_t) = nullptr;
    int (*free_)(void*) = nullptr;
    int (*copy_)(void*, const void*, std::size_t, int) = nullptr;
    int (*set_)(void*, int, std::size_t) = nullptr;
    int (*synchronize_)() = nullptr;
    const char* (*error_text_)(int) = nullptr;

    void check(int code, const char* what) const;
};

}  // namespace hywu::backends::ort
