// The C ABI with the toy bundle on ONNX Runtime: arguments, callbacks, threads. That the pictures are right
// is tested against the Python runtime, in tests/cpp.
#include "hywu/hywu.h"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

std::string toy() { return std::string(HYWU_SOURCE_DIR) + "/tests/data/toy"; }
bool have_backend() {
    if (hywu_backend_missing("ort-cpu") == nullptr) return true;
    MESSAGE("ONNX Runtime's library is not here: HYWU_ONNXRUNTIME_LIBRARY may name it");
    return false;
}
std::string error() { return hywu_last_error(); }

template <class T, void (*release)(T*)>
struct Free {
    void operator()(T* p) const { release(p); }
};
using EditorHandle = std::unique_ptr<hywu_editor, Free<hywu_editor, hywu_editor_free>>;
using BundleHandle = std::unique_ptr<hywu_bundle, Free<hywu_bundle, hywu_bundle_free>>;
using ImagesHandle = std::unique_ptr<hywu_images, Free<hywu_images, hywu_images_free>>;
using DeltasHandle = std::unique_ptr<hywu_deltas, Free<hywu_deltas, hywu_deltas_free>>;
using CancelHandle = std::unique_ptr<hywu_cancel, Free<hywu_cancel, hywu_cancel_free>>;

EditorHandle load() {
    hywu_editor_params params;
    REQUIRE(hywu_editor_params_init(&params, sizeof params) == HYWU_OK);
    params.threads = 1;
    hywu_editor* editor = nullptr;
    const hywu_status status = hywu_editor_load(toy().c_str(), nullptr, &params, &editor);
    REQUIRE_MESSAGE(status == HYWU_OK, error());
    return EditorHandle(editor);
}

// A request for the toy, with everything that it points to.
struct Request {
    std::vector<std::uint8_t> rgb = std::vector<std::uint8_t>(16 * 8 * 3);
    std::vector<float> region = std::vector<float>(8, 0.5F);
    hywu_pixels photo = {};
    const char* prompt = "abc";
    hywu_tensor input = {};
    hywu_edit_params params = {};

    explicit Request(int seed = 1) {
        for (std::size_t i = 0; i < rgb.size(); ++i)
            rgb[i] = static_cast<std::uint8_t>(i * static_cast<std::size_t>(seed) * 7);
        photo = {rgb.data(), 16, 8, 0};
        input = {"region", region.data(), HYWU_DTYPE_FLOAT32, 4, {1, 1, 2, 4}};
        REQUIRE(hywu_edit_params_init(&params, sizeof params) == HYWU_OK);
        params.photos = &photo;
        params.prompts = &prompt;
        params.seed = static_cast<std::uint64_t>(seed);
        params.inputs = &input;
        params.input_count = 1;
    }
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;
};

std::vector<std::uint8_t> edit(hywu_editor* editor, const hywu_edit_params& params) {
    hywu_images* made = nullptr;
    const hywu_status status = hywu_edit(editor, &params, &made);
    REQUIRE_MESSAGE(status == HYWU_OK, error());
    const ImagesHandle images(made);
    std::vector<std::uint8_t> bytes;
    for (std::size_t i = 0; i < hywu_images_count(made); ++i) {
        hywu_pixels view = {};
        REQUIRE(hywu_images_get(made, i, &view) == HYWU_OK);
        bytes.insert(bytes.end(), view.data, view.data + view.stride * static_cast<std::size_t>(view.height));
    }
    return bytes;
}

hywu_status refused(hywu_editor* editor, const hywu_edit_params& params) {
    hywu_images* made = nullptr;
    const hywu_status status = hywu_edit(editor, &params, &made);
    CHECK(made == nullptr);
    hywu_images_free(made);
    return status;
}

}  // namespace

