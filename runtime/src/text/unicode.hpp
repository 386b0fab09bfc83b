// What is known about code points, with the `tokenizers` library's versions of Unicode; see
// unicode_tables.hpp.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace hywu::text {

// A code point of a changed text and how many of the old one it stands for, less one: 1 for an added one, 0
// for one that takes another's place, -n for one behind which n were removed. The numbers of the `tokenizers`
// library.
struct Change {
    char32_t code_point;
    int change;
};
using Changes = std::vector<Change>;

enum class NormalForm { nfc, nfd, nfkc, nfkd };

bool is_space(char32_t code_point) noexcept;        // White_Space
bool is_number(char32_t code_point) noexcept;       // general category N
bool is_mark(char32_t code_point) noexcept;         // what StripAccents removes
bool is_punctuation(char32_t code_point) noexcept;  // what Punctuation splits at
bool is_word(char32_t code_point) noexcept;         // \w of added tokens and of Whitespace

// The code point, or one of Unicode 14 of the same general category and the same length in UTF-8 in place of
// one that is newer, for libraries that do not know it.
char32_t stand_in(char32_t code_point) noexcept;

// The lower-case form, of one or two code points, without regard to neighbours.
void append_lower(Changes& changes, char32_t code_point);

// A text (valid UTF-8) in a normal form of Unicode 9.
Changes normal_form(std::string_view text, NormalForm form);

// The ends, in bytes, of the extended grapheme clusters of a text (valid UTF-8).
std::vector<std::size_t> grapheme_ends(std::string_view text);

}  // namespace hywu::text
