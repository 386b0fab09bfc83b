// What Replace and Split look for: a string, or a regular expression.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "core/json.hpp"
#include "text/regex.hpp"

namespace hywu::text {

class Pattern {
public:
    // From {"String": …} or {"Regex": …}. Throws FileError, UnsupportedTokenizer.
    Pattern(const core::Json& description, std::string_view where);

    Matches find(std::string_view text) const;

private:
    std::string literal_;
    std::optional<Regex> regex_;
};

}  // namespace hywu::text
