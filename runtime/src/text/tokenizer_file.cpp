#include "text/tokenizer_file.hpp"

#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.hpp"

namespace hywu::text {

namespace {

using core::Json;

class Reader : public nlohmann::json_sax<nlohmann::json> {
public:
    explicit Reader(TokenizerFile& file) : file_(file) {}

    bool null() override { return add(Json()); }
    bool boolean(bool value) override { return add(Json(value)); }
    bool number_integer(number_integer_t value) override {
        if (part_ == Part::scores) return score(std::to_string(value));
        return add(Json(std::int64_t{value}));
    }
    bool number_unsigned(number_unsigned_t value) override {
        if (part_ == Part::ids) {
            if (value > std::numeric_limits<std::uint32_t>::max())
                throw FileError("an id in its vocabulary is too large");
            file_.ids.push_back(static_cast<std::uint32_t>(value));
            return true;
        }
        if (part_ == Part::scores) return score(std::to_string(value));
        if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
            return add(Json(Json::BigInteger{std::to_string(value)}));
        }
        return add(Json(static_cast<std::int64_t>(value)));
    }
    bool number_float(number_float_t value, const string_t& text) override {
        if (part_ == Part::scores) return score(text);
        return add(Json(value));
    }
    bool string(string_t& value) override {
        if (part_ == Part::scores && depth_ == 2 && file_.tokens.size() == file_.scores.size()) {
            ++pair_;
            file_.tokens.add(value);
            return true;
        }
        if (part_ == Part::merges) return merge(value);
        return add(Json(std::move(value)));
    }
    bool binary(binary_t& /*value*/) override { throw FileError("it holds binary data"); }
    bool start_object(std::size_t /*elements*/) override {
        if (part_ != Part::rest) wrong();
        if (at("vocab")) {
            start(Part::ids, file_.has_vocab);
            return true;
        }
        return open(true);
    }
    bool start_array(std::size_t /*elements*/) override {
        if (part_ == Part::scores || part_ == Part::merges) {
            if (++depth_ > 2) wrong();
            pair_ = 0;
            return true;
        }
        if (part_ == Part::ids) wrong();
        if (at("vocab")) {
            start(Part::scores, file_.has_vocab);
            return true;
        }
        if (at("merges")) {
            start(Part::merges, file_.has_merges);
            return true;
        }
        return open(false);
    }
    bool key(string_t& value) override {
        if (part_ == Part::ids) {
            if (file_.tokens.size() != file_.ids.size()) wrong();
            file_.tokens.add(value);
        } else {
            stack_.back().key = std::move(value);
        }
        return true;
    }
    bool end_object() override {
        if (part_ == Part::ids) {
            if (file_.tokens.size() != file_.ids.size()) wrong();
            part_ = Part::rest;
            return true;
        }
        Json object(std::move(stack_.back().members));
        stack_.pop_back();
        return add(std::move(object));
    }
    bool end_array() override {
        if (part_ == Part::scores || part_ == Part::merges) {
            if (--depth_ == 0) {
                part_ = Part::rest;
            } else if (pair_ != 2) {
                wrong();
            }
            return true;
        }
        Json array(std::move(stack_.back().items));
        stack_.pop_back();
        return add(std::move(array));
    }
    bool parse_error(std::size_t position, const std::string& /*token*/,
                     const nlohmann::detail::exception& /*error*/) override {
        throw FileError("it is not JSON (at byte " + std::to_string(position) + ")");
    }

private:
    enum class Part { rest, ids, scores, merges };
    struct Frame {
        bool object;
        std::string key;
        Json::Members members;
        Json::Items items;
    };
    static constexpr std::size_t max_depth = 100;

    // Whether the value that comes is model.`key`.
    bool at(std::string_view key) const {
        return stack_.size() == 2 && stack_[0].object && stack_[1].object && stack_[0].key == "model" &&
               stack_[1].key == key;
    }
    void start(Part part, bool& seen) {
        if (seen) throw FileError("its model has two vocabularies");
        seen = true;
        part_ = part;
        depth_ = 1;
    }
    [[noreturn]] void wrong() const {
        throw FileError(part_ == Part::merges
                            ? "model.merges holds something that is not a merge"
                            : "model.vocab holds something that is not a token with its number");
    }
    bool add(Json value) {
        if (part_ != Part::rest) wrong();
        if (stack_.empty()) {
            file_.rest = std::move(value);
        } else if (Frame& frame = stack_.back(); !frame.object) {
            frame.items.push_back(std::move(value));
        } else {
            // Of equal keys the last counts, as in the library; readers take the first.
            for (auto& [key, old] : frame.members) {
                if (key == frame.key && frame.members.size() < 64) {
                    old = std::move(value);
                    return true;
                }
            }
            frame.members.emplace_back(std::move(frame.key), std::move(value));
        }
        return true;
    }
    bool open(bool object) {
        if (stack_.size() >= max_depth) throw FileError("it nests too deeply");
        stack_.push_back({object, {}, {}, {}});
        return true;
    }
    bool score(std::string_view number) {
        if (depth_ != 2 || file_.tokens.size() != file_.scores.size() + 1) wrong();
        ++pair_;
        file_.scores.push_back(read_score(number));
        return true;
    }
    // "left right", or one half of ["left", "right"].
    bool merge(const std::string& text) {
        if (depth_ == 2) {
            if (++pair_ > 2) wrong();
            file_.merges.add(text);
            return true;
        }
        if (text.rfind("#version", 0) == 0) return true;
        const std::size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) wrong();
        file_.merges.add(std::string_view(text).substr(0, space));
        file_.merges.add(std::string_view(text).substr(space + 1));
        return true;
    }

