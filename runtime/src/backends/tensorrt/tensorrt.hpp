// TensorRT and TensorRT-RTX. Graphs are plan files that were built beforehand; everything runs on one stream,
// and the calls of a step become one CUDA graph that serves every request.
#pragma once

#include <vector>

#include "backends/registry.hpp"

namespace hywu::backends {

// The backends tensorrt and tensorrt-rtx, as far as they were built.
std::vector<Entry> tensorrt_entries();

// tensorrt.cpp, compiled against the headers of one or the other: their classes have the same names and other
// layouts.
namespace tensorrt {
Entry entry();
}
namespace tensorrt_rtx {
Entry entry();
}

}  // namespace hywu::backends
