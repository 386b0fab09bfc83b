// What is the same everywhere.
#include "core/files.hpp"

#include <algorithm>

namespace hywu::core {

std::string display(const std::filesystem::path& path) { return path.u8string(); }

std::filesystem::path path_of(std::string_view utf8) {
    return std::filesystem::u8path(utf8.data(), utf8.data() + utf8.size());
}

std::string read_file(const std::filesystem::path& path, std::size_t limit) {
    const InputFile file(path);
    std::string text(static_cast<std::size_t>(std::min<std::uint64_t>(file.size(), limit)), '\0');
    text.resize(file.read_at(0, text.data(), text.size()));
    return text;
}

}  // namespace hywu::core
