// The C ABI: arguments checked and converted, calls handed to the editor, exceptions turned into statuses.
#include "hywu/hywu.h"

#include <atomic>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "api/errors.hpp"
#include "api/structs.hpp"
#include "backends/registry.hpp"
#include "core/array.hpp"
#include "core/deltas.hpp"
#include "core/files.hpp"
#include "core/log.hpp"
#include "runtime/editor.hpp"

using hywu::api::CallbackError;
using hywu::api::guard;
using hywu::api::input_error;
using hywu::api::need;
namespace api = hywu::api;
namespace backends = hywu::backends;
namespace core = hywu::core;
namespace runtime = hywu::runtime;

struct hywu_bundle {
    runtime::SharedBundle shared;
};
struct hywu_editor {
    std::shared_ptr<runtime::Editor> editor;
    std::string backend;
};
struct hywu_deltas {
    core::Deltas deltas;
};
struct hywu_images {
    core::Array pixels;  // [count, height, width, 3]
};
struct hywu_tensors {
    std::vector<std::pair<std::string, core::Array>> tensors;
};
struct hywu_cancel {
    std::shared_ptr<std::atomic<bool>> flag = std::make_shared<std::atomic<bool>>(false);
};

namespace {

constexpr std::size_t max_list =
    65536;  // entries of any list but the batch: more is a length that was never set
constexpr int64_t max_bytes = int64_t{1} << 46;

// ---- Defaults ----

hywu_bundle_params bundle_defaults() {
    hywu_bundle_params params = {};
    params.struct_size = sizeof params;
    return params;
}

// Sizes of hywu_editor_params in earlier headers: without `engine`.
constexpr std::initializer_list<std::size_t> editor_sizes = {offsetof(hywu_editor_params, engine)};

hywu_editor_params editor_defaults() {
    hywu_editor_params params = {};
    params.struct_size = sizeof params;
    params.device = -1;
    return params;
}

// The same of hywu_edit_params, without `strength`, and of hywu_limits, without `default_strength`.
constexpr std::initializer_list<std::size_t> edit_sizes = {offsetof(hywu_edit_params, strength)};
constexpr std::initializer_list<std::size_t> generate_sizes = {offsetof(hywu_generate_params, photo_count)};
constexpr std::initializer_list<std::size_t> limits_sizes = {offsetof(hywu_limits, default_strength)};

hywu_edit_params edit_defaults() {
    hywu_edit_params params = {};
    params.struct_size = sizeof params;
    params.count = 1;
    params.delta_strength = 1.0;
    params.photo_count = 1;
    return params;
}

hywu_generate_params generate_defaults() {
    hywu_generate_params params = {};
    params.struct_size = sizeof params;
    params.prompt_length = HYWU_TERMINATED;
    params.photo_count = 1;
    return params;
}

hywu_run_params run_defaults() {
    hywu_run_params params = {};
    params.struct_size = sizeof params;
    params.delta_strength = 1.0;
    return params;
}

// ---- Arguments ----

void check_reserved(int32_t value, const char* what) {
    if (value == 0) return;
    throw input_error(std::string("`reserved` of ") + what + " is " + std::to_string(value), "Expected 0",
                      std::string("Start with ") + what + "_init");
}

bool flag(int32_t value, const char* name) {
    if (value == 0 || value == 1) return value == 1;
    throw input_error(std::string("`") + name + "` is " + std::to_string(value), "Expected 0 or 1",
                      "Correct it");
}

void check_list(const void* list, std::size_t count, const char* name) {
    if (count > max_list) {
        throw input_error(std::string("`") + name + "` has " + std::to_string(count) + " entries",
                          "Expected at most " + std::to_string(max_list), "Correct its count");
    }
    if (count != 0) need(list, name);
}

std::string entry(const char* name, std::size_t index) {
    return std::string(name) + "[" + std::to_string(index) + "]";
}

// A text of a list; `lengths` may be NULL.
std::vector<std::string> texts(const char* const* list, const std::size_t* lengths, std::size_t count,
                               const char* name) {
    std::vector<std::string> result;
    if (list == nullptr) return result;
    result.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        need(list[i], entry(name, i).c_str());
        if (lengths == nullptr || lengths[i] == HYWU_TERMINATED) {
            result.emplace_back(list[i]);
        } else {
            result.emplace_back(list[i], lengths[i]);
        }
    }
    return result;
}

std::optional<core::Dtype> dtype_of(int32_t dtype) {
    switch (dtype) {
        case HYWU_DTYPE_UINT8:
            return core::Dtype::uint8;
        case HYWU_DTYPE_INT32:
            return core::Dtype::int32;
        case HYWU_DTYPE_INT64:
            return core::Dtype::int64;
        case HYWU_DTYPE_FLOAT16:
            return core::Dtype::float16;
        case HYWU_DTYPE_FLOAT32:
            return core::Dtype::float32;
        case HYWU_DTYPE_BFLOAT16:
            return core::Dtype::bfloat16;
        case HYWU_DTYPE_FLOAT64:
            return core::Dtype::float64;
        default:
            return std::nullopt;
    }
}

