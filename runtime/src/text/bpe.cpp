#include "text/bpe.hpp"

#include <functional>
#include <queue>
#include <tuple>

#include "core/error.hpp"
#include "core/text.hpp"

namespace hywu::text {

namespace {

std::optional<std::string> optional_string(const core::Json& model, std::string_view key) {
    const core::Json* value = model.member(key);
    if (!value || value->is_null()) return {};
    return string_member(model, key, "model");
}

std::uint64_t pair(std::uint32_t left, std::uint32_t right) noexcept {
    return std::uint64_t{left} << 32 | right;
}

}  // namespace

Bpe::Bpe(TokenizerFile&& file, const core::Json& model) : tokens_(std::move(file.tokens)) {
    if (const core::Json* dropout = model.member("dropout"); dropout && !dropout->is_null()) {
        const double* rate = dropout->real();
        const std::int64_t* whole = dropout->integer();
        if (!(rate && *rate == 0.0) && !(whole && *whole == 0)) {
            throw UnsupportedTokenizer("its model BPE has dropout, which makes its tokens random");
        }
    }
    unknown_ = optional_string(model, "unk_token");
    prefix_ = optional_string(model, "continuing_subword_prefix").value_or("");
    suffix_ = optional_string(model, "end_of_word_suffix").value_or("");
    fuse_unknown_ = bool_member(model, "fuse_unk", "model", false);
    byte_fallback_ = bool_member(model, "byte_fallback", "model", false);
    ignore_merges_ = bool_member(model, "ignore_merges", "model", false);
    if (!file.has_vocab || !file.has_merges || !file.scores.empty() || file.ids.size() != tokens_.size()) {
        throw FileError("its model BPE has no vocabulary or no merges");
    }

    vocabulary_.reserve(tokens_.size());
    for (std::size_t i = 0; i < tokens_.size(); ++i) vocabulary_[tokens_[i]] = file.ids[i];
    bytes_ = byte_tokens(*this);
    const auto id = [&](std::string_view token) {
        const auto found = vocabulary_.find(token);
        if (found == vocabulary_.end()) {
            throw FileError("the token " + core::show(token) + " of a merge is not in its vocabulary");
        }
        return found->second;
    };
    merges_.reserve(file.merges.size() / 2);
    std::string merged;
    for (std::size_t i = 0; i + 1 < file.merges.size(); i += 2) {
        const std::string_view left = file.merges[i], right = file.merges[i + 1];
        const std::uint64_t key = pair(id(left), id(right));
        if (right.size() < prefix_.size()) {
            throw FileError("the token " + core::show(right) + " of a merge is shorter than the prefix");
        }
        merged.assign(left);
        merged += right.substr(prefix_.size());
        merges_[key] = {static_cast<std::uint32_t>(i / 2), id(merged)};
    }
}

std::optional<std::uint32_t> Bpe::token_to_id(std::string_view token) const {
    const auto found = vocabulary_.find(token);
    return found == vocabulary_.end() ? std::nullopt : std::optional(found->second);
}

const Bpe::Merge* Bpe::merge_of(std::uint32_t left, std::uint32_t right) const {
    const auto found = merges_.find(pair(left, right));
    return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const {
    if (ignore_merges_) {
        if (const auto id = token_to_id(piece)) {
            ids.push_back(*id);
            return;
        }
    }
    std::vector<Symbol> all = symbols(piece);
    merge(all);
    for (const Symbol& symbol : all) {
        if (symbol.length > 0) ids.push_back(symbol.id);
    }
}

// One symbol for each code point, or for each byte of one that has no token, or for one or several unknown
// ones.
std::vector<Bpe::Symbol> Bpe::symbols(std::string_view piece) const {
    std::vector<Symbol> all;
    all.reserve(piece.size());
    const auto add = [&](std::uint32_t id, std::size_t length) {
        const auto at = static_cast<std::int32_t>(all.size());
        if (!all.empty()) all.back().next = at;
        all.push_back({id, at - 1, -1, static_cast<std::uint32_t>(length)});
    };
    std::uint32_t unknown = 0;
    std::size_t unknown_length = 0;  // of an unknown one that is still to be added; 0 if there is none
    const auto add_unknown = [&] {
        if (unknown_length > 0) add(unknown, unknown_length);
        unknown_length = 0;
    };
    std::string text;
    for (std::size_t at = 0; at < piece.size();) {
        const std::size_t begin = at;
        core::decode_utf8(piece, at);
        const std::size_t length = at - begin;
        text.clear();
        if (begin > 0) text += prefix_;
        text += piece.substr(begin, length);
        if (at == piece.size()) text += suffix_;
        if (const auto known = token_to_id(text)) {
            add_unknown();
            add(*known, length);
            continue;
        }
        if (byte_fallback_ && all_have_tokens(text, bytes_)) {
            // An unknown one before them is added behind them: that is what the library does.
            for (const char byte : text) add(*bytes_[static_cast<unsigned char>(byte)], 1);
            continue;
        }
        if (!unknown_) continue;
        if (unknown_length > 0 && fuse_unknown_) {
            unknown_length += length;
            continue;
        }
        add_unknown();
        const auto id = token_to_id(*unknown_);
        if (!id)
            throw UnknownToken("the unknown token " + core::show(*unknown_) + " is not in its vocabulary");
        unknown = *id;
        unknown_length = length;
    }
    add_unknown();
    return all;
}

// Merges the pair of lowest rank, the leftmost of equals, until there is none: n log n in the number of
// symbols.
void Bpe::merge(std::vector<Symbol>& all) const {
    struct Candidate {
        std::uint32_t rank;
        std::int32_t at;
        std::uint32_t id;
        bool operator>(const Candidate& other) const {
            return std::tie(rank, at) > std::tie(other.rank, other.at);
        }
    };
    std::vector<Candidate> storage;
    storage.reserve(all.size());
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>{},
                                                                                 std::move(storage));
    const auto symbol = [&](std::int32_t at) -> Symbol& { return all[static_cast<std::size_t>(at)]; };
    const auto offer = [&](std::int32_t left, std::int32_t right) {
        if (const Merge* found = merge_of(symbol(left).id, symbol(right).id)) {
            queue.push({found->rank, left, found->id});
        }
    };
    for (std::size_t i = 1; i < all.size(); ++i) {
        offer(static_cast<std::int32_t>(i - 1), static_cast<std::int32_t>(i));
    }
    while (!queue.empty()) {
        const Candidate best = queue.top();
        queue.pop();
        Symbol& left = symbol(best.at);
        if (left.length == 0 || left.next < 0) continue;
        Symbol& right = symbol(left.next);
        const Merge* found = merge_of(left.id, right.id);
        if (!found || found->id != best.id) continue;  // one of the two has been merged since
        left.id = best.id;
        left.length += right.length;
        left.next = right.next;
        right.length = 0;
        if (left.next >= 0) symbol(left.next).previous = best.at;
        if (left.previous >= 0) offer(left.previous, best.at);
        if (left.next >= 0) offer(best.at, left.next);
    }
}

}  // namespace hywu::text
