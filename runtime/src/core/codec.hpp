// JSON to structs. A *kind* says what JSON a field takes, as the type hints of hywu_runtime.codec do: it has
//
//     using type = …;
//     static std::string what();                               // completes the sentence "expected …"
//     static bool fits(const Json&);                           // the JSON type alone
//     static type decode(const Json&, const std::string& where);   // throws Error(bundle), naming `where`
//
// A struct's fields are listed once, by a function `fields(visitor, struct)` next to it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "core/error.hpp"
#include "core/json.hpp"
#include "core/ordered.hpp"
#include "core/text.hpp"

namespace hywu::core::codec {

inline constexpr std::int64_t max_integer = std::int64_t{1} << 53;  // what every JSON reader holds exactly

// The error for one key of a manifest, for example `program[3].phase`.
Error malformed(const std::string& where, const std::string& problem, const std::string& expected);

// A value as Python's ascii() writes it, shortened; arrays and objects by their size.
std::string show(const Json& value);

// where[3], where['name'], where.key
std::string at(const std::string& where, std::size_t index);
std::string at(const std::string& where, std::string_view key);
std::string dot(const std::string& where, std::string_view key);

[[noreturn]] inline void refuse(const Json& value, const std::string& where, const std::string& expected) {
    throw malformed(where, "is " + show(value), expected);
}

struct Text {
    using type = std::string;
    static std::string what() { return "a string"; }
    static bool fits(const Json& value) { return value.string() != nullptr; }
    static type decode(const Json& value, const std::string& where) {
        if (!fits(value)) refuse(value, where, what());
        return *value.string();
    }
};

struct Integer {
    using type = std::int64_t;
    static std::string what() { return "an integer"; }
    static bool fits(const Json& value) {
        const std::int64_t* number = value.integer();
        return number && *number >= -max_integer && *number <= max_integer;
    }
    static type decode(const Json& value, const std::string& where) {
        if (!fits(value)) refuse(value, where, what());
        return *value.integer();
    }
};

struct Number {
    using type = double;
    static std::string what() { return "a finite number"; }
    static bool fits(const Json& value);
    static type decode(const Json& value, const std::string& where);
};

struct Boolean {
    using type = bool;
    static std::string what() { return "true or false"; }
    static bool fits(const Json& value) { return value.boolean() != nullptr; }
    static type decode(const Json& value, const std::string& where) {
        if (!fits(value)) refuse(value, where, what());
        return *value.boolean();
    }
};

// `Base`, narrowed: `Rule` has `what()` and `test(value)`.
template <class Base, class Rule>
struct Narrowed {
    using type = typename Base::type;
    static std::string what() { return Rule::what(); }
    static bool fits(const Json& value) { return Base::fits(value); }
    static type decode(const Json& value, const std::string& where) {
        type result = Base::decode(value, where);
        if (!Rule::test(result)) refuse(value, where, what());
        return result;
    }
    // The same of a key.
    static void check(const std::string& key, const std::string& where) {
        if (!Rule::test(key)) throw malformed(where, "is " + core::show(key), what());
    }
};

// One of the words of `List::all`, an array of pairs of a word and its value, of type `List::type`.
template <class List>
struct Word {
    using type = typename List::type;
    static std::string what() {
        std::vector<std::string> words;
        words.reserve(List::all.size());
        for (const auto& [word, value] : List::all) words.emplace_back(word);
        return "one of " + join(words, ", ");
    }
    static const type* find(const Json& value) {
        if (const std::string* text = value.string()) {
            for (const auto& [word, meaning] : List::all) {
                if (word == *text) return &meaning;
            }
        }
        return nullptr;
    }
    static bool fits(const Json& value) { return find(value) != nullptr; }
    static type decode(const Json& value, const std::string& where) {
        const type* found = find(value);
        if (!found) refuse(value, where, what());
        return *found;
    }
};

template <class Kind>
struct Nullable {
    using type = std::optional<typename Kind::type>;
    static std::string what() { return Kind::what() + " or null"; }
    static bool fits(const Json& value) { return value.is_null() || Kind::fits(value); }
    static type decode(const Json& value, const std::string& where) {
        if (value.is_null()) return std::nullopt;
        if (!Kind::fits(value)) refuse(value, where, what());
        return Kind::decode(value, where);
    }
};

// Either of two kinds that differ in their JSON type.
template <class First, class Second>
struct Either {
    using type = std::variant<typename First::type, typename Second::type>;
    static std::string what() { return First::what() + " or " + Second::what(); }
    static bool fits(const Json& value) { return First::fits(value) || Second::fits(value); }
    static type decode(const Json& value, const std::string& where) {
        if (First::fits(value)) return type(std::in_place_index<0>, First::decode(value, where));
        if (Second::fits(value)) return type(std::in_place_index<1>, Second::decode(value, where));
        refuse(value, where, what());
    }
};

template <class Kind>
struct List {
    using type = std::vector<typename Kind::type>;
    static std::string what() { return "an array"; }
    static bool fits(const Json& value) { return value.items() != nullptr; }
    static type decode(const Json& value, const std::string& where) {
        if (!fits(value)) refuse(value, where, what());
        type result;
        result.reserve(value.items()->size());
        for (const Json& item : *value.items())
            result.push_back(Kind::decode(item, at(where, result.size())));
        return result;
    }
};

// An object with any keys of kind `Key`; keys that start with "x-" are ignored.
template <class Key, class Kind>
struct Table {
    using type = Ordered<typename Kind::type>;
    static std::string what() { return "an object"; }
    static bool fits(const Json& value) { return value.members() != nullptr; }
    static type decode(const Json& value, const std::string& where) {
        if (!fits(value)) refuse(value, where, what());
        type result;
        for (const auto& [key, entry] : *value.members()) {
            if (key.compare(0, 2, "x-") == 0) continue;
            typename Kind::type decoded = Kind::decode(entry, at(where, key));
            Key::check(key, where + ": key");
            result.add(key, std::move(decoded));
        }
        return result;
    }
};

// Lists the keys of a struct.
class KeyLister {
public:
    template <class Kind, class T>
    void operator()(Kind /*kind*/, std::string_view key, T& /*target*/) {
        keys.push_back(key);
    }
    template <class Kind, class T>
    void optional(Kind kind, std::string_view key, T& target) {
        (*this)(kind, key, target);
    }