runtime::View view(const hywu_tensor& tensor, const std::string& name) {
    const std::optional<core::Dtype> dtype = dtype_of(tensor.dtype);
    if (!dtype) {
        throw input_error("Tensor " + core::show(name) + " has dtype " + std::to_string(tensor.dtype),
                          "Expected one of HYWU_DTYPE_…", "Correct it");
    }
    if (tensor.rank < 0 || tensor.rank > HYWU_MAX_RANK) {
        throw input_error("Tensor " + core::show(name) + " has rank " + std::to_string(tensor.rank),
                          "Expected 0 to " + std::to_string(HYWU_MAX_RANK), "Correct it");
    }
    core::Shape shape(tensor.shape, tensor.shape + tensor.rank);
    auto bytes = static_cast<int64_t>(core::item_size(*dtype));
    bool empty = false;
    for (const int64_t size : shape) {
        if (size < 0 || (size > 0 && bytes > max_bytes / size)) {
            throw input_error("Tensor " + core::show(name) + " has shape " + runtime::shape_text(shape),
                              "Expected sizes of at least 0, that memory could hold", "Correct it");
        }
        empty |= size == 0;
        bytes *= size > 0 ? size : 1;
    }
    if (!empty) need(tensor.data, ("data of tensor " + core::show(name)).c_str());
    return {*dtype, std::move(shape), tensor.data};
}

// An array that somebody holds, whose dtype is one that bundles have.
hywu_tensor tensor_of(const std::string& name, const core::Array& array) {
    hywu_tensor tensor = {};
    tensor.name = name.c_str();
    tensor.data = array.data();
    for (int32_t dtype = HYWU_DTYPE_UINT8; dtype <= HYWU_DTYPE_FLOAT64; ++dtype) {
        if (dtype_of(dtype) == array.dtype()) tensor.dtype = dtype;
    }
    tensor.rank = static_cast<int32_t>(array.shape().size());
    std::copy(array.shape().begin(), array.shape().end(), tensor.shape);
    return tensor;
}

runtime::NamedViews views(const hywu_tensor* tensors, std::size_t count, const char* list) {
    check_list(tensors, count, list);
    runtime::NamedViews result;
    for (std::size_t i = 0; i < count; ++i) {
        need(tensors[i].name, (entry(list, i) + ".name").c_str());
        result.emplace_back(tensors[i].name, view(tensors[i], tensors[i].name));
    }
    return result;
}

runtime::Photo photo(const hywu_pixels& pixels, const std::string& name) {
    need(pixels.data, (name + ".data").c_str());
    if (pixels.width < 1 || pixels.height < 1) {
        throw input_error("`" + name + "` has " + std::to_string(pixels.width) + "x" +
                              std::to_string(pixels.height) + " pixels",
                          "Expected at least one", "Give another photo");
    }
    const std::size_t row = static_cast<std::size_t>(pixels.width) * 3;
    if (pixels.stride != 0 && pixels.stride < row) {
        throw input_error("`" + name + "` has a stride of " + std::to_string(pixels.stride) + " bytes",
                          "Expected 0, or at least the " + std::to_string(row) + " of a row", "Correct it");
    }
    return {pixels.data, pixels.width, pixels.height, pixels.stride != 0 ? pixels.stride : row};
}

std::optional<runtime::Size> size(int32_t width, int32_t height) {
    if (width == 0 && height == 0) return std::nullopt;
    return runtime::Size{width, height};
}

std::function<bool()> cancelled(const hywu_cancel* cancel) {
    if (cancel == nullptr) return {};
    return [flag = cancel->flag] { return flag->load(std::memory_order_relaxed); };
}

std::vector<double> values(double one, const double* each, std::size_t count) {
    return each != nullptr ? std::vector<double>(each, each + count) : std::vector<double>{one};
}

// The lists of a caller that knows nothing of several photos are not read beyond their end.
void check_photo_count(const runtime::Editor& editor, std::size_t count) {
    const std::size_t wanted = editor.limits().photos;
    if (count == wanted) return;
    throw input_error("`photo_count` is " + std::to_string(count),
                      "This bundle takes " + std::to_string(wanted) + " for each sample",
                      "Give so many (hywu-edit --photo adds one), or export with other --images");
}

