// How a normalised text is cut into the pieces that the model sees one by one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/json.hpp"
#include "text/normalized_string.hpp"

namespace hywu::text {

// A piece of a text, or an added token, whose text no longer matters.
struct Piece {
    NormalizedString text;
    std::optional<std::uint32_t> token;
};
using Pieces = std::vector<Piece>;

// The parts of a piece that are not empty.
void append_parts(const NormalizedString& text, const Matches& matches, SplitBehavior behavior,
                  Pieces& pieces);

class PreTokenizer {
public:
    virtual ~PreTokenizer() = default;
    PreTokenizer(const PreTokenizer&) = delete;
    PreTokenizer& operator=(const PreTokenizer&) = delete;

    // Cuts the pieces that are not added tokens. Throws PatternError if a search is hopeless.
    virtual void pre_tokenize(Pieces& pieces) const = 0;

protected:
    PreTokenizer() = default;
};

// The pre-tokenizer of a tokenizer file: ByteLevel, Split, Metaspace, Whitespace, WhitespaceSplit,
// Punctuation, Digits, or a Sequence of these. Throws FileError, UnsupportedTokenizer.
std::unique_ptr<PreTokenizer> make_pre_tokenizer(const core::Json& description);

}  // namespace hywu::text
