// The tokens "<0x00>" to "<0xFF>", for code points that a vocabulary does not have.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "text/model.hpp"

namespace hywu::text {

using ByteTokens = std::array<std::optional<std::uint32_t>, 256>;

inline ByteTokens byte_tokens(const Model& model) {
    constexpr std::string_view digits = "0123456789ABCDEF";
    ByteTokens tokens;
    for (std::size_t byte = 0; byte < tokens.size(); ++byte) {
        tokens[byte] = model.token_to_id(std::string("<0x") + digits[byte / 16] + digits[byte % 16] + ">");
    }
    return tokens;
}

inline bool all_have_tokens(std::string_view text, const ByteTokens& tokens) {
    for (const char byte : text) {
        if (!tokens[static_cast<unsigned char>(byte)]) return false;
    }
    return true;
}

}  // namespace hywu::text
