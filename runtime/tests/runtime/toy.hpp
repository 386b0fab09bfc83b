// The made-up family of tests/runtime/toy_bundle.py, which lies in tests/data/toy.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/array.hpp"
#include "runtime/editor.hpp"

namespace hywu::testing {

inline std::filesystem::path toy_path() { return std::filesystem::path(HYWU_SOURCE_DIR) / "tests/data/toy"; }

inline runtime::SharedBundle toy_bundle() {
    return {std::make_shared<const core::Bundle>(core::Bundle::open(toy_path())),
            std::make_shared<runtime::SessionPool>()};
}

// A request for the toy: photos of 16 x 8 pixels that depend on `seed`, a region, a prompt.
struct ToyRequest {
    std::vector<std::vector<std::uint8_t>> pixels;
    std::vector<float> region;
    runtime::EditOptions options;

    explicit ToyRequest(std::size_t count = 1, unsigned seed = 1, std::string prompt = "abc") {
        std::uint32_t state = seed * 2654435761U + 1;
        const auto next = [&] { return state = state * 1664525U + 1013904223U; };
        for (std::size_t i = 0; i < count; ++i) {
            pixels.emplace_back(16 * 8 * 3);
            for (std::uint8_t& value : pixels.back()) value = static_cast<std::uint8_t>(next() >> 24);
        }
        region.resize(count * 4 * 2);
        for (float& value : region) value = static_cast<float>(next() >> 8) / 16777216.0F;
        options.count = count;
        for (const auto& photo : pixels) options.photos.push_back({photo.data(), 16, 8, 16 * 3});
        options.prompts.assign(count, std::move(prompt));
        options.inputs.emplace_back(
            "region",
            runtime::View(core::Dtype::float32, {static_cast<std::int64_t>(count), 1, 2, 4}, region.data()));
        options.seed = seed;
    }
    ToyRequest(const ToyRequest&) = delete;
    ToyRequest& operator=(const ToyRequest&) = delete;
};

inline std::vector<std::uint8_t> edit(runtime::Editor& editor, const runtime::EditOptions& options) {
    std::vector<std::uint8_t> picture;
    editor.edit(options, [&](const core::Shape& shape) {
        picture.resize(core::count(shape));
        return picture.data();
    });
    return picture;
}

}  // namespace hywu::testing
