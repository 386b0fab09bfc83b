// A text that is being normalised, with the part of the original that each of its bytes comes from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "text/unicode.hpp"

namespace hywu::text {

// A part of a text, in bytes, and whether it is what was looked for. A list of them covers a text without
// gaps.
struct Match {
    std::size_t begin, end;
    bool found;
};
using Matches = std::vector<Match>;

// What becomes of the matches when a text is split at them.
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

// The parts of a text that split at `matches` leaves, as [begin, end) in bytes; none is empty.
std::vector<std::pair<std::size_t, std::size_t>> split(const Matches& matches, SplitBehavior behavior);

// Every code point that fulfils the condition, on its own.
Matches match_if(std::string_view text, const std::function<bool(char32_t)>& condition);

// Changes go through `transform` as in the `tokenizers` library, whose alignments decide what counts as the
// beginning of the original text, and in corner cases what a later change applies to.
class NormalizedString {
public:
    // `text` is valid UTF-8.
    explicit NormalizedString(std::string_view text);

    const std::string& text() const noexcept { return text_; }
    bool empty() const noexcept { return text_.empty(); }
    // Where in the whole original text this part begins, in bytes.
    std::size_t original_begin() const noexcept { return shift_; }

    // The part [begin, end) of the text.
    NormalizedString slice(std::size_t begin, std::size_t end) const;

    // Replaces the whole text. `removed` code points are dropped at its beginning.
    void transform(const Changes& changes, std::size_t removed = 0);
    void prepend(std::string_view prefix);
    // Keeps the code points that fulfil the condition.
    void filter(const std::function<bool(char32_t)>& keep);
    void strip(bool left, bool right);
    // Replaces every match.
    void replace(const Matches& matches, std::string_view content);

private:
    struct Span {
        std::uint32_t begin, end;
    };

    NormalizedString() = default;
    void transform(std::size_t begin, std::size_t end, const Changes& changes, std::size_t removed);
    Span aligned(std::size_t at) const noexcept;

    std::string text_;
    std::vector<Span> alignments_;  // of every byte of text_, in this part of the original
    std::uint32_t original_size_ = 0;
    std::size_t shift_ = 0;
};

}  // namespace hywu::text
