// hywu.h for C++17: move-only handles, options with defaults, spans in and out, exceptions or results.
//
//     #include <hywu/hywu.hpp>
//
//     std::vector<std::uint8_t> edit(const char* bundle, hywu::Pixels photo) {
//         hywu::Editor editor = hywu::Editor::load(bundle);
//         hywu::EditOptions options;
//         options.seed = 42;
//         hywu::Images images = editor.edit(photo, "make it sepia", options);
//         const hywu::Span<const std::uint8_t> edited = images[0].bytes();
//         return {edited.begin(), edited.end()};
//     }
//
// What can fail throws hywu::Error. With HYWU_NO_EXCEPTIONS, which is set where the compiler has exceptions
// switched off, it gives a hywu::Result instead, to be asked before it is used.
//
// hywu.h says what everything means, and what threads may do. The names are the same; this header is compiled
// into the program that uses it, so the C++ standard library is no part of the library's interface.
#ifndef HYWU_HYWU_HPP
#define HYWU_HYWU_HPP

#include <hywu/hywu.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#if !defined(HYWU_NO_EXCEPTIONS) && !defined(__cpp_exceptions)
#define HYWU_NO_EXCEPTIONS
#endif
#if !defined(HYWU_NO_EXCEPTIONS)
#include <exception>
#endif

namespace hywu {

// Elements in memory that somebody else holds. From and to std::span where there is one.
template <class T>
class Span {
public:
    constexpr Span() noexcept = default;
    constexpr Span(T* data, std::size_t size) noexcept : data_(data), size_(size) {}
    template <class Container,
              class = std::enable_if_t<
                  std::is_convertible_v<decltype(std::declval<Container&>().data()), T*> &&
                  std::is_convertible_v<decltype(std::declval<Container&>().size()), std::size_t>>>
    constexpr Span(Container&& container) noexcept : data_(container.data()), size_(container.size()) {}

    constexpr T* data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr T* begin() const noexcept { return data_; }
    constexpr T* end() const noexcept { return data_ + size_; }
    constexpr T& operator[](std::size_t i) const noexcept { return data_[i]; }

private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

// ---- Errors ----

enum class Status : hywu_status {
    ok = HYWU_OK,
    bundle = HYWU_ERROR_BUNDLE,
    checkpoint = HYWU_ERROR_CHECKPOINT,
    unsupported = HYWU_ERROR_UNSUPPORTED,
    delta = HYWU_ERROR_DELTA,
    engine = HYWU_ERROR_ENGINE,
    device = HYWU_ERROR_DEVICE,
    input = HYWU_ERROR_INPUT,
    cancelled = HYWU_ERROR_CANCELLED,
    memory = HYWU_ERROR_MEMORY,
    callback = HYWU_ERROR_CALLBACK,
    internal = HYWU_ERROR_INTERNAL,
};

// What went wrong: a text of up to three sentences, and its parts.
class Error : public std::runtime_error {
public:
    Error(Status status, std::string wrong, std::string expected, std::string remedy)
        : Error(status, wrong + ". " + expected + ". " + remedy + ".", wrong, expected, remedy) {}
    // Of the last call that failed in this thread.
    static Error last() {
        return Error(static_cast<Status>(hywu_last_status()), hywu_last_error(),
                     hywu_last_error_part(HYWU_ERROR_PART_WRONG),
                     hywu_last_error_part(HYWU_ERROR_PART_EXPECTED),
                     hywu_last_error_part(HYWU_ERROR_PART_REMEDY));
    }

    Status status() const noexcept { return status_; }
    const std::string& wrong() const noexcept { return wrong_; }        // what is wrong with which thing
    const std::string& expected() const noexcept { return expected_; }  // what was expected
    const std::string& remedy() const noexcept { return remedy_; }      // what to do about it

private:
    Error(Status status, const std::string& text, std::string wrong, std::string expected, std::string remedy)
        : std::runtime_error(text),
          status_(status),
          wrong_(std::move(wrong)),
          expected_(std::move(expected)),
          remedy_(std::move(remedy)) {}

