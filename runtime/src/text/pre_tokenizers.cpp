#include "text/pre_tokenizers.hpp"

#include <array>
#include <string>
#include <utility>

#include "core/error.hpp"
#include "core/text.hpp"
#include "text/pattern.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

namespace {

constexpr std::string_view where = "pre_tokenizer";

// Replaces every piece that is not a token by what `cut(text, pieces)` appends for it.
template <class Cut>
void cut_all(Pieces& pieces, Cut&& cut) {
    Pieces result;
    result.reserve(pieces.size());
    for (Piece& piece : pieces) {
        if (piece.token) {
            result.push_back(std::move(piece));
        } else {
            cut(piece.text, result);
        }
    }
    pieces = std::move(result);
}

SplitBehavior behavior_of(const std::string& name) {
    if (name == "Removed") return SplitBehavior::removed;
    if (name == "Isolated") return SplitBehavior::isolated;
    if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
    if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
    if (name == "Contiguous") return SplitBehavior::contiguous;
    throw UnsupportedTokenizer("the behavior of its pre_tokenizer is " + core::show(name));
}

// GPT-2's alphabet: printable characters of Latin-1 stand for their own byte, U+0100 and up for the others.
const std::array<char32_t, 256>& byte_alphabet() {
    static const std::array<char32_t, 256> alphabet = [] {
        std::array<char32_t, 256> table{};
        char32_t next = 0x100;
        for (std::size_t byte = 0; byte < table.size(); ++byte) {
            const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
            table[byte] = printable ? static_cast<char32_t>(byte) : next++;
        }
        return table;
    }();
    return alphabet;
}

class ByteLevel : public PreTokenizer {
public:
    explicit ByteLevel(const core::Json& description)
        : prefix_space_(bool_member(description, "add_prefix_space", where)) {
        if (bool_member(description, "use_regex", where, true)) {
            regex_.emplace(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)");
        }
    }
    void pre_tokenize(Pieces& pieces) const override {
        cut_all(pieces, [this](NormalizedString& text, Pieces& result) {
            if (prefix_space_ && text.text().front() != ' ') text.prepend(" ");
            if (regex_) {
                append_parts(text, regex_->find(text.text()), SplitBehavior::isolated, result);
            } else {
                result.push_back({std::move(text), {}});
            }
        });
        for (Piece& piece : pieces) {
            if (!piece.token) to_bytes(piece.text);
        }
    }

private:
    static void to_bytes(NormalizedString& text) {
        Changes changes;
        changes.reserve(text.text().size());
        for (const char c : text.text()) {
            const auto byte = static_cast<unsigned char>(c);
            const bool first = (byte & 0xc0) != 0x80;
            changes.push_back({byte_alphabet()[byte], first ? 0 : 1});
        }
        text.transform(changes);
    }

    bool prefix_space_;
    std::optional<Regex> regex_;
};

class Split : public PreTokenizer {
public:
    explicit Split(const core::Json& description)
        : pattern_(member(description, "pattern", where), where),
          behavior_(behavior_of(string_member(description, "behavior", where))),
          invert_(bool_member(description, "invert", where)) {}
    void pre_tokenize(Pieces& pieces) const override {
        cut_all(pieces, [this](const NormalizedString& text, Pieces& result) {
            Matches matches = pattern_.find(text.text());
            if (invert_) {
                for (Match& match : matches) match.found = !match.found;
            }
            append_parts(text, matches, behavior_, result);
        });
    }

private:
    Pattern pattern_;
    SplitBehavior behavior_;
    bool invert_;
};

class Metaspace : public PreTokenizer {
public:
    explicit Metaspace(const core::Json& description)
        : replacement_(string_member(description, "replacement", where)),
          split_(bool_member(description, "split", where, true)) {
        if (core::length(replacement_) != 1) throw FileError("pre_tokenizer.replacement is not a character");
        if (const core::Json* scheme = description.member("prepend_scheme")) {
            const std::string* name = scheme->string();
            if (name && *name == "first") {
                scheme_ = Scheme::first;
            } else if (name && *name == "never") {
                scheme_ = Scheme::never;
            } else if (!name || *name != "always") {
                throw FileError("pre_tokenizer.prepend_scheme is not first, never or always");
            }
        }
        if (!bool_member(description, "add_prefix_space", where, true) && scheme_ != Scheme::never) {
            throw FileError("pre_tokenizer.add_prefix_space does not go with its prepend_scheme");
        }
    }
    void pre_tokenize(Pieces& pieces) const override {
        cut_all(pieces, [this](NormalizedString& text, Pieces& result) {
            text.replace(match_if(text.text(), [](char32_t c) { return c == U' '; }), replacement_);
            const bool prepend =
                scheme_ == Scheme::always || (scheme_ == Scheme::first && text.original_begin() == 0);
            if (prepend && text.text().compare(0, replacement_.size(), replacement_) != 0) {
                text.prepend(replacement_);
            }
            if (!split_) {
                result.push_back({std::move(text), {}});
                return;
            }
            std::size_t at = 0;
            const char32_t mark = core::decode_utf8(replacement_, at);
            append_parts(text, match_if(text.text(), [mark](char32_t c) { return c == mark; }),
                         SplitBehavior::merged_with_next, result);
        });
    }

private:
    enum class Scheme { first, never, always };

