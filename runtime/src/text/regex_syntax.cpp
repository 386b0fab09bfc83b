// From Oniguruma's Ruby syntax (its doc/RE) to PCRE2's (pcre2pattern(3)). Where the two mean different things
// by the same text, the pattern is rewritten; what has no counterpart, and what no tokenizer needs, is
// refused by name.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/error.hpp"
#include "core/text.hpp"
#include "text/regex.hpp"

namespace hywu::text {

namespace {

constexpr std::size_t max_pattern = 1 << 16, max_depth = 64;

// Insides of character classes. Spaces are White_Space: PCRE2 counts U+180E too.
constexpr std::string_view space =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view no_space =
    R"(\x{0}-\x{8}\x{e}-\x{1f}\x{21}-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027})"
    R"(\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff})";
// Letters, marks, decimal and letter numbers, connectors, the other alphabetic ones, and, as Oniguruma has
// it, the numbers of Latin-1.
constexpr std::string_view word =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be}\x{24b6}-\x{24e9})"
    R"(\x{1f130}-\x{1f149}\x{1f150}-\x{1f169}\x{1f170}-\x{1f189})";
constexpr std::string_view hexadecimal = "0-9A-Fa-f";

constexpr std::array<std::string_view, 37> categories = {
    "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",  "Nd", "Nl",
    "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk",
    "So", "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Cn", "Co", "Any"};
constexpr std::array<std::string_view, 12> scripts = {"Armenian", "Bengali",  "Bopomofo", "Devanagari",
                                                      "Greek",    "Han",      "Hangul",   "Hebrew",
                                                      "Hiragana", "Katakana", "Latin",    "Thai"};

[[noreturn]] void refuse(const std::string& what) { throw PatternError(what); }

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

bool same(std::string_view a, std::string_view b) {
    return a.size() == b.size() &&
           std::equal(a.begin(), a.end(), b.begin(), [](char x, char y) { return lower(x) == lower(y); });
}

bool is_letter_or_digit(char c) { return (lower(c) >= 'a' && lower(c) <= 'z') || (c >= '0' && c <= '9'); }

// A code point that stands for itself, inside a class and outside.
std::string literal(char32_t c) {
    std::string text;
    if (c >= 0x80 || is_letter_or_digit(static_cast<char>(c))) {
        core::append_utf8(text, c);
        return text;
    }
    constexpr std::string_view digits = "0123456789abcdef";
    text = "\\x{";
    if (c >= 16) text += digits[c / 16];
    return text + digits[c % 16] + "}";
}

class Translator {
public:
    explicit Translator(std::string_view pattern) : in_(pattern) {}

    std::string translate() {
        alternatives();
        if (at_ < in_.size()) refuse("it closes a group that is not open");
        return std::move(out_);
    }

private:
    bool more() const { return at_ < in_.size(); }
    char peek() const { return more() ? in_[at_] : '\0'; }
    bool next_is(std::string_view text) const { return in_.substr(at_, text.size()) == text; }
    bool take(std::string_view text) {
        if (!next_is(text)) return false;
        at_ += text.size();
        return true;
    }

    // Up to the end of the group, or of the pattern.
    void alternatives() {
        if (++depth_ > max_depth) refuse("it nests too deeply");
        while (more() && peek() != ')') {
            if (take("|")) {
                out_ += '|';
            } else {
                quantified();
            }
        }
        --depth_;
    }

    void quantified() {
        const std::size_t begin = out_.size();
        if (!atom()) return;
        for (bool first = true; quantifier(begin, first); first = false) {
        }
    }

    // A quantifier of what was written since `begin`. A second one applies to all before it: PCRE2 wants a
    // group.
    bool quantifier(std::size_t begin, bool first) {
        std::string text;
        bool suffix = true;
        if (take("*")) {
            text = "*";
        } else if (take("+")) {
            text = "+";
        } else if (take("?")) {
            text = "?";
        } else if (!interval(text, suffix)) {
            return false;
        }
        const bool is_interval = text.front() == '{';
        // {n}? is an optional {n}, and {n,m}+ a repeated {n,m}.
        if (suffix && take("?")) {
            text += '?';
        } else if (suffix && !is_interval && take("+")) {
            text += '+';
        }
        if (!first) {
            out_.insert(begin, "(?:");
            out_ += ')';
        }
        out_ += text;
        return true;
    }

