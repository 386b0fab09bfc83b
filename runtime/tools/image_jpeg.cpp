#include <cstddef>
#include <cstdio>

#include <jerror.h>
#include <jpeglib.h>

#include <array>
#include <climits>
#include <cstdlib>
#include <new>

#include "image_codecs.hpp"

namespace hywu::tools {

namespace {

[[noreturn]] void fail(j_common_ptr codec) {
    std::array<char, JMSG_LENGTH_MAX> message{};
    codec->err->format_message(codec, message.data());
    static_cast<Guard*>(codec->client_data)->fail(message.data());
}

// Only the end that comes too early counts: cameras leave bytes between markers, and Pillow too takes the
// rest.
void warn(j_common_ptr codec, int level) {
    if (level < 0 && codec->err->msg_code == JWRN_JPEG_EOF) ++codec->err->num_warnings;
}
void ignore(j_common_ptr /*codec*/) {}

void set_errors(jpeg_error_mgr& errors) {
    jpeg_std_error(&errors);
    errors.error_exit = fail;
    errors.emit_message = warn;
    errors.output_message = ignore;
}

struct Decompress {
    jpeg_decompress_struct codec{};
    jpeg_error_mgr errors{};
    Guard guard;
    Decompress() {
        set_errors(errors);
        codec.err = &errors;
        codec.client_data = &guard;
        protect(guard, [&] { jpeg_create_decompress(&codec); });
    }
    Decompress(const Decompress&) = delete;
    Decompress& operator=(const Decompress&) = delete;
    ~Decompress() { jpeg_destroy_decompress(&codec); }
};

struct Compress {
    jpeg_compress_struct codec{};
    jpeg_error_mgr errors{};
    Guard guard;
    unsigned char* memory = nullptr;
    unsigned long size = 0;
    Compress() {
        set_errors(errors);
        codec.err = &errors;
        codec.client_data = &guard;
        protect(guard, [&] { jpeg_create_compress(&codec); });
    }
    Compress(const Compress&) = delete;
    Compress& operator=(const Compress&) = delete;
    ~Compress() {
        jpeg_destroy_compress(&codec);
        std::free(memory);
    }
};

// In the file's order, EXIF first; as Pillow reads it.
int orientation_of(const jpeg_decompress_struct& codec) {
    constexpr std::string_view exif("Exif\0\0", 6), xmp("http://ns.adobe.com/xap/1.0/\0", 29);
    int found = 0;
    for (const jpeg_marker_struct* marker = codec.marker_list; marker; marker = marker->next) {
        const std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
        if (data.substr(0, exif.size()) == exif) {
            if (const int value = exif_orientation(data.substr(exif.size()))) return value;
        } else if (found == 0 && data.substr(0, xmp.size()) == xmp) {
            found = xmp_orientation(data.substr(xmp.size()));
        }
    }
    return found > 0 ? found : 1;
}

// a·b/255, rounded, as Pillow does.
int multiply(int a, int b) {
    const int product = a * b + 128;
    return ((product >> 8) + product) >> 8;
}

// Pillow takes every CMYK file to be inverted, as Adobe writes them.
void to_rgb(const std::uint8_t* cmyk, std::size_t count, std::uint8_t* rgb) {
    for (std::size_t i = 0; i < count; ++i, cmyk += 4) {
        const int light = cmyk[3];
        for (int channel = 0; channel < 3; ++channel) {
            *rgb++ = static_cast<std::uint8_t>(light - multiply(255 - cmyk[channel], light));
        }
    }
}

}  // namespace

Decoded decode_jpeg(std::string_view bytes, const Limits& limits) {
    if (bytes.size() > ULONG_MAX) throw CodecError("it is too large");
    Decompress decompress;
    jpeg_decompress_struct& codec = decompress.codec;
    Guard& guard = decompress.guard;
    protect(guard, [&] {
        jpeg_mem_src(&codec, reinterpret_cast<const unsigned char*>(bytes.data()),
                     static_cast<unsigned long>(bytes.size()));
        jpeg_save_markers(&codec, JPEG_APP0 + 1, 0xffff);
        jpeg_read_header(&codec, TRUE);
    });
    Decoded result;
    result.orientation = orientation_of(codec);
    const bool turned = result.orientation >= 5 && result.orientation <= 8;
    codec.scale_num = 1;
    codec.scale_denom = static_cast<unsigned>(
        limits(static_cast<int>(codec.image_width), static_cast<int>(codec.image_height), turned));
    switch (codec.jpeg_color_space) {
        case JCS_CMYK:
        case JCS_YCCK:
            codec.out_color_space = JCS_CMYK;
            break;
        case JCS_GRAYSCALE:
        case JCS_RGB:
        case JCS_YCbCr:
            codec.out_color_space = JCS_RGB;
            break;
        default:
            throw CodecError("its colours are of a kind that is not read");
    }
    protect(guard, [&] { jpeg_start_decompress(&codec); });
    const std::size_t width = codec.output_width, height = codec.output_height;
    result.image.width = static_cast<int>(width);
    result.image.height = static_cast<int>(height);
    result.image.pixels.resize(3 * width * height);
    std::vector<std::uint8_t> cmyk(codec.output_components == 4 ? 4 * width : 0);
    while (codec.output_scanline < codec.output_height) {
        std::uint8_t* row = result.image.pixels.data() + 3 * width * codec.output_scanline;
        JSAMPROW target = cmyk.empty() ? row : cmyk.data();
        protect(guard, [&] { jpeg_read_scanlines(&codec, &target, 1); });
        if (!cmyk.empty()) to_rgb(cmyk.data(), width, row);
        if (decompress.errors.num_warnings > 0) throw CodecError("it is cut off");
    }
    protect(guard, [&] { jpeg_finish_decompress(&codec); });
    return result;
}

std::string encode_jpeg(const Image& image, int quality) {
    Compress compress;
    jpeg_compress_struct& codec = compress.codec;
    protect(compress.guard, [&] {
        jpeg_mem_dest(&codec, &compress.memory, &compress.size);
        codec.image_width = static_cast<JDIMENSION>(image.width);
        codec.image_height = static_cast<JDIMENSION>(image.height);
        codec.input_components = 3;
        codec.in_color_space = JCS_RGB;
        jpeg_set_defaults(&codec);
        jpeg_set_quality(&codec, quality, TRUE);
        jpeg_start_compress(&codec, TRUE);
        while (codec.next_scanline < codec.image_height) {
            auto* row = const_cast<JSAMPROW>(image.pixels.data() +
                                             3 * static_cast<std::size_t>(image.width) * codec.next_scanline);
            jpeg_write_scanlines(&codec, &row, 1);
        }
        jpeg_finish_compress(&codec);
    });
    return {reinterpret_cast<const char*>(compress.memory), compress.size};
}

}  // namespace hywu::tools
