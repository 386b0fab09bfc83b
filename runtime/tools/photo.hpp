// Photographs for an editor.
#pragma once

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <string>
#include <utility>

#include "arguments.hpp"
#include "hywu/hywu.hpp"
#include "image_file.hpp"

namespace hywu::tools {

// A photo for a request, whose width and height are set to the size at which it will be edited: a large JPEG
// file is decoded smaller, and what is left of it must not decide.
inline Image load_photo(const std::filesystem::path& path, const Editor& editor, EditOptions& request) {
    if (editor.limits().has_size == 0) return read_image(path);
    return read_image(path, [&](int width, int height) {
        if (request.width == 0 && request.height == 0) {
            std::tie(request.width, request.height) = editor.working_size(width, height);
        }
        return std::make_pair(std::max(request.width, 1), std::max(request.height, 1));
    });
}

// Refuses, before any work is done, what write_image does not write.
inline void check_suffix(const std::filesystem::path& path) {
    std::string suffix = path.extension().u8string();
    std::transform(suffix.begin(), suffix.end(), suffix.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (suffix == ".png" || suffix == ".jpg" || suffix == ".jpeg") return;
    throw bad_argument(path.u8string() + " has no known picture suffix", "Expected .png, .jpg, .jpeg",
                       "Change the suffix");
}

}  // namespace hywu::tools
