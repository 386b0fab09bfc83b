// Which of many strings a text begins with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hywu::text {

// A compressed trie (Morrison's PATRICIA, over bytes): at most two nodes for every string, whatever their
// length.
class Trie {
public:
    using Entry = std::pair<std::string_view, std::uint32_t>;

    // Longer strings, which no tokenizer has, would let a file make every look-up slow.
    static constexpr std::size_t max_size = 1024;

    Trie() = default;
    // The strings are copied. Of equal ones the last counts; empty ones are never found.
    // Throws std::length_error: a string is longer than `max_size`, or they are too many.
    explicit Trie(std::vector<Entry> entries);

    bool empty() const noexcept { return nodes_.size() < 2; }
    // The value of exactly this string.
    std::optional<std::uint32_t> find(std::string_view text) const;

    // Calls visit(length, value) for every string that `text` begins with, from the shortest to the longest.
    template <class Visit>
    void prefixes(std::string_view text, Visit&& visit) const {
        if (empty()) return;
        std::size_t at = 0;
        for (const Node* node = child(nodes_[0], text, at); node; node = child(*node, text, at)) {
            if (node->value != none) visit(at, node->value);
        }
    }

private:
    static constexpr std::uint32_t none = 0xffffffff;

    struct Node {
        std::uint32_t label, label_size;  // in labels_
        std::uint32_t children, child_count;
        std::uint32_t value;
    };

    // The child that `text` goes on with at `at`, which is moved behind the child's label; or null.
    const Node* child(const Node& node, std::string_view text, std::size_t& at) const {
        if (at >= text.size()) return nullptr;
        std::size_t low = node.children, count = node.child_count;
        while (count > 0) {
            const std::size_t half = count / 2;
            if (static_cast<unsigned char>(labels_[nodes_[low + half].label]) <
                static_cast<unsigned char>(text[at])) {
                low += half + 1;
                count -= half + 1;
            } else {
                count = half;
            }
        }
        if (low >= std::size_t{node.children} + node.child_count) return nullptr;
        const Node& next = nodes_[low];
        const std::string_view label(labels_.data() + next.label, next.label_size);
        if (text.size() - at < label.size() || text.compare(at, label.size(), label) != 0) return nullptr;
        at += label.size();
        return &next;
    }

    std::vector<Node> nodes_;
    std::string labels_;
};

}  // namespace hywu::text
