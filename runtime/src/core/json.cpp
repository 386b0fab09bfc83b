#include "core/json.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

namespace hywu::core {

namespace {

// Builds a Json from the parser's events. The parser itself does not recurse; the depth is bounded for those
// that walk the value.
class Builder : public nlohmann::json_sax<nlohmann::json> {
public:
    bool null() override { return add(Json()); }
    bool boolean(bool value) override { return add(Json(value)); }
    bool number_integer(number_integer_t value) override { return add(Json(std::int64_t{value})); }
    bool number_unsigned(number_unsigned_t value) override {
        if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
            return add(Json(Json::BigInteger{std::to_string(value)}));
        }
        return add(Json(static_cast<std::int64_t>(value)));
    }
    bool number_float(number_float_t value, const string_t& text) override {
        const bool whole = text.find_first_of(".eE") == std::string::npos;
        return add(whole ? Json(Json::BigInteger{text}) : Json(value));
    }
    bool string(string_t& value) override { return add(Json(std::move(value))); }
    bool binary(binary_t& /*value*/) override { return fail("binary data"); }
    bool start_object(std::size_t /*elements*/) override { return open(true); }
    bool start_array(std::size_t /*elements*/) override { return open(false); }
    bool key(string_t& value) override {
        stack_.back().key = std::move(value);
        return true;
    }
    bool end_object() override {
        Json::Members& members = stack_.back().members;
        std::vector<std::string_view> keys;
        keys.reserve(members.size());
        for (const auto& [key, value] : members) keys.emplace_back(key);
        std::sort(keys.begin(), keys.end());
        if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) {
            return fail("an object has the same key twice");
        }
        Json object(std::move(members));
        stack_.pop_back();
        return add(std::move(object));
    }
    bool end_array() override {
        Json array(std::move(stack_.back().items));
        stack_.pop_back();
        return add(std::move(array));
    }
    bool parse_error(std::size_t position, const std::string& /*token*/,
                     const nlohmann::detail::exception& error) override {
        // "[json.exception.…] parse error at line 1, column 2: syntax error while parsing … - REASON; last
        // read: 'TEXT'": the text may be long and may not be UTF-8.
        const std::string_view what = error.what();
        std::string_view reason = "a number is too large";
        if (const std::size_t at = what.find(" - "); at != std::string_view::npos) {
            reason = what.substr(at + 3);
            reason = reason.substr(0, reason.find("; last read"));
        }
        return fail(std::string(reason) + " at byte " + std::to_string(position));
    }

    Json result;
    std::string problem;

private:
    struct Level {
        bool object = false;
        std::string key;
        Json::Members members;
        Json::Items items;
    };

    bool fail(std::string text) {
        problem = std::move(text);
        return false;
    }
    bool open(bool object) {
        if (stack_.size() == Json::max_depth) return fail("it nests too deeply");
        stack_.emplace_back();
        stack_.back().object = object;
        return true;
    }
    bool add(Json value) {
        if (stack_.empty()) {
            result = std::move(value);
        } else if (stack_.back().object) {
            stack_.back().members.emplace_back(std::move(stack_.back().key), std::move(value));
        } else {
            stack_.back().items.push_back(std::move(value));
        }
        return true;
    }

    std::vector<Level> stack_;
};

}  // namespace

Json Json::parse(std::string_view text) {
    // The parser would skip a byte order mark, and take a NUL for the end.
    if (text.substr(0, 3) == "\xef\xbb\xbf") throw JsonError("it begins with a byte order mark");
    if (text.find('\0') != std::string_view::npos) throw JsonError("it contains a NUL character");
    Builder builder;
    if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) throw JsonError(builder.problem);
    return std::move(builder.result);
}

const Json* Json::member(std::string_view key) const noexcept {
    if (const Members* all = members()) {
        for (const auto& [name, value] : *all) {
            if (name == key) return &value;
        }
    }
    return nullptr;
}

}  // namespace hywu::core
