// The unigram language model (Kudo, 2018), as SentencePiece and T5 use it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "text/byte_tokens.hpp"
#include "text/model.hpp"
#include "text/tokenizer_file.hpp"
#include "text/trie.hpp"

namespace hywu::text {

class Unigram : public Model {
public:
    // Takes the vocabulary out of the file; `model` is the rest of its description. Throws FileError.
    Unigram(TokenizerFile&& file, const core::Json& model);

    void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const override;
    std::optional<std::uint32_t> token_to_id(std::string_view token) const override {
        return trie_.find(token);
    }
    std::size_t vocabulary_size() const noexcept override { return scores_.size(); }

private:
    void unknown(std::string_view text, std::vector<std::uint32_t>& reversed) const;

    std::vector<double> scores_;
    Trie trie_;
    double unknown_score_ = 0;
    std::optional<std::uint32_t> unknown_;
    bool byte_fallback_ = false;
    ByteTokens bytes_{};
};

}  // namespace hywu::text
