// The part of the CUDA driver that the TensorRT backends use. Its library comes with every driver and is
// opened at run time, so that this library starts where there is no GPU.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/backend.hpp"

namespace hywu::backends::cuda {

// Why CUDA cannot be used here: no driver, no GPU; nothing if it can. The driver is asked once.
std::optional<std::string> missing();

// A GPU, and its primary context, which the application may use as well.
class Device {
public:
    // Throws Error(device): there is no such GPU.
    explicit Device(int index);
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device();

    int index() const noexcept { return index_; }
    const std::string& name() const noexcept { return name_; }
    // Compute capability as in "8.9", and as two numbers.
    std::string capability() const { return std::to_string(major_) + "." + std::to_string(minor_); }
    int major() const noexcept { return major_; }
    int minor() const noexcept { return minor_; }
    CUcontext context() const noexcept { return context_; }

private:
    int index_, major_ = 0, minor_ = 0;
    std::string name_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
};

// Makes a device current in this thread for as long as it lives, and then what was current before.
class Current {
public:
    explicit Current(const Device& device);
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    ~Current();
};

// Device memory, aligned to 256 bytes as TensorRT asks for. Throws Error(device) where there is none left.
class Memory {
public:
    Memory(std::shared_ptr<const Device> device, std::size_t bytes);
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory();

    static constexpr std::size_t alignment = 256;
    CUdeviceptr address() const noexcept { return address_; }
    void* pointer() const noexcept { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address_)); }
    std::size_t bytes() const noexcept { return bytes_; }

private:
    std::shared_ptr<const Device> device_;
    CUdeviceptr address_ = 0;
    std::size_t bytes_;
};

// What a stream captured; launched as one.
class Graph {
public:
    Graph(std::shared_ptr<const Device> device, CUgraphExec executable)
        : device_(std::move(device)), executable_(executable) {}
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph();

    CUgraphExec get() const noexcept { return executable_; }

private:
    std::shared_ptr<const Device> device_;
    CUgraphExec executable_;
};

// The stream on which everything of one backend runs, in order, with pinned memory through which small values
// reach it without waiting. The device must be current where a member is called. For one thread at a time.
class Stream {
public:
    explicit Stream(std::shared_ptr<const Device> device);
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream();

    const std::shared_ptr<const Device>& device() const noexcept { return device_; }
    CUstream get() const noexcept { return stream_; }

    // The source may be changed when it returns.
    void to_device(CUdeviceptr target, const void* source, std::size_t bytes);
    // Waits for the stream.
    void to_host(void* target, CUdeviceptr source, std::size_t bytes);
    void copy(CUdeviceptr target, CUdeviceptr source, std::size_t bytes);
    void zero(CUdeviceptr target, std::size_t bytes);
    void synchronize();
    // Wipes the pinned memory, where it holds something.
    void forget();

    // Memory for what TensorRT needs while a graph runs, at least `bytes` of it: graphs that run one after
    // the other share it. Those that were bound before a larger one came keep the smaller.
    std::shared_ptr<const Memory> scratch(std::size_t bytes);

    // Captures what `enqueue` puts on the stream in place of running it. Gives nothing, and says why in
    // `why`, if the stream cannot be captured; what `enqueue` throws is passed on.
    template <class Enqueue>
    std::unique_ptr<Graph> capture(Enqueue&& enqueue, std::string* why) {
        begin_capture();
        try {
            enqueue();
        } catch (...) {
            end_capture(nullptr);
            throw;
        }
        return end_capture(why);
    }
    void launch(const Graph& graph);

    // Waits until at most one unit of work is under way: called after each, it keeps the host one ahead of
    // the device.
    void pace();

private:
    void begin_capture();
    std::unique_ptr<Graph> end_capture(std::string* why);

    static constexpr std::size_t staging_bytes = std::size_t{4} << 20, largest_staged = std::size_t{1} << 20;

    std::shared_ptr<const Device> device_;
    CUstream stream_ = nullptr;
    CUevent events_[2] = {nullptr, nullptr};
    std::size_t paced_ = 0;
    std::byte* staging_ = nullptr;
    std::size_t staged_ = 0;  // bytes in use since the last wait
    std::size_t dirty_ = 0;   // bytes that hold something
    std::shared_ptr<const Memory> scratch_;
};

// A buffer on the device. It holds zeros at first.
class Tensor final : public DeviceTensor {
public:
    Tensor(std::shared_ptr<Stream> stream, core::Dtype dtype, std::vector<std::int64_t> shape);
    ~Tensor() override;  // waits for what still uses it

    void write(const void* data, std::size_t bytes) override;
    void read(void* data, std::size_t bytes) override;
    void wipe() override;
    std::optional<bool> finite() override { return std::nullopt; }

    const std::shared_ptr<Stream>& stream() const noexcept { return stream_; }
    const Memory& memory() const noexcept { return memory_; }

private:
    std::shared_ptr<Stream> stream_;
    Memory memory_;
};

}  // namespace hywu::backends::cuda