    TokenizerFile& file_;
    std::vector<Frame> stack_;
    Part part_ = Part::rest;
    std::size_t depth_ = 0, pair_ = 0;  // within a part: open arrays, items of the inner one
};

[[noreturn]] void wrong(std::string_view where, std::string_view key, std::string_view expected) {
    throw FileError(std::string(where) + (where.empty() ? "" : ".") + std::string(key) + " is not " +
                    std::string(expected));
}

}  // namespace

TokenizerFile TokenizerFile::parse(std::string_view json) {
    if (json.substr(0, 3) == "\xef\xbb\xbf") throw FileError("it begins with a byte order mark");
    TokenizerFile file;
    Reader reader(file);
    nlohmann::json::sax_parse(json.begin(), json.end(), &reader);
    if (!file.rest.members()) throw FileError("it is not a JSON object");
    return file;
}

double read_score(std::string_view number) {
    std::size_t at = 0;
    const bool negative = number.substr(0, 1) == "-";
    if (negative) ++at;
    std::uint64_t significand = 0;
    int exponent = 0;
    bool full = false, point = false;
    for (; at < number.size() && number[at] != 'e' && number[at] != 'E'; ++at) {
        if (number[at] == '.') {
            point = true;
            continue;
        }
        const auto digit = static_cast<std::uint64_t>(number[at] - '0');
        constexpr std::uint64_t top = std::numeric_limits<std::uint64_t>::max();
        full = full || significand > top / 10 || (significand == top / 10 && digit > top % 10);
        if (full) {  // further digits count by their number alone
            exponent += point ? 0 : 1;
        } else {
            significand = significand * 10 + digit;
            exponent -= point ? 1 : 0;
        }
    }
    if (at < number.size()) {
        ++at;
        const bool down = number.substr(at, 1) == "-";
        if (down || number.substr(at, 1) == "+") ++at;
        int power = 0;
        for (; at < number.size() && power < 100'000; ++at) power = power * 10 + (number[at] - '0');
        exponent += down ? -power : power;
    }
    static const std::array<double, 309> powers = [] {
        std::array<double, 309> table{};
        for (std::size_t i = 0; i < table.size(); ++i) table[i] = std::stod("1e" + std::to_string(i));
        return table;
    }();
    auto value = static_cast<double>(significand);
    while (value != 0.0 && std::abs(exponent) >= 309) {
        if (exponent > 0) throw FileError("a score in its vocabulary is too large");
        value /= 1e308;
        exponent += 308;
    }
    if (value != 0.0) {
        const double power = powers[static_cast<std::size_t>(std::abs(exponent))];
        value = exponent >= 0 ? value * power : value / power;
    }
    if (!std::isfinite(value)) throw FileError("a score in its vocabulary is too large");
    return negative ? -value : value;
}

const Json& member(const Json& object, std::string_view key, std::string_view where) {
    const Json* value = object.member(key);
    if (!value) {
        throw FileError(std::string(where) + (where.empty() ? "" : ".") + std::string(key) + " is missing");
    }
    return *value;
}

const std::string& string_member(const Json& object, std::string_view key, std::string_view where) {
    const std::string* value = member(object, key, where).string();
    if (!value) wrong(where, key, "a string");
    return *value;
}

bool bool_member(const Json& object, std::string_view key, std::string_view where) {
    const bool* value = member(object, key, where).boolean();
    if (!value) wrong(where, key, "true or false");
    return *value;
}

bool bool_member(const Json& object, std::string_view key, std::string_view where, bool otherwise) {
    const Json* value = object.member(key);
    return value && !value->is_null() ? bool_member(object, key, where) : otherwise;
}

const Json::Items& array_member(const Json& object, std::string_view key, std::string_view where) {
    const Json::Items* value = member(object, key, where).items();
    if (!value) wrong(where, key, "an array");
    return *value;
}

std::uint32_t id_of(const Json& value, std::string_view where) {
    const std::int64_t* id = value.integer();
    if (!id || *id < 0 || *id > std::numeric_limits<std::uint32_t>::max()) {
        throw FileError(std::string(where) + " is not a token id");
    }
    return static_cast<std::uint32_t>(*id);
}

const std::string& type_of(const Json& object, std::string_view where) {
    if (!object.members()) throw FileError(std::string(where) + " is not an object");
    return string_member(object, "type", where);
}

}  // namespace hywu::text
