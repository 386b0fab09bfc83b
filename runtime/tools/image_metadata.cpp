#include <cstdint>

#include "image_codecs.hpp"

namespace hywu::tools {

int exif_orientation(std::string_view tiff) {
    const bool little = tiff.substr(0, 2) == "II";
    if (!little && tiff.substr(0, 2) != "MM") return 0;
    const auto number = [&](std::size_t at, std::size_t bytes) -> std::uint32_t {
        std::uint32_t value = 0;
        if (at > tiff.size() || bytes > tiff.size() - at) return 0;
        for (std::size_t i = 0; i < bytes; ++i) {
            value = value << 8 | static_cast<unsigned char>(tiff[at + (little ? bytes - 1 - i : i)]);
        }
        return value;
    };
    if (number(2, 2) != 42) return 0;
    const std::size_t directory = number(4, 4);
    const std::size_t entries = number(directory, 2);
    for (std::size_t i = 0; i < entries; ++i) {
        constexpr std::uint32_t orientation = 0x0112;
        const std::size_t at = directory + 2 + 12 * i;
        if (at + 12 > tiff.size()) return 0;
        if (number(at, 2) != orientation) continue;
        const std::uint32_t type = number(at + 2, 2);  // BYTE, SHORT or LONG
        const std::size_t size = type == 1 ? 1 : type == 3 ? 2 : type == 4 ? 4 : 0;
        const std::uint32_t value = number(at + 8, size);
        return value <= 8 ? static_cast<int>(value) : 0;
    }
    return 0;
}

int xmp_orientation(std::string_view packet) {
    constexpr std::string_view key = "tiff:Orientation";
    const std::size_t at = packet.find(key);
    if (at == std::string_view::npos) return 0;
    std::string_view rest = packet.substr(at + key.size());
    if (rest.substr(0, 2) == "=\"") {
        rest.remove_prefix(2);
    } else if (rest.substr(0, 1) == ">") {
        rest.remove_prefix(1);
    } else {
        return 0;
    }
    return !rest.empty() && rest[0] >= '0' && rest[0] <= '9' ? rest[0] - '0' : 0;
}

}  // namespace hywu::tools
