#include "backends/tensorrt/tensorrt.hpp"

namespace hywu::backends {

std::vector<Entry> tensorrt_entries() {
    std::vector<Entry> entries;
#if defined(HYWU_HAVE_TENSORRT_ENTERPRISE)
    entries.push_back(tensorrt::entry());
#endif
#if defined(HYWU_HAVE_TENSORRT_RTX)
    entries.push_back(tensorrt_rtx::entry());
#endif
    return entries;
}

}  // namespace hywu::backends
