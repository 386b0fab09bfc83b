#include "images/resize.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "core/error.hpp"

namespace hywu::images {

namespace {

// Pillow's arithmetic (src/libImaging/Resample.c): weights in double, then fixed point with 22 bits behind
// the point; along the rows and along the columns, rounded to bytes in between.
constexpr int precision_bits = 32 - 8 - 2;
constexpr double lobes = 3.0;
constexpr double pi = 3.14159265358979323846;

double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= pi;
    return std::sin(x) / x;
}

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

double lanczos(double x) { return -lobes <= x && x < lobes ? sinc(x) * sinc(x / lobes) : 0.0; }

// Which pixels make each new one, and their weights.
struct Weights {
    struct Window {
        int begin, count;
    };
    std::vector<Window> windows;
    std::vector<std::int32_t> weights;  // [size, stride]
    std::size_t stride = 0;
};

// Truncated as Pillow does it, which for what is below zero is not to the nearest.
int rounded(double value) {
    return static_cast<int>(value + 0.5);  // NOLINT(bugprone-incorrect-roundings)
}

Weights weights(int old_size, int new_size, core::Filter filter) {
    const bool cubic = filter == core::Filter::bicubic;
    const double scale = static_cast<double>(old_size) / new_size;
    const double filter_scale = std::max(scale, 1.0);
    const double support = (cubic ? 2.0 : lobes) * filter_scale, step = 1.0 / filter_scale;
    Weights result;
    result.stride = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
    result.windows.reserve(static_cast<std::size_t>(new_size));
    result.weights.resize(static_cast<std::size_t>(new_size) * result.stride);
    std::vector<double> window(result.stride);
    for (int i = 0; i < new_size; ++i) {
        const double center = (i + 0.5) * scale;
        const int begin = std::max(rounded(center - support), 0);
        const int count = std::min(rounded(center + support), old_size) - begin;
        double sum = 0.0;
        for (int j = 0; j < count; ++j) {
            const double x = (j + begin - center + 0.5) * step;
            const double weight = cubic ? bicubic(x) : lanczos(x);
            window[static_cast<std::size_t>(j)] = weight;
            sum += weight;
        }
        std::int32_t* fixed = result.weights.data() + static_cast<std::size_t>(i) * result.stride;
        for (int j = 0; j < count; ++j) {
            double weight = window[static_cast<std::size_t>(j)];
            if (sum != 0.0) weight /= sum;
            fixed[j] = static_cast<std::int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << precision_bits));
        }
        result.windows.push_back({begin, count});
    }
    return result;
}

std::uint8_t to_byte(std::int32_t sum) {
    return static_cast<std::uint8_t>(std::clamp(sum >> precision_bits, 0, 255));
}

constexpr std::int32_t half = 1 << (precision_bits - 1);

std::vector<std::uint8_t> resize_rows(const std::uint8_t* rgb, int width, int height, int new_width,
                                      core::Filter filter) {
    const Weights table = weights(width, new_width, filter);
    std::vector<std::uint8_t> result(3 * static_cast<std::size_t>(new_width) *
                                     static_cast<std::size_t>(height));
    std::uint8_t* out = result.data();
    for (int y = 0; y < height; ++y) {
        const std::uint8_t* row = rgb + 3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(y);
        const std::int32_t* weight = table.weights.data();
        for (const auto& [begin, count] : table.windows) {
            const std::uint8_t* pixel = row + 3 * static_cast<std::size_t>(begin);
            std::int32_t r = half, g = half, b = half;
            for (int i = 0; i < count; ++i, pixel += 3) {
                r += pixel[0] * weight[i];
                g += pixel[1] * weight[i];
                b += pixel[2] * weight[i];
            }
            *out++ = to_byte(r);
            *out++ = to_byte(g);
            *out++ = to_byte(b);
            weight += table.stride;
        }
    }
    return result;
}

std::vector<std::uint8_t> resize_columns(const std::uint8_t* rgb, int width, int height, int new_height,
                                         core::Filter filter) {
    const Weights table = weights(height, new_height, filter);
    const std::size_t row_bytes = 3 * static_cast<std::size_t>(width);
    std::vector<std::uint8_t> result(row_bytes * static_cast<std::size_t>(new_height));
    std::vector<std::int32_t> sums(row_bytes);
    std::uint8_t* out = result.data();
    const std::int32_t* weight = table.weights.data();
    for (const auto& [begin, count] : table.windows) {
        std::fill(sums.begin(), sums.end(), half);
        for (int i = 0; i < count; ++i) {
            const std::uint8_t* row = rgb + row_bytes * static_cast<std::size_t>(begin + i);
            const std::int32_t factor = weight[i];
            for (std::size_t x = 0; x < row_bytes; ++x) sums[x] += row[x] * factor;
        }
        for (const std::int32_t sum : sums) *out++ = to_byte(sum);
        weight += table.stride;
    }
    return result;
}

// Of the policy's sizes within its limits, that whose aspect is nearest to the photo's; of several the
// least, by width, then height.
std::optional<Size> nearest_aspect(const core::ImagePolicy& policy, int width, int height) {
    const double aspect = static_cast<double>(width) / height;
    std::optional<std::tuple<double, int, int>> best;
    for (const auto& [w, h] : policy.sizes) {
        if (std::min(w, h) < policy.min || std::max(w, h) > policy.max) continue;
        const double distance = std::abs(aspect - static_cast<double>(w) / static_cast<double>(h));
        const std::tuple one{distance, static_cast<int>(w), static_cast<int>(h)};
        if (!best || one < *best) best = one;
    }
    if (!best) return std::nullopt;
    return Size(std::get<1>(*best), std::get<2>(*best));
}

}  // namespace