TEST_CASE("version, statuses, backends") {
    CHECK(hywu_version() == HYWU_VERSION);
    CHECK(std::string(hywu_version_string()) == "0.1.0");
    CHECK(std::string(hywu_status_name(HYWU_OK)) == "HYWU_OK");
    CHECK(std::string(hywu_status_name(HYWU_ERROR_CALLBACK)) == "HYWU_ERROR_CALLBACK");
    CHECK(std::string(hywu_status_name(-1000)) == "HYWU_ERROR_INTERNAL");
    const std::array<std::string, 4> names = {"tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu"};
    for (std::size_t i = 0; i < names.size(); ++i) CHECK(hywu_backend(i) == names[i]);
    CHECK(hywu_backend(4) == nullptr);
    CHECK(hywu_backend_missing(nullptr) != nullptr);
    CHECK(std::string(hywu_backend_missing("magic")) == "there is no such backend");
    CHECK(hywu_backend_version("magic") == nullptr);
    CHECK(hywu_backend_version(nullptr) == nullptr);
}

TEST_CASE("NULL is refused where it is not allowed, and *_free takes it") {
    CHECK(hywu_bundle_open(nullptr, nullptr, nullptr) == HYWU_ERROR_INPUT);
    hywu_bundle* bundle = nullptr;
    CHECK(hywu_bundle_open(nullptr, nullptr, &bundle) == HYWU_ERROR_INPUT);
    CHECK(error() == "`path` is NULL. Expected a pointer. Pass one.");
    CHECK(std::string(hywu_last_error_part(HYWU_ERROR_PART_WRONG)) == "`path` is NULL");
    CHECK(std::string(hywu_last_error_part(HYWU_ERROR_PART_EXPECTED)) == "Expected a pointer");
    CHECK(std::string(hywu_last_error_part(HYWU_ERROR_PART_REMEDY)) == "Pass one");
    CHECK(std::string(hywu_last_error_part(7)).empty());
    CHECK(hywu_last_status() == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_create(nullptr, nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_load("x", nullptr, nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_warm_up(nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_limits(nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_steps(nullptr, nullptr, nullptr, 0, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_working_size(nullptr, 1, 1, nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_memory(nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_timings(nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_graph_time(nullptr, 0, nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_step_time(nullptr, 0, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_edit(nullptr, nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_edit_into(nullptr, nullptr, nullptr, 0, nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_generate(nullptr, nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_images_get(nullptr, 0, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_create(nullptr, 1, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_load(nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_save(nullptr, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_blend(nullptr, nullptr, 0, 0, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_stack(nullptr, 0, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_select(nullptr, 0, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_check(nullptr, nullptr, 0) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_tensor(nullptr, 0, nullptr) == HYWU_ERROR_INPUT);
    CHECK(hywu_bundle_params_init(nullptr, 0) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_params_init(nullptr, 0) == HYWU_ERROR_INPUT);
    CHECK(hywu_edit_params_init(nullptr, 0) == HYWU_ERROR_INPUT);
    CHECK(hywu_generate_params_init(nullptr, 0) == HYWU_ERROR_INPUT);
    CHECK(hywu_cancel_create(nullptr) == HYWU_ERROR_INPUT);
    CHECK(std::string(hywu_bundle_name(nullptr)).empty());
    CHECK(hywu_bundle_variant(nullptr, 0) == nullptr);
    CHECK(std::string(hywu_editor_backend(nullptr)).empty());
    CHECK(hywu_editor_sampler(nullptr, 0) == nullptr);
    CHECK(hywu_editor_guidance(nullptr, 0, nullptr) == nullptr);
    CHECK(hywu_images_count(nullptr) == 0);
    CHECK(hywu_deltas_count(nullptr) == 0);
    CHECK(hywu_deltas_rank(nullptr) == 0);
    CHECK(hywu_deltas_batch(nullptr) == 0);
    hywu_bundle_free(nullptr);
    hywu_editor_free(nullptr);
    hywu_images_free(nullptr);
    hywu_deltas_free(nullptr);
    hywu_cancel_request(nullptr);
    hywu_cancel_reset(nullptr);
    hywu_cancel_free(nullptr);
}

TEST_CASE("struct sizes") {
    hywu_editor_params params;
    CHECK(hywu_editor_params_init(&params, 7) == HYWU_ERROR_INPUT);
    REQUIRE(hywu_editor_params_init(&params, sizeof params) == HYWU_OK);
    CHECK(params.device == -1);
    params.struct_size = 8;
    hywu_editor* editor = nullptr;
    // A caller whose header had no `engine`: what lies behind its struct is neither read nor written.
    const std::size_t former = offsetof(hywu_editor_params, engine);
    hywu_editor_params older;
    older.engine = "nobody";
    REQUIRE(hywu_editor_params_init(&older, former) == HYWU_OK);
    CHECK(older.struct_size == former);
    CHECK(older.engine == std::string("nobody"));
    older.backend = "magic";
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &older, &editor) == HYWU_ERROR_INPUT);
    CHECK(error().find("There is no backend 'magic'") == 0);
    older.struct_size = sizeof older;
    older.backend = nullptr;
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &older, &editor) == HYWU_ERROR_INPUT);
    CHECK(error().find("The bundle has no engine 'nobody'. It has: none") == 0);
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &params, &editor) == HYWU_ERROR_INPUT);
    CHECK(error().find("hywu_editor_params has struct_size 8") == 0);
    struct {
        hywu_editor_params known;
        std::uint64_t later;
    } newer;
    REQUIRE(hywu_editor_params_init(&newer.known, sizeof newer) == HYWU_OK);
    CHECK(newer.later == 0);
    newer.later = 1;
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &newer.known, &editor) == HYWU_ERROR_INPUT);
    CHECK(editor == nullptr);
    params.struct_size = sizeof params;
    params.reserved = 1;
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &params, &editor) == HYWU_ERROR_INPUT);
}

TEST_CASE("bundles and backends that are not there") {
    hywu_editor* editor = nullptr;
    CHECK(hywu_editor_load("/nowhere", nullptr, nullptr, &editor) == HYWU_ERROR_BUNDLE);
    CHECK(error().find("No bundle can be read") == 0);
    hywu_editor_params params;
    REQUIRE(hywu_editor_params_init(&params, sizeof params) == HYWU_OK);
    params.backend = "magic";
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &params, &editor) == HYWU_ERROR_INPUT);
    params.backend = "tensorrt";
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &params, &editor) == HYWU_ERROR_DEVICE);
    CHECK(error().find("Backend tensorrt cannot be used") == 0);
    if (!have_backend()) return;
    params.backend = nullptr;
    params.threads = -5;
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &params, &editor) == HYWU_ERROR_INPUT);
    params.threads = 0;
    params.variant = "fp16";
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &params, &editor) == HYWU_ERROR_INPUT);
    params.variant = nullptr;
    params.low_memory = 2;
    CHECK(hywu_editor_load(toy().c_str(), nullptr, &params, &editor) == HYWU_ERROR_INPUT);
    hywu_bundle_params bundle_params;
    REQUIRE(hywu_bundle_params_init(&bundle_params, sizeof bundle_params) == HYWU_OK);
    const char* const name = "nobody";
    bundle_params.source_count = 1;
    bundle_params.source_ids = &name;
    CHECK(hywu_editor_load(toy().c_str(), &bundle_params, nullptr, &editor) == HYWU_ERROR_INPUT);
    bundle_params.source_directories = &name;
    CHECK(hywu_editor_load(toy().c_str(), &bundle_params, nullptr, &editor) == HYWU_ERROR_INPUT);
    CHECK(error().find("The bundle has no source 'nobody'") == 0);
    bundle_params.source_count = std::numeric_limits<std::size_t>::max();
    CHECK(hywu_editor_load(toy().c_str(), &bundle_params, nullptr, &editor) == HYWU_ERROR_INPUT);
    CHECK(editor == nullptr);
}

TEST_CASE("arguments of an edit") {
    if (!have_backend()) return;
    const EditorHandle editor = load();
    const Request good;
    const auto expected = edit(editor.get(), good.params);
    CHECK(expected.size() == 16 * 8 * 3);
    const auto with = [&](const std::function<void(Request&)>& change) {
        Request request;
        change(request);
        return refused(editor.get(), request.params);
    };
    CHECK(with([](Request& r) { r.params.struct_size = 16; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.reserved = 1; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.count = 0; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.count = std::numeric_limits<std::size_t>::max(); }) ==
          HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.photos = nullptr; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.photo.data = nullptr; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.photo.width = 0; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.photo.height = -1; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.photo.stride = 47; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.prompt = nullptr; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.prompt = "\xc3("; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.steps = -1; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.strength = 0.5; }) == HYWU_ERROR_INPUT);  // it starts from noise
    CHECK(with([](Request& r) { r.params.sampler = "none"; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.width = 8; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.delta_strength = std::numeric_limits<double>::quiet_NaN(); }) ==
          HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.guidance_count = 1; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.delta_count = 1; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.delta_count = 2; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.input_count = std::numeric_limits<std::size_t>::max(); }) ==
          HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.inputs = nullptr; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.input.name = nullptr; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.input.data = nullptr; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.input.dtype = 0; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.input.rank = 9; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.input.rank = -1; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.input.shape[0] = -1; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.input.shape[0] = std::numeric_limits<std::int64_t>::max(); }) ==
          HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.noise = &r.input; }) == HYWU_ERROR_INPUT);
    CHECK(with([](Request& r) { r.params.latents = &r.input; }) == HYWU_ERROR_INPUT);
    CHECK(edit(editor.get(), good.params) == expected);

    Request strided;  // rows further apart, and a length in place of a NUL
    std::vector<std::uint8_t> wide(100 * 8, 0xEE);
    for (std::size_t y = 0; y < 8; ++y) std::memcpy(wide.data() + y * 100, strided.rgb.data() + y * 48, 48);
    wide.resize(100 * 7 + 48);
    strided.photo = {wide.data(), 16, 8, 100};
    const char* const text = "abcdef";
    const std::size_t length = 3;
    strided.params.prompts = &text;
    strided.params.prompt_lengths = &length;
    CHECK(edit(editor.get(), strided.params) == expected);

    std::vector<std::uint8_t> into(expected.size());
    std::int32_t width = 0, height = 0;
    CHECK(hywu_edit_into(editor.get(), &good.params, into.data(), into.size(), &width, &height) == HYWU_OK);
    CHECK(into == expected);
    CHECK(width == 16);
    CHECK(height == 8);
    std::vector<std::uint8_t> untouched(expected.size(), 0x55);
    CHECK(hywu_edit_into(editor.get(), &good.params, untouched.data(), untouched.size() - 1, nullptr,
                         nullptr) == HYWU_ERROR_INPUT);
    CHECK(untouched == std::vector<std::uint8_t>(expected.size(), 0x55));
    CHECK(hywu_edit_into(editor.get(), &good.params, into.data(), into.size(), nullptr, nullptr) == HYWU_OK);
}

