#include "text/prompt_encoder.hpp"

#include <algorithm>
#include <system_error>
#include <utility>

#include "core/error.hpp"
#include "core/files.hpp"
#include "core/log.hpp"
#include "core/text.hpp"
#include "text/normalizers.hpp"
#include "text/regex.hpp"
#include "text/tokenizer.hpp"

namespace hywu::text {

namespace {

using core::Error;
using core::ErrorKind;

Error unusable(const std::string& name, const std::string& problem) {
    return Error(ErrorKind::bundle, name + " is not a usable tokenizer: " + problem,
                 "Expected a Hugging Face `tokenizers` file", "Copy or export the bundle again");
}

std::unique_ptr<Tokenizer> load(const std::filesystem::path& path, const std::string& name) {
    std::string json;
    try {
        json = core::read_file(path, max_tokenizer_bytes + 1);
    } catch (const std::system_error& error) {
        throw unusable(name, error.code().message());
    }
    if (json.size() > max_tokenizer_bytes) throw unusable(name, "it is larger than 256 MiB");
    try {
        return std::make_unique<Tokenizer>(json);
    } catch (const FileError& error) {
        throw unusable(name, error.what());
    } catch (const UnsupportedTokenizer& error) {
        throw Error(ErrorKind::unsupported, name + " cannot be used here: " + error.what(),
                    "Expected CLIP's, GPT-2's, Qwen's or T5's kind of tokenizer",
                    "Give token ids instead of texts, or use the Python runtime");
    }
}

}  // namespace

PromptEncoder::PromptEncoder(const std::filesystem::path& path, core::Tokenizer entry)
    : entry_(std::move(entry)), name_(core::display(path.filename())), tokenizer_(load(path, name_)) {}

PromptEncoder::~PromptEncoder() = default;
PromptEncoder::PromptEncoder(PromptEncoder&&) noexcept = default;
PromptEncoder& PromptEncoder::operator=(PromptEncoder&&) noexcept = default;

Encoded PromptEncoder::encode(const std::vector<std::string>& texts) const {
    for (const std::string& text : texts) check_text(text);
    const auto length = static_cast<std::size_t>(entry_.max_length);
    Encoded result;
    result.ids.reserve(texts.size() * length);
    result.mask.reserve(texts.size() * length);
    const std::size_t gap = entry_.text_template.find("{}");
    for (const std::string& text : texts) {
        std::string whole = entry_.text_template;
        whole.replace(gap, 2, entry_.lowercase ? stripped_lowercase(text) : text);
        Tokenizer::Result tokens;
        try {
            tokens = tokenizer_->encode(whole, entry_.truncate ? std::optional(length) : std::nullopt);
        } catch (const UnknownToken& error) {
            throw Error(ErrorKind::bundle,
                        "The prompt " + core::show(text) + " has no tokens: " + error.what(),
                        "Expected a vocabulary for any text", "Use other words, or export the bundle again");
        } catch (const PatternError& error) {
            throw Error(ErrorKind::input,
                        "The prompt " + core::show(text) + " cannot be cut into words: " + error.what(),
                        "Expected a text of ordinary length", "Shorten it");
        } catch (const UnsupportedTokenizer& error) {
            throw Error(ErrorKind::input,
                        "The prompt " + core::show(text) + " cannot be encoded: " + error.what(),
                        "Expected a text of ordinary length", "Shorten it");
        }
        if (tokens.ids.size() > length) {
            throw Error(
                ErrorKind::input,
                "The prompt " + core::show(text) + " has " + std::to_string(tokens.ids.size()) + " tokens",
                "This bundle takes " + std::to_string(length), "Shorten it");
        }
        if (tokens.cut) {
            core::log(core::LogLevel::warning, "the prompt " + core::show(text) + " is longer than " +
                                                   std::to_string(length) + " tokens and was cut");
        }
        const std::size_t padding = length - tokens.ids.size();
        const auto pad = [&] {
            result.ids.insert(result.ids.end(), padding, entry_.pad_id);
            result.mask.insert(result.mask.end(), padding, 0);
        };
        if (entry_.pad_side == core::PadSide::left) pad();
        result.ids.insert(result.ids.end(), tokens.ids.begin(), tokens.ids.end());
        result.mask.insert(result.mask.end(), tokens.ids.size(), 1);
        if (entry_.pad_side == core::PadSide::right) pad();
    }
    return result;
}

void check_text(std::string_view text) {
    // A code point has at most four bytes.
    const std::size_t length = text.size() > 4 * max_characters ? text.size() / 4 : core::length(text);
    if (length > max_characters) {
        throw Error(ErrorKind::input, "The prompt has " + std::to_string(length) + " characters",
                    "Expected at most " + std::to_string(max_characters), "Shorten it");
    }
    if (!core::is_utf8(text)) {
        throw Error(ErrorKind::input, "The prompt " + core::show(text) + " is not valid Unicode",
                    "Expected UTF-8 without surrogates", "Decode it from its real encoding");
    }
}

}  // namespace hywu::text
