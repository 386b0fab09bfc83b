// Regular expressions as tokenizer files write them, in Oniguruma's Ruby syntax, on PCRE2.
#pragma once

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "text/normalized_string.hpp"

namespace hywu::text {

// A pattern is malformed, or uses what is not supported; what() is a clause that says which.
class PatternError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// A pattern in Ruby's syntax as PCRE2 understands it, with Oniguruma's character classes. Groups do not
// capture.
// Throws PatternError.
std::string to_pcre2(std::string_view pattern);

// While one lives, all searches of its thread together may take so long; without it each may.
class SearchTime {
public:
    static constexpr std::chrono::seconds limit{10};

    SearchTime();
    ~SearchTime();
    SearchTime(const SearchTime&) = delete;
    SearchTime& operator=(const SearchTime&) = delete;
};

// A compiled pattern. Its const members may be called from several threads at once.
class Regex {
public:
    // Throws PatternError.
    explicit Regex(std::string_view pattern);
    ~Regex();
    Regex(Regex&&) noexcept;
    Regex& operator=(Regex&&) noexcept;

    // The matches of the pattern in a text (valid UTF-8) from left to right, and what lies between.
    // Throws PatternError if the search takes too much time or memory.
    Matches find(std::string_view text) const;

private:
    struct Code;
    std::unique_ptr<Code> code_;
};

}  // namespace hywu::text
