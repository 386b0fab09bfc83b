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

// The backend's entry; for `auto` the best that can be used. Throws Error(input) for an unknown name,
// Error(device) where it cannot be used.
const Entry& choose(std::string_view name);

// Makes the backend called `name`. Throws as choose(), and Error(input) for options out of range.
std::unique_ptr<Backend> create_backend(std::string_view name, const Options& options);

}  // namespace hywu::backends
