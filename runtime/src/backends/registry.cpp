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

const Entry& choose(std::string_view name) {
    std::string known, usable, reasons;
    const Entry *wanted = nullptr, *best = nullptr;
    for (const Entry& entry : entries()) {
        known += (known.empty() ? "" : ", ") + entry.name;
        if (entry.name == name) wanted = &entry;
    }
    if (name != "auto" && wanted == nullptr) {
        throw Error(ErrorKind::input, "There is no backend " + show(name), "Expected auto or one of " + known,
                    "Choose one of these");
    }
    if (wanted != nullptr && !wanted->missing()) return *wanted;
    for (const Entry& entry : entries()) {
        if (const auto reason = entry.missing()) {
            reasons += (reasons.empty() ? "" : "; ") + entry.name + ": " + *reason;
        } else {
            usable += (usable.empty() ? "" : ", ") + entry.name;
            if (best == nullptr) best = &entry;
        }
    }
    if (wanted != nullptr) {
        throw Error(ErrorKind::device, "Backend " + wanted->name + " cannot be used: " + *wanted->missing(),
                    "Usable here: " + (usable.empty() ? "none" : usable),
                    "Choose one of these, or backend=\"auto\"");
    }
    if (best == nullptr) {
        throw Error(ErrorKind::device, "No backend can be used", reasons, "Install ONNX Runtime or TensorRT");
    }
    core::log(core::LogLevel::info, "backend " + best->name + " chosen among " + usable);
    return *best;
}

std::unique_ptr<Backend> create_backend(std::string_view name, const Options& options) {
    const Entry& entry = choose(name);
    check_range("threads", options.threads, 1);
    check_range("device", options.device, 0);
    return entry.create(options);
}

}  // namespace hywu::backends
