// The schedule tables: what each evaluation of the denoiser is told, and what is made of its output.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/manifest.hpp"

namespace hywu::core {

// The rows that a request runs: one for each evaluation of the denoiser.
struct Rows {
    std::string sampler;
    std::int64_t steps = 0;
    float initial_scale = 0;          // standard deviation of the first latents
    std::vector<float> timesteps;     // [n]
    std::vector<float> coefficients;  // [n, width], row-major
    std::size_t width = 0;            // K
    std::vector<float> start;         // [S], of the first row; empty unless requests may start midway

    std::size_t size() const noexcept { return timesteps.size(); }
    const float* row(std::size_t i) const noexcept { return coefficients.data() + i * width; }
};

// The tables of schedule.safetensors.
class Schedule {
public:
    // Throws Error(bundle): the file cannot be read, or a table is missing or malformed.
    Schedule(const std::filesystem::path& path, Schedules section);

    const Schedules& section() const noexcept { return section_; }
    // K, the number of coefficients of a row.
    std::size_t width() const noexcept { return width_; }
    // The step counts that a sampler of the bundle takes, ascending.
    std::vector<std::int64_t> accepted(std::string_view sampler) const;
    // The rows for a step count; without one, the bundle's default, or the nearest that the sampler takes.
    // Where requests may start midway, the last ones: `strength`, above 0 and at most 1, is the part of the
    // steps to run; without one, the bundle's default.
    // Throws Error(input): no such sampler, it refuses the count, or it cannot start there; the message names
    // what it takes.
    Rows rows(const std::optional<std::string>& sampler = {}, std::optional<std::int64_t> steps = {},
              std::optional<double> strength = {}) const;

private:
    struct Table {
        std::vector<std::int64_t> offsets;
        std::vector<float> timesteps, coefficients, initial_scale, start;
        std::size_t width = 0, start_width = 0;
    };

    // How many rows a request leaves out that starts midway, as the pipelines of diffusers count.
    std::int64_t skipped(const std::string& sampler, std::int64_t steps, std::int64_t rows,
                         std::optional<double> strength) const;

    Schedules section_;
    std::map<std::string, Table, std::less<>> tables_;
    std::size_t width_ = 0;
};

// {1, 2, 3, 5} as "1 to 3, 5".
std::string ranges(const std::vector<std::int64_t>& numbers);

}  // namespace hywu::core
