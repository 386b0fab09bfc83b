#include "text/unigram.hpp"

#include <algorithm>
#include <limits>

#include "core/text.hpp"

namespace hywu::text {

namespace {

constexpr double unknown_penalty = 10.0;  // below the worst token of the vocabulary
constexpr std::size_t max_tokens = 1 << 28;

}  // namespace

Unigram::Unigram(TokenizerFile&& file, const core::Json& model) : scores_(std::move(file.scores)) {
    if (!file.has_vocab || !file.ids.empty() || file.tokens.size() != scores_.size() ||
        scores_.size() > max_tokens) {
        throw FileError("its model Unigram has no vocabulary");
    }
    byte_fallback_ = bool_member(model, "byte_fallback", "model", false);
    if (const core::Json* id = model.member("unk_id"); id && !id->is_null()) {
        unknown_ = id_of(*id, "model.unk_id");
        if (*unknown_ >= scores_.size()) throw FileError("model.unk_id is not in its vocabulary");
    }
    double lowest = std::numeric_limits<double>::infinity();
    std::vector<Trie::Entry> entries;
    entries.reserve(scores_.size());
    for (std::size_t i = 0; i < scores_.size(); ++i) {
        entries.emplace_back(file.tokens[i], static_cast<std::uint32_t>(i));
        lowest = std::min(lowest, scores_[i]);
    }
    unknown_score_ = lowest - unknown_penalty;
    trie_ = Trie(std::move(entries));
    bytes_ = byte_tokens(*this);
}

// The path of the highest score, the sum of its tokens' scores from left to right (Viterbi); of equals the
// one that was found first, by where the last token begins, then by its length.
void Unigram::tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const {
    struct Node {
        double score = 0;
        std::size_t begin = 0;  // of the last token of the best path to here
        std::uint32_t id = 0;
        bool reached = false;
    };
    std::vector<Node> best(piece.size() + 1);
    for (std::size_t at = 0; at < piece.size();) {
        const std::size_t begin = at;
        core::decode_utf8(piece, at);
        const std::size_t length = at - begin;
        const double score = best[begin].score;
        const auto offer = [&](std::size_t end, double candidate, std::uint32_t id) {
            Node& node = best[end];
            if (!node.reached || candidate > node.score) node = {candidate, begin, id, true};
        };
        bool single = false;
        trie_.prefixes(piece.substr(begin), [&](std::size_t size, std::uint32_t id) {
            offer(begin + size, scores_[id] + score, id);
            single = single || size == length;
        });
        if (single) continue;
        const bool better = !best[at].reached || unknown_score_ + score > best[at].score;
        if (better && !unknown_) {
            throw UnknownToken("a character is not in its vocabulary, which has no unknown token");
        }
        if (unknown_) offer(at, unknown_score_ + score, *unknown_);
    }
    std::vector<std::uint32_t> reversed;
    for (std::size_t end = piece.size(); end > 0;) {
        std::size_t begin = best[end].begin;
        if (unknown_ && best[end].id == *unknown_) {  // neighbours are one token
            while (begin > 0 && best[begin].id == *unknown_) begin = best[begin].begin;
            unknown(piece.substr(begin, end - begin), reversed);
        } else {
            reversed.push_back(best[end].id);
        }
        end = begin;
    }
    ids.insert(ids.end(), reversed.rbegin(), reversed.rend());
}

void Unigram::unknown(std::string_view text, std::vector<std::uint32_t>& reversed) const {
    if (const auto id = trie_.find(text)) {
        reversed.push_back(*id);
    } else if (byte_fallback_ && all_have_tokens(text, bytes_)) {
        for (auto byte = text.rbegin(); byte != text.rend(); ++byte) {
            reversed.push_back(*bytes_[static_cast<unsigned char>(*byte)]);
        }
    } else {
        reversed.push_back(*unknown_);
    }
}

}  // namespace hywu::text