    Status status_;
    std::string wrong_, expected_, remedy_;
};

// A value or an error, where there are no exceptions.
template <class T>
class [[nodiscard]] Result {
public:
    Result(T value) : content_(std::in_place_index<0>, std::move(value)) {}
    Result(Error error) : content_(std::in_place_index<1>, std::move(error)) {}

    explicit operator bool() const noexcept { return content_.index() == 0; }
    bool has_value() const noexcept { return content_.index() == 0; }
    // Only if there is a value.
    T& operator*() & noexcept { return *std::get_if<0>(&content_); }
    const T& operator*() const& noexcept { return *std::get_if<0>(&content_); }
    T&& operator*() && noexcept { return std::move(*std::get_if<0>(&content_)); }
    T* operator->() noexcept { return std::get_if<0>(&content_); }
    const T* operator->() const noexcept { return std::get_if<0>(&content_); }
    // Only if there is none.
    const Error& error() const noexcept { return *std::get_if<1>(&content_); }

private:
    std::variant<T, Error> content_;
};
using Done = std::monostate;  // Result<Done>: nothing to give but success

#if defined(HYWU_NO_EXCEPTIONS)
template <class T>
using Returned = Result<std::conditional_t<std::is_void_v<T>, Done, T>>;
#else
template <class T>
using Returned = T;
#endif

namespace detail {

template <class T, void (*free)(T*)>
struct Free {
    void operator()(T* handle) const noexcept { free(handle); }
};
template <class T, void (*free)(T*)>
using Handle = std::unique_ptr<T, Free<T, free>>;

template <class T>
Returned<T> fail(Error error) {
#if defined(HYWU_NO_EXCEPTIONS)
    return error;
#else
    throw error;
#endif
}

// What `make` gives if the status is a success; otherwise the error.
template <class Make>
auto finish(hywu_status status, Make&& make) -> Returned<decltype(make())> {
#if defined(HYWU_NO_EXCEPTIONS)
    if (status != HYWU_OK) return Error::last();
    if constexpr (std::is_void_v<decltype(make())>) {
        make();
        return Done{};
    } else {
        return make();
    }
#else
    if (status != HYWU_OK) throw Error::last();
    return make();
#endif
}
inline Returned<void> finish(hywu_status status) {
    return finish(status, [] {});
}

inline std::string utf8(const std::filesystem::path& path) {
    const auto text = path.u8string();  // std::string, or std::u8string since C++20
    return {reinterpret_cast<const char*>(text.data()), text.size()};
}

template <class T>
const T* pointer(const std::vector<T>& list) noexcept {
    return list.empty() ? nullptr : list.data();
}

}  // namespace detail

// ---- Plain values ----

// A picture: 8-bit RGB, rows from the top. A view: the pixels are held elsewhere.
struct Pixels {
    const std::uint8_t* data = nullptr;
    std::int32_t width = 0, height = 0;
    std::size_t stride = 0;  // bytes from row to row; 0: 3 * width

    Pixels() = default;
    Pixels(const std::uint8_t* d, std::int32_t w, std::int32_t h, std::size_t s = 0)
        : data(d), width(w), height(h), stride(s) {}
    explicit Pixels(const hywu_pixels& p) : Pixels(p.data, p.width, p.height, p.stride) {}
    operator hywu_pixels() const { return {data, width, height, stride}; }
    // All bytes, from the first pixel to the last.
    Span<const std::uint8_t> bytes() const noexcept {
        const std::size_t row = static_cast<std::size_t>(width) * 3;
        if (height <= 0) return {data, 0};
        return {data, (stride != 0 ? stride : row) * static_cast<std::size_t>(height - 1) + row};
    }
};

enum class Dtype : std::int32_t {
    uint8 = HYWU_DTYPE_UINT8,
    int32 = HYWU_DTYPE_INT32,
    int64 = HYWU_DTYPE_INT64,
    float16 = HYWU_DTYPE_FLOAT16,
    float32 = HYWU_DTYPE_FLOAT32,
    bfloat16 = HYWU_DTYPE_BFLOAT16,
    float64 = HYWU_DTYPE_FLOAT64,
};

// A dense, row-major tensor. A view, but for its name.
struct Tensor {
    std::string name;
    Dtype dtype = Dtype::float32;
    std::vector<std::int64_t> shape;
    const void* data = nullptr;

