// Which of a bundle's engines serves a request, and what `hywu build` would have to make.
//
// The rules, which every runtime follows: an engine is usable if it was made for the backend and the variant,
// is not stale, and its version and its GPU are those at hand; *newest* is the last in the manifest. A
// request is served by the newest usable engine that has every graph it needs and covers its sizes.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/manifest.hpp"

namespace hywu::core {

// What an engine must have been built for to run here: `tensorrt` or `tensorrt-rtx`, the version of its
// library, the GPU's compute capability ("8.6") and name.
struct Target {
    std::string backend, version, capability, device;
};

using AxisSizes = std::map<std::string, std::int64_t, std::less<>>;
using AxisRanges = Ordered<std::array<std::int64_t, 3>>;

// Why an engine cannot run on `target`; nothing if it can.
std::optional<std::string> obstacle(const Manifest& manifest, const std::string& key, const Target& target);

// The engines that run on `target`, the newest first; with `key` this one and no other. `root` is the
// bundle's directory, for the commands in messages.
// Throws Error(input): there is no engine `key`; Error(engine): none is usable, why, and what to build.
std::vector<std::string> usable(const std::filesystem::path& root, const Manifest& manifest,
                                const Target& target, const std::optional<std::string>& variant = {},
                                const std::optional<std::string>& key = {});

// The first of some usable engines that has all `graphs` and takes the sizes of `axes`.
// Throws Error(input): a size is outside the shapes of them all; Error(engine): none has all graphs.
std::string covering(const std::filesystem::path& root, const Manifest& manifest,
                     const std::vector<std::string>& keys, const AxisSizes& axes,
                     const std::set<std::string>& graphs, const Target& target);

// Throws Error(input) unless the bundle has an engine `key`.
void check_key(const Manifest& manifest, const std::string& key);

// The policy for a photo's size, within what an engine takes: see "Variants and engines" in docs/bundle.md.
std::optional<ImagePolicy> narrowed(const Manifest& manifest, const Engine& engine);

// The axes of a photo: height and width, where they are axes.
std::vector<std::string> sides(const Manifest& manifest);

// The `hywu build` that makes an engine for `target`, ready for a shell.
std::string build_command(const std::filesystem::path& root, const Manifest& manifest, const Target& target,
                          const std::optional<std::string>& variant, const AxisRanges& shapes = {});

}  // namespace hywu::core
