#include "core/schedule.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>
#include <system_error>
#include <utility>

#include "core/error.hpp"
#include "core/files.hpp"
#include "core/safetensors.hpp"
#include "core/text.hpp"

namespace hywu::core {

namespace {

Error damaged(const std::string& problem) {
    return Error(ErrorKind::bundle, problem, "Expected the tables that docs/bundle.md describes",
                 "Copy or export the bundle again");
}

// A dtype of the file as NumPy calls it, for messages.
std::string numpy_name(const std::string& word) {
    if (const std::optional<Dtype> dtype = stored_dtype(word)) return std::string(name(*dtype));
    if (word == "I16") return "int16";
    if (word == "U16") return "uint16";
    if (word == "U32") return "uint32";
    if (word == "U64") return "uint64";
    return word;
}

Array table(const SafetensorsFile& file, const std::string& tensor, Dtype dtype, std::size_t dimensions) {
    const auto found = file.header().tensors.find(tensor);
    std::string problem;
    if (found == file.header().tensors.end()) {
        problem = "missing";
    } else if (stored_dtype(found->second.dtype) != dtype || found->second.shape.size() != dimensions) {
        problem = numpy_name(found->second.dtype) + " " + repr(found->second.shape);
    } else {
        return file.read(found->second, dtype);
    }
    throw damaged("The schedule tensor " + tensor + " is " + problem + ", not " + std::string(name(dtype)) +
                  " with " + std::to_string(dimensions) + " dimensions");
}

std::vector<float> floats(const Array& array) {
    return {array.as<float>(), array.as<float>() + array.size()};
}

bool finite(const std::vector<float>& numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](float number) { return std::isfinite(number); });
}

}  // namespace

Schedule::Schedule(const std::filesystem::path& path, Schedules section) : section_(std::move(section)) {
    const auto unreadable = [&](const std::string& reason) {
        return damaged(display(path.filename()) + " cannot be read: " + reason);
    };
    try {
        const SafetensorsFile file(path);
        std::set<std::int64_t> widths;
        for (const auto& [sampler, entry] : section_.samplers) {
            const Array offsets = table(file, sampler + ".offsets", Dtype::int64, 1);
            const Array timesteps = table(file, sampler + ".timesteps", Dtype::float32, 1);
            const Array coefficients = table(file, sampler + ".coefficients", Dtype::float32, 2);
            const Array initial = table(file, sampler + ".initial_scale", Dtype::float32, 1);
            Table& table = tables_[sampler];
            table.offsets.assign(offsets.as<std::int64_t>(), offsets.as<std::int64_t>() + offsets.size());
            table.timesteps = floats(timesteps);
            table.coefficients = floats(coefficients);
            table.initial_scale = floats(initial);
            std::int64_t starts = timesteps.shape()[0];
            if (section_.strength) {
                const Array start = hywu::core::table(file, sampler + ".start", Dtype::float32, 2);
                table.start = floats(start);
                table.start_width = static_cast<std::size_t>(start.shape()[1]);
                starts = start.shape()[0];
            }
            const bool sound =
                offsets.size() >= 2 && offsets.size() == initial.size() + 1 && table.offsets.front() == 0 &&
                std::is_sorted(table.offsets.begin(), table.offsets.end()) &&
                table.offsets.back() == timesteps.shape()[0] &&
                table.offsets.back() == coefficients.shape()[0] && table.offsets.back() == starts &&
                finite(table.timesteps) && finite(table.coefficients) && finite(table.initial_scale) &&
                finite(table.start);
            if (!sound)
                throw damaged("The schedule of sampler " + sampler + " is inconsistent or not finite");
            widths.insert(coefficients.shape()[1]);
        }
        if (widths.size() > 1) {
            throw damaged("The samplers of " + display(path.filename()) + " have " +
                          repr(std::vector<std::int64_t>(widths.begin(), widths.end())) + " coefficients");
        }
        width_ = static_cast<std::size_t>(*widths.begin());  // the manifest has a default sampler
    } catch (const SafetensorsError& error) {
        throw unreadable(error.what());
    } catch (const std::system_error& error) {
        throw unreadable(error.code().message());
    }
}