    // {n}, {n,}, {,m} or {n,m}; anything else that begins with a brace stands for itself.
    bool interval(std::string& text, bool& suffix) {
        if (peek() != '{') return false;
        std::size_t at = at_ + 1;
        const auto number = [&](std::string& digits) {
            while (at < in_.size() && in_[at] >= '0' && in_[at] <= '9') digits += in_[at++];
        };
        std::string low, high;
        number(low);
        const bool comma = at < in_.size() && in_[at] == ',';
        if (comma) {
            ++at;
            number(high);
        }
        if (at >= in_.size() || in_[at] != '}' || (low.empty() && high.empty())) return false;
        if (low.size() > 5 || high.size() > 5) refuse("it repeats too often");
        if (!low.empty() && !high.empty() && std::stol(low) > std::stol(high))
            refuse("a repetition runs backwards");
        at_ = at + 1;
        suffix = comma;
        text = "{" + (low.empty() ? "0" : low) + (comma ? "," : "") + high + "}";
        return true;
    }

    // False if nothing was written that could be repeated.
    bool atom() {
        const char c = peek();
        switch (c) {
            case '(':
                return group();
            case '[':
                ++at_;
                out_ += set();
                return true;
            case '\\':
                ++at_;
                escape();
                return true;
            case '.':
            case '^':
            case '$':
                ++at_;
                out_ += c;
                return true;
            case '*':
            case '+':
            case '?':
                refuse("it repeats nothing");
            default: {
                out_ += literal(core::decode_utf8(in_, at_));
                return true;
            }
        }
    }

    bool group() {
        ++at_;
        if (!take("?")) {
            out_ += "(?:";
        } else if (take("#")) {
            while (more() && peek() != ')') ++at_;
            if (!take(")")) refuse("a comment has no end");
            return false;
        } else if (next_is("<") && !next_is("<=") && !next_is("<!")) {
            const std::size_t end = in_.find('>', at_);
            if (end == std::string_view::npos) refuse("a name has no end");
            at_ = end + 1;
            out_ += "(?:";
        } else {
            bool known = false;
            for (const std::string_view kind : {":", "=", "!", ">", "<=", "<!"}) {
                if (!known && take(kind)) {
                    known = true;
                    out_ += "(?" + std::string(kind);
                }
            }
            if (!known) return options();
        }
        alternatives();
        close();
        return true;
    }

    // (?i-m:…), or (?i) which holds up to the end of the group, its further alternatives included.
    bool options() {
        std::string text;
        for (; peek() == 'i' || peek() == 'm' || peek() == '-'; ++at_) text += peek() == 'm' ? 's' : peek();
        out_ += "(?" + text + ":";
        if (take(":")) {
            alternatives();
            close();
            return true;
        }
        if (!take(")")) refuse("(?" + std::string(in_.substr(at_, 1)) + " is not supported");
        alternatives();
        out_ += ')';
        return false;
    }

    void close() {
        if (!take(")")) refuse("a group has no end");
        out_ += ')';
    }

    void escape() {
        switch (peek()) {
            case 's':
                return escaped_set(space, false);
            case 'S':
                return escaped_set(space, true);
            case 'w':
                return escaped_set(word, false);
            case 'W':
                return escaped_set(word, true);
            case 'h':
                return escaped_set(hexadecimal, false);
            case 'H':
                return escaped_set(hexadecimal, true);
            case 'd':
                ++at_;
                out_ += "\\p{Nd}";
                return;
            case 'D':
                ++at_;
                out_ += "\\P{Nd}";
                return;
            case 'p':
            case 'P':
                out_ += property();
                return;
            case 'b':
            case 'B': {
                const std::string w = "[" + std::string(word) + "]";
                const bool boundary = peek() == 'b';
                ++at_;
                out_ += boundary ? "(?:(?<=" + w + ")(?!" + w + ")|(?<!" + w + ")(?=" + w + "))"
                                 : "(?:(?<=" + w + ")(?=" + w + ")|(?<!" + w + ")(?!" + w + "))";
                return;
            }
            case 'A':
            case 'z':
            case 'Z':
                out_ += '\\';
                out_ += peek();
                ++at_;
                return;
            default:
                out_ += literal(escaped_literal());
        }
    }

    void escaped_set(std::string_view inside, bool negated) {
        ++at_;
        out_ += negated ? "[^" : "[";
        out_ += inside;
        out_ += ']';
    }

    // What follows a backslash, as one code point.
    char32_t escaped_literal() {
        if (!more()) refuse("it ends in a backslash");
        switch (peek()) {
            case 't':
                return ++at_, U'\t';
            case 'n':
                return ++at_, U'\n';
            case 'r':
                return ++at_, U'\r';
            case 'f':
                return ++at_, U'\f';
            case 'v':
                return ++at_, U'\v';
            case 'a':
                return ++at_, U'\a';
            case 'e':
                return ++at_, char32_t{0x1b};
            case 'x':
                ++at_;
                return take("{") ? number(8, true) : number(2, false);
            case 'u':
                ++at_;
                return number(4, false);
            default:
                break;
        }
        if (is_letter_or_digit(peek())) refuse("\\" + std::string(1, peek()) + " is not supported");
        return core::decode_utf8(in_, at_);
    }

