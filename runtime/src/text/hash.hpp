// A keyed hash for tables whose keys come from files: nobody can write a file whose keys collide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace hywu::text {

// SipHash-1-3 (Aumasson and Bernstein, 2012) with a key that is drawn once per process.
std::uint64_t keyed_hash(const void* data, std::size_t size) noexcept;

struct KeyedHash {
    std::size_t operator()(std::string_view key) const noexcept {
        return static_cast<std::size_t>(keyed_hash(key.data(), key.size()));
    }
    std::size_t operator()(std::uint64_t key) const noexcept {
        return static_cast<std::size_t>(keyed_hash(&key, sizeof key));
    }
};

}  // namespace hywu::text
