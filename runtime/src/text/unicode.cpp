#include "text/unicode.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/text.hpp"
#include "text/unicode_tables.hpp"

namespace hywu::text {

namespace {

template <class T>
const T* find(const Table<T>& table, char32_t code_point) noexcept {
    const T* entry = std::upper_bound(table.begin(), table.end(), code_point,
                                      [](char32_t c, const T& range) { return c < range.first; });
    return entry != table.begin() && code_point <= (entry - 1)->last ? entry - 1 : nullptr;
}

// Below these, the tables that start there say nothing.
constexpr char32_t first_mark = 0x300, first_composing = 0x300, first_recent = 0x897;

bool is_later_than_9(char32_t code_point) noexcept {
    return code_point >= first_mark && find(later_than_9, code_point) != nullptr;
}

int combining_class(char32_t code_point) noexcept {
    if (code_point < first_mark || is_later_than_9(code_point)) return 0;
    return utf8proc_get_property(static_cast<utf8proc_int32_t>(code_point))->combining_class;
}

struct Classed {
    char32_t code_point;
    int change;
    int combining_class;
};

// Decomposed, with marks in canonical order (The Unicode Standard, D108 and D109).
std::vector<Classed> decompose(std::string_view text, bool compatibility) {
    const int options = UTF8PROC_DECOMPOSE | (compatibility ? UTF8PROC_COMPAT : 0);
    std::vector<Classed> result;
    result.reserve(text.size());
    std::size_t sorted = 0;  // where the present run of marks begins
    const auto sort_marks = [&] {
        std::stable_sort(
            result.begin() + static_cast<std::ptrdiff_t>(sorted), result.end(),
            [](const Classed& a, const Classed& b) { return a.combining_class < b.combining_class; });
    };
    const auto add = [&](char32_t code_point, int change) {
        const int ccc = combining_class(code_point);
        if (ccc == 0) {
            sort_marks();
            sorted = result.size() + 1;
        }
        result.push_back({code_point, change, ccc});
    };
    for (std::size_t at = 0; at < text.size();) {
        const char32_t c = core::decode_utf8(text, at);
        std::array<utf8proc_int32_t, 32> parts{};  // at most 18 (U+FDFA)
        utf8proc_ssize_t count = 0;
        if (c >= 0x80 && !is_later_than_9(c)) {
            count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), parts.data(),
                                            static_cast<utf8proc_ssize_t>(parts.size()),
                                            static_cast<utf8proc_option_t>(options), nullptr);
        }
        if (count < 1 || count > static_cast<utf8proc_ssize_t>(parts.size())) {
            add(c, 0);
            continue;
        }
        for (utf8proc_ssize_t i = 0; i < count; ++i) {
            add(static_cast<char32_t>(parts[static_cast<std::size_t>(i)]), i > 0 ? 1 : 0);
        }
    }
    sort_marks();
    return result;
}

// The primary composite of two code points, or 0.
char32_t compose(char32_t first, char32_t second) noexcept {
    if (second < first_composing || is_later_than_9(second) || is_later_than_9(first)) return 0;
    std::array<utf8proc_int32_t, 2> pair = {static_cast<utf8proc_int32_t>(first),
                                            static_cast<utf8proc_int32_t>(second)};
    const int options = UTF8PROC_STABLE | UTF8PROC_COMPOSE;
    if (utf8proc_normalize_utf32(pair.data(), 2, static_cast<utf8proc_option_t>(options)) != 1) return 0;
    const auto composite = static_cast<char32_t>(pair[0]);
    return is_later_than_9(composite) ? 0 : composite;
}

// The canonical composition algorithm (D117), in place: what remains is moved to the front.
void compose(std::vector<Classed>& text) {
    const std::size_t none = text.size();
    std::size_t starter = none, kept = 0;
    int last_class = -1;  // of the kept code points behind the starter; -1 if there are none
    for (std::size_t i = 0; i < text.size(); ++i) {
        const Classed next = text[i];  // kept <= i: what is still to be read is not written over
        if (starter != none && last_class < next.combining_class) {
            if (const char32_t composite = compose(text[starter].code_point, next.code_point)) {
                text[starter].code_point = composite;
                text[starter].change += next.change - 1;
                continue;
            }
        }
        last_class = next.combining_class;
        if (next.combining_class == 0) {
            starter = kept;
            last_class = -1;
        }
        text[kept++] = next;
    }
    text.resize(kept);
}

}  // namespace

bool is_space(char32_t c) noexcept {
    return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
           c == 0x3000;
}

bool is_number(char32_t c) noexcept {
    switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_NO:
            return true;
        default:
            return find(recent_numbers, c) != nullptr;
    }
}

bool is_mark(char32_t c) noexcept { return find(marks, c) != nullptr; }

bool is_punctuation(char32_t c) noexcept { return find(punctuation, c) != nullptr; }

bool is_word(char32_t c) noexcept { return find(words, c) != nullptr; }

char32_t stand_in(char32_t c) noexcept {
    if (c < first_recent || (c >= 0x3400 && c < 0xa7cb)) return c;
    const StandIn* recent = find(stand_ins, c);
    return recent ? recent->by : c;
}

void append_lower(Changes& changes, char32_t c) {
    if (c == 0x130) {  // İ: the only one whose lower-case form is two
        changes.push_back({U'i', 0});
        changes.push_back({0x307, 1});
        return;
    }
    const auto* pair =
        std::lower_bound(recent_lower.begin(), recent_lower.end(), c,
                         [](const CodePointPair& entry, char32_t value) { return entry.from < value; });
    const bool recent = pair != recent_lower.end() && pair->from == c;
    changes.push_back(
        {recent ? pair->to : static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))), 0});
}

Changes normal_form(std::string_view text, NormalForm form) {
    std::vector<Classed> code_points = decompose(text, form == NormalForm::nfkc || form == NormalForm::nfkd);
    if (form == NormalForm::nfc || form == NormalForm::nfkc) compose(code_points);
    Changes result;
    result.reserve(code_points.size());
    for (const Classed& c : code_points) result.push_back({c.code_point, c.change});
    return result;
}

std::vector<std::size_t> grapheme_ends(std::string_view text) {
    std::vector<std::size_t> ends;
    utf8proc_int32_t state = 0, last = 0;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t begin = at;
        const auto c = static_cast<utf8proc_int32_t>(stand_in(core::decode_utf8(text, at)));
        if (begin > 0 && utf8proc_grapheme_break_stateful(last, c, &state)) ends.push_back(begin);
        last = c;
    }
    if (!text.empty()) ends.push_back(text.size());
    return ends;
}

}  // namespace hywu::text
