// What runs graphs.
//
// A backend loads graphs and makes device tensors; a session binds tensors to a graph's inputs and outputs
// once, and the binding runs as often as it is asked. Addresses never change while a binding lives, so a
// device may capture it.
//
// Threads: a backend, its tensors and their bindings belong to one editor and are used by one thread at a
// time. A session is shared by all editors of a bundle that ask for the same backend, device and threads:
// `bind` may be called from several threads at once, and bindings of one session may run at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/bundle.hpp"
#include "core/dtype.hpp"
#include "core/engines.hpp"

namespace hywu::backends {

// A buffer of fixed shape, dtype and address on the backend's device, dense and row-major.
class DeviceTensor {
public:
    virtual ~DeviceTensor() = default;
    DeviceTensor(const DeviceTensor&) = delete;
    DeviceTensor& operator=(const DeviceTensor&) = delete;

    core::Dtype dtype() const noexcept { return dtype_; }
    const std::vector<int64_t>& shape() const noexcept { return shape_; }
    size_t bytes() const noexcept { return bytes_; }

    // Copies exactly bytes() from the host; the source may be changed when it returns.
    virtual void write(const void* data, size_t bytes) = 0;
    // Copies exactly bytes() to the host.
    virtual void read(void* data, size_t bytes) = 0;
    // Fills the buffer with zeros.
    virtual void wipe() = 0;
    // Whether all numbers are finite; nothing where looking would take a copy to the host.
    virtual std::optional<bool> finite() = 0;

protected:
    // Throws Error(device) where the size overflows.
    DeviceTensor(core::Dtype dtype, std::vector<int64_t> shape);

private:
    core::Dtype dtype_;
    std::vector<int64_t> shape_;
    size_t bytes_;
};

// A graph with its inputs and outputs bound; the tensors must outlive it. It keeps its session alive.
class Binding {
public:
    virtual ~Binding() = default;
    Binding(const Binding&) = delete;
    Binding& operator=(const Binding&) = delete;

    // Runs the graph. What reads an output afterwards (DeviceTensor::read, another binding) sees the result.
    // Allocates nothing of its own. Throws Error(engine).
    virtual void run() = 0;

protected:
    Binding() = default;
};

using TensorMap = std::map<std::string, DeviceTensor*>;

// A loaded graph.
class Session {
public:
    virtual ~Session() = default;
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // Binds every input and output by the graph's names; the tensors are of one backend, and what a backend
    // has of its own (a stream) is theirs. Throws Error(bundle) if the graph is not what the manifest says.
    virtual std::unique_ptr<Binding> bind(const TensorMap& inputs, const TensorMap& outputs) = 0;

protected:
    Session() = default;
};

// Runs graphs on one device.
class Backend {
public:
    virtual ~Backend() = default;
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;

    virtual std::string_view name() const = 0;

    // Loads a graph. `weights` are its linked initializers; the session keeps what it needs of them, and of
    // the maps that they point into. Throws Error(bundle, engine, device).
    virtual std::shared_ptr<Session> load(const std::filesystem::path& file,
                                          const std::vector<core::Weight>& weights) = 0;

    // A graph of a stage: a backend that can use several devices runs stage k on the k-th from its own on, if
    // there is one.
    virtual std::shared_ptr<Session> load_stage(const std::filesystem::path& file,
                                                const std::vector<core::Weight>& weights,
                                                std::int64_t /*stage*/) {
        return load(file, weights);
    }

    // A new buffer of zeros. Throws Error(device) where there is no memory.
    virtual std::unique_ptr<DeviceTensor> allocate(core::Dtype dtype, const std::vector<int64_t>& shape) = 0;

    // What engines (engines/<key>/*.plan) must have been built for; nothing where ONNX graphs run as they
    // are.
    virtual std::optional<core::Target> target() const { return std::nullopt; }

    // The calls of one step as one unit, with copies (from first to second) after them. This default runs and
    // copies one after the other; TensorRT captures a CUDA graph. The bindings and tensors must outlive it.
    virtual std::unique_ptr<Binding> sequence(std::vector<Binding*> bindings,
                                              std::vector<std::pair<DeviceTensor*, DeviceTensor*>> copies);

    // How carried state gets from `next` to where it is read. false: two buffers are written in turn, and
    // nothing is copied. true: it is copied on the device at the end of each step, so that one captured step
    // serves all.
    virtual bool copies_state() const { return false; }

protected:
    Backend() = default;
};

}  // namespace hywu::backends
