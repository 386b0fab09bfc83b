// The errors that a user may meet, as in hywu_runtime.errors.
//
// A message has three parts: what is wrong with which thing, what was expected, what to do about it.
#pragma once

#include <cstddef>
#include <exception>
#include <string>
#include <string_view>

namespace hywu::core {

enum class ErrorKind { bundle, checkpoint, unsupported, delta, engine, device, input, cancelled };

// "BundleError", "DeltaError", …: the name of the Python class.
std::string_view name(ErrorKind kind);

class Error : public std::exception {
public:
    explicit Error(ErrorKind kind, std::string wrong, std::string expected = "", std::string remedy = "");

    ErrorKind kind() const noexcept { return kind_; }
    const std::string& wrong() const noexcept { return wrong_; }
    const std::string& expected() const noexcept { return expected_; }
    const std::string& remedy() const noexcept { return remedy_; }
    // One paragraph of up to three sentences, UTF-8.
    const char* what() const noexcept override { return text_.c_str(); }

private:
    ErrorKind kind_;
    std::string wrong_, expected_, remedy_, text_;
};

// `text` (UTF-8) as Python's ascii() writes it: quoted, escaped, cut to `limit` characters, so that hostile
// values cannot flood a message. Bytes that are not UTF-8 are written as \xNN.
std::string show(std::string_view text, std::size_t limit = 60);

}  // namespace hywu::core
