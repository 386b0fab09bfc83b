#include "text/pattern.hpp"

#include "core/error.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

Pattern::Pattern(const core::Json& description, std::string_view where) {
    if (const core::Json* text = description.member("String"); text && text->string()) {
        literal_ = *text->string();
        if (literal_.empty()) regex_.emplace("");  // matches between all characters
        return;
    }
    const core::Json* text = description.member("Regex");
    if (!text || !text->string())
        throw FileError(std::string(where) + ".pattern is not a string or a regular expression");
    try {
        regex_.emplace(*text->string());
    } catch (const PatternError& error) {
        throw UnsupportedTokenizer("the regular expression " + core::show(*text->string()) + " of its " +
                                   std::string(where) + " cannot be used: " + error.what());
    }
}

Matches Pattern::find(std::string_view text) const {
    if (regex_) return regex_->find(text);
    Matches matches;
    std::size_t behind = 0;
    for (std::size_t at = text.find(literal_); at != std::string_view::npos;
         at = text.find(literal_, behind)) {
        if (behind < at) matches.push_back({behind, at, false});
        behind = at + literal_.size();
        matches.push_back({at, behind, true});
    }
    if (behind < text.size()) matches.push_back({behind, text.size(), false});
    return matches;
}

}  // namespace hywu::text
