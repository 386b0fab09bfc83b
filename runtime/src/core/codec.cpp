#include "core/codec.hpp"

#include <algorithm>
#include <cmath>

namespace hywu::core::codec {

Error malformed(const std::string& where, const std::string& problem, const std::string& expected) {
    return Error(ErrorKind::bundle, "manifest.json: `" + where + "` " + problem, "Expected " + expected,
                 "Export the bundle again with a toolchain of the same format, or correct the manifest");
}

std::string show(const Json& value) {
    if (const bool* boolean = value.boolean()) return *boolean ? "True" : "False";
    if (const std::int64_t* integer = value.integer()) return std::to_string(*integer);
    if (const double* real = value.real()) return repr(*real);
    if (const std::string* text = value.string()) return core::show(*text);
    if (const Json::BigInteger* big = value.big_integer()) return shorten(big->digits, 60);
    if (const Json::Items* items = value.items()) return "list of " + std::to_string(items->size());
    if (const Json::Members* members = value.members()) return "dict of " + std::to_string(members->size());
    return "None";
}

std::string at(const std::string& where, std::size_t index) {
    return where + "[" + std::to_string(index) + "]";
}

std::string at(const std::string& where, std::string_view key) { return where + "[" + core::show(key) + "]"; }

std::string dot(const std::string& where, std::string_view key) {
    return where.empty() ? std::string(key) : where + "." + std::string(key);
}

bool Number::fits(const Json& value) {
    constexpr double largest = 1e300;
    if (const double* real = value.real()) return std::abs(*real) <= largest;
    if (const Json::BigInteger* big = value.big_integer()) {
        return std::abs(std::strtod(big->digits.c_str(), nullptr)) <= largest;
    }
    return value.integer() != nullptr;
}

double Number::decode(const Json& value, const std::string& where) {
    if (!fits(value)) refuse(value, where, what());
    if (const double* real = value.real()) return *real;
    if (const Json::BigInteger* big = value.big_integer()) return std::strtod(big->digits.c_str(), nullptr);
    return static_cast<double>(*value.integer());
}

void check_keys(const Json& object, const std::string& where, const std::vector<std::string_view>& known) {
    for (const auto& [key, value] : *object.members()) {
        if (key.compare(0, 2, "x-") == 0 || std::find(known.begin(), known.end(), key) != known.end())
            continue;
        std::vector<std::string> names(known.begin(), known.end());
        std::sort(names.begin(), names.end());
        throw malformed(dot(where, inside(core::show(key))), "is not a key of this format",
                        "one of " + join(names, ", "));
    }
}

}  // namespace hywu::core::codec