TEST_CASE("a caller whose header had no strength") {
    const std::size_t former = offsetof(hywu_edit_params, strength);
    hywu_edit_params params;
    params.strength = 0.5;
    REQUIRE(hywu_edit_params_init(&params, former) == HYWU_OK);
    CHECK(params.struct_size == former);
    CHECK(params.strength == 0.5);
    REQUIRE(hywu_edit_params_init(&params, sizeof params) == HYWU_OK);
    CHECK(params.strength == 0);
    if (!have_backend()) return;
    const EditorHandle editor = load();
    hywu_limits limits = {};
    limits.default_strength = 7;
    limits.struct_size = offsetof(hywu_limits, default_strength);
    REQUIRE(hywu_editor_limits(editor.get(), &limits) == HYWU_OK);
    CHECK(limits.default_strength == 7);
}

TEST_CASE("limits, timings, memory") {
    if (!have_backend()) return;
    const EditorHandle editor = load();
    CHECK(std::string(hywu_editor_backend(editor.get())) == "ort-cpu");
    hywu_limits limits = {};
    CHECK(hywu_editor_limits(editor.get(), &limits) == HYWU_ERROR_INPUT);  // struct_size is not set
    limits.struct_size = sizeof limits;
    REQUIRE(hywu_editor_limits(editor.get(), &limits) == HYWU_OK);
    CHECK(limits.batch_max == 4);
    CHECK(limits.size_multiple == 8);
    CHECK(limits.rank == 3);
    CHECK(limits.sampler_count == 2);
    CHECK(limits.guidance_count == 1);
    CHECK(limits.default_steps == 3);
    CHECK(limits.default_strength == 0);
    CHECK(std::string(hywu_editor_sampler(editor.get(), 1)) == "wild");
    CHECK(hywu_editor_sampler(editor.get(), 2) == nullptr);
    double scale = 0;
    CHECK(std::string(hywu_editor_guidance(editor.get(), 0, &scale)) == "text");
    CHECK(scale == 2.0);
    std::array<std::int32_t, 2> steps = {};
    std::size_t count = 0;
    CHECK(hywu_editor_steps(editor.get(), nullptr, steps.data(), steps.size(), &count) == HYWU_OK);
    CHECK(count == 5);
    CHECK(steps == std::array<std::int32_t, 2>{1, 2});
    CHECK(hywu_editor_steps(editor.get(), "wild", nullptr, 0, &count) == HYWU_OK);
    CHECK(count == 3);
    CHECK(hywu_editor_steps(editor.get(), "none", nullptr, 0, &count) == HYWU_ERROR_INPUT);
    std::int32_t width = 0, height = 0;
    CHECK(hywu_editor_working_size(editor.get(), 300, 200, &width, &height) == HYWU_OK);
    CHECK(width % 8 == 0);
    CHECK(hywu_editor_working_size(editor.get(), 0, 200, &width, &height) == HYWU_ERROR_INPUT);

    const Request request;
    edit(editor.get(), request.params);
    hywu_timings timings = {};
    timings.struct_size = sizeof timings;
    REQUIRE(hywu_editor_timings(editor.get(), &timings) == HYWU_OK);
    CHECK(timings.step_count == 3);
    CHECK(timings.graph_count == 6);
    CHECK(timings.total > 0);
    const char* name = nullptr;
    double seconds = -1;
    CHECK(hywu_editor_graph_time(editor.get(), 0, &name, &seconds) == HYWU_OK);
    CHECK(std::string(name) == "words");
    CHECK(hywu_editor_graph_time(editor.get(), 6, &name, &seconds) == HYWU_ERROR_INPUT);
    CHECK(hywu_editor_step_time(editor.get(), 2, &seconds) == HYWU_OK);
    CHECK(hywu_editor_step_time(editor.get(), 3, &seconds) == HYWU_ERROR_INPUT);
    hywu_memory memory = {};
    memory.struct_size = sizeof memory;
    REQUIRE(hywu_editor_memory(editor.get(), &memory) == HYWU_OK);
    CHECK(memory.graphs == 7);
    CHECK(memory.shared == 7);
    CHECK(memory.constants == 16);
    CHECK(memory.buffers > 1000);
}

