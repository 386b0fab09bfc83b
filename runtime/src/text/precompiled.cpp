#include "text/precompiled.hpp"

#include <algorithm>
#include <array>

#include "core/text.hpp"
#include "text/normalizers.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

namespace {

std::string from_base64(std::string_view text) {
    std::array<int, 256> values{};
    values.fill(-1);
    constexpr std::string_view letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (std::size_t i = 0; i < letters.size(); ++i) {
        values[static_cast<unsigned char>(letters[i])] = static_cast<int>(i);
    }
    if (text.size() % 4 != 0) throw FileError("its precompiled_charsmap is not base64");
    std::size_t padding = 0;
    while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') ++padding;
    text.remove_suffix(padding);
    std::string bytes;
    bytes.reserve(text.size() / 4 * 3);
    std::uint32_t bits = 0;
    int count = 0;
    for (const char letter : text) {
        const int value = values[static_cast<unsigned char>(letter)];
        if (value < 0) throw FileError("its precompiled_charsmap is not base64");
        bits = bits << 6 | static_cast<std::uint32_t>(value);
        count += 6;
        if (count >= 8) {
            count -= 8;
            bytes += static_cast<char>(bits >> count & 0xff);
        }
    }
    return bytes;
}

std::uint32_t little_endian(std::string_view bytes, std::size_t at) {
    std::uint32_t value = 0;
    for (std::size_t i = 4; i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
    return value;
}

// A unit of the double array (darts-clone).
bool has_leaf(std::uint32_t unit) { return (unit >> 8 & 1) != 0; }
std::uint32_t value(std::uint32_t unit) { return unit & 0x7fffffff; }
std::uint32_t label(std::uint32_t unit) { return unit & (1U << 31 | 0xff); }
std::size_t offset(std::uint32_t unit) { return std::size_t{unit >> 10} << ((unit & 1U << 9) >> 6); }

constexpr std::size_t longest_cluster = 5;  // bytes; longer ones are looked up code point by code point

}  // namespace

Precompiled::Precompiled(std::string_view base64) {
    const std::string bytes = from_base64(base64);
    if (bytes.size() < 4) throw FileError("its precompiled_charsmap is cut off");
    const std::size_t size = little_endian(bytes, 0);
    if (size > bytes.size() - 4 || size < 4) throw FileError("its precompiled_charsmap is cut off");
    units_.reserve(size / 4);
    for (std::size_t i = 0; i < size / 4; ++i) units_.push_back(little_endian(bytes, 4 + 4 * i));
    replacements_ = bytes.substr(4 + size / 4 * 4);
    if (!core::is_utf8(replacements_)) throw FileError("its precompiled_charsmap is not UTF-8");
}

std::optional<std::string_view> Precompiled::replacement(std::string_view text) const {
    std::size_t at = offset(units_[0]);
    for (const char c : text) {
        const std::uint32_t byte = static_cast<unsigned char>(c);
        if (byte == 0) break;
        at ^= byte;
        if (at >= units_.size() || label(units_[at]) != byte) return {};
        const std::uint32_t unit = units_[at];
        at ^= offset(unit);
        if (!has_leaf(unit)) continue;
        const std::size_t begin = at < units_.size() ? value(units_[at]) : replacements_.size();
        if (begin >= replacements_.size()) return std::string_view();
        const std::string_view rest = std::string_view(replacements_).substr(begin);
        const std::string_view found = rest.substr(0, rest.find('\0'));
        // A damaged map may point into the middle of a code point.
        return core::is_utf8(found) ? std::optional(found) : std::nullopt;
    }
    return {};
}

std::optional<Changes> Precompiled::normalize(std::string_view text) const {
    Changes changes;
    changes.reserve(text.size());
    bool modified = false;
    const auto replace = [&](std::string_view part, std::string_view by) {
        modified = true;
        const int difference = static_cast<int>(core::length(by)) - static_cast<int>(core::length(part));
        if (by.size() > max_normalized_bytes - std::min(changes.size(), max_normalized_bytes)) {
            throw UnsupportedTokenizer("its normalizers let a text grow beyond 64 MiB");
        }
        for (std::size_t at = 0; at < by.size();) changes.push_back({core::decode_utf8(by, at), 0});
        if (difference > 0) {
            for (int i = 0; i < difference; ++i)
                changes[changes.size() - 1 - static_cast<std::size_t>(i)].change = 1;
        } else if (difference < 0 && !changes.empty()) {
            changes.back().change += difference;
        }
    };
    std::size_t begin = 0;
    for (const std::size_t end : grapheme_ends(text)) {
        const std::string_view cluster = text.substr(begin, end - begin);
        begin = end;
        if (cluster.size() <= longest_cluster) {
            if (const auto by = replacement(cluster)) {
                // The shortest entry, and so perhaps that of a part, stands for the whole cluster.
                replace(cluster, *by);
                continue;
            }
        }
        for (std::size_t at = 0; at < cluster.size();) {
            const std::size_t from = at;
            const char32_t c = core::decode_utf8(cluster, at);
            const std::string_view part = cluster.substr(from, at - from);
            if (const auto by = replacement(part)) {
                replace(part, *by);
            } else {
                changes.push_back({c, 0});
            }
        }
    }
    if (!modified) return {};
    return changes;
}

}  // namespace hywu::text