    Tensor() = default;
    Tensor(std::string n, Dtype d, std::vector<std::int64_t> s, const void* p)
        : name(std::move(n)), dtype(d), shape(std::move(s)), data(p) {}
    Tensor(std::string n, std::vector<std::int64_t> s, const float* p)
        : Tensor(std::move(n), Dtype::float32, std::move(s), p) {}
    Tensor(std::string n, std::vector<std::int64_t> s, const std::int64_t* p)
        : Tensor(std::move(n), Dtype::int64, std::move(s), p) {}
    Tensor(std::string n, std::vector<std::int64_t> s, const std::int32_t* p)
        : Tensor(std::move(n), Dtype::int32, std::move(s), p) {}
    Tensor(std::string n, std::vector<std::int64_t> s, const std::uint8_t* p)
        : Tensor(std::move(n), Dtype::uint8, std::move(s), p) {}

    // Valid as long as this is. More than HYWU_MAX_RANK axes are refused by what it is given to.
    hywu_tensor view() const noexcept {
        hywu_tensor tensor = {};
        tensor.name = name.c_str();
        tensor.data = data;
        tensor.dtype = static_cast<std::int32_t>(dtype);
        tensor.rank = static_cast<std::int32_t>(shape.size());
        std::copy_n(shape.begin(), std::min<std::size_t>(shape.size(), HYWU_MAX_RANK), tensor.shape);
        return tensor;
    }
};

// ---- Deltas ----

class Deltas {
public:
    static Returned<Deltas> load(const std::filesystem::path& path) {
        hywu_deltas* made = nullptr;
        return take(hywu_deltas_load(detail::utf8(path).c_str(), &made), made);
    }
    static Returned<Deltas> create(const std::vector<Tensor>& tensors) {
        std::vector<hywu_tensor> views;
        for (const Tensor& tensor : tensors) views.push_back(tensor.view());
        hywu_deltas* made = nullptr;
        return take(hywu_deltas_create(detail::pointer(views), views.size(), &made), made);
    }
    // The weighted sum, exactly; `max_rank` 0: any.
    static Returned<Deltas> blend(std::initializer_list<std::pair<const Deltas&, double>> parts,
                                  std::int64_t max_rank = 0) {
        std::vector<const hywu_deltas*> sets;
        std::vector<double> weights;
        for (const auto& [set, weight] : parts) {
            sets.push_back(set.get());
            weights.push_back(weight);
        }
        hywu_deltas* made = nullptr;
        return take(
            hywu_deltas_blend(detail::pointer(sets), detail::pointer(weights), sets.size(), max_rank, &made),
            made);
    }
    // One set for a batch, sample i using sets[i].
    static Returned<Deltas> stack(Span<const Deltas* const> sets) {
        std::vector<const hywu_deltas*> handles;
        for (const Deltas* set : sets) handles.push_back(set->get());
        hywu_deltas* made = nullptr;
        return take(hywu_deltas_stack(detail::pointer(handles), handles.size(), &made), made);
    }

    Returned<Deltas> select(std::int64_t sample) const {
        hywu_deltas* made = nullptr;
        return take(hywu_deltas_select(get(), sample, &made), made);
    }
    Returned<void> save(const std::filesystem::path& path) const {
        return detail::finish(hywu_deltas_save(get(), detail::utf8(path).c_str()));
    }
    std::int64_t rank() const noexcept { return hywu_deltas_rank(get()); }
    std::int64_t batch() const noexcept { return hywu_deltas_batch(get()); }
    std::size_t size() const noexcept { return hywu_deltas_count(get()); }
    // Tensor i < size(), in the order of names; its data is held by this.
    Returned<Tensor> tensor(std::size_t i) const {
        hywu_tensor found = {};
        return detail::finish(hywu_deltas_tensor(get(), i, &found), [&] {
            return Tensor(found.name, Dtype::float32, {found.shape, found.shape + found.rank}, found.data);
        });
    }

