#include "text/trie.hpp"

#include <algorithm>
#include <deque>
#include <stdexcept>

namespace hywu::text {

Trie::Trie(std::vector<Entry> entries) {
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry& a, const Entry& b) { return a.first < b.first; });
    std::size_t kept = 0, bytes = 0;
    for (std::size_t i = 0; i < entries.size(); ++i) {
        if (kept > 0 && entries[kept - 1].first == entries[i].first) --kept;
        entries[kept++] = entries[i];
    }
    entries.resize(kept);
    for (const Entry& entry : entries) {
        if (entry.first.size() > max_size) throw std::length_error("a token has more than 1024 bytes");
        bytes += entry.first.size();
    }
    if (bytes > none || entries.size() > none / 4) throw std::length_error("a vocabulary is too large");
    labels_.reserve(bytes);

    // Level by level, so that the children of a node stand together, by their first byte.
    struct Open {
        std::uint32_t node;
        std::size_t begin, end, depth;  // entries [begin, end) agree in their first `depth` bytes
    };
    nodes_.push_back({0, 0, 0, 0, none});
    std::deque<Open> open{{0, 0, entries.size(), 0}};
    for (; !open.empty(); open.pop_front()) {
        auto [node, begin, end, depth] = open.front();
        if (begin < end && entries[begin].first.size() == depth) ++begin;  // the node's own string
        nodes_[node].children = static_cast<std::uint32_t>(nodes_.size());
        while (begin < end) {
            const char first = entries[begin].first[depth];
            const std::size_t next = static_cast<std::size_t>(
                std::partition_point(
                    entries.begin() + static_cast<std::ptrdiff_t>(begin),
                    entries.begin() + static_cast<std::ptrdiff_t>(end),
                    [&, at = depth](const Entry& entry) { return entry.first[at] == first; }) -
                entries.begin());
            // Sorted, so that what the first and the last share is what all share.
            const std::string_view low = entries[begin].first, high = entries[next - 1].first;
            std::size_t shared = depth + 1;
            while (shared < low.size() && shared < high.size() && low[shared] == high[shared]) ++shared;
            const std::uint32_t value = low.size() == shared ? entries[begin].second : none;
            nodes_.push_back({static_cast<std::uint32_t>(labels_.size()),
                              static_cast<std::uint32_t>(shared - depth), 0, 0, value});
            labels_ += low.substr(depth, shared - depth);
            ++nodes_[node].child_count;
            open.push_back({static_cast<std::uint32_t>(nodes_.size() - 1), begin, next, shared});
            begin = next;
        }
    }
}

std::optional<std::uint32_t> Trie::find(std::string_view text) const {
    std::optional<std::uint32_t> found;
    prefixes(text, [&](std::size_t length, std::uint32_t value) {
        if (length == text.size()) found = value;
    });
    return found;
}

}  // namespace hywu::text
