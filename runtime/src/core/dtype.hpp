// Element types of tensors.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace hywu::core {

enum class Dtype { boolean, uint8, int8, int32, int64, float16, bfloat16, float32, float64 };

// Bytes of one element.
constexpr std::size_t item_size(Dtype dtype) {
    switch (dtype) {
        case Dtype::boolean:
        case Dtype::uint8:
        case Dtype::int8:
            return 1;
        case Dtype::float16:
        case Dtype::bfloat16:
            return 2;
        case Dtype::int32:
        case Dtype::float32:
            return 4;
        case Dtype::int64:
        case Dtype::float64:
            return 8;
    }
    return 0;
}

// The word of the manifest: "bool", "uint8", …, "float32".
constexpr std::string_view name(Dtype dtype) {
    switch (dtype) {
        case Dtype::boolean:
            return "bool";
        case Dtype::uint8:
            return "uint8";
        case Dtype::int8:
            return "int8";
        case Dtype::int32:
            return "int32";
        case Dtype::int64:
            return "int64";
        case Dtype::float16:
            return "float16";
        case Dtype::bfloat16:
            return "bfloat16";
        case Dtype::float32:
            return "float32";
        case Dtype::float64:
            return "float64";
    }
    return "";
}

// The dtype of C++ element types; bfloat16 and float16 have none.
template <class T>
constexpr Dtype dtype_of() = delete;
template <>
constexpr Dtype dtype_of<bool>() {
    return Dtype::boolean;
}
template <>
constexpr Dtype dtype_of<unsigned char>() {
    return Dtype::uint8;
}
template <>
constexpr Dtype dtype_of<signed char>() {
    return Dtype::int8;
}
template <>
constexpr Dtype dtype_of<int>() {
    return Dtype::int32;
}
template <>
constexpr Dtype dtype_of<long>() {
    return sizeof(long) == 8 ? Dtype::int64 : Dtype::int32;
}
template <>
constexpr Dtype dtype_of<long long>() {
    return Dtype::int64;
}
template <>
constexpr Dtype dtype_of<float>() {
    return Dtype::float32;
}
template <>
constexpr Dtype dtype_of<double>() {
    return Dtype::float64;
}

}  // namespace hywu::core
