// Structs that grow: `struct_size` first, further fields at the end.
//
// `released` lists the sizes that the struct had in earlier versions, smallest first. Callers built with an
// earlier header pass one of them; callers built with a later header pass a larger one, and what this version
// does not know must be zero.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <string>

#include "api/errors.hpp"

namespace hywu::api {

inline constexpr std::size_t max_struct_size =
    4096;  // beyond any version: a size that was never set must not be believed

template <class T>
void check_struct_size(std::size_t size, std::initializer_list<std::size_t> released, const char* what) {
    const bool known =
        size == sizeof(T) || std::find(released.begin(), released.end(), size) != released.end();
    if (known || (size > sizeof(T) && size <= max_struct_size)) return;
    throw input_error(std::string(what) + " has struct_size " + std::to_string(size),
                      "Expected " + std::to_string(sizeof(T)) + ", its size in this version",
                      std::string("Set it with ") + what + "_init, or to sizeof(" + what + ")");
}

// The caller's struct as this version's: `defaults` for fields that it does not have. NULL: `defaults`.
template <class T>
T read_struct(const T* given, const T& defaults, std::initializer_list<std::size_t> released,
              const char* what) {
    if (given == nullptr) return defaults;
    std::size_t size = 0;
    std::memcpy(&size, given, sizeof size);
    check_struct_size<T>(size, released, what);
    const auto* const bytes = reinterpret_cast<const unsigned char*>(given);
    if (size > sizeof(T) &&
        std::any_of(bytes + sizeof(T), bytes + size, [](unsigned char b) { return b != 0; })) {
        throw input_error(std::string(what) + " sets fields that this version of the library does not know",
                          "Expected zeros after the first " + std::to_string(sizeof(T)) + " bytes",
                          "Use a newer library, or leave these fields alone");
    }
    T result = defaults;
    std::memcpy(&result, given, std::min(size, sizeof(T)));
    return result;
}

// Fills the caller's struct, of `size` bytes, with values.
template <class T>
void write_struct(T* out, std::size_t size, T values, std::initializer_list<std::size_t> released,
                  const char* what) {
    need(out, what);
    check_struct_size<T>(size, released, what);
    values.struct_size = size;
    std::memcpy(out, &values, std::min(size, sizeof(T)));
    if (size > sizeof(T)) std::memset(reinterpret_cast<unsigned char*>(out) + sizeof(T), 0, size - sizeof(T));
}

// The same where the caller has set struct_size.
template <class T>
void write_struct(T* out, const T& values, std::initializer_list<std::size_t> released, const char* what) {
    need(out, what);
    std::size_t size = 0;
    std::memcpy(&size, out, sizeof size);
    write_struct(out, size, values, released, what);
}

}  // namespace hywu::api
