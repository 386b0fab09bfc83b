#include <png.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <optional>

#include "image_codecs.hpp"
#include "images/resize.hpp"

namespace hywu::tools {

namespace {

// End a decoder or encoder of libpng, whatever happens.
struct Reader {
    png_structp png = nullptr;
    png_infop info = nullptr;
    ~Reader() { png_destroy_read_struct(&png, &info, nullptr); }
};
struct Writer {
    png_structp png = nullptr;
    png_infop info = nullptr;
    ~Writer() { png_destroy_write_struct(&png, &info); }
};

[[noreturn]] void fail(png_structp png, png_const_charp message) {
    static_cast<Guard*>(png_get_error_ptr(png))->fail(message);
}
void ignore(png_structp /*png*/, png_const_charp /*message*/) {}

void read(png_structp png, png_bytep data, png_size_t bytes) {
    auto* rest = static_cast<std::string_view*>(png_get_io_ptr(png));
    if (bytes > rest->size()) png_error(png, "it is cut off");
    std::memcpy(data, rest->data(), bytes);
    rest->remove_prefix(bytes);
}

void write(png_structp png, png_bytep data, png_size_t bytes) {
    bool written = true;
    try {
        static_cast<std::string*>(png_get_io_ptr(png))->append(reinterpret_cast<const char*>(data), bytes);
    } catch (const std::bad_alloc&) {
        written = false;
    }
    if (!written) png_error(png, "there is not enough memory");
}
void flush(png_structp /*png*/) {}

// As Pillow reads it: the eXIf chunk, else an XMP packet in an iTXt chunk.
int orientation_of(png_structp png, png_infop info) {
#ifdef PNG_eXIf_SUPPORTED
    png_uint_32 size = 0;
    png_bytep exif = nullptr;
    if (png_get_eXIf_1(png, info, &size, &exif) != 0 && exif) {
        if (const int found = exif_orientation({reinterpret_cast<const char*>(exif), size})) return found;
    }
#endif
    png_textp texts = nullptr;
    int count = 0;
    png_get_text(png, info, &texts, &count);
    for (int i = 0; i < count; ++i) {
        if (texts[i].text && std::strcmp(texts[i].key, "XML:com.adobe.xmp") == 0)
            return xmp_orientation(texts[i].text);
    }
    return 1;
}

}  // namespace

Decoded decode_png(std::string_view bytes, const Limits& limits) {
    Guard guard;
    Reader reader;
    reader.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &guard, fail, ignore);
    if (!reader.png) throw std::bad_alloc();
    png_struct* const png = reader.png;
    reader.info = png_create_info_struct(png);
    png_info* const info = reader.info;
    if (!info) throw std::bad_alloc();
    protect(guard, [&] {
        png_set_read_fn(png, &bytes, read);
        png_set_user_limits(png, 0x7fffffff, 0x7fffffff);
        png_set_chunk_malloc_max(png, 64 << 20);
        png_read_info(png, info);
    });

    png_uint_32 width = 0, height = 0;
    int depth = 0, color = 0;
    png_get_IHDR(png, info, &width, &height, &depth, &color, nullptr, nullptr, nullptr);
    if (std::max(width, height) > static_cast<png_uint_32>(std::numeric_limits<int>::max()))
        throw CodecError("it is too large");
    Decoded result;
    result.orientation = orientation_of(png, info);
    const bool turned = result.orientation >= 5 && result.orientation <= 8;
    limits(static_cast<int>(width), static_cast<int>(height), turned);

    // 8 bits per sample, RGB, with alpha where there is some. Key colours of gray and RGB are applied below:
    // Pillow compares them with the samples after these have been brought to 8 bits, and not at all with
    // 16-bit gray.
    png_color_16p key = nullptr;
    png_bytep alphas = nullptr;
    int alpha_count = 0;
    const bool has_key = png_get_tRNS(png, info, &alphas, &alpha_count, &key) != 0;
    std::optional<png_color_16> transparent;
    const bool palette = color == PNG_COLOR_TYPE_PALETTE;
    if (!palette && has_key && key && !(color == PNG_COLOR_TYPE_GRAY && depth == 16)) transparent = *key;
    protect(guard, [&] {
        if (palette) png_set_palette_to_rgb(png);
        if (palette && has_key) png_set_tRNS_to_alpha(png);
        if (color == PNG_COLOR_TYPE_GRAY && depth < 8) png_set_expand_gray_1_2_4_to_8(png);
        if (depth == 16) png_set_strip_16(png);
        if ((color & PNG_COLOR_MASK_COLOR) == 0) png_set_gray_to_rgb(png);
        png_set_interlace_handling(png);
        png_read_update_info(png, info);
    });

    const std::size_t channels = png_get_channels(png, info);
    const std::size_t row_bytes = png_get_rowbytes(png, info);
    const std::size_t count = std::size_t{width} * height;
    if ((channels != 3 && channels != 4) || row_bytes != channels * width)
        throw CodecError("its samples are of an unknown kind");
    std::vector<std::uint8_t> pixels(row_bytes * height);
    std::vector<png_bytep> rows(height);
    for (std::size_t y = 0; y < height; ++y) rows[y] = pixels.data() + y * row_bytes;
    protect(guard, [&] { png_read_image(png, rows.data()); });

    result.image.width = static_cast<int>(width);
    result.image.height = static_cast<int>(height);
    if (channels == 3 && transparent) {
        const bool gray = color == PNG_COLOR_TYPE_GRAY;
        const png_uint_16 samples[3] = {gray ? transparent->gray : transparent->red,
                                        gray ? transparent->gray : transparent->green,
                                        gray ? transparent->gray : transparent->blue};
        for (std::size_t i = 0; i < count; ++i) {
            std::uint8_t* pixel = pixels.data() + 3 * i;
            // Only the lower 8 bits of the key count, as in Pillow.
            if (pixel[0] == (samples[0] & 0xff) && pixel[1] == (samples[1] & 0xff) &&
                pixel[2] == (samples[2] & 0xff)) {
                std::fill_n(pixel, 3, std::uint8_t{255});
            }
        }
    }
    result.image.pixels =
        channels == 4 ? images::composite_on_white(pixels.data(), count) : std::move(pixels);
    return result;
}

std::string encode_png(const Image& image) {
    std::string bytes;
    Guard guard;
    Writer writer;
    writer.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &guard, fail, ignore);
    if (!writer.png) throw std::bad_alloc();
    writer.info = png_create_info_struct(writer.png);
    if (!writer.info) throw std::bad_alloc();
    png_struct* const png = writer.png;
    png_info* const info = writer.info;
    protect(guard, [&] {
        png_set_write_fn(png, &bytes, write, flush);
        png_set_IHDR(png, info, static_cast<png_uint_32>(image.width), static_cast<png_uint_32>(image.height),
                     8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                     PNG_FILTER_TYPE_DEFAULT);
        png_write_info(png, info);
        const std::size_t row_bytes = 3 * static_cast<std::size_t>(image.width);
        for (int y = 0; y < image.height; ++y) {
            png_write_row(png, image.pixels.data() + static_cast<std::size_t>(y) * row_bytes);
        }
        png_write_end(png, info);
    });
    return bytes;
}

}  // namespace hywu::tools