    const hywu_deltas* get() const noexcept { return handle_.get(); }

private:
    friend class Editor;
    explicit Deltas(hywu_deltas* handle) : handle_(handle) {}
    static Returned<Deltas> take(hywu_status status, hywu_deltas*& made) {
        return detail::finish(status, [&] { return Deltas(made); });
    }

    detail::Handle<hywu_deltas, hywu_deltas_free> handle_;
};

// ---- Requests ----

// Ends requests early, from any thread.
class Cancel {
public:
    static Returned<Cancel> create() {
        hywu_cancel* made = nullptr;
        const hywu_status status = hywu_cancel_create(&made);
        return detail::finish(status, [&] { return Cancel(made); });
    }
    void request() noexcept { hywu_cancel_request(get()); }
    void reset() noexcept { hywu_cancel_reset(get()); }
    hywu_cancel* get() const noexcept { return handle_.get(); }

private:
    explicit Cancel(hywu_cancel* handle) : handle_(handle) {}
    detail::Handle<hywu_cancel, hywu_cancel_free> handle_;
};

class Images {
public:
    std::size_t size() const noexcept { return hywu_images_count(get()); }
    // Picture i < size(), held by this.
    Pixels operator[](std::size_t i) const noexcept {
        hywu_pixels found = {};
        (void)hywu_images_get(get(), i, &found);
        return Pixels(found);
    }
    const hywu_images* get() const noexcept { return handle_.get(); }

private:
    friend class Editor;
    explicit Images(hywu_images* handle) : handle_(handle) {}
    detail::Handle<hywu_images, hywu_images_free> handle_;
};

// What Editor::run made.
class Tensors {
public:
    std::size_t size() const noexcept { return hywu_tensors_count(get()); }
    // Tensor i < size(), in the order of the outputs; its data is held by this.
    Tensor operator[](std::size_t i) const {
        hywu_tensor found = {};
        if (hywu_tensors_get(get(), i, &found) != HYWU_OK) return {};
        return Tensor(found.name, static_cast<Dtype>(found.dtype), {found.shape, found.shape + found.rank},
                      found.data);
    }
    const hywu_tensors* get() const noexcept { return handle_.get(); }

private:
    friend class Editor;
    explicit Tensors(hywu_tensors* handle) : handle_(handle) {}
    detail::Handle<hywu_tensors, hywu_tensors_free> handle_;
};

// One photograph with its instruction.
struct Sample {
    Pixels photo;
    std::string prompt;
    std::string negative_prompt = {};
    std::vector<Pixels> more_photos = {};  // after the first, for a bundle that takes several
};

// What hywu_edit_params says beside the samples. Vectors have one entry for all samples, or one for each;
// empty: the default.
struct EditOptions {
    std::uint64_t seed = 0;
    std::vector<std::uint64_t> seeds;  // for each sample: what this seed alone gives
    std::map<std::string, std::vector<double>> guidance;
    std::vector<double> delta_strength;
    std::vector<const Deltas*> deltas;
    std::string sampler;
    std::int32_t steps = 0, width = 0, height = 0;
    double strength = 0;  // 0: the bundle's default
    std::optional<Tensor> noise, latents;
    std::vector<Tensor> inputs;
    // Evaluations done, and in all. What it throws comes out of the call.
    std::function<void(std::int32_t, std::int32_t)> progress;
    const Cancel* cancel = nullptr;
};

// ---- Bundles and editors ----

struct BundleOptions {
    bool verify = false;
    std::map<std::string, std::filesystem::path> sources;
};

class Bundle {
public:
    static Returned<Bundle> open(const std::filesystem::path& path, const BundleOptions& options = {}) {
        std::vector<std::string> folders;
        std::vector<const char*> names, directories;
        for (const auto& [name, folder] : options.sources) {
            names.push_back(name.c_str());
            folders.push_back(detail::utf8(folder));
        }
        for (const std::string& folder : folders) directories.push_back(folder.c_str());
        hywu_bundle_params params = {};
        hywu_bundle* made = nullptr;
        hywu_status status = hywu_bundle_params_init(&params, sizeof params);
        params.verify = options.verify ? 1 : 0;
        params.source_count = names.size();
        params.source_ids = detail::pointer(names);
        params.source_directories = detail::pointer(directories);
        if (status == HYWU_OK) status = hywu_bundle_open(detail::utf8(path).c_str(), &params, &made);
        return detail::finish(status, [&] { return Bundle(made); });
    }
    std::string name() const { return hywu_bundle_name(get()); }
    std::vector<std::string> variants() const {
        std::vector<std::string> names;
        while (const char* name = hywu_bundle_variant(get(), names.size())) names.emplace_back(name);
        return names;
    }
    std::vector<std::string> engines() const {
        std::vector<std::string> keys;
        while (const char* key = hywu_bundle_engine(get(), keys.size())) keys.emplace_back(key);
        return keys;
    }
    hywu_bundle* get() const noexcept { return handle_.get(); }

private:
    explicit Bundle(hywu_bundle* handle) : handle_(handle) {}
    detail::Handle<hywu_bundle, hywu_bundle_free> handle_;
};

struct EditorOptions {
    std::string backend;  // empty: the best that can be used
    std::string variant;  // empty: the bundle's own graphs
    std::string engine;   // empty: the newest of the bundle's engines that serves a request
    std::int32_t device = -1;
    std::int32_t threads = 0;
    bool low_memory = false;
};

struct Sampler {
    std::string name;
    std::vector<std::int32_t> steps;
};

struct Timings {
    double total = 0, load = 0;                          // seconds
    std::vector<std::pair<std::string, double>> graphs;  // those that ran outside the steps
    std::vector<double> steps;                           // by evaluation
};

class Editor {
public:
    static Returned<Editor> create(const Bundle& bundle, const EditorOptions& options = {}) {
        hywu_editor_params params = {};
        hywu_editor* made = nullptr;
        hywu_status status = fill(params, options);
        if (status == HYWU_OK) status = hywu_editor_create(bundle.get(), &params, &made);
        return detail::finish(status, [&] { return Editor(made); });
    }
    // Opens a bundle for one editor.
    static Returned<Editor> load(const std::filesystem::path& path, const EditorOptions& options = {},
                                 const BundleOptions& bundle_options = {}) {
#if defined(HYWU_NO_EXCEPTIONS)
        Result<Bundle> bundle = Bundle::open(path, bundle_options);
        if (!bundle) return bundle.error();
        return create(*bundle, options);
#else
        return create(Bundle::open(path, bundle_options), options);
#endif
    }