// `names` is what the caller knows the editor by.
runtime::EditOptions edit_options(const runtime::Editor& editor, const hywu_edit_params* given) {
    need(given, "params");
    const hywu_edit_params params = api::read_struct(given, edit_defaults(), edit_sizes, "hywu_edit_params");
    check_reserved(params.reserved, "hywu_edit_params");
    const std::size_t count = params.count;
    if (count == 0)
        throw input_error("There is no request", "Expected photos with their instructions",
                          "Give at least one");
    if (editor.limits().edits) editor.check_batch(count);  // before the lists are read
    runtime::EditOptions options;
    options.count = count;
    if (!editor.limits().edits) return options;  // is refused
    check_photo_count(editor, params.photo_count);
    for (std::size_t i = 0; params.photos != nullptr && i < count * params.photo_count; ++i) {
        options.photos.push_back(photo(params.photos[i], entry("photos", i)));
    }
    options.prompts = texts(params.prompts, params.prompt_lengths, count, "prompts");
    options.negative_prompts =
        texts(params.negative_prompts, params.negative_prompt_lengths, count, "negative_prompts");
    options.seed = params.seed;
    if (params.seeds != nullptr) options.seeds.assign(params.seeds, params.seeds + count);
    check_list(params.guidance, params.guidance_count, "guidance");
    for (std::size_t i = 0; i < params.guidance_count; ++i) {
        const hywu_guidance& guidance = params.guidance[i];
        need(guidance.name, (entry("guidance", i) + ".name").c_str());
        options.guidance.emplace_back(guidance.name, values(guidance.scale, guidance.scales, count));
    }
    options.strengths = values(params.delta_strength, params.delta_strengths, count);
    if (params.delta_count > 1 && params.delta_count != count) {
        throw input_error("`deltas` has " + std::to_string(params.delta_count) + " entries",
                          "Expected 1, or " + std::to_string(count) + ", one set for each photo",
                          "Correct `delta_count`");
    }
    check_list(params.deltas, params.delta_count, "deltas");
    for (std::size_t i = 0; i < params.delta_count; ++i) {
        need(params.deltas[i], entry("deltas", i).c_str());
        options.deltas.push_back(&params.deltas[i]->deltas);
    }
    if (params.sampler != nullptr) options.sampler = params.sampler;
    if (params.steps != 0) options.steps = params.steps;
    if (params.strength != 0) options.strength = params.strength;
    options.size = size(params.width, params.height);
    if (params.noise != nullptr) options.noise = view(*params.noise, "noise");
    if (params.latents != nullptr) options.latents = view(*params.latents, "latents");
    options.inputs = views(params.inputs, params.input_count, "inputs");
    if (params.progress != nullptr) {
        options.progress = [callback = params.progress, user = params.progress_user](std::size_t done,
                                                                                     std::size_t total) {
            int32_t stop = 0;
            try {
                stop = callback(user, static_cast<int32_t>(done), static_cast<int32_t>(total));
            } catch (...) {
                throw CallbackError("progress");
            }
            if (stop != 0) throw core::Error(core::ErrorKind::cancelled, "The request was cancelled");
        };
    }
    options.cancelled = cancelled(params.cancel);
    return options;
}

// The name of an entry, or null after the last.
template <class T>
const char* key_at(const core::Ordered<T>& entries, std::size_t index) {
    if (index >= entries.size()) return nullptr;
    return (entries.begin() + static_cast<std::ptrdiff_t>(index))->first.c_str();
}

template <class Handle>
void give(Handle** out, std::unique_ptr<Handle> handle) {
    *out = handle.release();
}

std::shared_ptr<runtime::Editor> held(const hywu_editor* editor) {
    need(editor, "editor");
    return editor->editor;
}

std::vector<const core::Deltas*> sets_of(const hywu_deltas* const* sets, std::size_t count) {
    check_list(sets, count, "sets");
    std::vector<const core::Deltas*> result;
    for (std::size_t i = 0; i < count; ++i) {
        need(sets[i], entry("sets", i).c_str());
        result.push_back(&sets[i]->deltas);
    }
    return result;
}

void give_deltas(hywu_deltas** out, core::Deltas deltas) {
    give(out, std::make_unique<hywu_deltas>(hywu_deltas{std::move(deltas)}));
}

runtime::SharedBundle open_bundle(const char* path, const hywu_bundle_params* given) {
    need(path, "path");
    const hywu_bundle_params params = api::read_struct(given, bundle_defaults(), {}, "hywu_bundle_params");
    check_reserved(params.reserved, "hywu_bundle_params");
    core::OpenOptions options;
    options.verify = flag(params.verify, "verify");
    check_list(params.source_ids, params.source_count, "source_ids");
    check_list(params.source_directories, params.source_count, "source_directories");
    for (std::size_t i = 0; i < params.source_count; ++i) {
        need(params.source_ids[i], entry("source_ids", i).c_str());
        need(params.source_directories[i], entry("source_directories", i).c_str());
        options.sources[params.source_ids[i]] = core::path_of(params.source_directories[i]);
    }
    return {std::make_shared<const core::Bundle>(core::Bundle::open(core::path_of(path), options)),
            std::make_shared<runtime::SessionPool>()};
}

