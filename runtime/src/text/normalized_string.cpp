#include "text/normalized_string.hpp"

#include <algorithm>

#include "core/text.hpp"

namespace hywu::text {

std::vector<std::pair<std::size_t, std::size_t>> split(const Matches& matches, SplitBehavior behavior) {
    std::vector<std::pair<std::size_t, std::size_t>> parts;
    parts.reserve(matches.size());
    bool previous = false;
    const auto join = [&](const Match& match, bool merge) {
        if (merge && !parts.empty()) {
            parts.back().first = std::min(parts.back().first, match.begin);
            parts.back().second = std::max(parts.back().second, match.end);
        } else {
            parts.emplace_back(match.begin, match.end);
        }
        previous = match.found;
    };
    switch (behavior) {
        case SplitBehavior::removed:
            for (const Match& match : matches) {
                if (!match.found) parts.emplace_back(match.begin, match.end);
            }
            break;
        case SplitBehavior::isolated:
            for (const Match& match : matches) parts.emplace_back(match.begin, match.end);
            break;
        case SplitBehavior::contiguous:
            for (const Match& match : matches) join(match, match.found == previous);
            break;
        case SplitBehavior::merged_with_previous:
            for (const Match& match : matches) join(match, match.found && !previous);
            break;
        case SplitBehavior::merged_with_next:
            for (auto match = matches.rbegin(); match != matches.rend(); ++match) {
                join(*match, match->found && !previous);
            }
            std::reverse(parts.begin(), parts.end());
            break;
    }
    parts.erase(std::remove_if(parts.begin(), parts.end(),
                               [](const auto& part) { return part.first == part.second; }),
                parts.end());
    return parts;
}

Matches match_if(std::string_view text, const std::function<bool(char32_t)>& condition) {
    Matches matches;
    std::size_t behind = 0;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t begin = at;
        if (!condition(core::decode_utf8(text, at))) continue;
        if (behind < begin) matches.push_back({behind, begin, false});
        matches.push_back({begin, at, true});
        behind = at;
    }
    if (behind < text.size()) matches.push_back({behind, text.size(), false});
    return matches;
}

NormalizedString::NormalizedString(std::string_view text)
    : text_(text), original_size_(static_cast<std::uint32_t>(text.size())) {
    alignments_.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t begin = at;
        core::decode_utf8(text, at);
        alignments_.insert(alignments_.end(), at - begin,
                           {static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(at)});
    }
}

NormalizedString NormalizedString::slice(std::size_t begin, std::size_t end) const {
    NormalizedString part;
    if (begin >= end) return part;
    part.text_ = text_.substr(begin, end - begin);
    part.alignments_.assign(alignments_.begin() + static_cast<std::ptrdiff_t>(begin),
                            alignments_.begin() + static_cast<std::ptrdiff_t>(end));
    const std::uint32_t first = part.alignments_.front().begin;
    for (Span& span : part.alignments_) span = {span.begin - first, span.end - first};
    part.original_size_ = part.alignments_.back().end;
    part.shift_ = shift_ + first;
    return part;
}

void NormalizedString::transform(const Changes& changes, std::size_t removed) {
    // The text that stands for the whole original: not what was put before its beginning without width.
    std::size_t begin = 0, end = 0;
    if (original_size_ > 0) {
        bool started = false;
        for (; end < alignments_.size() && alignments_[end].end <= original_size_; ++end) {
            if (!started && alignments_[end].begin != alignments_[end].end) {
                started = true;
                begin = end;
            }
        }
        if (end == 0) return;
        if (!started) begin = end;
    }
    transform(begin, end, changes, removed);
}