    Returned<Images> edit(Pixels photo, std::string prompt, const EditOptions& options = {}) {
        const Sample sample = {photo, std::move(prompt)};
        return edit(Span<const Sample>(&sample, 1), options);
    }
    // A batch: all photos are brought to one working size.
    Returned<Images> edit(Span<const Sample> samples, const EditOptions& options = {}) {
        Call call(samples, options);
        if (call.refused) return detail::fail<Images>(*call.refused);
        hywu_images* made = nullptr;
        const hywu_status status = hywu_edit(get(), &call.params, &made);
        call.rethrow();
        return detail::finish(status, [&] { return Images(made); });
    }
    // Into memory of the caller's, of exactly the pictures' size; gives their width and height.
    Returned<std::pair<std::int32_t, std::int32_t>> edit_into(Span<const Sample> samples,
                                                              Span<std::uint8_t> pixels,
                                                              const EditOptions& options = {}) {
        Call call(samples, options);
        if (call.refused) return detail::fail<std::pair<std::int32_t, std::int32_t>>(*call.refused);
        std::int32_t width = 0, height = 0;
        const hywu_status status =
            hywu_edit_into(get(), &call.params, pixels.data(), pixels.size(), &width, &height);
        call.rethrow();
        return detail::finish(status, [&] { return std::make_pair(width, height); });
    }

