// SentencePiece's character map: a double-array trie of byte strings and what replaces them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/unicode.hpp"

namespace hywu::text {

class Precompiled {
public:
    // From the base64 text of a tokenizer file. Throws FileError.
    explicit Precompiled(std::string_view base64);

    // The text with what the map replaces replaced; nothing if the map replaces nothing.
    // Throws UnsupportedTokenizer if the text grows beyond reason.
    std::optional<Changes> normalize(std::string_view text) const;

private:
    // What replaces the shortest entry that `text` begins with.
    std::optional<std::string_view> replacement(std::string_view text) const;

    std::vector<std::uint32_t> units_;
    std::string replacements_;  // each ends in a NUL
};

}  // namespace hywu::text
