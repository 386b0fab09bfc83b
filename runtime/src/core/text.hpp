// UTF-8 and the way Python writes strings: messages are the same in both runtimes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace hywu::core {

// What `decode_utf8` gives for a byte that begins no valid sequence.
inline constexpr char32_t invalid_code_point = 0xffffffff;

// The code point that begins at `text[at]`; moves `at` behind it, by one byte if it is invalid (surrogates
// and overlong forms are).
char32_t decode_utf8(std::string_view text, std::size_t& at) noexcept;
void append_utf8(std::string& text, char32_t code_point);
bool is_utf8(std::string_view text) noexcept;
// Code points, invalid bytes counting as one each.
std::size_t length(std::string_view text) noexcept;
std::u32string to_utf32(std::string_view text);

// Python's str.isprintable: no control, format, separator, surrogate, private or unassigned code point but
// the space.
bool is_printable(std::string_view text);

// Python's repr() of a string.
std::string repr(std::string_view text);
// Python's repr() of a list: [1, 2], ['a', 'b'].
std::string repr(const std::vector<std::int64_t>& numbers);
std::string repr(const std::vector<std::string>& texts);
// Python's repr() of a float.
std::string repr(double number);

// At most `limit` code points, the last one "…" where something was left out.
std::string shorten(std::string text, std::size_t limit);
// Without the first and the last code point.
std::string_view inside(std::string_view text);
std::string join(const std::vector<std::string>& parts, std::string_view separator);
bool ends_with(std::string_view text, std::string_view tail) noexcept;

}  // namespace hywu::core
