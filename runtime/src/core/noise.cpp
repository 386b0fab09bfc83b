#include "core/noise.hpp"

#include <algorithm>
#include <cmath>

namespace hywu::core::noise {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                    std::array<std::uint32_t, 2> key) noexcept {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xd2511f53} * counter[0];
        const std::uint64_t p1 = std::uint64_t{0xcd9e8d57} * counter[2];
        counter = {static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(p1),
                   static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ key[1],
                   static_cast<std::uint32_t>(p0)};
        key = {key[0] + 0x9e3779b9U, key[1] + 0xbb67ae85U};
    }
    return counter;
}

void normal(float* out, std::size_t count, std::uint64_t seed, std::uint32_t sample,
            std::uint32_t draw) noexcept {
    constexpr double two_pi = 6.283185307179586;
    const std::array<std::uint32_t, 2> key = {static_cast<std::uint32_t>(seed),
                                              static_cast<std::uint32_t>(seed >> 32)};
    for (std::size_t start = 0; start < count; start += 4) {
        const auto words = philox({static_cast<std::uint32_t>(start / 4), draw, sample, 0}, key);
        std::array<float, 4> numbers{};
        for (std::size_t pair = 0; pair < 4; pair += 2) {
            const double u0 = (words[pair] + 0.5) * 0x1p-32;
            const double u1 = (words[pair + 1] + 0.5) * 0x1p-32;
            const double radius = std::sqrt(-2.0 * std::log(u0));
            const double angle = two_pi * u1;
            numbers[pair] = static_cast<float>(radius * std::cos(angle));
            numbers[pair + 1] = static_cast<float>(radius * std::sin(angle));
        }
        std::copy_n(numbers.begin(), std::min<std::size_t>(4, count - start), out + start);
    }
}

}  // namespace hywu::core::noise
