// An array in host memory.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.hpp"

namespace hywu::core {

using Shape = std::vector<std::int64_t>;

// The number of elements; 1 for a scalar.
// Throws std::length_error if a dimension is negative, or if it is more than memory could hold.
std::size_t count(const Shape& shape);

// Owning, row-major, contiguous, aligned to 64 bytes. Copies are deep; what was moved from can only be
// assigned to.
class Array {
public:
    static constexpr std::size_t alignment = 64;

    Array() : Array(Dtype::float32, {0}) {}
    // The elements are zero. Throws std::length_error (see `count`), std::bad_alloc.
    Array(Dtype dtype, Shape shape);
    // A copy of `data`, `count(shape)` elements of `dtype`.
    Array(Dtype dtype, Shape shape, const void* data);

    Array(const Array& other);
    Array& operator=(const Array& other);
    Array(Array&& other) noexcept;
    Array& operator=(Array&& other) noexcept;
    ~Array() = default;

    Dtype dtype() const noexcept { return dtype_; }
    const Shape& shape() const noexcept { return shape_; }
    // Elements, and their size in bytes.
    std::size_t size() const noexcept { return bytes_ / item_size(dtype_); }
    std::size_t bytes() const noexcept { return bytes_; }
    std::byte* data() noexcept { return data_.get(); }
    const std::byte* data() const noexcept { return data_.get(); }

    // The elements as T, whose dtype must be the array's.
    template <class T>
    T* as() noexcept {
        assert(dtype_of<T>() == dtype_);
        return reinterpret_cast<T*>(data_.get());
    }
    template <class T>
    const T* as() const noexcept {
        assert(dtype_of<T>() == dtype_);
        return reinterpret_cast<const T*>(data_.get());
    }

private:
    struct Free {
        void operator()(std::byte* memory) const noexcept;
    };

    Dtype dtype_;
    Shape shape_;
    std::size_t bytes_ = 0;
    std::unique_ptr<std::byte[], Free> data_;
};

// Whether all numbers are finite; those of other dtypes than float16 and float32, which alone the tensors of
// a bundle may have, always are.
bool all_finite(Dtype dtype, const std::byte* data, std::size_t bytes);

}  // namespace hywu::core