Size working_size(const core::ImagePolicy& policy, int width, int height,
                  const std::optional<Size>& explicit_size) {
    if (explicit_size) {
        for (const int side : {explicit_size->first, explicit_size->second}) {
            if (side < policy.min || side > policy.max || side % policy.multiple != 0) {
                throw core::Error(core::ErrorKind::input,
                                  "The size " + std::to_string(explicit_size->first) + "x" +
                                      std::to_string(explicit_size->second) + " cannot be used",
                                  "Expected sides from " + std::to_string(policy.min) + " to " +
                                      std::to_string(policy.max) + " pixels, multiples of " +
                                      std::to_string(policy.multiple),
                                  "Give WIDTHxHEIGHT, or no size to keep the photo's aspect");
            }
        }
        return *explicit_size;
    }
    if (const std::optional<Size> offered = nearest_aspect(policy, width, height)) return *offered;
    const auto area = static_cast<double>(std::int64_t{width} * height);
    const int shorter = std::min(width, height);
    const auto min = static_cast<double>(policy.min);
    double scale = std::sqrt(static_cast<double>(policy.default_area) / area);
    if (!policy.enlarge) scale = std::min(scale, 1.0);
    if (shorter * scale < min) scale = min / shorter;
    const std::int64_t low = (policy.min + policy.multiple - 1) / policy.multiple * policy.multiple;
    const std::int64_t most = policy.max / policy.multiple, high = most * policy.multiple;
    const auto side = [&](int length) {
        const double multiples = std::floor(length * scale / static_cast<double>(policy.multiple) + 0.5);
        // A very long side of a picture that is enlarged may be beyond any integer.
        const auto rounded =
            static_cast<std::int64_t>(std::min(multiples, static_cast<double>(most))) * policy.multiple;
        return static_cast<int>(std::max(low, std::min(high, rounded)));
    };
    return {side(width), side(height)};
}

std::vector<Size> resized_sizes(const std::vector<core::Resize>& steps, int width, int height) {
    std::vector<Size> sizes;
    for (const core::Resize& step : steps) {
        const double area = static_cast<double>(std::int64_t{width} * height);
        const auto sides = [&](double (*to_integer)(double), double divisor, double factor) {
            const auto side = [&](int length) {
                const auto multiple = static_cast<double>(step.multiple);
                const double count = std::max(1.0, to_integer(length / divisor * factor / multiple));
                return static_cast<int>(std::min(count * multiple, double{1 << 30}));
            };
            return Size(side(width), side(height));
        };
        const auto nearest = [](double x) { return std::floor(x + 0.5); };
        const auto down = [](double x) { return std::floor(x); };
        const auto up = [](double x) { return std::ceil(x); };
        const auto wanted = [](const std::optional<std::int64_t>& pixels) {
            return static_cast<double>(*pixels);
        };
        Size made = sides(nearest, step.area ? std::sqrt(area / wanted(step.area)) : 1.0, 1.0);
        const std::int64_t pixels = std::int64_t{made.first} * made.second;
        if (step.max_area && pixels > *step.max_area) {
            made = sides(down, std::sqrt(area / wanted(step.max_area)), 1.0);
        } else if (step.min_area && pixels < *step.min_area) {
            made = sides(up, 1.0, std::sqrt(wanted(step.min_area) / area));
        }
        if (std::int64_t{made.first} * made.second > max_pixels) {
            throw core::Error(
                core::ErrorKind::input,
                "A photo of " + std::to_string(width) + "x" + std::to_string(height) +
                    " pixels would be brought to " + std::to_string(made.first) + "x" +
                    std::to_string(made.second),
                "Expected at most " + std::to_string(max_pixels) + " pixels",
                "Give a photo of another shape; if it is an ordinary one, the bundle is damaged");
        }
        sizes.push_back(made);
        std::tie(width, height) = made;
    }
    return sizes;
}

std::vector<std::uint8_t> resize(const std::uint8_t* rgb, int width, int height, int new_width,
                                 int new_height, core::Filter filter) {
    if (width == new_width && height == new_height) {
        return {rgb, rgb + 3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height)};
    }
    if (width == new_width) return resize_columns(rgb, width, height, new_height, filter);
    if (height == new_height) return resize_rows(rgb, width, height, new_width, filter);
    // Until version 12 Pillow began with the rows always. This rule of version 13 was read off its results.
    const bool columns_first =
        new_height < height && std::int64_t{height} - new_height > 2 * (std::int64_t{width} - new_width);
    if (columns_first) {
        return resize_rows(resize_columns(rgb, width, height, new_height, filter).data(), width, new_height,
                           new_width, filter);
    }
    return resize_columns(resize_rows(rgb, width, height, new_width, filter).data(), new_width, height,
                          new_height, filter);
}

std::vector<std::uint8_t> composite_on_white(const std::uint8_t* rgba, std::size_t count) {
    std::vector<std::uint8_t> result(3 * count);
    std::uint8_t* out = result.data();
    for (std::size_t i = 0; i < count; ++i, rgba += 4) {
        const std::uint32_t alpha = rgba[3];
        for (int channel = 0; channel < 3; ++channel) {
            // Pillow's division by 255, with seven more bits.
            const std::uint32_t sum = (rgba[channel] * alpha + 255 * (255 - alpha)) * 128 + (128 << 7);
            *out++ = static_cast<std::uint8_t>((((sum >> 8) + sum) >> 8) >> 7);
        }
    }
    return result;
}

}  // namespace hywu::images
