// Byte-pair encoding.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/byte_tokens.hpp"
#include "text/hash.hpp"
#include "text/model.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

class Bpe : public Model {
public:
    // Takes the vocabulary and the merges out of the file; `model` is the rest of its description. Throws
    // FileError, UnsupportedTokenizer.
    Bpe(TokenizerFile&& file, const core::Json& model);

    void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const override;
    std::optional<std::uint32_t> token_to_id(std::string_view token) const override;
    std::size_t vocabulary_size() const noexcept override { return vocabulary_.size(); }

private:
    struct Merge {
        std::uint32_t rank, id;
    };
    // A token of the piece that is being merged; a removed one has no length.
    struct Symbol {
        std::uint32_t id;
        std::int32_t previous, next;
        std::uint32_t length;
    };

    const Merge* merge_of(std::uint32_t left, std::uint32_t right) const;
    std::vector<Symbol> symbols(std::string_view piece) const;
    void merge(std::vector<Symbol>& symbols) const;

    Strings tokens_;
    std::unordered_map<std::string_view, std::uint32_t, KeyedHash> vocabulary_;
    std::unordered_map<std::uint64_t, Merge, KeyedHash> merges_;  // by left << 32 | right
    std::optional<std::string> unknown_;
    std::string prefix_, suffix_;
    bool fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
    ByteTokens bytes_{};
};

}  // namespace hywu::text
