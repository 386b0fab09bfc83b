// Standard normal numbers that are the same in every language.
//
// Philox 4×32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in counter mode,
// then Box–Muller in float64 and one rounding to float32. docs/bundle.md gives the keys and counters.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace hywu::core::noise {

// Philox 4×32 with 10 rounds.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                    std::array<std::uint32_t, 2> key) noexcept;

// Fills `out` with `count` standard normal numbers of one sample, in row-major order. `sample` is its place
// in the batch, or 0 for a sample with a seed of its own; `draw` is 0 for the initial noise, k for evaluation
// k = 1, 2, …. Allocates nothing.
void normal(float* out, std::size_t count, std::uint64_t seed, std::uint32_t sample,
            std::uint32_t draw) noexcept;

}  // namespace hywu::core::noise
