// A picture file.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/error.hpp"
#include "image_file.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hywu;
    // Large pictures take time and show nothing more.
    const auto small = [](int width, int height) {
        if (std::int64_t{width} * height > 1 << 20) throw core::Error(core::ErrorKind::input, "It is large");
        return std::pair(16, 16);
    };
    try {
        const tools::Image image =
            tools::read_image({reinterpret_cast<const char*>(data), size}, "fuzzed", small);
        const auto pixels = static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height);
        if (image.pixels.size() != 3 * pixels) __builtin_trap();
    } catch (const core::Error&) {
    }
    return 0;
}