    std::string replacement_;
    bool split_;
    Scheme scheme_ = Scheme::always;
};

// Cuts at single characters.
class Characters : public PreTokenizer {
public:
    Characters(bool (*condition)(char32_t), SplitBehavior behavior)
        : condition_(condition), behavior_(behavior) {}
    void pre_tokenize(Pieces& pieces) const override {
        cut_all(pieces, [this](const NormalizedString& text, Pieces& result) {
            append_parts(text, match_if(text.text(), condition_), behavior_, result);
        });
    }

private:
    bool (*condition_)(char32_t);
    SplitBehavior behavior_;
};

// Runs of word characters, and of others that are not spaces.
class Whitespace : public PreTokenizer {
public:
    void pre_tokenize(Pieces& pieces) const override {
        cut_all(pieces, [](const NormalizedString& text, Pieces& result) {
            const auto kind = [](char32_t c) { return is_word(c) ? 1 : is_space(c) ? 0 : 2; };
            std::size_t begin = 0;
            int last = 0;
            const std::string& all = text.text();
            for (std::size_t at = 0; at < all.size();) {
                const std::size_t from = at;
                const int next = kind(core::decode_utf8(all, at));
                if (next == last) continue;
                if (last != 0) result.push_back({text.slice(begin, from), {}});
                begin = from;
                last = next;
            }
            if (last != 0) result.push_back({text.slice(begin, all.size()), {}});
        });
    }
};

class Sequence : public PreTokenizer {
public:
    explicit Sequence(const core::Json& description) {
        for (const core::Json& item : array_member(description, "pretokenizers", where)) {
            items_.push_back(make_pre_tokenizer(item));
        }
    }
    void pre_tokenize(Pieces& pieces) const override {
        for (const auto& item : items_) item->pre_tokenize(pieces);
    }

private:
    std::vector<std::unique_ptr<PreTokenizer>> items_;
};

}  // namespace

void append_parts(const NormalizedString& text, const Matches& matches, SplitBehavior behavior,
                  Pieces& pieces) {
    for (const auto& [begin, end] : split(matches, behavior)) pieces.push_back({text.slice(begin, end), {}});
}

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const core::Json& description) {
    const std::string& type = type_of(description, where);
    if (type == "ByteLevel") return std::make_unique<ByteLevel>(description);
    if (type == "Split") return std::make_unique<Split>(description);
    if (type == "Metaspace") return std::make_unique<Metaspace>(description);
    if (type == "Whitespace") return std::make_unique<Whitespace>();
    if (type == "WhitespaceSplit") return std::make_unique<Characters>(is_space, SplitBehavior::removed);
    if (type == "Punctuation") {
        const core::Json* behavior = description.member("behavior");
        return std::make_unique<Characters>(
            is_punctuation,
            behavior ? behavior_of(string_member(description, "behavior", where)) : SplitBehavior::isolated);
    }
    if (type == "Digits") {
        return std::make_unique<Characters>(is_number, bool_member(description, "individual_digits", where)
                                                           ? SplitBehavior::isolated
                                                           : SplitBehavior::contiguous);
    }
    if (type == "Sequence") return std::make_unique<Sequence>(description);
    throw UnsupportedTokenizer("its pre_tokenizer is of the type " + core::show(type));
}

}  // namespace hywu::text
