#include "text/normalizers.hpp"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "core/text.hpp"
#include "text/pattern.hpp"
#include "text/precompiled.hpp"
#include "text/tokenizer_file.hpp"

namespace hywu::text {

namespace {

constexpr std::string_view where = "normalizer";
constexpr std::size_t max_prefix = 1 << 16;

void check_size(const NormalizedString& text) {
    if (text.text().size() > max_normalized_bytes) {
        throw UnsupportedTokenizer("its normalizers let a text grow beyond 64 MiB");
    }
}

class Form : public Normalizer {
public:
    explicit Form(NormalForm form) : form_(form) {}
    void normalize(NormalizedString& text) const override { text.transform(normal_form(text.text(), form_)); }

private:
    NormalForm form_;
};

class Lowercase : public Normalizer {
public:
    void normalize(NormalizedString& text) const override {
        Changes changes;
        changes.reserve(text.text().size());
        for (std::size_t at = 0; at < text.text().size();) {
            append_lower(changes, core::decode_utf8(text.text(), at));
        }
        text.transform(changes);
    }
};

class Replace : public Normalizer {
public:
    explicit Replace(const core::Json& description)
        : pattern_(member(description, "pattern", where), where),
          content_(string_member(description, "content", where)) {}
    void normalize(NormalizedString& text) const override {
        const Matches matches = pattern_.find(text.text());
        std::size_t size = text.text().size();
        for (const Match& match : matches) size += match.found ? content_.size() : 0;
        if (size > max_normalized_bytes)
            throw UnsupportedTokenizer("its normalizers let a text grow beyond 64 MiB");
        text.replace(matches, content_);
    }

private:
    Pattern pattern_;
    std::string content_;
};

class Prepend : public Normalizer {
public:
    explicit Prepend(const core::Json& description) : prefix_(string_member(description, "prepend", where)) {
        if (prefix_.size() > max_prefix)
            throw UnsupportedTokenizer("its normalizer prepends more than 64 KiB");
    }
    void normalize(NormalizedString& text) const override { text.prepend(prefix_); }

private:
    std::string prefix_;
};

class Strip : public Normalizer {
public:
    explicit Strip(const core::Json& description)
        : left_(bool_member(description, "strip_left", where)),
          right_(bool_member(description, "strip_right", where)) {}
    void normalize(NormalizedString& text) const override { text.strip(left_, right_); }

private:
    bool left_, right_;
};

class StripAccents : public Normalizer {
public:
    void normalize(NormalizedString& text) const override {
        text.filter([](char32_t c) { return !is_mark(c); });
    }
};

class CharacterMap : public Normalizer {
public:
    explicit CharacterMap(const core::Json& description)
        : map_(string_member(description, "precompiled_charsmap", where)) {}
    void normalize(NormalizedString& text) const override {
        if (const auto changes = map_.normalize(text.text())) text.transform(*changes);
    }

private:
    Precompiled map_;
};

class Sequence : public Normalizer {
public:
    explicit Sequence(const core::Json& description) {
        for (const core::Json& item : array_member(description, "normalizers", where)) {
            items_.push_back(make_normalizer(item));
        }
    }
    void normalize(NormalizedString& text) const override {
        for (const auto& item : items_) {
            item->normalize(text);
            check_size(text);
        }
    }

private:
    std::vector<std::unique_ptr<Normalizer>> items_;
};

}  // namespace

std::unique_ptr<Normalizer> make_normalizer(const core::Json& description) {
    const std::string& type = type_of(description, where);
    if (type == "NFC") return std::make_unique<Form>(NormalForm::nfc);
    if (type == "NFD") return std::make_unique<Form>(NormalForm::nfd);
    if (type == "NFKC") return std::make_unique<Form>(NormalForm::nfkc);
    if (type == "NFKD") return std::make_unique<Form>(NormalForm::nfkd);
    if (type == "Lowercase") return std::make_unique<Lowercase>();
    if (type == "Replace") return std::make_unique<Replace>(description);
    if (type == "Prepend") return std::make_unique<Prepend>(description);
    if (type == "Strip") return std::make_unique<Strip>(description);
    if (type == "StripAccents") return std::make_unique<StripAccents>();
    if (type == "Precompiled") return std::make_unique<CharacterMap>(description);
    if (type == "Sequence") return std::make_unique<Sequence>(description);
    throw UnsupportedTokenizer("its normalizer is of the type " + core::show(type));
}

std::string stripped_lowercase(std::string_view text) {
    NormalizedString result(text);
    result.strip(true, true);
    Lowercase().normalize(result);
    return result.text();
}

}  // namespace hywu::text