    // The deltas that an edit would use. Of the options: width, height, inputs, cancel.
    Returned<Deltas> generate(Pixels photo, const std::string& prompt, const EditOptions& options = {}) {
        const hywu_pixels pixels = photo;
        return generate(&pixels, 1, prompt, options);
    }
    // Of several photos, for a bundle that takes so many.
    Returned<Deltas> generate(const std::vector<Pixels>& photos, const std::string& prompt,
                              const EditOptions& options = {}) {
        const std::vector<hywu_pixels> pixels(photos.begin(), photos.end());
        return generate(pixels.data(), pixels.size(), prompt, options);
    }
    // Where inputs stand for what is made of a photo.
    Returned<Deltas> generate(const EditOptions& options) { return generate(nullptr, 1, "", options); }

    // A bundle of any module. Of the options: deltas, delta_strength, cancel. `outputs`: which of outputs();
    // none: all.
    Returned<Tensors> run(const std::vector<Tensor>& inputs, const EditOptions& options = {},
                          const std::vector<std::string>& outputs = {}) {
        hywu_run_params params = {};
        hywu_status status = hywu_run_params_init(&params, sizeof params);
        std::vector<hywu_tensor> views;
        for (const Tensor& tensor : inputs) views.push_back(tensor.view());
        std::vector<const char*> names;
        for (const std::string& name : outputs) names.push_back(name.c_str());
        std::vector<const hywu_deltas*> sets;
        for (const Deltas* set : options.deltas) sets.push_back(set->get());
        params.inputs = detail::pointer(views);
        params.input_count = views.size();
        params.outputs = detail::pointer(names);
        params.output_count = names.size();
        params.deltas = detail::pointer(sets);
        params.delta_count = sets.size();
        params.delta_strengths = detail::pointer(options.delta_strength);
        params.strength_count = options.delta_strength.size();
        params.cancel = options.cancel != nullptr ? options.cancel->get() : nullptr;
        hywu_tensors* made = nullptr;
        if (status == HYWU_OK) status = hywu_run(get(), &params, &made);
        return detail::finish(status, [&] { return Tensors(made); });
    }
    // What run() gives.
    std::vector<std::string> outputs() const {
        std::vector<std::string> names;
        while (const char* name = hywu_editor_output(get(), names.size())) names.emplace_back(name);
        return names;
    }

    Returned<void> warm_up() { return detail::finish(hywu_editor_warm_up(get())); }
    std::string backend() const { return hywu_editor_backend(get()); }
    Returned<hywu_limits> limits() const {
        hywu_limits limits = {};
        limits.struct_size = sizeof limits;
        return detail::finish(hywu_editor_limits(get(), &limits), [&] { return limits; });
    }
    // The default first.
    std::vector<Sampler> samplers() const {
        std::vector<Sampler> result;
        while (const char* name = hywu_editor_sampler(get(), result.size())) {
            std::size_t count = 0;
            if (hywu_editor_steps(get(), name, nullptr, 0, &count) != HYWU_OK) break;
            Sampler sampler = {name, std::vector<std::int32_t>(count)};
            if (hywu_editor_steps(get(), name, sampler.steps.data(), count, &count) != HYWU_OK) break;
            result.push_back(std::move(sampler));
        }
        return result;
    }
    // Scale of guidance and its default.
    std::vector<std::pair<std::string, double>> guidance() const {
        std::vector<std::pair<std::string, double>> result;
        double scale = 0;
        while (const char* name = hywu_editor_guidance(get(), result.size(), &scale))
            result.emplace_back(name, scale);
        return result;
    }
    Returned<std::pair<std::int32_t, std::int32_t>> working_size(std::int32_t width,
                                                                 std::int32_t height) const {
        std::int32_t w = 0, h = 0;
        return detail::finish(hywu_editor_working_size(get(), width, height, &w, &h),
                              [&] { return std::make_pair(w, h); });
    }
    Returned<void> check(const Deltas& deltas, std::int64_t batch = 0) const {
        return detail::finish(hywu_deltas_check(deltas.get(), get(), batch));
    }
    Returned<hywu_memory> memory() {
        hywu_memory memory = {};
        memory.struct_size = sizeof memory;
        return detail::finish(hywu_editor_memory(get(), &memory), [&] { return memory; });
    }
    // Of the last request.
    Returned<Timings> timings() {
        hywu_timings totals = {};
        totals.struct_size = sizeof totals;
        Timings result;
        hywu_status status = hywu_editor_timings(get(), &totals);
        for (std::size_t i = 0; status == HYWU_OK && i < totals.graph_count; ++i) {
            const char* name = "";
            double seconds = 0;
            status = hywu_editor_graph_time(get(), i, &name, &seconds);
            result.graphs.emplace_back(name, seconds);
        }
        for (std::size_t i = 0; status == HYWU_OK && i < totals.step_count; ++i) {
            result.steps.push_back(0);
            status = hywu_editor_step_time(get(), i, &result.steps.back());
        }
        result.total = totals.total;
        result.load = totals.load;
        return detail::finish(status, [&] { return std::move(result); });
    }

