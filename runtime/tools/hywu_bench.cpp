// hywu-bench: how long each stage of an edit takes. docs/cpp-performance.md describes what it prints.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <thread>

#include "arguments.hpp"
#include "hywu/hywu.hpp"
#include "photo.hpp"
#include "terminal.hpp"

namespace {

using hywu::tools::Arguments;
using hywu::tools::bad_argument;
using hywu::tools::Option;
using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

const std::vector<Option> options = {
    {"--photo", "FILE", "Edit this photo.  [default: a gradient of the bundle's default size]"},
    {"--prompt", "TEXT", "The instruction.  [default: \"make it sepia\"]"},
    {"--batch", "N", "Samples of one edit, each with its own deltas.  [default: 1]"},
    {"--steps", "N", "Steps of the scheduler.  [default: the bundle's]"},
    {"--strength", "X", "Part of the steps to run, from the photo on.  [default: the bundle's]"},
    {"--scheduler", "NAME", "One of the bundle's schedulers.  [default: its first]"},
    {"--guidance", "[NAME=]X", "Guidance by the prompt, or the scale of that name; repeat for more.", true},
    {"--image-guidance", "X", "Guidance by the photo.  [default: the bundle's]"},
    {"--size", "WxH", "Size of the picture.  [default: near the photo's]"},
    {"--runs", "N", "Edits that are measured.  [default: 20]"},
    {"--warm-up", "N", "Edits before, at most; they end when times are stable.  [default: 20]"},
    {"--backend", "NAME", "auto, tensorrt, tensorrt-rtx, ort-cuda or ort-cpu.  [default: auto]"},
    {"--variant", "NAME", "A precision variant of the bundle."},
    {"--engine", "KEY", "One of the bundle's engines.  [default: the newest that fits]"},
    {"--device", "N", "Index of the GPU.  [default: the first]"},
    {"--threads", "N", "CPU threads."},
    {"--low-memory", "", "Hold one stage of the model in memory at a time."},
    {"--source", "ID=DIR", "Where the checkpoint of a source with linked weights is; repeat for each.", true},
    {"--json", "", "Print one JSON object instead of a table."},
    {"--out", "FILE", "Also write the JSON object to a file."},
    {"--help", "", "Show this message and exit."},
};

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Between the two nearest ranks, as numpy.percentile.
double percentile(const std::vector<double>& sorted, double p) {
    const double rank = p / 100 * static_cast<double>(sorted.size() - 1);
    const auto below = static_cast<std::size_t>(rank);
    const std::size_t above = std::min(below + 1, sorted.size() - 1);
    return sorted[below] + (rank - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

double variation(const std::vector<double>& values) {
    const double mean =
        std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
    double squares = 0;
    for (const double value : values) squares += (value - mean) * (value - mean);
    return mean > 0 ? std::sqrt(squares / static_cast<double>(values.size())) / mean : 0;
}

Json summary(std::vector<double> values) {
    const double mean =
        std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
    const double spread = variation(values);
    std::sort(values.begin(), values.end());
    Json result;
    result["count"] = values.size();
    result["mean"] = mean;
    result["min"] = values.front();
    for (const int p : {50, 90, 95, 99}) result["p" + std::to_string(p)] = percentile(values, p);
    result["max"] = values.back();
    result["variation"] = spread;
    return result;
}

// Whether the last four edits took the same time, within 5 %.
bool stable(const std::vector<double>& times) {
    if (times.size() < 4) return false;
    const auto [least, most] = std::minmax_element(times.end() - 4, times.end());
    return *most <= *least * 1.05;
}

int bench(int count, char** values) {
    const Arguments arguments(count, values, options);
    if (arguments.has("--help")) {
        hywu::tools::print_help("hywu-bench BUNDLE [OPTIONS]", "Measures the stages of an edit with BUNDLE.",
                                options);
        return 0;
    }
    if (arguments.positional.size() != 1) {
        throw bad_argument(
            "There are " + std::to_string(arguments.positional.size()) + " arguments beside the options",
            "Expected BUNDLE", "See --help");
    }
    hywu::EditorOptions how;
    how.backend = arguments.text("--backend").value_or("");
    how.variant = arguments.text("--variant").value_or("");
    how.engine = arguments.text("--engine").value_or("");
    how.device = static_cast<std::int32_t>(arguments.integer("--device", 0, 4096).value_or(-1));
    how.threads = static_cast<std::int32_t>(arguments.integer("--threads", 1, 4096).value_or(0));
    how.low_memory = arguments.has("--low-memory");
    hywu::BundleOptions where;
    where.sources = arguments.sources("--source");
    const auto batch = static_cast<std::size_t>(arguments.integer("--batch", 1, 4096).value_or(1));
    const auto runs = static_cast<std::size_t>(arguments.integer("--runs", 1, 1000000).value_or(20));
    const auto most_warm_up =
        static_cast<std::size_t>(arguments.integer("--warm-up", 0, 1000000).value_or(20));

    const auto start = Clock::now();
    const hywu::Bundle bundle = hywu::Bundle::open(arguments.positional[0], where);
    hywu::Editor editor = hywu::Editor::create(bundle, how);
    const double opened = seconds_since(start);

    hywu::EditOptions request;
    request.steps = static_cast<std::int32_t>(arguments.integer("--steps", 1, 1 << 30).value_or(0));
    request.strength = arguments.part("--strength").value_or(0);
    request.sampler = arguments.text("--scheduler").value_or("");
    request.guidance = arguments.scales("--guidance");
    if (const auto x = arguments.number("--image-guidance")) request.guidance["image"] = {*x};
    if (const auto size = arguments.size("--size")) std::tie(request.width, request.height) = *size;
    hywu::tools::Image photo;
    if (const auto path = arguments.text("--photo")) {
        photo = hywu::tools::load_photo(*path, editor, request);
    } else {
        const hywu_limits limits = editor.limits();
        photo.width = request.width;
        photo.height = request.height;
        if (photo.width == 0) {
            const auto side =
                static_cast<std::int32_t>(std::sqrt(static_cast<double>(limits.size_default_area)));
            std::tie(photo.width, photo.height) = editor.working_size(std::max(side, 64), std::max(side, 64));
        }
        for (std::int32_t y = 0; y < photo.height; ++y) {
            for (std::int32_t x = 0; x < photo.width; ++x) {
                photo.pixels.push_back(static_cast<std::uint8_t>(255 * x / photo.width));
                photo.pixels.push_back(static_cast<std::uint8_t>(255 * y / photo.height));
                photo.pixels.push_back(static_cast<std::uint8_t>((x ^ y) & 255));
            }
        }
    }
    hywu::Sample sample = {{photo.pixels.data(), photo.width, photo.height},
                           arguments.text("--prompt").value_or("make it sepia")};
    // A bundle that takes several photos gets this one several times.
    const hywu_limits limits = editor.limits();
    sample.more_photos.assign(std::max<std::size_t>(limits.photo_count, 1) - 1, sample.photo);
    const std::vector<hywu::Sample> samples(batch, sample);
    const bool generates = editor.limits().generates != 0;

    std::int32_t width = 0, height = 0;
    const auto edit_once = [&] {
        const auto begin = Clock::now();
        const hywu::Images images = editor.edit(samples, request);
        width = images[0].width;
        height = images[0].height;
        return seconds_since(begin);
    };
    const double first = edit_once();
    const hywu::Timings cold = editor.timings();
    std::vector<double> warm;
    while (warm.size() < most_warm_up && !stable(warm)) warm.push_back(edit_once());

    hywu::tools::ProgressBar bar;
    std::map<std::string, std::vector<double>> times;
    std::vector<std::string> order;
    const auto add = [&](const std::string& stage, double seconds) {
        if (times[stage].empty()) order.push_back(stage);
        times[stage].push_back(seconds);
    };
    for (std::size_t run = 0; run < runs; ++run) {
        request.seed = run;
        const double whole = edit_once();
        const hywu::Timings timings = editor.timings();
        for (const auto& [graph, seconds] : timings.graphs) add(graph, seconds);
        for (std::size_t k = 0; k < timings.steps.size(); ++k) {
            add("step", timings.steps[k]);
            if (timings.steps.size() > 1) add(k == 0 ? "first_step" : "steady_step", timings.steps[k]);
        }
        add("edit", whole);
        bar.show(static_cast<std::int32_t>(run + 1), static_cast<std::int32_t>(runs));
    }
    bar.clear();
    if (generates) {
        std::vector<hywu::Pixels> photos = {sample.photo};
        photos.insert(photos.end(), sample.more_photos.begin(), sample.more_photos.end());
        (void)editor.generate(photos, sample.prompt, request);  // another plan: its buffers are made here
        for (std::size_t run = 0; run < runs; ++run) {
            const auto begin = Clock::now();
            (void)editor.generate(photos, sample.prompt, request);
            add("generate_call", seconds_since(begin));
        }
    }

    Json result;
    result["schema"] = "hywu.bench/1";
    result["bundle"] = bundle.name();
    result["variant"] = how.variant.empty() ? Json() : Json(how.variant);
    result["backend"] = editor.backend();
    result["runtime"] = "c++";
    result["versions"] = {{"hywu", hywu::version()}, {"backend", hywu::backend_version(editor.backend())}};
    result["threads"] = how.threads > 0 ? Json(how.threads) : Json();
    result["processors"] = std::thread::hardware_concurrency();
    result["low_memory"] = how.low_memory;
    result["request"] = {{"width", width},
                         {"height", height},
                         {"batch", batch},
                         {"evaluations", cold.steps.size()},
                         {"sampler", request.sampler.empty() ? Json() : Json(request.sampler)}};
    result["cold"] = {{"open", opened}, {"first_edit", first}, {"load", cold.load}};
    result["warm_up"] = {{"edits", warm.size() + 1}, {"stable", stable(warm)}};
    result["runs"] = runs;
    const std::vector<double>& whole = times["edit"];
    result["edits_per_second"] =
        static_cast<double>(runs * batch) / std::accumulate(whole.begin(), whole.end(), 0.0);
    Json stages = Json::object();
    for (const std::string& stage : order) stages[stage] = summary(times[stage]);
    result["stages"] = stages;
    result["peak_memory"] = hywu::tools::peak_memory();
    Json warnings = Json::array();
    if (!stable(warm)) warnings.push_back("the times were not stable when the measurement began");
    if (variation(times["edit"]) > 0.025)
        warnings.push_back("the times of the edits vary by more than 2.5 %");
    if (runs < 100) warnings.push_back("p99 of fewer than 100 edits says little");
    result["warnings"] = warnings;
    const std::string text = result.dump(1) + "\n";
    if (const auto path = arguments.text("--out")) {
        std::ofstream stream(*path, std::ios::binary);
        stream << text;
        if (!stream.flush())
            throw bad_argument(*path + " cannot be written", "Expected a writable folder",
                               "Choose another path");
    }
    if (arguments.has("--json")) {
        std::fputs(text.c_str(), stdout);
        return 0;
    }
    std::printf("%s on %s %s: %zu x %dx%d, %zu evaluations\n\n", bundle.name().c_str(),
                editor.backend().c_str(), hywu::backend_version(editor.backend()).c_str(), batch, width,
                height, cold.steps.size());
    std::printf("  %-20s %8s %10s %10s %10s %10s\n", "stage", "count", "p50 ms", "p90 ms", "p95 ms",
                "p99 ms");
    for (const std::string& stage : order) {
        const Json& numbers = stages[stage];
        std::printf("  %-20s %8zu", stage.c_str(), numbers["count"].get<std::size_t>());
        for (const char* p : {"p50", "p90", "p95", "p99"})
            std::printf(" %10.2f", 1000 * numbers[p].get<double>());
        std::printf("\n");
    }
    std::printf("\n  open %.3f s, first edit %.3f s (of which loading %.3f s), peak memory %.0f MB\n", opened,
                first, cold.load, static_cast<double>(hywu::tools::peak_memory()) / 1e6);
    for (const auto& warning : warnings)
        std::fprintf(stderr, "Warning: %s\n", warning.get<std::string>().c_str());
    return 0;
}

}  // namespace

int main(int count, char** values) {
    return hywu::tools::run([&] { return bench(count, values); });
}