TEST_CASE("a callback may stop a request, and may throw") {
    if (!have_backend()) return;
    const EditorHandle editor = load();
    Request request;
    const auto expected = edit(editor.get(), request.params);
    int seen = 0;
    request.params.progress_user = &seen;
    request.params.progress = [](void* user, std::int32_t done, std::int32_t total) {
        CHECK(total == 3);
        *static_cast<int*>(user) = done;
        return 0;
    };
    CHECK(edit(editor.get(), request.params) == expected);
    CHECK(seen == 3);
    request.params.progress = [](void*, std::int32_t done, std::int32_t) { return done == 2 ? 1 : 0; };
    CHECK(refused(editor.get(), request.params) == HYWU_ERROR_CANCELLED);
    request.params.progress = [](void*, std::int32_t, std::int32_t) -> std::int32_t {
        throw std::runtime_error("mine");
    };
    CHECK(refused(editor.get(), request.params) == HYWU_ERROR_CALLBACK);
    CHECK(error() ==
          "The progress callback threw a C++ exception. Expected it to return. Catch exceptions in the "
          "callback.");
    request.params.progress = [](void*, std::int32_t, std::int32_t) -> std::int32_t { throw 5; };
    CHECK(refused(editor.get(), request.params) == HYWU_ERROR_CALLBACK);
    struct Inner {
        hywu_editor* editor;
        hywu_status status = HYWU_OK, timings = HYWU_OK;
    } inner = {editor.get()};
    request.params.progress_user = &inner;
    request.params.progress = [](void* user, std::int32_t, std::int32_t) {
        auto* const self = static_cast<Inner*>(user);
        const Request again;
        self->status = refused(self->editor, again.params);
        hywu_timings timings = {};
        timings.struct_size = sizeof timings;
        self->timings = hywu_editor_timings(self->editor, &timings);
        return 0;
    };
    CHECK(edit(editor.get(), request.params) == expected);
    CHECK(inner.status == HYWU_ERROR_INPUT);
    CHECK(inner.timings == HYWU_ERROR_INPUT);
    request.params.progress = nullptr;
    CHECK(edit(editor.get(), request.params) == expected);
}

