// Strict JSON: valid UTF-8, no duplicate keys, no NaN or infinity, no byte order mark, bounded nesting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace hywu::core {

// The text is not such JSON; what() says where and why, short and printable.
class JsonError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// A parsed value. Objects keep the order of their keys.
class Json {
public:
    using Items = std::vector<Json>;
    using Members = std::vector<std::pair<std::string, Json>>;
    // An integer beyond 64 bits, as it was written.
    struct BigInteger {
        std::string digits;
    };

    static constexpr std::size_t max_depth = 512;

    Json() = default;
    explicit Json(bool value) : value_(value) {}
    explicit Json(std::int64_t value) : value_(value) {}
    explicit Json(double value) : value_(value) {}
    explicit Json(std::string value) : value_(std::make_unique<std::string>(std::move(value))) {}
    explicit Json(BigInteger value) : value_(std::make_unique<BigInteger>(std::move(value))) {}
    explicit Json(Items value) : value_(std::make_unique<Items>(std::move(value))) {}
    explicit Json(Members value) : value_(std::make_unique<Members>(std::move(value))) {}

    // Time is n log n in the size of the text. Throws JsonError.
    static Json parse(std::string_view text);

    // The value if it is of that type, otherwise null.
    bool is_null() const noexcept { return std::holds_alternative<std::monostate>(value_); }
    const bool* boolean() const noexcept { return std::get_if<bool>(&value_); }
    const std::int64_t* integer() const noexcept { return std::get_if<std::int64_t>(&value_); }
    const double* real() const noexcept { return std::get_if<double>(&value_); }
    const std::string* string() const noexcept { return pointer<std::string>(); }
    const BigInteger* big_integer() const noexcept { return pointer<BigInteger>(); }
    const Items* items() const noexcept { return pointer<Items>(); }
    const Members* members() const noexcept { return pointer<Members>(); }
    // A member of an object with few keys, or null.
    const Json* member(std::string_view key) const noexcept;

private:
    template <class T>
    const T* pointer() const noexcept {
        const auto* held = std::get_if<std::unique_ptr<T>>(&value_);
        return held ? held->get() : nullptr;
    }

    std::variant<std::monostate, bool, std::int64_t, double, std::unique_ptr<std::string>,
                 std::unique_ptr<BigInteger>, std::unique_ptr<Items>, std::unique_ptr<Members>>
        value_;
};

}  // namespace hywu::core
