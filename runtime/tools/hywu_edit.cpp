// hywu-edit: edits one photograph, as `hywu edit`, on devices without Python.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>

#include "arguments.hpp"
#include "hywu/hywu.hpp"
#include "photo.hpp"
#include "terminal.hpp"

namespace {

using hywu::tools::Arguments;
using hywu::tools::bad_argument;
using hywu::tools::Option;
namespace fs = std::filesystem;

const std::vector<Option> options = {
    {"--out", "FILE", "The picture, PNG or JPEG.  [default: PHOTO's name with -edited.png]"},
    {"--steps", "N", "Steps of the scheduler.  [default: the bundle's]"},
    {"--strength", "X", "Part of the steps to run, from the photo on.  [default: the bundle's]"},
    {"--seed", "N", "Seed of the noise.  [default: 0]"},
    {"--delta-strength", "X", "Strength of the deltas; 0 is the base model.  [default: 1.0]"},
    {"--guidance", "[NAME=]X", "Guidance by the prompt, or the scale of that name; repeat for more.", true},
    {"--photo", "FILE", "Another photo, for a bundle that takes several; the last gives the size.", true},
    {"--image-guidance", "X", "Guidance by the photo.  [default: the bundle's]"},
    {"--negative-prompt", "TEXT", "What guidance leads away from."},
    {"--size", "WxH", "Size of the picture.  [default: near the photo's, aspect kept]"},
    {"--scheduler", "NAME", "One of the bundle's schedulers.  [default: its first]"},
    {"--deltas", "FILE", "Use these deltas instead of generated ones."},
    {"--save-deltas", "FILE", "Also write the generated deltas."},
    {"--backend", "NAME", "auto, tensorrt, tensorrt-rtx, ort-cuda or ort-cpu.  [default: auto]"},
    {"--variant", "NAME", "A precision variant of the bundle."},
    {"--engine", "KEY", "One of the bundle's engines.  [default: the newest that fits]"},
    {"--device", "N", "Index of the GPU.  [default: the first]"},
    {"--threads", "N", "CPU threads."},
    {"--low-memory", "", "Hold one stage of the model in memory at a time."},
    {"--verify", "", "Check the SHA-256 of the bundle's files first."},
    {"--source", "ID=DIR", "Where the checkpoint of a source with linked weights is; repeat for each.", true},
    {"--json", "", "Print one JSON object."},
    {"--verbose", "", "Log what happens to stderr."},
    {"--version", "", "Show the version and the backends, and exit."},
    {"--help", "", "Show this message and exit."},
};

hywu_cancel* interrupt = nullptr;
extern "C" void on_interrupt(int) { hywu_cancel_request(interrupt); }

extern "C" void on_log(void*, int32_t level, const char* message) {
    std::fprintf(stderr, "%s: %s\n",
                 level == HYWU_LOG_WARNING ? "Warning"
                 : level == HYWU_LOG_INFO  ? "Info"
                                           : "Debug",
                 message);
}

// Refuses, before any work is done, an output that cannot be written, or that is one of the others.
void check_output(const fs::path& path, const std::vector<fs::path>& others) {
    std::error_code ignored;
    const fs::path parent = path.parent_path().empty() ? fs::path(".") : path.parent_path();
    const bool folder = fs::is_directory(path, ignored);
    if (folder || !fs::is_directory(parent, ignored)) {
        throw bad_argument(
            path.string() +
                (folder ? " is a directory" : " cannot be written: there is no folder " + parent.string()),
            "Expected the path of a file in a folder that exists", "Correct the path");
    }
    for (const fs::path& other : others) {
        if (fs::weakly_canonical(path, ignored) == fs::weakly_canonical(other, ignored) ||
            fs::equivalent(path, other, ignored)) {
            throw bad_argument(path.string() + " is to be written, and is also " + other.string(),
                               "Expected another path for the result", "Choose another one");
        }
    }
}

int edit(int count, char** values) {
    const auto start = std::chrono::steady_clock::now();
    const Arguments arguments(count, values, options);
    if (arguments.has("--help")) {
        hywu::tools::print_help("hywu-edit BUNDLE PHOTO PROMPT [OPTIONS]", "Edits PHOTO as PROMPT says.",
                                options);
        return 0;
    }
    if (arguments.has("--version")) {
        std::printf("hywu-edit %s\n", hywu::version().c_str());
        for (const auto& [name, missing] : hywu::backends()) {
            const std::string version = hywu::backend_version(name);
            std::printf("  %-12s  %s\n", name.c_str(),
                        missing.empty() ? ("usable " + version).c_str() : missing.c_str());
        }
        return 0;
    }
    if (arguments.positional.size() != 3) {
        throw bad_argument(
            "There are " + std::to_string(arguments.positional.size()) + " arguments beside the options",
            "Expected BUNDLE PHOTO PROMPT", "See --help");
    }
    const fs::path bundle = arguments.positional[0], photo_path = arguments.positional[1];
    const std::string& prompt = arguments.positional[2];
    const fs::path out = arguments.text("--out").value_or(photo_path.stem().string() + "-edited.png");
    const auto deltas_file = arguments.text("--deltas"), save_deltas = arguments.text("--save-deltas");
    hywu::tools::check_suffix(out);
    std::vector<fs::path> inputs = {photo_path};
    const std::vector<std::string> more = arguments.texts("--photo");
    inputs.insert(inputs.end(), more.begin(), more.end());
    if (deltas_file) inputs.emplace_back(*deltas_file);
    check_output(out, inputs);
    if (save_deltas) {
        if (deltas_file) {
            throw bad_argument("--save-deltas was given beside --deltas", "Expected one of them",
                               "The deltas are in a file already");
        }
        inputs.push_back(out);
        check_output(*save_deltas, inputs);
    }
    hywu_set_log(on_log, nullptr, arguments.has("--verbose") ? HYWU_LOG_INFO : HYWU_LOG_WARNING);

    hywu::EditOptions request;
    request.seed = arguments.unsigned_integer("--seed").value_or(0);
    request.steps = static_cast<std::int32_t>(arguments.integer("--steps", 1, 1 << 30).value_or(0));
    request.strength = arguments.part("--strength").value_or(0);
    if (const auto x = arguments.number("--delta-strength")) request.delta_strength = {*x};
    request.guidance = arguments.scales("--guidance");
    if (const auto x = arguments.number("--image-guidance")) request.guidance["image"] = {*x};
    request.sampler = arguments.text("--scheduler").value_or("");
    if (const auto size = arguments.size("--size")) std::tie(request.width, request.height) = *size;
    hywu::EditorOptions how;
    how.backend = arguments.text("--backend").value_or("");
    how.variant = arguments.text("--variant").value_or("");
    how.engine = arguments.text("--engine").value_or("");
    how.device = static_cast<std::int32_t>(arguments.integer("--device", 0, 4096).value_or(-1));
    how.threads = static_cast<std::int32_t>(arguments.integer("--threads", 1, 4096).value_or(0));
    how.low_memory = arguments.has("--low-memory");
    hywu::BundleOptions where;
    where.verify = arguments.has("--verify");
    where.sources = arguments.sources("--source");

    std::optional<hywu::Deltas> deltas;
    if (deltas_file) deltas = hywu::Deltas::load(*deltas_file);
    hywu::Editor editor = hywu::Editor::load(bundle, how, where);
    hywu::Cancel cancel = hywu::Cancel::create();
    interrupt = cancel.get();
    std::signal(SIGINT, on_interrupt);
    request.cancel = &cancel;
    // Several photos have a size each, which the library works out.
    const hywu::tools::Image photo = more.empty() ? hywu::tools::load_photo(photo_path, editor, request)
                                                  : hywu::tools::read_image(photo_path);
    hywu::Sample sample = {{photo.pixels.data(), photo.width, photo.height},
                           prompt,
                           arguments.text("--negative-prompt").value_or("")};
    std::vector<hywu::tools::Image> others;
    others.reserve(more.size());
    for (const std::string& path : more) {
        const hywu::tools::Image& other = others.emplace_back(hywu::tools::read_image(path));
        sample.more_photos.push_back({other.pixels.data(), other.width, other.height});
    }
    hywu::tools::ProgressBar bar;
    request.progress = [&](std::int32_t done, std::int32_t total) { bar.show(done, total); };
    if (save_deltas) {
        std::vector<hywu::Pixels> photos = {sample.photo};
        photos.insert(photos.end(), sample.more_photos.begin(), sample.more_photos.end());
        deltas = editor.generate(photos, prompt, request);
    }
    if (deltas) request.deltas = {&*deltas};
    const hywu::Images images = editor.edit({&sample, 1}, request);
    bar.clear();
    std::signal(SIGINT, SIG_DFL);

    const hywu::Pixels picture = images[0];
    const auto bytes = picture.bytes();
    hywu::tools::write_image(out, {picture.width, picture.height, {bytes.begin(), bytes.end()}});
    if (save_deltas) deltas->save(*save_deltas);
    const hywu::Timings timings = editor.timings();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (arguments.has("--json")) {
        nlohmann::ordered_json graphs = nlohmann::ordered_json::object();
        for (const auto& [name, time] : timings.graphs) graphs[name] = time;
        nlohmann::ordered_json result;
        result["out"] = out.u8string();
        result["width"] = picture.width;
        result["height"] = picture.height;
        result["seed"] = request.seed;
        result["backend"] = editor.backend();
        result["deltas"] = save_deltas ? nlohmann::ordered_json(*save_deltas) : nlohmann::ordered_json();
        result["seconds"] = {
            {"total", seconds}, {"load", timings.load}, {"graphs", graphs}, {"steps", timings.steps}};
        std::printf("%s\n",
                    result.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace).c_str());
        return 0;
    }
    double total = 0;
    for (const double step : timings.steps) total += step;
    const std::size_t evaluations = timings.steps.size();
    std::printf(
        "%s: %dx%d, %zu evaluation%s of %s, %s in all, on %s\n", out.u8string().c_str(), picture.width,
        picture.height, evaluations, evaluations == 1 ? "" : "s",
        hywu::tools::time_text(total / static_cast<double>(std::max<std::size_t>(evaluations, 1))).c_str(),
        hywu::tools::time_text(seconds).c_str(), editor.backend().c_str());
    return 0;
}

}  // namespace

int main(int count, char** values) {
    return hywu::tools::run([&] { return edit(count, values); });
}