TEST_CASE("a token cancels from another thread, until it is reset") {
    if (!have_backend()) return;
    const EditorHandle editor = load();
    hywu_cancel* made = nullptr;
    REQUIRE(hywu_cancel_create(&made) == HYWU_OK);
    CancelHandle cancel(made);
    Request request;
    const auto expected = edit(editor.get(), request.params);
    request.params.cancel = made;
    CHECK(edit(editor.get(), request.params) == expected);
    std::thread([&] { hywu_cancel_request(made); }).join();
    CHECK(refused(editor.get(), request.params) == HYWU_ERROR_CANCELLED);
    CHECK(error() == "The request was cancelled.");
    hywu_cancel_reset(made);
    CHECK(edit(editor.get(), request.params) == expected);
    // During an edit, and the token is freed before the edit ends.
    request.params.progress_user = &cancel;
    request.params.progress = [](void* user, std::int32_t, std::int32_t) {
        auto* const token = static_cast<CancelHandle*>(user);
        std::thread([&] { hywu_cancel_request(token->get()); }).join();
        token->reset();
        return 0;
    };
    CHECK(refused(editor.get(), request.params) == HYWU_ERROR_CANCELLED);
}

TEST_CASE("logs") {
    static std::vector<std::string> heard;
    heard.clear();
    const hywu_log_callback hear = [](void* user, std::int32_t level, const char* message) {
        CHECK(user == &heard);
        heard.push_back(std::to_string(level) + " " + message);
    };
    CHECK(hywu_set_log(hear, &heard, 9) == HYWU_ERROR_INPUT);
    CHECK(hywu_set_log(hear, &heard, HYWU_LOG_INFO) == HYWU_OK);
    if (have_backend()) {
        const EditorHandle editor = load();
        REQUIRE(heard.size() == 1);
        CHECK(heard[0].find("1 backend ort-cpu chosen among") == 0);
        heard.clear();
        Request request;
        request.prompt = "far more than eight tokens";
        edit(editor.get(), request.params);
        REQUIRE(heard.size() >= 1);
        CHECK(heard[0].find("was cut") != std::string::npos);
        CHECK(hywu_set_log([](void*, std::int32_t, const char*) { throw 1; }, nullptr, HYWU_LOG_WARNING) ==
              HYWU_OK);
        CHECK(refused(editor.get(), request.params) == HYWU_ERROR_CALLBACK);
        CHECK(error().find("The log callback threw") == 0);
    }
    CHECK(hywu_set_log(nullptr, nullptr, HYWU_LOG_OFF) == HYWU_OK);
}

