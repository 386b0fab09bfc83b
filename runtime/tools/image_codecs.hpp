// What image_file.cpp uses of libpng and libjpeg.
#pragma once

#include <array>
#include <csetjmp>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "image_file.hpp"

namespace hywu::tools {

// A file is damaged or of a kind that is not read; what() is a clause.
class CodecError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// libpng and libjpeg report an error by a callback that must not return. It jumps back into `protect`, which
// throws: exceptions do not pass through their frames, and no frame of ours that has a destructor to run is
// jumped over, if what `protect` calls does nothing but call the library.
struct Guard {
    std::jmp_buf jump;
    std::array<char, 200> message;

    [[noreturn]] void fail(const char* text) {
        std::snprintf(message.data(), message.size(), "%s", text);
        std::longjmp(jump, 1);
    }
};

template <class Call>
void protect(Guard& guard, Call&& call) {
    if (setjmp(guard.jump) != 0) throw CodecError(guard.message.data());
    call();
}

struct Decoded {
    Image image;
    int orientation = 1;  // EXIF's
};

// Is told the size of a picture as it is stored, and whether its sides are swapped when it is upright; gives
// the divisor, 1, 2, 4 or 8, of the size at which a JPEG file is decoded. Throws if there are too many
// pixels.
using Limits = std::function<int(int width, int height, bool turned)>;

Decoded decode_png(std::string_view bytes, const Limits& limits);
Decoded decode_jpeg(std::string_view bytes, const Limits& limits);
std::string encode_png(const Image& image);
std::string encode_jpeg(const Image& image, int quality);

// The orientation in an EXIF block, which begins with a TIFF header; 0 if it says none.
int exif_orientation(std::string_view tiff);
// The same in an XMP packet.
int xmp_orientation(std::string_view packet);

}  // namespace hywu::tools