    hywu_editor* get() const noexcept { return handle_.get(); }

private:
    explicit Editor(hywu_editor* handle) : handle_(handle) {}

    static hywu_status fill(hywu_editor_params& params, const EditorOptions& options) {
        const hywu_status status = hywu_editor_params_init(&params, sizeof params);
        params.backend = options.backend.empty() ? nullptr : options.backend.c_str();
        params.variant = options.variant.empty() ? nullptr : options.variant.c_str();
        params.engine = options.engine.empty() ? nullptr : options.engine.c_str();
        params.device = options.device;
        params.threads = options.threads;
        params.low_memory = options.low_memory ? 1 : 0;
        return status;
    }

    // Arguments of one edit, and what they point to.
    struct Call {
        hywu_edit_params params = {};
        std::optional<Error> refused;

        Call(Span<const Sample> samples, const EditOptions& options) : options_(options) {
            if (hywu_edit_params_init(&params, sizeof params) != HYWU_OK) refused = Error::last();
            const std::size_t count = samples.size();
            for (const Sample& sample : samples) {
                photos_.push_back(sample.photo);
                photos_.insert(photos_.end(), sample.more_photos.begin(), sample.more_photos.end());
                if (sample.more_photos.size() != samples.begin()->more_photos.size()) {
                    refused = Error(Status::input, "The samples have different numbers of photos",
                                    "Expected as many for each", "Give as many as the bundle takes");
                }
                photo_given_ |= sample.photo.data != nullptr;
                prompts_.push_back(sample.prompt.data());
                lengths_.push_back(sample.prompt.size());
                negatives_.push_back(sample.negative_prompt.data());
                negative_lengths_.push_back(sample.negative_prompt.size());
            }
            params.count = count;
            if (photo_given_) params.photos = photos_.data();
            if (count != 0) params.photo_count = photos_.size() / count;
            params.prompts = detail::pointer(prompts_);
            params.prompt_lengths = detail::pointer(lengths_);
            params.negative_prompts = detail::pointer(negatives_);
            params.negative_prompt_lengths = detail::pointer(negative_lengths_);
            params.seed = options.seed;
            if (!options.seeds.empty()) params.seeds = per_sample("seeds", options.seeds, seeds_, count);
            guidance_values_.reserve(options.guidance.size());
            for (const auto& [name, scales] : options.guidance) {
                hywu_guidance entry = {};
                entry.name = name.c_str();
                guidance_values_.emplace_back();
                if (!scales.empty())
                    entry.scales = per_sample("guidance", scales, guidance_values_.back(), count);
                if (!scales.empty()) guidance_.push_back(entry);
            }
            params.guidance = detail::pointer(guidance_);
            params.guidance_count = guidance_.size();
            if (!options.delta_strength.empty()) {
                params.delta_strengths =
                    per_sample("delta_strength", options.delta_strength, strengths_, count);
            }
            for (const Deltas* set : options.deltas) deltas_.push_back(set != nullptr ? set->get() : nullptr);
            params.deltas = detail::pointer(deltas_);
            params.delta_count = deltas_.size();
            params.sampler = options.sampler.empty() ? nullptr : options.sampler.c_str();
            params.steps = options.steps;
            params.strength = options.strength;
            params.width = options.width;
            params.height = options.height;
            if (options.noise) params.noise = &(noise_ = options.noise->view());
            if (options.latents) params.latents = &(latents_ = options.latents->view());
            for (const Tensor& tensor : options.inputs) inputs_.push_back(tensor.view());
            params.inputs = detail::pointer(inputs_);
            params.input_count = inputs_.size();
            if (options.progress) {
                params.progress = [](void* user, std::int32_t done, std::int32_t total) {
                    return static_cast<Call*>(user)->tell(done, total);
                };
                params.progress_user = this;
            }
            params.cancel = options.cancel != nullptr ? options.cancel->get() : nullptr;
        }
        Call(const Call&) = delete;
        Call& operator=(const Call&) = delete;