    char32_t number(std::size_t digits, bool braced) {
        char32_t value = 0;
        std::size_t count = 0;
        for (; count < digits && more(); ++count, ++at_) {
            const char c = lower(peek());
            if (c >= '0' && c <= '9') {
                value = value * 16 + static_cast<char32_t>(c - '0');
            } else if (c >= 'a' && c <= 'f') {
                value = value * 16 + static_cast<char32_t>(c - 'a' + 10);
            } else {
                break;
            }
        }
        const bool whole = braced ? count > 0 && take("}") : count == digits;
        // \x80 and above would be a byte of a code point.
        if (!whole || value > 0x10ffff || (value >= 0xd800 && value < 0xe000) ||
            (digits == 2 && value > 0x7f)) {
            refuse("a character's number is not valid");
        }
        return value;
    }

    std::string property() {
        bool negated = peek() == 'P';
        ++at_;
        if (!take("{")) refuse("\\p has no property in braces");
        if (take("^")) negated = !negated;
        const std::size_t end = in_.find('}', at_);
        if (end == std::string_view::npos) refuse("a property has no end");
        const std::string_view name = in_.substr(at_, end - at_);
        at_ = end + 1;
        const std::string prefix = negated ? "\\P{" : "\\p{";
        for (const std::string_view category : categories) {
            if (same(name, category)) return prefix + std::string(category) + "}";
        }
        for (const std::string_view script : scripts) {
            if (!same(name, script)) continue;
            // Since 10.40 the plain name means Script_Extensions.
            const bool new_names = PCRE2_MAJOR > 10 || PCRE2_MINOR >= 40;
            return prefix + (new_names ? "sc:" : "") + std::string(script) + "}";
        }
        refuse("the property " + core::show(name) + " is not supported");
    }

    // The rest of a character class.
    std::string set() {
        std::string text = take("^") ? "[^" : "[";
        bool first = true;
        while (true) {
            if (!more()) refuse("a character class has no end");
            if (!first && take("]")) break;
            if (next_is("&&")) refuse("&& in a character class is not supported");
            if (first && next_is("]") && in_.find(']', at_ + 1) == std::string_view::npos) {
                refuse("a character class is empty");
            }
            first = false;
            char32_t low = 0;
            if (set_of_its_own(text, low)) {
                if (next_is("-") && !next_is("-]"))
                    refuse("a range in a character class begins with a class");
                continue;
            }
            if (!(next_is("-") && in_.substr(at_, 2) != "-]" && at_ + 1 < in_.size())) {
                text += literal(low);
                continue;
            }
            ++at_;
            char32_t high = 0;
            std::string ignored;
            if (set_of_its_own(ignored, high)) refuse("a range in a character class ends in a class");
            if (high < low) refuse("a range in a character class runs backwards");
            text += literal(low) + "-" + literal(high);
        }
        return text + "]";
    }

    // Adds a class inside a class to `text`; false if there is a single code point, which `single` then is.
    bool set_of_its_own(std::string& text, char32_t& single) {
        if (next_is("[:")) {
            at_ += 2;
            return named_set(text);
        }
        if (next_is("[")) refuse("a character class in another is not supported");
        if (!take("\\")) {
            single = core::decode_utf8(in_, at_);
            return false;
        }
        switch (peek()) {
            case 's':
                return ++at_, text += space, true;
            case 'S':
                return ++at_, text += no_space, true;
            case 'w':
                return ++at_, text += word, true;
            case 'd':
                return ++at_, text += "\\p{Nd}", true;
            case 'D':
                return ++at_, text += "\\P{Nd}", true;
            case 'h':
                return ++at_, text += hexadecimal, true;
            case 'p':
            case 'P':
                text += property();
                return true;
            case 'b':
                ++at_;
                single = U'\b';
                return false;
            default:
                single = escaped_literal();
                return false;
        }
    }

    bool named_set(std::string& text) {
        if (take("space:]")) return text += space, true;
        if (take("digit:]")) return text += "\\p{Nd}", true;
        if (take("xdigit:]")) return text += hexadecimal, true;
        if (take("word:]")) return text += word, true;
        const std::size_t end = std::min(in_.find(":]", at_), in_.size());
        refuse("[:" + std::string(in_.substr(at_, std::min<std::size_t>(end - at_, 20))) +
               ":] is not supported");
    }

    std::string_view in_;
    std::string out_;
    std::size_t at_ = 0, depth_ = 0;
};

}  // namespace

std::string to_pcre2(std::string_view pattern) {
    if (pattern.size() > max_pattern) refuse("it is longer than 64 KiB");
    return Translator(pattern).translate();
}

}  // namespace hywu::text
