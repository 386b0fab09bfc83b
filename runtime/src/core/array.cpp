#include "core/array.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

namespace hywu::core {

namespace {

std::byte* allocate(std::size_t bytes) {
    return static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{Array::alignment}));
}

}  // namespace

std::size_t count(const Shape& shape) {
    constexpr std::size_t most = std::numeric_limits<std::ptrdiff_t>::max() / 8;
    std::size_t product = 1;
    for (const std::int64_t size : shape) {
        if (size < 0) throw std::length_error("a dimension is negative");
        if (size == 0) return 0;
        if (static_cast<std::uint64_t>(size) > most / product)
            throw std::length_error("an array is too large");
        product *= static_cast<std::size_t>(size);
    }
    return product;
}

void Array::Free::operator()(std::byte* memory) const noexcept {
    ::operator delete[](memory, std::align_val_t{alignment});
}

Array::Array(Dtype dtype, Shape shape)
    : dtype_(dtype),
      shape_(std::move(shape)),
      bytes_(count(shape_) * item_size(dtype)),
      data_(allocate(bytes_)) {
    if (bytes_ > 0) std::memset(data_.get(), 0, bytes_);
}

Array::Array(Dtype dtype, Shape shape, const void* data)
    : dtype_(dtype),
      shape_(std::move(shape)),
      bytes_(count(shape_) * item_size(dtype)),
      data_(allocate(bytes_)) {
    if (bytes_ > 0) std::memcpy(data_.get(), data, bytes_);
}

Array::Array(const Array& other) : Array(other.dtype_, other.shape_, other.data_.get()) {}

Array& Array::operator=(const Array& other) {
    if (this != &other) *this = Array(other);
    return *this;
}

Array::Array(Array&& other) noexcept
    : dtype_(other.dtype_),
      shape_(std::exchange(other.shape_, {})),
      bytes_(std::exchange(other.bytes_, 0)),
      data_(std::move(other.data_)) {}

Array& Array::operator=(Array&& other) noexcept {
    dtype_ = other.dtype_;
    shape_ = std::exchange(other.shape_, {});
    bytes_ = std::exchange(other.bytes_, 0);
    data_ = std::move(other.data_);
    return *this;
}

bool all_finite(Dtype dtype, const std::byte* data, std::size_t bytes) {
    if (dtype == Dtype::float32) {
        const auto* values = reinterpret_cast<const float*>(data);
        return std::all_of(values, values + bytes / sizeof(float), [](float x) { return std::isfinite(x); });
    }
    if (dtype == Dtype::float16) {
        const auto* values = reinterpret_cast<const std::uint16_t*>(data);
        return std::all_of(values, values + bytes / 2,
                           [](std::uint16_t x) { return (x & 0x7C00U) != 0x7C00U; });
    }
    return true;
}

}  // namespace hywu::core
