#include "core/text.hpp"

#include <utf8proc.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "core/error.hpp"

namespace hywu::core {

namespace {

bool is_continuation(std::string_view text, std::size_t at) {
    return at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80;
}

bool is_printable(char32_t c) {
    if (c < 0x7f) return c >= 0x20;
    switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
        case UTF8PROC_CATEGORY_CC:
        case UTF8PROC_CATEGORY_CF:
        case UTF8PROC_CATEGORY_CS:
        case UTF8PROC_CATEGORY_CO:
        case UTF8PROC_CATEGORY_CN:
        case UTF8PROC_CATEGORY_ZL:
        case UTF8PROC_CATEGORY_ZP:
        case UTF8PROC_CATEGORY_ZS:
            return false;
        default:
            return true;
    }
}

void append_escape(std::string& text, char32_t c) {
    const int digits = c < 0x100 ? 2 : c < 0x10000 ? 4 : 8;
    text += '\\';
    text += digits == 2 ? 'x' : digits == 4 ? 'u' : 'U';
    for (int shift = 4 * digits - 4; shift >= 0; shift -= 4) text += "0123456789abcdef"[c >> shift & 15];
}

// Stops early once more than `limit` characters are written.
std::string quote(std::string_view text, bool ascii, std::size_t limit) {
    const bool doubled =
        text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
    const char mark = doubled ? '"' : '\'';
    std::string result(1, mark);
    for (std::size_t at = 0; at < text.size();) {
        if (result.size() > 4 * limit + 16) return result;  // the rest would be cut off
        const std::size_t start = at;
        const char32_t c = decode_utf8(text, at);
        if (c == invalid_code_point) {
            append_escape(result, static_cast<unsigned char>(text[start]));
        } else if (c == static_cast<unsigned char>(mark) || c == '\\') {
            result += '\\';
            result += static_cast<char>(c);
        } else if (c == '\n') {
            result += "\\n";
        } else if (c == '\r') {
            result += "\\r";
        } else if (c == '\t') {
            result += "\\t";
        } else if (c < 0x7f ? c < 0x20 : (ascii || !is_printable(c))) {
            append_escape(result, c);
        } else {
            result.append(text.substr(start, at - start));
        }
    }
    return result + mark;
}

constexpr std::size_t unlimited = static_cast<std::size_t>(1) << 40;

template <class T, class Write>
std::string list(const std::vector<T>& items, Write write) {
    std::string result = "[";
    for (const T& item : items) {
        if (result.size() > 1) result += ", ";
        result += write(item);
    }
    return result + "]";
}

}  // namespace

char32_t decode_utf8(std::string_view text, std::size_t& at) noexcept {
    const std::size_t start = at++;
    const auto first = static_cast<unsigned char>(text[start]);
    if (first < 0x80) return first;
    const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
    if (first < 0xc2 || first > 0xf4) return invalid_code_point;
    char32_t c = first & (0x3fU >> more);
    for (int i = 1; i <= more; ++i) {
        if (!is_continuation(text, start + static_cast<std::size_t>(i))) return invalid_code_point;
        c = c << 6 | (static_cast<unsigned char>(text[start + static_cast<std::size_t>(i)]) & 0x3fU);
    }
    const char32_t smallest = more == 3 ? 0x10000 : more == 2 ? 0x800 : 0x80;
    if (c < smallest || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff)) return invalid_code_point;
    at = start + 1 + static_cast<std::size_t>(more);
    return c;
}

void append_utf8(std::string& text, char32_t c) {
    if (c < 0x80) {
        text += static_cast<char>(c);
    } else if (c < 0x800) {
        text += static_cast<char>(0xc0 | c >> 6);
        text += static_cast<char>(0x80 | (c & 0x3f));
    } else if (c < 0x10000) {
        text += static_cast<char>(0xe0 | c >> 12);
        text += static_cast<char>(0x80 | (c >> 6 & 0x3f));
        text += static_cast<char>(0x80 | (c & 0x3f));
    } else {
        text += static_cast<char>(0xf0 | c >> 18);
        text += static_cast<char>(0x80 | (c >> 12 & 0x3f));
        text += static_cast<char>(0x80 | (c >> 6 & 0x3f));
        text += static_cast<char>(0x80 | (c & 0x3f));
    }
}