TEST_CASE("deltas: made, read, saved, blended, used") {
    const std::vector<float> numbers(3 * 4, 0.25F);
    std::array<hywu_tensor, 2> tensors = {{{"mix.lora_A", numbers.data(), HYWU_DTYPE_FLOAT32, 3, {1, 3, 4}},
                                           {"mix.lora_B", numbers.data(), HYWU_DTYPE_FLOAT32, 3, {1, 4, 3}}}};
    hywu_deltas* made = nullptr;
    REQUIRE(hywu_deltas_create(tensors.data(), 2, &made) == HYWU_OK);
    const DeltasHandle deltas(made);
    CHECK(hywu_deltas_rank(made) == 3);
    CHECK(hywu_deltas_batch(made) == 1);
    CHECK(hywu_deltas_count(made) == 2);
    hywu_tensor seen = {};
    REQUIRE(hywu_deltas_tensor(made, 1, &seen) == HYWU_OK);
    CHECK(std::string(seen.name) == "mix.lora_B");
    CHECK(seen.shape[1] == 4);
    CHECK(std::memcmp(seen.data, numbers.data(), 48) == 0);
    CHECK(hywu_deltas_tensor(made, 2, &seen) == HYWU_ERROR_INPUT);

    hywu_deltas* none = nullptr;
    tensors[1].name = "mix.lora_A";
    CHECK(hywu_deltas_create(tensors.data(), 2, &none) == HYWU_ERROR_DELTA);
    tensors[1].name = "mix";
    CHECK(hywu_deltas_create(tensors.data(), 2, &none) == HYWU_ERROR_DELTA);
    tensors[1].rank = 2;
    CHECK(hywu_deltas_create(tensors.data(), 2, &none) == HYWU_ERROR_DELTA);

    const std::array<const hywu_deltas*, 2> sets = {made, made};
    const std::array<double, 2> weights = {0.5, 0.5};
    CHECK(hywu_deltas_blend(sets.data(), weights.data(), 2, 3, &none) == HYWU_ERROR_DELTA);
    CHECK(hywu_deltas_blend(sets.data(), weights.data(), 2, -1, &none) == HYWU_ERROR_INPUT);
    CHECK(hywu_deltas_blend(nullptr, nullptr, 0, 0, &none) == HYWU_ERROR_DELTA);
    CHECK(none == nullptr);
    hywu_deltas* blended = nullptr;
    REQUIRE(hywu_deltas_blend(sets.data(), weights.data(), 2, 0, &blended) == HYWU_OK);
    const DeltasHandle blend(blended);
    CHECK(hywu_deltas_rank(blended) == 6);
    hywu_deltas* stacked = nullptr;
    REQUIRE(hywu_deltas_stack(sets.data(), 2, &stacked) == HYWU_OK);
    const DeltasHandle stack(stacked);
    CHECK(hywu_deltas_batch(stacked) == 2);
    CHECK(hywu_deltas_select(stacked, 2, &none) == HYWU_ERROR_DELTA);
    hywu_deltas* chosen = nullptr;
    REQUIRE(hywu_deltas_select(stacked, 1, &chosen) == HYWU_OK);
    const DeltasHandle choice(chosen);

    const std::filesystem::path file =
        std::filesystem::temp_directory_path() / "hywu-tests-\xc3\xa4.safetensors";
    REQUIRE(hywu_deltas_save(made, file.u8string().c_str()) == HYWU_OK);
    hywu_deltas* loaded = nullptr;
    REQUIRE(hywu_deltas_load(file.u8string().c_str(), &loaded) == HYWU_OK);
    const DeltasHandle again(loaded);
    std::filesystem::remove(file);
    CHECK(hywu_deltas_load(file.u8string().c_str(), &none) == HYWU_ERROR_DELTA);
    CHECK(hywu_deltas_save(made, "/nowhere/x.safetensors") == HYWU_ERROR_INPUT);

    if (!have_backend()) return;
    const EditorHandle editor = load();
    CHECK(hywu_deltas_check(made, editor.get(), 1) == HYWU_OK);
    CHECK(hywu_deltas_check(stacked, editor.get(), 3) == HYWU_ERROR_DELTA);
    CHECK(hywu_deltas_check(blended, editor.get(), 0) == HYWU_ERROR_DELTA);
    CHECK(hywu_deltas_check(made, editor.get(), -1) == HYWU_ERROR_INPUT);
    Request request;
    const auto generated = edit(editor.get(), request.params);
    const hywu_deltas* given = loaded;
    request.params.deltas = &given;
    request.params.delta_count = 1;
    const auto edited = edit(editor.get(), request.params);
    CHECK(edited != generated);
    given = chosen;
    CHECK(edit(editor.get(), request.params) == edited);

    hywu_generate_params params;
    REQUIRE(hywu_generate_params_init(&params, sizeof params) == HYWU_OK);
    params.photo = &request.photo;
    params.prompt = request.prompt;
    hywu_deltas* own = nullptr;
    REQUIRE(hywu_generate(editor.get(), &params, &own) == HYWU_OK);
    const DeltasHandle held(own);
    given = own;
    CHECK(edit(editor.get(), request.params) == generated);
}

