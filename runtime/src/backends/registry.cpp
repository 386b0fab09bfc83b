#include "backends/registry.hpp"

#include <algorithm>
#include <array>

#include "core/error.hpp"
#include "core/log.hpp"
#if defined(HYWU_HAVE_ONNXRUNTIME)
#include "backends/onnxruntime/onnxruntime.hpp"
#endif
#if defined(HYWU_HAVE_TENSORRT)
#include "backends/tensorrt/tensorrt.hpp"
#endif

namespace hywu::backends {

using core::Error;
using core::ErrorKind;
using core::show;

namespace {

constexpr std::array<std::string_view, 4> order = {"tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu"};

std::vector<Entry> all_entries() {
    std::vector<Entry> built;
    [[maybe_unused]] const auto add = [&](std::vector<Entry> more) {
        for (Entry& entry : more) built.push_back(std::move(entry));
    };
#if defined(HYWU_HAVE_ONNXRUNTIME)
    add(onnxruntime_entries());
#endif
#if defined(HYWU_HAVE_TENSORRT)
    add(tensorrt_entries());
#endif
    std::vector<Entry> result;
    for (const std::string_view name : order) {
        const auto found =
            std::find_if(built.begin(), built.end(), [&](const Entry& e) { return e.name == name; });
        if (found != built.end()) {
            result.push_back(std::move(*found));
        } else {
            result.push_back({std::string(name),
                              [] { return std::string("this library was built without it"); }, nullptr,
                              nullptr});
        }
    }
    return result;
}

void check_range(const char* name, const std::optional<int>& number, int least) {
    if (!number || (*number >= least && *number <= 4096)) return;
    throw Error(ErrorKind::input, std::string("`") + name + "` is " + std::to_string(*number),
                "Expected an integer from " + std::to_string(least) + " to 4096, or None", "Correct it");
}

}  // namespace

const std::vector<Entry>& entries() {
    static const auto* const instance = new std::vector<Entry>(all_entries());
    return *instance;
}

bool is_compiled(std::string_view name) {
    return name == core::name(core::EngineBackend::tensorrt) ||
           name == core::name(core::EngineBackend::tensorrt_rtx);
}

void check_options(const Options& options) {
    check_range("threads", options.threads, 1);
    check_range("device", options.device, 0);
}

std::unique_ptr<Backend> create_backend(std::string_view name, const Options& options,
                                        const std::vector<Entry>& among) {
    const auto wanted =
        std::find_if(among.begin(), among.end(), [&](const Entry& entry) { return entry.name == name; });
    if (name != "auto" && wanted == among.end()) {
        std::string known;
        for (const Entry& entry : among) known += (known.empty() ? "" : ", ") + entry.name;
        throw Error(ErrorKind::input, "There is no backend " + show(name), "Expected auto or one of " + known,
                    "Choose one of these");
    }
    check_options(options);
    if (wanted != among.end() && !wanted->missing()) return wanted->create(options);
    std::string usable, reasons;
    const Entry* best = nullptr;
    for (const Entry& entry : among) {
        if (name == "auto" && is_compiled(entry.name)) continue;
        if (const auto reason = entry.missing()) {
            reasons += (reasons.empty() ? "" : "; ") + entry.name + ": " + *reason;
        } else {
            usable += (usable.empty() ? "" : ", ") + entry.name;
            if (best == nullptr) best = &entry;
        }
    }
    if (wanted != among.end()) {
        throw Error(ErrorKind::device, "Backend " + wanted->name + " cannot be used: " + *wanted->missing(),
                    "Usable here: " + (usable.empty() ? "none" : usable),
                    "Choose one of these, or backend=\"auto\"");
    }
    if (best == nullptr) {
        throw Error(ErrorKind::device, "No backend can be used", reasons, "Install ONNX Runtime");
    }
    core::log(core::LogLevel::info, "backend " + best->name + " chosen among " + usable);
    return best->create(options);
}

}  // namespace hywu::backends
