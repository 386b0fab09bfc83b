// Prompts to token ids, with Hugging Face `tokenizers` files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/manifest.hpp"

namespace hywu::text {

class Tokenizer;

inline constexpr std::size_t max_characters = 1'000'000;
inline constexpr std::size_t max_tokenizer_bytes = std::size_t{256} << 20;

// Token ids and attention mask (1 for tokens, 0 for padding), both [texts, max_length], row-major.
struct Encoded {
    std::vector<std::int64_t> ids, mask;
};

// Encodes texts to a fixed length, as the manifest's tokenizer entry says. Its const members may be called
// from several threads at once.
class PromptEncoder {
public:
    // Throws core::Error(bundle): the tokenizer file cannot be used; Error(unsupported): it is of a type that
    // this runtime does not know.
    PromptEncoder(const std::filesystem::path& path, core::Tokenizer entry);
    ~PromptEncoder();
    PromptEncoder(PromptEncoder&&) noexcept;
    PromptEncoder& operator=(PromptEncoder&&) noexcept;

    // Texts are UTF-8. Cutting a text is warned of. Throws core::Error(input): a text is not valid Unicode,
    // is absurdly long, or too long where the bundle does not cut; core::Error(bundle): the vocabulary has no
    // token for it.
    Encoded encode(const std::vector<std::string>& texts) const;

private:
    core::Tokenizer entry_;
    std::string name_;
    std::unique_ptr<Tokenizer> tokenizer_;
};

// Throws core::Error(input) unless `text` is valid UTF-8 of sane length.
void check_text(std::string_view text);

}  // namespace hywu::text