TEST_CASE("handles may be freed in any order, while a call runs") {
    if (!have_backend()) return;
    hywu_bundle* bundle = nullptr;
    REQUIRE(hywu_bundle_open(toy().c_str(), nullptr, &bundle) == HYWU_OK);
    CHECK(std::string(hywu_bundle_name(bundle)) == "made up");
    hywu_editor* editor = nullptr;
    REQUIRE(hywu_editor_create(bundle, nullptr, &editor) == HYWU_OK);
    hywu_bundle_free(bundle);
    Request request;
    request.params.progress_user = editor;
    request.params.progress = [](void* user, std::int32_t done, std::int32_t) {
        if (done == 1) hywu_editor_free(static_cast<hywu_editor*>(user));
        return 0;
    };
    CHECK(edit(editor, request.params).size() == 16 * 8 * 3);
}

TEST_CASE("many editors in many threads, on one bundle and on one editor") {
    if (!have_backend()) return;
    hywu_bundle* opened = nullptr;
    REQUIRE(hywu_bundle_open(toy().c_str(), nullptr, &opened) == HYWU_OK);
    const BundleHandle bundle(opened);
    const EditorHandle alone = load();
    std::vector<std::vector<std::uint8_t>> expected;
    for (int i = 0; i < 4; ++i) {
        const Request request(i + 1);
        expected.push_back(edit(alone.get(), request.params));
    }
    std::atomic<int> wrong{0};
    const auto work = [&](hywu_editor* editor, int i) {
        for (int k = 0; k < 10; ++k) {
            const Request request(i + 1);
            hywu_images* images = nullptr;
            hywu_pixels view = {};
            const bool good = hywu_edit(editor, &request.params, &images) == HYWU_OK &&
                              hywu_images_get(images, 0, &view) == HYWU_OK &&
                              std::memcmp(view.data, expected[static_cast<std::size_t>(i)].data(), 384) == 0;
            hywu_images_free(images);
            hywu_edit_params bad = request.params;
            bad.steps = 100 + i;  // each thread has its own last error
            const bool kept = hywu_edit(editor, &bad, &images) == HYWU_ERROR_INPUT &&
                              error().find(std::to_string(100 + i) + " steps") == 0;
            wrong += good && kept ? 0 : 1;
        }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&, i] {
            hywu_editor* editor = nullptr;
            if (hywu_editor_create(bundle.get(), nullptr, &editor) != HYWU_OK) {
                ++wrong;
                return;
            }
            work(editor, i);
            hywu_editor_free(editor);
        });
        threads.emplace_back([&, i] { work(alone.get(), i); });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}
