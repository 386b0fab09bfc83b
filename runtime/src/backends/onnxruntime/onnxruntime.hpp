// ONNX Runtime on the CPU and on CUDA, over its C API. No tensor passes through the host between graphs.
#pragma once

#include <vector>

#include "backends/registry.hpp"

namespace hywu::backends {

// The backends ort-cuda and ort-cpu.
std::vector<Entry> onnxruntime_entries();

}  // namespace hywu::backends
