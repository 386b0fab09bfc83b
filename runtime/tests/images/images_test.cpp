// Sizes and resampling. That the bytes are Pillow's is shown in tests/cpp; these are some of them.
#include <doctest/doctest.h>

#include <numeric>
#include <vector>

#include "core/error.hpp"
#include "images/resize.hpp"

using namespace hywu;
using images::Size;

namespace {

core::ImagePolicy policy() {
    core::ImagePolicy result;
    result.multiple = 32;
    result.min = 64;
    result.max = 1024;
    result.default_area = 65536;
    return result;
}

// A picture without a pattern, the same everywhere.
std::vector<std::uint8_t> picture(int width, int height) {
    std::vector<std::uint8_t> pixels(3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height));
    std::uint32_t state = 1;
    for (std::uint8_t& value : pixels) {
        state = state * 1664525 + 1013904223;
        value = static_cast<std::uint8_t>(state >> 24);
    }
    return pixels;
}

std::uint64_t sum(const std::vector<std::uint8_t>& bytes) {
    return std::accumulate(bytes.begin(), bytes.end(), std::uint64_t{0},
                           [](std::uint64_t a, std::uint8_t b) { return a * 31 + b; });
}

}  // namespace

TEST_CASE("working sizes") {
    CHECK(images::working_size(policy(), 4000, 3000) == Size(288, 224));
    CHECK(images::working_size(policy(), 100, 100) == Size(96, 96));    // never enlarged …
    CHECK(images::working_size(policy(), 10, 20) == Size(64, 128));     // … but to the least side
    CHECK(images::working_size(policy(), 20000, 1) == Size(1024, 64));  // clamped
    CHECK(images::working_size(policy(), 100, 100, Size(64, 1024)) == Size(64, 1024));
    for (const Size& size : {Size(63, 64), Size(64, 1056), Size(0, 64), Size(-64, 64)}) {
        CHECK_THROWS_AS(images::working_size(policy(), 100, 100, size), core::Error);
    }
}

TEST_CASE("resampling gives Pillow's bytes") {
    struct Case {
        int width, height, new_width, new_height;
        std::uint64_t sum;
    };
    const std::vector<Case> cases = {
        {40, 30, 16, 24, 3732685485948738019U}, {40, 30, 64, 20, 1803894081388999047U},
        {40, 30, 80, 90, 8820756342569548352U}, {30, 40, 29, 12, 15051160755015717633U},
        {7, 5, 100, 5, 895153080327654566U},    {7, 50, 7, 3, 2630161961566580783U},
        {1, 9, 4, 4, 18171154774847578176U},    {33, 21, 33, 21, 699461887418009666U},
    };
    for (const Case& c : cases) {
        CAPTURE(c.new_width);
        CAPTURE(c.new_height);
        const auto pixels =
            images::resize(picture(c.width, c.height).data(), c.width, c.height, c.new_width, c.new_height);
        CHECK(pixels.size() ==
              3 * static_cast<std::size_t>(c.new_width) * static_cast<std::size_t>(c.new_height));
        CHECK(sum(pixels) == c.sum);
    }
    const std::vector<std::uint8_t> white(3 * 50 * 40, 255);
    CHECK(images::resize(white.data(), 50, 40, 13, 71) == std::vector<std::uint8_t>(3 * 13 * 71, 255));
}

TEST_CASE("transparency on white") {
    const std::vector<std::uint8_t> rgba = {10, 20, 30, 255, 10, 20, 30, 0, 0, 100, 255, 128};
    CHECK(images::composite_on_white(rgba.data(), 3) ==
          std::vector<std::uint8_t>{10, 20, 30, 255, 255, 255, 127, 177, 255});
}