    std::vector<std::string_view> keys;
};

// Fills a struct from an object.
class FieldReader {
public:
    FieldReader(const Json& object, const std::string& where) : object_(object), where_(where) {}

    template <class Kind, class T>
    void operator()(Kind kind, std::string_view key, T& target) {
        if (!object_.member(key)) throw malformed(dot(where_, key), "is missing", Kind::what());
        optional(kind, key, target);
    }
    template <class Kind, class T>
    void optional(Kind /*kind*/, std::string_view key, T& target) {
        if (const Json* value = object_.member(key)) target = Kind::decode(*value, dot(where_, key));
    }

private:
    const Json& object_;
    const std::string& where_;
};

void check_keys(const Json& object, const std::string& where, const std::vector<std::string_view>& known);

template <class Struct>
struct Record {
    using type = Struct;
    static std::string what() { return "an object"; }
    static bool fits(const Json& value) { return value.members() != nullptr; }
    static type decode(const Json& value, const std::string& where) {
        static const std::vector<std::string_view> known = [] {
            KeyLister lister;
            Struct any;
            fields(lister, any);
            return std::move(lister.keys);
        }();
        if (!fits(value)) refuse(value, where, what());
        check_keys(value, where, known);
        Struct result;
        FieldReader reader(value, where);
        fields(reader, result);
        return result;
    }
};

}  // namespace hywu::core::codec
