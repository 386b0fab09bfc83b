#include "core/similarity.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <utility>

#include "core/text.hpp"

namespace hywu::core {

namespace {

constexpr double cutoff = 0.5;

// Compares many texts with one word.
class Matcher {
public:
    explicit Matcher(const std::string& word) : word_(to_utf32(word)) {
        for (std::size_t j = 0; j < word_.size(); ++j) places_[word_[j]].push_back(j);
        for (const auto& [letter, places] : places_) counts_[letter] = places.size();
        if (word_.size() < 200) return;
        // In a long word, letters that make up more than one percent begin no match.
        const std::size_t most = word_.size() / 100 + 1;
        for (auto entry = places_.begin(); entry != places_.end();) {
            entry = entry->second.size() > most ? places_.erase(entry) : std::next(entry);
        }
    }

    // 2·matches / (sum of lengths); 0 where cheap bounds show that it is below the cutoff.
    double ratio(const std::u32string& text) const {
        const std::size_t total = text.size() + word_.size();
        const auto of = [total](std::size_t matches) {
            return total == 0 ? 1.0 : 2.0 * static_cast<double>(matches) / static_cast<double>(total);
        };
        if (of(std::min(text.size(), word_.size())) < cutoff || of(common(text)) < cutoff) return 0;
        return of(matches(text));
    }

private:
    struct Block {
        std::size_t i, j, size;
    };

    // Letters in common, in whatever order.
    std::size_t common(const std::u32string& text) const {
        std::map<char32_t, std::size_t> left = counts_;
        std::size_t count = 0;
        for (const char32_t letter : text) {
            const auto found = left.find(letter);
            if (found == left.end() || found->second == 0) continue;
            --found->second;
            ++count;
        }
        return count;
    }

    // The longest block that both have, then what is left and right of it, and so on.
    std::size_t matches(const std::u32string& text) const {
        std::size_t count = 0;
        std::vector<std::pair<Block, Block>> ranges = {{{0, 0, 0}, {text.size(), word_.size(), 0}}};
        while (!ranges.empty()) {
            const auto [low, high] = ranges.back();
            ranges.pop_back();
            const Block block = longest(text, low, high);
            if (block.size == 0) continue;
            count += block.size;
            const Block end = {block.i + block.size, block.j + block.size, 0};
            if (low.i < block.i && low.j < block.j) ranges.emplace_back(low, block);
            if (end.i < high.i && end.j < high.j) ranges.emplace_back(end, high);
        }
        return count;
    }

    Block longest(const std::u32string& text, const Block& low, const Block& high) const {
        Block best = {low.i, low.j, 0};
        // lengths[j + 1]: of the match that ends with text[i - 1] and word[j].
        std::vector<std::size_t> lengths(word_.size() + 1), next(word_.size() + 1);
        for (std::size_t i = low.i; i < high.i; ++i) {
            std::fill(next.begin(), next.end(), 0);
            const auto places = places_.find(text[i]);
            if (places != places_.end()) {
                for (const std::size_t j : places->second) {
                    if (j < low.j) continue;
                    if (j >= high.j) break;
                    const std::size_t size = next[j + 1] = lengths[j] + 1;
                    if (size > best.size) best = {i + 1 - size, j + 1 - size, size};
                }
            }
            lengths.swap(next);
        }
        // Letters that begin no match may still extend one.
        while (best.i > low.i && best.j > low.j && text[best.i - 1] == word_[best.j - 1]) {
            best = {best.i - 1, best.j - 1, best.size + 1};
        }
        while (best.i + best.size < high.i && best.j + best.size < high.j &&
               text[best.i + best.size] == word_[best.j + best.size]) {
            ++best.size;
        }
        return best;
    }

    std::u32string word_;
    std::map<char32_t, std::vector<std::size_t>> places_;
    std::map<char32_t, std::size_t> counts_;
};

}  // namespace

std::optional<std::string> nearest(const std::string& word, const std::vector<std::string>& candidates) {
    const Matcher matcher(word);
    std::optional<std::pair<double, std::string>> best;
    for (const std::string& candidate : candidates) {
        const double ratio = matcher.ratio(to_utf32(candidate));
        if (ratio < cutoff) continue;
        std::pair<double, std::string> found = {ratio, candidate};
        if (!best || *best < found) best = std::move(found);
    }
    if (!best) return std::nullopt;
    return best->second;
}

}  // namespace hywu::core
