// Tokens that are found in the text itself, before the model sees it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.hpp"
#include "text/model.hpp"
#include "text/normalizers.hpp"
#include "text/pre_tokenizers.hpp"
#include "text/trie.hpp"

namespace hywu::text {

class AddedTokens {
public:
    // From a file's "added_tokens". A token that the model has takes its id, others count on from the
    // vocabulary's size: what the file says about ids is not heeded, as in the library. `normalizer` may be
    // null.
    // Throws FileError, UnsupportedTokenizer.
    AddedTokens(const core::Json& list, const Model& model, const Normalizer* normalizer);

    // The normalised text and the added tokens in it. Throws what the normalizer throws.
    Pieces extract(std::string_view text, const Normalizer* normalizer) const;

private:
    struct Token {
        std::string content;
        bool single_word, left_strip, right_strip, normalized;
    };

    void append(const NormalizedString& text, const Trie& trie, Pieces& pieces) const;

    std::map<std::uint32_t, Token> tokens_;
    Trie exact_, normalized_;  // looked for before and after the text is normalised
};

}  // namespace hywu::text
