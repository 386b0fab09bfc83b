// Encodes texts from standard input, for the comparison with the `tokenizers` library in tests/cpp.
//
//     hywu_encode_texts TOKENIZER.json [MAX_LENGTH PAD_ID left|right cut|refuse]
//
// A text is its length in bytes as a little-endian 32-bit integer, and the bytes. The answer is a line for
// each: the ids, and, with a length, " | " and the mask; or "error: …". Without a length nothing is cut or
// padded.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.hpp"
#include "core/files.hpp"
#include "text/prompt_encoder.hpp"
#include "text/tokenizer.hpp"

namespace {

std::optional<std::string> read_text() {
    unsigned char size[4];
    if (std::fread(size, 1, 4, stdin) != 4) return {};
    const std::uint32_t bytes =
        size[0] | std::uint32_t{size[1]} << 8 | std::uint32_t{size[2]} << 16 | std::uint32_t{size[3]} << 24;
    std::string text(bytes, '\0');
    if (std::fread(text.data(), 1, bytes, stdin) != bytes) return {};
    return text;
}

template <class Numbers>
void append(std::string& line, const Numbers& numbers) {
    for (const auto number : numbers) line += (line.empty() ? "" : " ") + std::to_string(number);
}

}  // namespace

int main(int argc, char** argv) {
    using namespace hywu;
    if (argc != 2 && argc != 6) {
        std::fputs("usage: hywu_encode_texts TOKENIZER.json [MAX_LENGTH PAD_ID left|right cut|refuse]\n",
                   stderr);
        return 2;
    }
    try {
        const std::filesystem::path path = core::path_of(argv[1]);
        core::Tokenizer entry;
        std::optional<text::Tokenizer> tokenizer;
        std::optional<text::PromptEncoder> encoder;
        const auto begin = std::chrono::steady_clock::now();
        if (argc == 6) {
            entry.max_length = std::stoll(argv[2]);
            entry.pad_id = std::stoll(argv[3]);
            entry.pad_side = std::string_view(argv[4]) == "left" ? core::PadSide::left : core::PadSide::right;
            entry.truncate = std::string_view(argv[5]) == "cut";
            encoder.emplace(path, entry);
        } else {
            tokenizer.emplace(core::read_file(path, text::max_tokenizer_bytes));
        }
        const std::chrono::duration<double> loading = std::chrono::steady_clock::now() - begin;
        std::size_t bytes = 0;
        const auto start = std::chrono::steady_clock::now();
        while (const auto text = read_text()) {
            bytes += text->size();
            std::string line;
            try {
                if (encoder) {
                    const text::Encoded encoded = encoder->encode({*text});
                    append(line, encoded.ids);
                    line += " | ";
                    std::string mask;
                    append(mask, encoded.mask);
                    line += mask;
                } else {
                    text::check_text(*text);
                    append(line, tokenizer->encode(*text).ids);
                }
            } catch (const std::exception& error) {
                line = std::string("error: ") + error.what();
            }
            line += '\n';
            std::fwrite(line.data(), 1, line.size(), stdout);
        }
        const std::chrono::duration<double> encoding = std::chrono::steady_clock::now() - start;
        std::fprintf(stderr, "loaded in %.3f s, %zu bytes encoded in %.3f s\n", loading.count(), bytes,
                     encoding.count());
    } catch (const std::exception& error) {
        std::printf("error: %s\n", error.what());
        return 1;
    }
    return 0;
}
