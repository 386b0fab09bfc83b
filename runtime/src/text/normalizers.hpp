// What happens to a text before it is cut into pieces.
#pragma once

#include <memory>
#include <string_view>

#include "core/json.hpp"
#include "text/normalized_string.hpp"

namespace hywu::text {

class Normalizer {
public:
    virtual ~Normalizer() = default;
    Normalizer(const Normalizer&) = delete;
    Normalizer& operator=(const Normalizer&) = delete;

    // Throws PatternError if a search is hopeless, UnsupportedTokenizer if the text grows beyond reason.
    virtual void normalize(NormalizedString& text) const = 0;

protected:
    Normalizer() = default;
};

// A text may grow this much from one normalizer to the next (the longest decomposition has 18 code points).
inline constexpr std::size_t max_normalized_bytes = std::size_t{64} << 20;

// The normalizer of a tokenizer file: NFC, NFD, NFKC, NFKD, Lowercase, Replace, Prepend, Strip, StripAccents,
// Precompiled, or a Sequence of these. Throws FileError, UnsupportedTokenizer.
std::unique_ptr<Normalizer> make_normalizer(const core::Json& description);

// A text without white space at its ends and in lower case, as Strip and Lowercase make it.
std::string stripped_lowercase(std::string_view text);

}  // namespace hywu::text