std::unique_ptr<hywu_editor> make_editor(runtime::SharedBundle shared, const hywu_editor_params* given) {
    const hywu_editor_params params =
        api::read_struct(given, editor_defaults(), editor_sizes, "hywu_editor_params");
    check_reserved(params.reserved, "hywu_editor_params");
    runtime::EditorOptions options;
    if (params.backend != nullptr) options.backend = params.backend;
    if (params.variant != nullptr) options.variant = params.variant;
    if (params.engine != nullptr) options.engine = params.engine;
    if (params.device != -1) options.device.device = params.device;
    if (params.threads != 0) options.device.threads = params.threads;
    options.low_memory = flag(params.low_memory, "low_memory");
    auto editor = std::make_shared<runtime::Editor>(std::move(shared), options);
    std::string backend = editor->backend();
    return std::make_unique<hywu_editor>(hywu_editor{std::move(editor), std::move(backend)});
}

}  // namespace

extern "C" {

// ---- Versions, errors, logs ----

int32_t hywu_version(void) { return HYWU_VERSION; }

#define HYWU_TEXT_OF(x) #x
#define HYWU_TEXT(x) HYWU_TEXT_OF(x)
const char* hywu_version_string(void) {
    return HYWU_TEXT(HYWU_VERSION_MAJOR) "." HYWU_TEXT(HYWU_VERSION_MINOR) "." HYWU_TEXT(HYWU_VERSION_PATCH);
}

const char* hywu_status_name(hywu_status status) {
    switch (status) {
        case HYWU_OK:
            return "HYWU_OK";
        case HYWU_ERROR_BUNDLE:
            return "HYWU_ERROR_BUNDLE";
        case HYWU_ERROR_CHECKPOINT:
            return "HYWU_ERROR_CHECKPOINT";
        case HYWU_ERROR_UNSUPPORTED:
            return "HYWU_ERROR_UNSUPPORTED";
        case HYWU_ERROR_DELTA:
            return "HYWU_ERROR_DELTA";
        case HYWU_ERROR_ENGINE:
            return "HYWU_ERROR_ENGINE";
        case HYWU_ERROR_DEVICE:
            return "HYWU_ERROR_DEVICE";
        case HYWU_ERROR_INPUT:
            return "HYWU_ERROR_INPUT";
        case HYWU_ERROR_CANCELLED:
            return "HYWU_ERROR_CANCELLED";
        case HYWU_ERROR_MEMORY:
            return "HYWU_ERROR_MEMORY";
        case HYWU_ERROR_CALLBACK:
            return "HYWU_ERROR_CALLBACK";
        default:
            return "HYWU_ERROR_INTERNAL";
    }
}

const char* hywu_last_error(void) { return api::last_error().text; }
hywu_status hywu_last_status(void) { return api::last_error().status; }
const char* hywu_last_error_part(int32_t part) {
    const api::LastError last = api::last_error();
    switch (part) {
        case HYWU_ERROR_PART_WRONG:
            return last.wrong;
        case HYWU_ERROR_PART_EXPECTED:
            return last.expected;
        case HYWU_ERROR_PART_REMEDY:
            return last.remedy;
        default:
            return "";
    }
}

hywu_status hywu_set_log(hywu_log_callback callback, void* user, int32_t level) {
    return guard([&] {
        if (level < HYWU_LOG_DEBUG || level > HYWU_LOG_OFF) {
            throw input_error("`level` is " + std::to_string(level), "Expected one of HYWU_LOG_…",
                              "Correct it");
        }
        core::LogSink sink;
        if (callback != nullptr) {
            sink = [callback, user](core::LogLevel at, const std::string& message) {
                try {
                    callback(user, static_cast<int32_t>(at), message.c_str());
                } catch (...) {
                    throw CallbackError("log");
                }
            };
        }
        core::set_log_sink(std::move(sink), static_cast<core::LogLevel>(level));
    });
}

// ---- Bundles ----

hywu_status hywu_bundle_params_init(hywu_bundle_params* params, size_t struct_size) {
    return guard(
        [&] { api::write_struct(params, struct_size, bundle_defaults(), {}, "hywu_bundle_params"); });
}

hywu_status hywu_bundle_open(const char* path, const hywu_bundle_params* params, hywu_bundle** bundle) {
    return guard([&] {
        need(bundle, "bundle");
        give(bundle, std::make_unique<hywu_bundle>(hywu_bundle{open_bundle(path, params)}));
    });
}

void hywu_bundle_free(hywu_bundle* bundle) { delete bundle; }

const char* hywu_bundle_name(const hywu_bundle* bundle) {
    return bundle == nullptr ? "" : bundle->shared.bundle->manifest().name.c_str();
}

const char* hywu_bundle_variant(const hywu_bundle* bundle, size_t index) {
    return bundle == nullptr ? nullptr : key_at(bundle->shared.bundle->manifest().variants, index);
}

const char* hywu_bundle_engine(const hywu_bundle* bundle, size_t index) {
    return bundle == nullptr ? nullptr : key_at(bundle->shared.bundle->manifest().engines, index);
}

// ---- Editors ----

const char* hywu_backend(size_t index) {
    const char* name = nullptr;
    guard([&] {
        const auto& entries = backends::entries();
        if (index < entries.size()) name = entries[index].name.c_str();
    });
    return name;
}

const char* hywu_backend_missing(const char* name) {
    static thread_local std::string text;
    const char* result = "memory ran out";
    guard([&] {
        std::optional<std::string> reason = "there is no such backend";
        for (const backends::Entry& entry : backends::entries()) {
            if (name != nullptr && entry.name == name) reason = entry.missing();
        }
        text = reason.value_or("");
        result = reason ? text.c_str() : nullptr;
    });
    return result;
}

const char* hywu_backend_version(const char* name) {
    static thread_local std::string text;
    const char* result = nullptr;
    guard([&] {
        for (const backends::Entry& entry : backends::entries()) {
            if (name == nullptr || entry.name != name || entry.missing()) continue;
            text = entry.version ? entry.version() : "";
            result = text.c_str();
        }
    });
    return result;
}

hywu_status hywu_editor_params_init(hywu_editor_params* params, size_t struct_size) {
    return guard([&] {
        api::write_struct(params, struct_size, editor_defaults(), editor_sizes, "hywu_editor_params");
    });
}

hywu_status hywu_editor_create(hywu_bundle* bundle, const hywu_editor_params* params, hywu_editor** editor) {
    return guard([&] {
        need(bundle, "bundle");
        need(editor, "editor");
        give(editor, make_editor(bundle->shared, params));
    });
}

hywu_status hywu_editor_load(const char* path, const hywu_bundle_params* bundle_params,
                             const hywu_editor_params* params, hywu_editor** editor) {
    return guard([&] {
        need(editor, "editor");
        give(editor, make_editor(open_bundle(path, bundle_params), params));
    });
}

void hywu_editor_free(hywu_editor* editor) { delete editor; }

hywu_status hywu_editor_warm_up(hywu_editor* editor) {
    return guard([&] { held(editor)->warm_up(); });
}

const char* hywu_editor_backend(const hywu_editor* editor) {
    return editor == nullptr ? "" : editor->backend.c_str();
}

hywu_status hywu_editor_limits(const hywu_editor* editor, hywu_limits* limits) {
    return guard([&] {
        const runtime::Limits& found = held(editor)->limits();
        const auto whole = [](int64_t n) {
            return static_cast<int32_t>(std::min<int64_t>(n, std::numeric_limits<int32_t>::max()));
        };
        hywu_limits values = {};
        values.batch_min = whole(found.batch_min);
        values.batch_max = whole(found.batch_max);
        if (found.size) {
            values.has_size = 1;
            values.size_multiple = whole(found.size->multiple);
            values.size_min = whole(found.size->min);
            values.size_max = whole(found.size->max);
            values.size_default_area = found.size->default_area;
        }
        values.rank = whole(found.rank);
        values.edits = found.edits ? 1 : 0;
        values.generates = found.generates ? 1 : 0;
        values.default_steps = whole(found.default_steps);
        values.sampler_count = found.steps.size();
        values.guidance_count = found.guidance.size();
        values.default_strength = found.default_strength;
        values.photo_count = found.photos;
        api::write_struct(limits, values, limits_sizes, "hywu_limits");
    });
}

const char* hywu_editor_sampler(const hywu_editor* editor, size_t index) {
    if (editor == nullptr) return nullptr;
    const auto& samplers = editor->editor->limits().steps;
    return index < samplers.size() ? samplers[index].first.c_str() : nullptr;
}

const char* hywu_editor_guidance(const hywu_editor* editor, size_t index, double* default_scale) {
    if (editor == nullptr) return nullptr;
    const auto& guidance = editor->editor->limits().guidance;
    if (index >= guidance.size()) return nullptr;
    if (default_scale != nullptr) *default_scale = guidance[index].second;
    return guidance[index].first.c_str();
}

const char* hywu_editor_output(const hywu_editor* editor, size_t index) {
    if (editor == nullptr) return nullptr;
    const auto& outputs = editor->editor->bundle().manifest().results.outputs;
    return index < outputs.size() ? outputs[index].c_str() : nullptr;
}

hywu_status hywu_editor_steps(const hywu_editor* editor, const char* sampler, int32_t* steps, size_t capacity,
                              size_t* count) {
    return guard([&] {
        const auto& samplers = held(editor)->limits().steps;
        need(count, "count");
        if (capacity != 0) need(steps, "steps");
        std::string known;
        for (std::size_t i = 0; i < samplers.size(); ++i) {
            const auto& [name, accepted] = samplers[i];
            known += (known.empty() ? "" : ", ") + name;
            if (sampler == nullptr ? i != 0 : name != sampler) continue;
            for (std::size_t k = 0; k < accepted.size() && k < capacity; ++k) {
                steps[k] = static_cast<int32_t>(accepted[k]);
            }
            *count = accepted.size();
            return;
        }
        throw input_error(sampler == nullptr ? "This bundle has no schedule"
                                             : "This bundle has no sampler " + core::show(sampler),
                          "It has " + (known.empty() ? "none" : known), "Choose one of these");
    });
}

hywu_status hywu_editor_working_size(const hywu_editor* editor, int32_t width, int32_t height,
                                     int32_t* working_width, int32_t* working_height) {
    return guard([&] {
        const auto found = held(editor);
        need(working_width, "working_width");
        need(working_height, "working_height");
        const runtime::Size working = found->working_size(width, height);
        *working_width = static_cast<int32_t>(working.width);
        *working_height = static_cast<int32_t>(working.height);
    });
}

hywu_status hywu_editor_memory(hywu_editor* editor, hywu_memory* memory) {
    return guard([&] {
        const runtime::Editor::Memory found = held(editor)->memory();
        hywu_memory values = {};
        values.buffers = found.buffers;
        values.constants = found.constants;
        values.graphs = found.graphs;
        values.shared = found.shared;
        api::write_struct(memory, values, {}, "hywu_memory");
    });
}

hywu_status hywu_editor_timings(hywu_editor* editor, hywu_timings* timings) {
    return guard([&] {
        const runtime::Timings found = held(editor)->timings();
        hywu_timings values = {};
        values.total = found.total;
        values.load = found.load;
        values.graph_count = found.graphs.size();
        values.step_count = found.steps.size();
        api::write_struct(timings, values, {}, "hywu_timings");
    });
}

hywu_status hywu_editor_graph_time(hywu_editor* editor, size_t index, const char** graph, double* seconds) {
    return guard([&] {
        const auto found = held(editor);
        need(graph, "graph");
        need(seconds, "seconds");
        const runtime::Timings timings = found->timings();
        if (index >= timings.graphs.size()) {
            throw input_error("There is no graph " + std::to_string(index) + " in the last request",
                              "It ran " + std::to_string(timings.graphs.size()),
                              "See graph_count of hywu_editor_timings");
        }
        // The manifest's own copy of the name lives as long as the editor.
        for (const auto& [name, unused] : found->bundle().manifest().graphs) {
            if (name == timings.graphs[index].first) *graph = name.c_str();
        }
        *seconds = timings.graphs[index].second;
    });
}

hywu_status hywu_editor_step_time(hywu_editor* editor, size_t index, double* seconds) {
    return guard([&] {
        const auto found = held(editor);
        need(seconds, "seconds");
        const runtime::Timings timings = found->timings();
        if (index >= timings.steps.size()) {
            throw input_error("There is no evaluation " + std::to_string(index) + " in the last request",
                              "It had " + std::to_string(timings.steps.size()),
                              "See step_count of hywu_editor_timings");
        }
        *seconds = timings.steps[index];
    });
}

// ---- Requests ----

hywu_status hywu_cancel_create(hywu_cancel** cancel) {
    return guard([&] {
        need(cancel, "cancel");
        give(cancel, std::make_unique<hywu_cancel>());
    });
}

void hywu_cancel_request(hywu_cancel* cancel) {
    if (cancel != nullptr) cancel->flag->store(true, std::memory_order_relaxed);
}

void hywu_cancel_reset(hywu_cancel* cancel) {
    if (cancel != nullptr) cancel->flag->store(false, std::memory_order_relaxed);
}

void hywu_cancel_free(hywu_cancel* cancel) { delete cancel; }

hywu_status hywu_edit_params_init(hywu_edit_params* params, size_t struct_size) {
    return guard(
        [&] { api::write_struct(params, struct_size, edit_defaults(), edit_sizes, "hywu_edit_params"); });
}

hywu_status hywu_edit(hywu_editor* editor, const hywu_edit_params* params, hywu_images** images) {
    return guard([&] {
        const auto found = held(editor);
        need(images, "images");
        auto result = std::make_unique<hywu_images>();
        found->edit(edit_options(*found, params), [&](const core::Shape& shape) {
            result->pixels = core::Array(core::Dtype::uint8, shape);
            return result->pixels.data();
        });
        give(images, std::move(result));
    });
}

hywu_status hywu_edit_into(hywu_editor* editor, const hywu_edit_params* params, uint8_t* pixels, size_t size,
                           int32_t* width, int32_t* height) {
    return guard([&] {
        const auto found = held(editor);
        need(pixels, "pixels");
        core::Shape made;
        found->edit(edit_options(*found, params), [&](const core::Shape& shape) {
            made = shape;
            if (core::count(shape) != size) {
                throw input_error("`size` is " + std::to_string(size) + " bytes",
                                  "Expected " + std::to_string(core::count(shape)) + " for pictures " +
                                      runtime::shape_text(shape),
                                  "See hywu_editor_working_size");
            }
            return pixels;
        });
        if (width != nullptr) *width = static_cast<int32_t>(made[2]);
        if (height != nullptr) *height = static_cast<int32_t>(made[1]);
    });
}

size_t hywu_images_count(const hywu_images* images) {
    return images == nullptr ? 0 : static_cast<size_t>(images->pixels.shape()[0]);
}

hywu_status hywu_images_get(const hywu_images* images, size_t index, hywu_pixels* pixels) {
    return guard([&] {
        need(images, "images");
        need(pixels, "pixels");
        const core::Shape& shape = images->pixels.shape();
        if (index >= static_cast<size_t>(shape[0])) {
            throw input_error("There is no picture " + std::to_string(index),
                              "There are " + std::to_string(shape[0]), "Choose one of these");
        }
        const auto row = static_cast<size_t>(shape[2] * shape[3]);
        *pixels = {images->pixels.as<unsigned char>() + index * row * static_cast<size_t>(shape[1]),
                   static_cast<int32_t>(shape[2]), static_cast<int32_t>(shape[1]), row};
    });
}

void hywu_images_free(hywu_images* images) { delete images; }

hywu_status hywu_generate_params_init(hywu_generate_params* params, size_t struct_size) {
    return guard([&] {
        api::write_struct(params, struct_size, generate_defaults(), generate_sizes, "hywu_generate_params");
    });
}

hywu_status hywu_generate(hywu_editor* editor, const hywu_generate_params* given, hywu_deltas** deltas) {
    return guard([&] {
        const auto found = held(editor);
        need(given, "params");
        need(deltas, "deltas");
        const hywu_generate_params params =
            api::read_struct(given, generate_defaults(), generate_sizes, "hywu_generate_params");
        runtime::GenerateOptions options;
        if (params.photo != nullptr) {
            check_photo_count(*found, params.photo_count);
            for (std::size_t i = 0; i < params.photo_count; ++i) {
                options.photos.push_back(photo(params.photo[i], i == 0 ? "photo" : entry("photo", i)));
            }
        }
        if (params.prompt != nullptr)
            options.prompt = texts(&params.prompt, &params.prompt_length, 1, "prompt")[0];
        options.size = size(params.width, params.height);
        options.inputs = views(params.inputs, params.input_count, "inputs");
        options.cancelled = cancelled(params.cancel);
        give_deltas(deltas, found->generate(options));
    });
}

hywu_status hywu_run_params_init(hywu_run_params* params, size_t struct_size) {
    return guard([&] { api::write_struct(params, struct_size, run_defaults(), {}, "hywu_run_params"); });
}

hywu_status hywu_run(hywu_editor* editor, const hywu_run_params* given, hywu_tensors** tensors) {
    return guard([&] {
        const auto found = held(editor);
        need(given, "params");
        need(tensors, "tensors");
        const hywu_run_params params = api::read_struct(given, run_defaults(), {}, "hywu_run_params");
        runtime::RunOptions options;
        options.inputs = views(params.inputs, params.input_count, "inputs");
        check_list(params.outputs, params.output_count, "outputs");
        options.outputs = texts(params.outputs, nullptr, params.output_count, "outputs");
        check_list(params.delta_strengths, params.strength_count, "delta_strengths");
        options.strengths = {params.delta_strength};
        if (params.strength_count != 0) {
            options.strengths.assign(params.delta_strengths, params.delta_strengths + params.strength_count);
        }
        check_list(params.deltas, params.delta_count, "deltas");
        for (std::size_t i = 0; i < params.delta_count; ++i) {
            need(params.deltas[i], entry("deltas", i).c_str());
            options.deltas.push_back(&params.deltas[i]->deltas);
        }
        options.cancelled = cancelled(params.cancel);
        give(tensors, std::make_unique<hywu_tensors>(hywu_tensors{found->run(options)}));
    });
}

size_t hywu_tensors_count(const hywu_tensors* tensors) {
    return tensors == nullptr ? 0 : tensors->tensors.size();
}

hywu_status hywu_tensors_get(const hywu_tensors* tensors, size_t index, hywu_tensor* tensor) {
    return guard([&] {
        need(tensors, "tensors");
        need(tensor, "tensor");
        if (index >= tensors->tensors.size()) {
            throw input_error("There is no tensor " + std::to_string(index),
                              "There are " + std::to_string(tensors->tensors.size()), "Choose one of these");
        }
        const auto& [name, array] = tensors->tensors[index];
        *tensor = tensor_of(name, array);
    });
}

void hywu_tensors_free(hywu_tensors* tensors) { delete tensors; }

// ---- Deltas ----

hywu_status hywu_deltas_create(const hywu_tensor* tensors, size_t count, hywu_deltas** deltas) {
    return guard([&] {
        need(deltas, "deltas");
        std::map<std::string, core::Array> arrays;
        for (const auto& [name, given] : views(tensors, count, "tensors")) {
            if (!arrays.emplace(name, core::Array(given.dtype, given.shape, given.data)).second) {
                throw core::Error(core::ErrorKind::delta,
                                  "Delta " + core::show(name, 200) + " is given twice",
                                  "Expected each name once", "Leave one out");
            }
        }
        give_deltas(deltas, core::Deltas(std::move(arrays)));
    });
}

hywu_status hywu_deltas_load(const char* path, hywu_deltas** deltas) {
    return guard([&] {
        need(path, "path");
        need(deltas, "deltas");
        give_deltas(deltas, core::Deltas::load(core::path_of(path)));
    });
}

hywu_status hywu_deltas_save(const hywu_deltas* deltas, const char* path) {
    return guard([&] {
        need(deltas, "deltas");
        need(path, "path");
        deltas->deltas.save(core::path_of(path));
    });
}

hywu_status hywu_deltas_blend(const hywu_deltas* const* sets, const double* weights, size_t count,
                              int64_t max_rank, hywu_deltas** deltas) {
    return guard([&] {
        need(deltas, "deltas");
        const std::vector<const core::Deltas*> parts = sets_of(sets, count);
        check_list(weights, count, "weights");
        if (max_rank < 0) {
            throw input_error("`max_rank` is " + std::to_string(max_rank), "Expected a rank, or 0 for any",
                              "Correct it");
        }
        give_deltas(deltas,
                    core::Deltas::blend(parts, std::vector<double>(weights, weights + count),
                                        max_rank == 0 ? std::nullopt : std::optional<int64_t>(max_rank)));
    });
}

hywu_status hywu_deltas_stack(const hywu_deltas* const* sets, size_t count, hywu_deltas** deltas) {
    return guard([&] {
        need(deltas, "deltas");
        give_deltas(deltas, core::Deltas::stack(sets_of(sets, count)));
    });
}

hywu_status hywu_deltas_select(const hywu_deltas* set, int64_t sample, hywu_deltas** deltas) {
    return guard([&] {
        need(set, "set");
        need(deltas, "deltas");
        give_deltas(deltas, set->deltas.select(sample));
    });
}

hywu_status hywu_deltas_check(const hywu_deltas* deltas, const hywu_editor* editor, int64_t batch) {
    return guard([&] {
        need(deltas, "deltas");
        const auto found = held(editor);
        if (batch < 0) {
            throw input_error("`batch` is " + std::to_string(batch),
                              "Expected a number of samples, or 0 for any", "Correct it");
        }
        const auto& spec = found->bundle().manifest().deltas;
        if (!spec) {
            throw core::Error(core::ErrorKind::delta, "This bundle takes no deltas",
                              "It was exported without targets", "Leave them out, or export with targets");
        }
        deltas->deltas.pad(*spec).check(*spec, batch == 0 ? std::nullopt : std::optional<int64_t>(batch));
    });
}

int64_t hywu_deltas_rank(const hywu_deltas* deltas) { return deltas == nullptr ? 0 : deltas->deltas.rank(); }
int64_t hywu_deltas_batch(const hywu_deltas* deltas) {
    return deltas == nullptr ? 0 : deltas->deltas.batch();
}
size_t hywu_deltas_count(const hywu_deltas* deltas) { return deltas == nullptr ? 0 : deltas->deltas.size(); }

hywu_status hywu_deltas_tensor(const hywu_deltas* deltas, size_t index, hywu_tensor* tensor) {
    return guard([&] {
        need(deltas, "deltas");
        need(tensor, "tensor");
        if (index >= deltas->deltas.size()) {
            throw input_error("There is no tensor " + std::to_string(index),
                              "There are " + std::to_string(deltas->deltas.size()), "Choose one of these");
        }
        const auto& [name, array] = *std::next(deltas->deltas.begin(), static_cast<std::ptrdiff_t>(index));
        *tensor = tensor_of(name, *array);
    });
}

void hywu_deltas_free(hywu_deltas* deltas) { delete deltas; }

}  // extern "C"
