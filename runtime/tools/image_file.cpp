#include "image_file.hpp"

#include <algorithm>
#include <cctype>
#include <string>
#include <system_error>

#include "core/error.hpp"
#include "core/files.hpp"
#include "image_codecs.hpp"
#include "images/resize.hpp"

namespace hywu::tools {

namespace {

using core::Error;
using core::ErrorKind;

constexpr std::size_t max_file_bytes = std::size_t{1} << 30;
constexpr std::string_view png_signature("\x89PNG\r\n\x1a\n", 8), jpeg_signature("\xff\xd8\xff", 3);

// EXIF's orientation, 1 to 8 (CIPA DC-008): what was done to the upright picture.
Image upright(Image image, int orientation) {
    if (orientation < 2 || orientation > 8) return image;
    const bool turned = orientation >= 5;  // rows have become columns
    const bool right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 6;
    const bool down = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
    Image result{turned ? image.height : image.width, turned ? image.width : image.height, {}};
    result.pixels.resize(image.pixels.size());
    std::uint8_t* out = result.pixels.data();
    for (int y = 0; y < result.height; ++y) {
        for (int x = 0; x < result.width; ++x, out += 3) {
            const int across = right ? result.width - 1 - x : x, along = down ? result.height - 1 - y : y;
            const int row = turned ? across : along, column = turned ? along : across;
            const std::size_t at = static_cast<std::size_t>(row) * static_cast<std::size_t>(image.width) +
                                   static_cast<std::size_t>(column);
            std::copy_n(image.pixels.data() + 3 * at, 3, out);
        }
    }
    return result;
}

bool begins_with(std::string_view text, std::string_view prefix) {
    return text.substr(0, prefix.size()) == prefix;
}

std::string lower_suffix(const std::filesystem::path& path) {
    std::string suffix = core::display(path.extension());
    std::transform(suffix.begin(), suffix.end(), suffix.begin(),
                   [](char c) { return static_cast<char>(std::tolower(static_cast<unsigned char>(c))); });
    return suffix;
}

}  // namespace

Image read_image(const std::filesystem::path& path, const Target& target) {
    const std::string name = core::display(path);
    std::string bytes;
    try {
        bytes = core::read_file(path, max_file_bytes);
    } catch (const std::system_error& error) {
        if (error.code() == std::errc::no_such_file_or_directory) {
            throw Error(ErrorKind::input, "There is no file " + core::show(name, 200),
                        "Expected a photograph", "Check the path");
        }
        throw Error(ErrorKind::input,
                    "The image " + core::show(name, 200) + " cannot be read: " + error.code().message(),
                    "Expected a photograph (JPEG or PNG)", "Check that the file is whole");
    }
    return read_image(bytes, name, target);
}

Image read_image(std::string_view bytes, std::string_view name, const Target& target) {
    const std::string what = "The image " + core::show(name, 200);
    const Limits limits = [&](int width, int height, bool turned) -> int {
        if (std::int64_t{width} * height > images::max_pixels) {
            throw Error(ErrorKind::input,
                        what + " has " + std::to_string(width) + "x" + std::to_string(height) + " pixels",
                        "Expected at most " + std::to_string(images::max_pixels), "Make it smaller");
        }
        if (!target) return 1;
        const auto [target_width, target_height] = turned ? target(height, width) : target(width, height);
        const int least = 2 * std::max(target_width, target_height);
        const int times = least > 0 ? std::min(width / least, height / least) : 1;
        return times >= 8 ? 8 : times >= 4 ? 4 : times >= 2 ? 2 : 1;
    };
    try {
        Decoded decoded;
        if (begins_with(bytes, png_signature)) {
            decoded = decode_png(bytes, limits);
        } else if (begins_with(bytes, jpeg_signature)) {
            decoded = decode_jpeg(bytes, limits);
        } else {
            throw CodecError("it is neither JPEG nor PNG");
        }
        return upright(std::move(decoded.image), decoded.orientation);
    } catch (const CodecError& error) {
        throw Error(ErrorKind::input, what + " cannot be read: " + error.what(),
                    "Expected a photograph (JPEG or PNG)", "Check that the file is whole");
    }
}

void write_image(const std::filesystem::path& path, const Image& image) {
    const std::string suffix = lower_suffix(path), name = core::display(path);
    std::string bytes;
    try {
        if (suffix == ".png") {
            bytes = encode_png(image);
        } else if (suffix == ".jpg" || suffix == ".jpeg") {
            bytes = encode_jpeg(image, 95);
        } else {
            throw Error(ErrorKind::input, name + " has no known picture suffix", "Expected .png, .jpg, .jpeg",
                        "Change the suffix");
        }
        core::write_atomically(path, {bytes});
    } catch (const CodecError& error) {
        throw Error(ErrorKind::input, name + " cannot be written: " + error.what(),
                    "Expected a picture of ordinary size", "Choose another format");
    } catch (const std::system_error& error) {
        throw Error(ErrorKind::input, name + " cannot be written: " + error.code().message(),
                    "Expected a path in a folder that can be written to",
                    "Check the path and the space left");
    }
}

}  // namespace hywu::tools
