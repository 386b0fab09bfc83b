// Image files, for the executables: JPEG and PNG.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

namespace hywu::tools {

// uint8 [height, width, 3], RGB.
struct Image {
    int width = 0, height = 0;
    std::vector<std::uint8_t> pixels;
};

// The size at which a picture of this (width, height), upright, will be used.
using Target = std::function<std::pair<int, int>(int width, int height)>;

// A picture, upright by its EXIF orientation (or XMP's), transparency on white, the upper 8 of 16 bits, of an
// animation the first frame. With a target, a JPEG file is decoded at a half, a quarter or an eighth of its
// size where that is at least twice the target: a large photo costs little memory. The pixels are Pillow's,
// and those that the Python runtime reads, as far as both use a libjpeg-turbo that decodes alike.
// Throws core::Error(input): the file cannot be read, is damaged, is neither PNG nor JPEG, or has too many
// pixels.
Image read_image(const std::filesystem::path& path, const Target& target = {});
// The same of the bytes of a file; `name` stands for it in messages.
Image read_image(std::string_view bytes, std::string_view name, const Target& target = {});

// Writes a picture, whole or not at all, as PNG or JPEG (quality 95) by the path's suffix.
// Throws core::Error(input): another suffix, or the file cannot be written.
void write_image(const std::filesystem::path& path, const Image& image);

}  // namespace hywu::tools