void NormalizedString::transform(std::size_t begin, std::size_t end, const Changes& changes,
                                 std::size_t removed) {
    std::size_t at = begin;
    // The size of the next `count` code points that are replaced.
    const auto skip = [&](std::size_t count) {
        const std::size_t from = at;
        for (; count > 0 && at < end; --count) core::decode_utf8(text_, at);
        return at - from;
    };
    std::size_t offset = begin + skip(removed);
    std::string text;
    text.reserve(changes.size());
    std::vector<Span> alignments;
    alignments.reserve(changes.size());
    for (const Change& change : changes) {
        Span span{0, 0};
        if (change.change <= 0) {
            span = aligned(offset);
            offset += skip(1 + static_cast<std::size_t>(-change.change));
        } else if (offset > 0) {
            span = aligned(offset - 1);
        }
        const std::size_t before = text.size();
        core::append_utf8(text, change.code_point);
        alignments.insert(alignments.end(), text.size() - before, span);
    }
    if (begin == 0 && end == text_.size()) {
        text_ = std::move(text);
        alignments_ = std::move(alignments);
        return;
    }
    text_.replace(begin, end - begin, text);
    const auto first = alignments_.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto rest = alignments_.erase(first, first + static_cast<std::ptrdiff_t>(end - begin));
    alignments_.insert(rest, alignments.begin(), alignments.end());
}

NormalizedString::Span NormalizedString::aligned(std::size_t at) const noexcept {
    if (alignments_.empty()) return {0, 0};
    return alignments_[std::min(at, alignments_.size() - 1)];
}

void NormalizedString::prepend(std::string_view prefix) {
    if (text_.empty() || prefix.empty()) return;
    Changes changes;
    for (std::size_t at = 0; at < prefix.size();) {
        changes.push_back({core::decode_utf8(prefix, at), changes.empty() ? 0 : 1});
    }
    std::size_t first = 0;
    changes.push_back({core::decode_utf8(text_, first), 1});
    transform(0, first, changes, 0);
}

void NormalizedString::filter(const std::function<bool(char32_t)>& keep) {
    Changes changes;
    std::size_t removed_first = 0;
    for (std::size_t at = 0; at < text_.size();) {
        const char32_t c = core::decode_utf8(text_, at);
        if (keep(c)) {
            changes.push_back({c, 0});
        } else if (changes.empty()) {
            ++removed_first;
        } else {
            --changes.back().change;
        }
    }
    // The library forgets what it removed if it removed everything.
    transform(changes, changes.empty() ? 0 : removed_first);
}

void NormalizedString::strip(bool left, bool right) {
    const std::u32string all = core::to_utf32(text_);
    std::size_t begin = 0, end = all.size();
    while (left && begin < all.size() && is_space(all[begin])) ++begin;
    // Leading and trailing spaces are counted apart: both are all of them where there is nothing else.
    while (right && end > 0 && is_space(all[end - 1])) --end;
    if (begin == 0 && end == all.size()) return;
    const std::size_t trailing = all.size() - end;
    Changes changes;
    for (std::size_t i = begin; i < end; ++i) {
        // The last one carries what is removed behind it; the library counts bytes here, so that this is lost
        // unless the text is ASCII.
        const bool last = i + trailing + 1 == text_.size();
        changes.push_back({all[i], last ? -static_cast<int>(trailing) : 0});
    }
    transform(changes, begin);
}

void NormalizedString::replace(const Matches& matches, std::string_view content) {
    std::string text;
    std::vector<Span> alignments;
    text.reserve(text_.size());
    alignments.reserve(alignments_.size());
    for (const Match& match : matches) {
        const auto begin = static_cast<std::ptrdiff_t>(match.begin),
                   end = static_cast<std::ptrdiff_t>(match.end);
        if (match.found) {
            text += content;
            alignments.insert(alignments.end(), content.size(),
                              match.end > 0 ? aligned(match.end - 1) : Span{0, 0});
        } else {
            text.append(text_, match.begin, match.end - match.begin);
            alignments.insert(alignments.end(), alignments_.begin() + begin, alignments_.begin() + end);
        }
    }
    text_ = std::move(text);
    alignments_ = std::move(alignments);
}

}  // namespace hywu::text
