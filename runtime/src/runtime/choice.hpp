// Which backend runs a bundle, and with which of its engines. As hywu_runtime.choice.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/registry.hpp"
#include "core/bundle.hpp"

namespace hywu::runtime {

// What a caller may say about it.
struct Wish {
    std::string backend = "auto";
    backends::Options device;
    std::optional<std::string> variant;
    std::optional<std::string> engine;  // a key of the manifest; nothing: the newest that serves a request
};

// `engines` are those that may serve requests, the newest first; none where graphs run as they are.
struct Choice {
    std::shared_ptr<backends::Backend> backend;
    std::optional<std::string> variant;
    std::vector<std::string> engines;
};

// `auto` takes TensorRT, then TensorRT-RTX, where the bundle has an engine that runs here, and otherwise ONNX
// Runtime. The choice is logged.
// Throws Error(device): the backend is not there; Error(engine): it has no engine that can be used;
// Error(input): arguments that contradict one another, or name what the bundle does not have.
Choice choose(const core::Bundle& bundle, Wish wish,
              const std::vector<backends::Entry>& among = backends::entries());
// The same with a backend that is there already.
Choice choose(const core::Bundle& bundle, Wish wish, std::shared_ptr<backends::Backend> backend);

}  // namespace hywu::runtime
