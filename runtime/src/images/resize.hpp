// The working size of a photograph, and how it gets there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "core/manifest.hpp"

namespace hywu::images {

// (width, height) in pixels.
using Size = std::pair<int, int>;

// The most pixels that a photograph may have.
inline constexpr std::int64_t max_pixels = 89'478'485;

// The size at which a photo of `width` × `height`, both at least 1, is edited: `explicit_size` if given, else
// by the policy; see "Image sizes" in docs/bundle.md.
// Throws core::Error(input): the explicit size is not a multiple within the policy's limits.
Size working_size(const core::ImagePolicy& policy, int width, int height,
                  const std::optional<Size>& explicit_size = {});

// The size after each of the steps, from a photo of `width` × `height`, both at least 1.
// Throws core::Error(input): it would be beyond max_pixels.
std::vector<Size> resized_sizes(const std::vector<core::Resize>& steps, int width, int height);

// Pixels uint8 [height, width, 3] brought to [new_height, new_width, 3] by resampling, Lanczos with three
// lobes or bicubic (a = -1/2): the bytes that Pillow gives. All sides are at least 1.
std::vector<std::uint8_t> resize(const std::uint8_t* rgb, int width, int height, int new_width,
                                 int new_height, core::Filter filter = core::Filter::lanczos);

// Pixels uint8 [count, 4], RGBA, on white: [count, 3].
std::vector<std::uint8_t> composite_on_white(const std::uint8_t* rgba, std::size_t count);

}  // namespace hywu::images
