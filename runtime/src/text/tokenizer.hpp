// A Hugging Face tokenizer: text to token ids.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string_view>

#include "text/added_tokens.hpp"
#include "text/model.hpp"
#include "text/normalizers.hpp"
#include "text/post_processors.hpp"
#include "text/pre_tokenizers.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

// Gives the ids that the `tokenizers` library gives, special tokens included. Its const members may be called
// from several threads at once.
class Tokenizer {
public:
    struct Result {
        Ids ids;
        bool cut = false;  // the text was longer
    };

    // From the text of a tokenizer.json. What it says about truncation and padding is not heeded.
    // Throws FileError, UnsupportedTokenizer.
    explicit Tokenizer(std::string_view json);

    // The ids of a text (valid UTF-8), at most `max_length` with the special tokens if that is given and is
    // at least their number. Throws UnknownToken, PatternError, UnsupportedTokenizer.
    Result encode(std::string_view text, std::optional<std::size_t> max_length = {}) const;

private:
    std::unique_ptr<Normalizer> normalizer_;
    std::unique_ptr<PreTokenizer> pre_tokenizer_;
    std::unique_ptr<Model> model_;
    std::unique_ptr<PostProcessor> post_processor_;
    std::optional<AddedTokens> added_tokens_;
};

}  // namespace hywu::text