std::vector<std::int64_t> Schedule::accepted(std::string_view sampler) const {
    std::vector<std::int64_t> counts;
    const auto found = tables_.find(sampler);
    if (found == tables_.end()) return counts;
    const std::vector<std::int64_t>& offsets = found->second.offsets;
    for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
        if (offsets[n] < offsets[n + 1]) counts.push_back(static_cast<std::int64_t>(n));
    }
    return counts;
}

std::int64_t Schedule::skipped(const std::string& sampler, std::int64_t steps, std::int64_t rows,
                               std::optional<double> strength) const {
    if (!section_.strength) {
        if (!strength) return 0;
        throw Error(ErrorKind::input, "`strength` was given, but this bundle starts every edit from noise",
                    "Expected none", "Leave it out");
    }
    const double value = strength.value_or(section_.strength->default_strength);
    if (!(value > 0 && value <= 1)) {
        throw Error(ErrorKind::input, "`strength` is " + repr(value),
                    "Expected a number above 0 and at most 1",
                    "Correct it: 1 keeps nothing of the photo, a small one nearly all of it");
    }
    const std::optional<std::int64_t> order = section_.samplers.at(sampler).order;
    if (!order) {
        if (value == 1) return 0;
        std::vector<std::string> able;
        for (const auto& [name, entry] : section_.samplers) {
            if (entry.order) able.push_back(name);
        }
        std::sort(able.begin(), able.end());
        throw Error(
            ErrorKind::input,
            "The sampler " + sampler + " cannot start midway, as a strength of " + repr(value) + " asks",
            "Its steps build on earlier ones",
            "Use a strength of 1" + (able.empty() ? "" : ", or the sampler " + join(able, " or ")));
    }
    const auto all = static_cast<double>(steps);
    const auto first = static_cast<std::int64_t>(std::max(all - std::min(all * value, all), 0.0)) * *order;
    if (first < rows) return first;
    throw Error(ErrorKind::input,
                "No step is left of " + std::to_string(steps) + " with a strength of " + repr(value),
                "Expected at least one", "Raise the strength or the number of steps");
}

Rows Schedule::rows(const std::optional<std::string>& sampler, std::optional<std::int64_t> steps,
                    std::optional<double> strength) const {
    const std::string& name = sampler ? *sampler : section_.default_sampler;
    const auto found = tables_.find(name);
    if (found == tables_.end()) {
        std::vector<std::string> names;
        for (const auto& [known, table] : tables_) names.push_back(known);
        throw Error(ErrorKind::input, "This bundle has no sampler " + show(name),
                    "It has " + join(names, ", "), "Choose one of these");
    }
    const std::vector<std::int64_t> counts = accepted(name);
    if (!steps) {
        const auto nearest =
            std::min_element(counts.begin(), counts.end(), [&](std::int64_t a, std::int64_t b) {
                return std::abs(a - section_.default_steps) < std::abs(b - section_.default_steps);
            });
        steps = nearest == counts.end() ? 0 : *nearest;
    }
    if (!std::binary_search(counts.begin(), counts.end(), *steps)) {
        throw Error(ErrorKind::input, std::to_string(*steps) + " steps cannot be made with sampler " + name,
                    "It takes " + ranges(counts), "Choose another number of steps");
    }
    const Table& table = found->second;
    const auto n = static_cast<std::size_t>(*steps);
    const std::int64_t last = table.offsets[n + 1];
    const std::int64_t first = table.offsets[n] + skipped(name, *steps, last - table.offsets[n], strength);
    const auto width = static_cast<std::int64_t>(width_);
    const auto starts = static_cast<std::int64_t>(table.start_width);
    return {name,
            *steps,
            table.initial_scale[n],
            {table.timesteps.begin() + first, table.timesteps.begin() + last},
            {table.coefficients.begin() + first * width, table.coefficients.begin() + last * width},
            width_,
            {table.start.begin() + first * starts, table.start.begin() + (first + 1) * starts}};
}

std::string ranges(const std::vector<std::int64_t>& numbers) {
    std::vector<std::string> parts;
    for (std::size_t start = 0, end = 0; start < numbers.size(); start = end) {
        for (end = start + 1; end < numbers.size() && numbers[end] == numbers[end - 1] + 1;) ++end;
        parts.push_back(std::to_string(numbers[start]));
        if (end - start > 1) parts.back() += " to " + std::to_string(numbers[end - 1]);
    }
    return parts.empty() ? "no number of steps" : join(parts, ", ");
}

}  // namespace hywu::core
