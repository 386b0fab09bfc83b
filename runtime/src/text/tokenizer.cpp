#include "text/tokenizer.hpp"

#include <utility>

#include "core/error.hpp"
#include "text/bpe.hpp"
#include "text/regex.hpp"
#include "text/unigram.hpp"

namespace hywu::text {

namespace {

std::unique_ptr<Model> make_model(TokenizerFile&& file, const core::Json& model) {
    if (!model.members()) throw FileError("model is not an object");
    // Files of before 0.9 do not name the type.
    const std::string type = model.member("type") ? type_of(model, "model")
                             : file.has_merges    ? "BPE"
                                                  : "Unigram";
    if (type == "BPE") return std::make_unique<Bpe>(std::move(file), model);
    if (type == "Unigram") return std::make_unique<Unigram>(std::move(file), model);
    throw UnsupportedTokenizer("its model is of the type " + core::show(type));
}

// A part of the file, if it is there.
const core::Json* part(const core::Json& file, std::string_view key) {
    const core::Json* value = file.member(key);
    return value && !value->is_null() ? value : nullptr;
}

}  // namespace

Tokenizer::Tokenizer(std::string_view json) {
    TokenizerFile file = TokenizerFile::parse(json);
    const core::Json rest = std::exchange(file.rest, {});
    if (const core::Json* version = part(rest, "version");
        version && (!version->string() || *version->string() != "1.0")) {
        throw UnsupportedTokenizer("its version is not 1.0");
    }
    if (const core::Json* normalizer = part(rest, "normalizer")) normalizer_ = make_normalizer(*normalizer);
    if (const core::Json* pre_tokenizer = part(rest, "pre_tokenizer")) {
        pre_tokenizer_ = make_pre_tokenizer(*pre_tokenizer);
    }
    if (const core::Json* post_processor = part(rest, "post_processor")) {
        post_processor_ = make_post_processor(*post_processor);
        post_processor_->sequences(1);
        if (post_processor_->added() > max_special_tokens) {
            throw UnsupportedTokenizer("its post_processor adds more than 65,536 tokens");
        }
    }
    try {
        model_ = make_model(std::move(file), member(rest, "model", ""));
        const core::Json none;
        const core::Json* added = rest.member("added_tokens");
        added_tokens_.emplace(added ? *added : none, *model_, normalizer_.get());
    } catch (const std::length_error& error) {
        throw UnsupportedTokenizer(error.what());
    } catch (const PatternError& error) {
        throw UnsupportedTokenizer(error.what());
    }
}

Tokenizer::Result Tokenizer::encode(std::string_view text, std::optional<std::size_t> max_length) const {
    const SearchTime search_time;
    Pieces pieces = added_tokens_->extract(text, normalizer_.get());
    if (pre_tokenizer_) pre_tokenizer_->pre_tokenize(pieces);
    const std::size_t added = post_processor_ ? post_processor_->added() : 0;
    const bool limited = max_length && *max_length >= added;
    Result result;
    for (const Piece& piece : pieces) {
        if (limited && result.ids.size() > *max_length - added) break;  // enough to see that it is too long
        if (piece.token) {
            result.ids.push_back(*piece.token);
        } else {
            model_->tokenize(piece.text.text(), result.ids);
        }
    }
    if (limited && result.ids.size() > *max_length - added) {
        result.ids.resize(*max_length - added);
        result.cut = true;
    }
    if (!post_processor_) return result;
    std::vector<Ids> sequences;
    sequences.push_back(std::move(result.ids));
    sequences = post_processor_->process(std::move(sequences));
    result.ids.clear();
    for (const Ids& sequence : sequences)
        result.ids.insert(result.ids.end(), sequence.begin(), sequence.end());
    return result;
}

}  // namespace hywu::text
