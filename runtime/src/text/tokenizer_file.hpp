// A tokenizer.json, read: the vocabulary as it streams by, the rest as a tree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.hpp"

namespace hywu::text {

// The file is not what it should be; what() is a clause that says where and why, short and printable.
class FileError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};
// The file is sound, but uses a type or an option that this runtime does not have.
class UnsupportedTokenizer : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Many strings in one block of memory.
class Strings {
public:
    void add(std::string_view text) {
        bytes_ += text;
        ends_.push_back(bytes_.size());
    }
    std::size_t size() const noexcept { return ends_.size(); }
    std::string_view operator[](std::size_t i) const noexcept {
        const std::size_t begin = i > 0 ? ends_[i - 1] : 0;
        return std::string_view(bytes_).substr(begin, ends_[i] - begin);
    }

private:
    std::string bytes_;
    std::vector<std::size_t> ends_;
};

struct TokenizerFile {
    // Without `model.vocab` and `model.merges`.
    core::Json rest;
    // The vocabulary in the file's order: an object of ids (`ids`), or an array of pairs with scores
    // (`scores`).
    bool has_vocab = false, has_merges = false;
    Strings tokens;
    std::vector<std::uint32_t> ids;
    std::vector<double> scores;
    // Merges, left and right one after the other.
    Strings merges;

    // Throws FileError.
    static TokenizerFile parse(std::string_view json);
};

// A double as the `tokenizers` library reads it: serde_json's quick way, which may miss the nearest by a bit
// or two.
// Throws FileError if it is too large.
double read_score(std::string_view number);

// Access to members, with messages that name `where`. All throw FileError.
const core::Json& member(const core::Json& object, std::string_view key, std::string_view where);
const std::string& string_member(const core::Json& object, std::string_view key, std::string_view where);
bool bool_member(const core::Json& object, std::string_view key, std::string_view where);
// Null and absence give the default.
bool bool_member(const core::Json& object, std::string_view key, std::string_view where, bool otherwise);
const core::Json::Items& array_member(const core::Json& object, std::string_view key, std::string_view where);
// An integer from 0 to 2³²−1.
std::uint32_t id_of(const core::Json& value, std::string_view where);
// An object's "type".
const std::string& type_of(const core::Json& object, std::string_view where);

}  // namespace hywu::text
