// Which backends there are, and which can be used here.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "backends/backend.hpp"

namespace hywu::backends {

// What a backend is made from. Nothing: the backend decides.
struct Options {
    std::optional<int> device;   // index of the GPU; the first by default
    std::optional<int> threads;  // CPU threads of one graph
    bool operator==(const Options& other) const { return device == other.device && threads == other.threads; }
};

// One backend that may or may not be usable. Each backend's folder defines functions that give its entries
// (onnxruntime/onnxruntime.hpp, tensorrt/tensorrt.hpp); registry.cpp puts them in the order of preference.
struct Entry {
    std::string name;
    std::function<std::optional<std::string>()> missing;  // why it cannot be used here; nothing if it can
    std::function<std::unique_ptr<Backend>(const Options&)> create;
    std::function<std::string()> version = {};  // of the backend's library, if it can be used; may be empty
};

// All backends, best first: tensorrt, tensorrt-rtx, ort-cuda, ort-cpu. Those that this library was built
// without say so.
const std::vector<Entry>& entries();

// Whether a backend of this name runs compiled engines: tensorrt, tensorrt-rtx.
bool is_compiled(std::string_view name);

// Throws Error(input) for options out of range.
void check_options(const Options& options);

// Makes the backend called `name`, or for `auto` the best that runs ONNX graphs as they are. Throws
// Error(input) for an unknown name and options out of range, Error(device) where it cannot be used.
std::unique_ptr<Backend> create_backend(std::string_view name, const Options& options,
                                        const std::vector<Entry>& among = entries());

}  // namespace hywu::backends
