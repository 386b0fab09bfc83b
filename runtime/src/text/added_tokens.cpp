#include "text/added_tokens.hpp"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "core/error.hpp"
#include "core/text.hpp"
#include "text/hash.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

namespace {

constexpr std::string_view where = "added_tokens";

// The code point that ends before `end`.
char32_t before(std::string_view text, std::size_t end) {
    std::size_t at = end - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
    return core::decode_utf8(text, at);
}

char32_t after(std::string_view text, std::size_t begin) { return core::decode_utf8(text, begin); }

std::size_t size_of(char32_t c) { return c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4; }

}  // namespace

AddedTokens::AddedTokens(const core::Json& list, const Model& model, const Normalizer* normalizer) {
    const core::Json::Items* items = list.items();
    if (!items && !list.is_null()) throw FileError("added_tokens is not an array");
    if (!items) return;
    std::unordered_map<std::string, std::uint32_t, KeyedHash> ids;
    auto next = static_cast<std::uint32_t>(model.vocabulary_size());
    for (const core::Json& item : *items) {
        id_of(member(item, "id", where), "an id of added_tokens");
        Token token{string_member(item, "content", where), bool_member(item, "single_word", where),
                    bool_member(item, "lstrip", where), bool_member(item, "rstrip", where),
                    bool_member(item, "normalized", where)};
        if (token.content.empty()) continue;
        auto known = ids.find(token.content);
        if (known == ids.end()) {
            const auto id = model.token_to_id(token.content);
            known = ids.emplace(token.content, id ? *id : next).first;
            if (!id) ++next;
        }
        tokens_.insert_or_assign(known->second, std::move(token));
    }
    std::vector<std::string> contents;
    contents.reserve(tokens_.size());
    std::vector<Trie::Entry> exact, normalized;
    // From the highest id down: of tokens that are the same when normalised, the one of the lowest is found.
    for (auto entry = tokens_.rbegin(); entry != tokens_.rend(); ++entry) {
        const auto& [id, token] = *entry;
        if (!token.normalized) {
            exact.emplace_back(token.content, id);
            continue;
        }
        NormalizedString content(token.content);
        if (normalizer) normalizer->normalize(content);
        contents.push_back(content.text());
        normalized.emplace_back(contents.back(), id);
    }
    exact_ = Trie(std::move(exact));
    normalized_ = Trie(std::move(normalized));
}

Pieces AddedTokens::extract(std::string_view text, const Normalizer* normalizer) const {
    Pieces exact, pieces;
    append(NormalizedString(text), exact_, exact);
    for (Piece& piece : exact) {
        if (piece.token) {
            pieces.push_back(std::move(piece));
            continue;
        }
        if (normalizer) normalizer->normalize(piece.text);
        append(piece.text, normalized_, pieces);
    }
    return pieces;
}

// Cuts a text at the leftmost token, the longest of those that begin there, and goes on behind it.
void AddedTokens::append(const NormalizedString& text, const Trie& trie, Pieces& pieces) const {
    const std::string& all = text.text();
    std::size_t done = 0;
    // A run of spaces that was skipped: [first, second).
    std::pair<std::size_t, std::size_t> run{0, 0};
    for (std::size_t at = 0; !trie.empty() && at < all.size();) {
        std::size_t begin = at, end = at;
        std::uint32_t id = 0;
        trie.prefixes(std::string_view(all).substr(at), [&](std::size_t size, std::uint32_t found) {
            end = begin + size;
            id = found;
        });
        if (end == begin) {
            ++at;
            continue;
        }
        at = end;
        const Token& token = tokens_.at(id);
        if (token.single_word &&
            ((begin > 0 && is_word(before(all, begin))) || (end < all.size() && is_word(after(all, end))))) {
            continue;
        }
        if (token.left_strip) {
            while (begin > done && is_space(before(all, begin))) begin -= size_of(before(all, begin));
        }
        if (token.right_strip) {
            const std::size_t from = end;
            if (run.first <= end && end < run.second) end = run.second;
            while (end < all.size() && is_space(after(all, end))) end += size_of(after(all, end));
            run = {from, end};
        }
        // Spaces that the last token took may hold this one: then the two overlap.
        if (done < begin) pieces.push_back({text.slice(done, begin), {}});
        if (begin < end) pieces.push_back({NormalizedString(""), id});
        done = end;
    }
    if (done < all.size()) pieces.push_back({text.slice(done, all.size()), {}});
}

}  // namespace hywu::text