        // What the progress function threw.
        void rethrow() {
#if !defined(HYWU_NO_EXCEPTIONS)
            if (thrown_) std::rethrow_exception(thrown_);
#endif
        }

    private:
        // One value for all is repeated, so that the library sees one for each; another count is refused
        // here.
        template <class T>
        const T* per_sample(const char* name, const std::vector<T>& values, std::vector<T>& kept,
                            std::size_t count) {
            kept = values.size() == 1 ? std::vector<T>(count, values[0]) : values;
            if (kept.size() == count) return kept.data();
            refused = Error(Status::input,
                            std::string("`") + name + "` has " + std::to_string(values.size()) + " entries",
                            "Expected " + std::to_string(count) + ", one for each photo, or a single value",
                            "Correct it");
            return nullptr;
        }
        std::int32_t tell(std::int32_t done, std::int32_t total) {
#if defined(HYWU_NO_EXCEPTIONS)
            options_.progress(done, total);
            return 0;
#else
            try {
                options_.progress(done, total);
                return 0;
            } catch (...) {
                thrown_ = std::current_exception();
                return 1;
            }
#endif
        }

        const EditOptions& options_;
        bool photo_given_ = false;
        std::vector<hywu_pixels> photos_;
        std::vector<const char*> prompts_, negatives_;
        std::vector<std::size_t> lengths_, negative_lengths_;
        std::vector<std::uint64_t> seeds_;
        std::vector<std::vector<double>> guidance_values_;
        std::vector<hywu_guidance> guidance_;
        std::vector<double> strengths_;
        std::vector<const hywu_deltas*> deltas_;
        hywu_tensor noise_ = {}, latents_ = {};
        std::vector<hywu_tensor> inputs_;
#if !defined(HYWU_NO_EXCEPTIONS)
        std::exception_ptr thrown_;
#endif
    };

    Returned<Deltas> generate(const hywu_pixels* photos, std::size_t count, const std::string& prompt,
                              const EditOptions& options) {
        hywu_generate_params params = {};
        hywu_status status = hywu_generate_params_init(&params, sizeof params);
        std::vector<hywu_tensor> inputs;
        for (const Tensor& tensor : options.inputs) inputs.push_back(tensor.view());
        params.photo = photos;
        params.photo_count = count;
        params.prompt = prompt.data();
        params.prompt_length = prompt.size();
        params.width = options.width;
        params.height = options.height;
        params.inputs = detail::pointer(inputs);
        params.input_count = inputs.size();
        params.cancel = options.cancel != nullptr ? options.cancel->get() : nullptr;
        hywu_deltas* made = nullptr;
        if (status == HYWU_OK) status = hywu_generate(get(), &params, &made);
        return Deltas::take(status, made);
    }

    detail::Handle<hywu_editor, hywu_editor_free> handle_;
};

// ---- The library ----

// Every backend, best first, with the reason why it cannot be used here; empty if it can.
inline std::vector<std::pair<std::string, std::string>> backends() {
    std::vector<std::pair<std::string, std::string>> result;
    while (const char* name = hywu_backend(result.size())) {
        const char* const missing = hywu_backend_missing(name);
        result.emplace_back(name, missing != nullptr ? missing : "");
    }
    return result;
}

// The version of the library behind a backend; empty if it cannot be used.
inline std::string backend_version(const std::string& backend) {
    const char* const text = hywu_backend_version(backend.c_str());
    return text != nullptr ? text : "";
}

inline std::string version() { return hywu_version_string(); }

}  // namespace hywu

#endif  // HYWU_HYWU_HPP