bool is_utf8(std::string_view text) noexcept {
    for (std::size_t at = 0; at < text.size();) {
        if (decode_utf8(text, at) == invalid_code_point) return false;
    }
    return true;
}

std::size_t length(std::string_view text) noexcept {
    std::size_t count = 0;
    for (std::size_t at = 0; at < text.size(); ++count) decode_utf8(text, at);
    return count;
}

std::u32string to_utf32(std::string_view text) {
    std::u32string result;
    for (std::size_t at = 0; at < text.size();) result += decode_utf8(text, at);
    return result;
}

bool is_printable(std::string_view text) {
    for (std::size_t at = 0; at < text.size();) {
        const char32_t c = decode_utf8(text, at);
        if (c == invalid_code_point || !is_printable(c)) return false;
    }
    return true;
}

std::string repr(std::string_view text) { return quote(text, false, unlimited); }

std::string repr(const std::vector<std::int64_t>& numbers) {
    return list(numbers, [](std::int64_t number) { return std::to_string(number); });
}

std::string repr(const std::vector<std::string>& texts) {
    return list(texts, [](const std::string& text) { return repr(text); });
}

std::string repr(double number) {
    if (std::isnan(number)) return "nan";
    if (std::isinf(number)) return number < 0 ? "-inf" : "inf";
    // The shortest digits that give the number back, then Python's choice of notation.
    std::array<char, 64> buffer{};
    const auto end =
        std::to_chars(buffer.data(), buffer.data() + buffer.size(), number, std::chars_format::scientific);
    std::string_view text(buffer.data(), static_cast<std::size_t>(end.ptr - buffer.data()));
    std::string result;
    if (text.front() == '-') {
        result = "-";
        text.remove_prefix(1);
    }
    const std::size_t split = text.find('e');
    const bool small = text[split + 1] == '-';
    int exponent = 0;
    std::from_chars(text.data() + split + 2, end.ptr, exponent);
    if (small) exponent = -exponent;
    std::string digits(1, text[0]);
    if (split > 2) digits += text.substr(2, split - 2);
    if (exponent < -4 || exponent >= 16) {
        result += digits.substr(0, 1);
        if (digits.size() > 1) result += "." + digits.substr(1);
        const std::string size = std::to_string(std::abs(exponent));
        return result + (small ? "e-" : "e+") + (size.size() < 2 ? "0" : "") + size;
    }
    if (exponent < 0)
        return result + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
    const std::size_t whole = static_cast<std::size_t>(exponent) + 1;
    if (digits.size() <= whole) return result + digits + std::string(whole - digits.size(), '0') + ".0";
    return result + digits.substr(0, whole) + "." + digits.substr(whole);
}

std::string shorten(std::string text, std::size_t limit) {
    std::size_t at = 0, kept = 0;
    for (std::size_t n = 0; at < text.size(); ++n) {
        if (n == limit) return text.substr(0, kept) + "…";
        if (n == limit - 1) kept = at;
        decode_utf8(text, at);
    }
    return text;
}

std::string_view inside(std::string_view text) {
    if (text.empty()) return text;
    std::size_t first = 0;
    decode_utf8(text, first);
    std::size_t last = text.size() - 1;
    while (last > first && is_continuation(text, last)) --last;
    return last < first ? std::string_view() : text.substr(first, last - first);
}

bool ends_with(std::string_view text, std::string_view tail) noexcept {
    return text.size() >= tail.size() && text.substr(text.size() - tail.size()) == tail;
}

std::string join(const std::vector<std::string>& parts, std::string_view separator) {
    std::string result;
    for (const std::string& part : parts) {
        if (&part != &parts.front()) result += separator;
        result += part;
    }
    return result;
}

std::string show(std::string_view text, std::size_t limit) {
    return shorten(quote(text, true, limit), limit);
}

}  // namespace hywu::core
