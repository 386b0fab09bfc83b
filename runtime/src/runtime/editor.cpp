#include "runtime/editor.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "core/engines.hpp"
#include "core/error.hpp"
#include "core/log.hpp"
#include "core/noise.hpp"
#include "images/resize.hpp"

namespace hywu::runtime {

using core::Array;
using core::Dtype;
using core::Error;
using core::ErrorKind;
using core::show;

namespace {

constexpr std::size_t max_noise = std::size_t{1}
                                  << 30;         // above any latents: a damaged manifest must not take hours
constexpr std::int64_t max_pixels = 89'478'485;  // Pillow's own limit against decompression bombs

// A number as Python writes it.
std::string number_text(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
    std::array<char, 32> text{};
    const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
    std::string result(text.data(), end);
    return result.find_first_of(".en") == std::string::npos ? result + ".0" : result;
}

void check_number(const std::string& name, double value) {
    if (std::abs(value) <= std::numeric_limits<float>::max()) return;
    if (std::isfinite(value) && std::isfinite(static_cast<float>(value)))
        return;  // rounds down to the largest float
    throw Error(ErrorKind::input, "`" + name + "` is " + number_text(value), "Expected a finite number",
                "Correct it");
}

// One value for every sample.
std::vector<double> per_sample(const std::string& name, const std::vector<double>& values,
                               std::size_t count) {
    for (const double value : values) check_number(name, value);
    if (values.size() == count) return values;
    if (values.size() == 1) return std::vector<double>(count, values[0]);
    throw Error(ErrorKind::input, "`" + name + "` has " + std::to_string(values.size()) + " entries",
                "Expected " + std::to_string(count) + ", one for each photo, or a single value",
                "Correct it");
}

float from_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
    std::uint32_t exponent = (half >> 10) & 0x1FU, mantissa = half & 0x3FFU, bits = 0;
    if (exponent == 0x1F) {
        bits = sign | 0x7F800000U | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else {
        const float value = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -value : value;
    }
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Finite floating-point numbers as float32.
Array floats(const std::string& name, const View& view) {
    const auto refuse = [&] {
        return Error(ErrorKind::input,
                     "`" + name + "` is " + std::string(core::name(view.dtype)) + " " +
                         shape_text(view.shape) + ", or not finite",
                     "Expected finite float32 numbers", "Correct the array");
    };
    if (view.dtype != Dtype::float16 && view.dtype != Dtype::float32 && view.dtype != Dtype::float64)
        throw refuse();
    Array result(Dtype::float32, view.shape);
    float* const out = result.as<float>();
    const auto* const bytes = static_cast<const std::byte*>(view.data);
    for (std::size_t i = 0; i < result.size(); ++i) {
        if (view.dtype == Dtype::float16) {
            std::uint16_t half = 0;
            std::memcpy(&half, bytes + i * sizeof half, sizeof half);
            out[i] = from_half(half);
            if (!std::isfinite(out[i])) throw refuse();
        } else if (view.dtype == Dtype::float64) {
            double value = 0;
            std::memcpy(&value, bytes + i * sizeof value, sizeof value);
            if (!std::isfinite(value)) throw refuse();
            out[i] = static_cast<float>(value);
        } else {
            std::memcpy(out + i, bytes + i * sizeof(float), sizeof(float));
            if (!std::isfinite(out[i])) throw refuse();
        }
    }
    return result;
}

struct Seed {
    std::uint64_t seed;
    std::uint32_t sample;
};

void check_noise(const core::Shape& shape) {
    std::size_t numbers = 0;
    try {
        numbers = core::count(shape);
    } catch (const std::length_error&) {
        numbers = std::numeric_limits<std::size_t>::max();
    }
    if (numbers <= max_noise) return;
    throw Error(ErrorKind::bundle,
                "The bundle asks for " + std::to_string(numbers) + " random numbers at once",
                "Expected at most " + std::to_string(max_noise),
                "Use a smaller size or batch; if it is as small as can be, the bundle is damaged");
}

// Random numbers [batch, …] of one draw.
void draw(float* out, std::size_t count, const std::vector<Seed>& seeds, std::uint32_t number) {
    const std::size_t each = count / seeds.size();
    for (const Seed& seed : seeds) {
        core::noise::normal(out, each, seed.seed, seed.sample, number);
        out += each;
    }
}

// Whether a tensor is drawn at a size that others determine, or changes from step to step.
// A photo's pixels, row by row without gaps: uint8 [H, W, 3]. Throws Error(input) for one without pixels.
Array whole(const Photo& photo) {
    Array rgb(Dtype::uint8, {photo.height, photo.width, 3});
    const std::size_t row = static_cast<std::size_t>(photo.width) * 3;
    for (std::int64_t y = 0; y < photo.height; ++y) {
        std::memcpy(rgb.data() + static_cast<std::size_t>(y) * row,
                    photo.data + static_cast<std::size_t>(y) * photo.stride, row);
    }
    return rgb;
}

Array resized(const Array& rgb, const Size& target, core::Filter filter) {
    const std::int64_t height = rgb.shape()[0], width = rgb.shape()[1];
    if (target.width == width && target.height == height) return rgb;
    const std::vector<std::uint8_t> pixels =
        images::resize(rgb.as<unsigned char>(), static_cast<int>(width), static_cast<int>(height),
                       static_cast<int>(target.width), static_cast<int>(target.height), filter);
    return {Dtype::uint8, {target.height, target.width, 3}, pixels.data()};
}

bool needs_axes(const core::ProvidedTensor& tensor) { return tensor.draw || tensor.changes(); }

// A column of the schedule by evaluation.
StepInput column(const std::string& name, const core::ProvidedTensor& tensor, const core::Rows& rows) {
    if (tensor.column == core::Column::timesteps)
        return {name, [&rows](std::size_t k) { return &rows.timesteps[k]; }};
    if (tensor.shape.size() != 1 || tensor.shape[0].size != static_cast<std::int64_t>(rows.width)) {
        throw Error(ErrorKind::bundle, "The schedule has " + std::to_string(rows.width) + " coefficients",
                    "Expected " + shape_text(tensor.shape) + ", as tensor " + show(name),
                    "Export the bundle again");
    }
    return {name, [&rows](std::size_t k) { return rows.row(k); }};
}

}  // namespace

// What a batch of requests says, one entry for each sample.
struct Editor::Samples {
    std::map<std::string, std::vector<Array>> pictures;  // by tensor: uint8 [H, W, 3] at its size
    std::vector<std::string> prompts, negative_prompts;
    std::vector<Seed> seeds;
    std::map<std::string, std::vector<double>> scales;
    std::vector<double> strengths;
    std::size_t count = 0;
};

class Editor::Turn {
public:
    explicit Turn(Editor& editor) : editor_(editor) {
        const std::thread::id self = std::this_thread::get_id();
        if (editor.owner_.load(std::memory_order_relaxed) == self) {
            throw Error(ErrorKind::input, "The editor is called from its own callback",
                        "Expected a call after the one that runs",
                        "Use another editor, or call when it has returned");
        }
        editor.mutex_.lock();
        editor.owner_.store(self, std::memory_order_relaxed);
    }
    ~Turn() {
        editor_.owner_.store({}, std::memory_order_relaxed);
        editor_.mutex_.unlock();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

private:
    Editor& editor_;
};

namespace {

std::string sharing_words(const EditorOptions& options, std::string_view backend) {
    const auto number = [](const std::optional<int>& n) { return n ? std::to_string(*n) : "-"; };
    return std::string(backend) + "/" + number(options.device.device) + "/" + number(options.device.threads);
}

void check_variant(const core::Bundle& bundle, const std::optional<std::string>& variant) {
    if (!variant) return;
    for (const auto& [name, graph] : bundle.manifest().graphs) bundle.graph_file(name, variant);
}

}  // namespace

Editor::Editor(SharedBundle shared, const EditorOptions& options)
    : Editor(shared, choose(*shared.bundle, options), "", options) {}

Editor::Editor(SharedBundle shared, std::shared_ptr<backends::Backend> backend, const std::string& sharing,
               const EditorOptions& options)
    : Editor(shared, choose(*shared.bundle, options, std::move(backend)), sharing, options) {}

Editor::Editor(SharedBundle shared, Choice choice, const std::string& sharing, const EditorOptions& options)
    : shared_(std::move(shared)),
      manifest_(shared_.bundle->manifest()),
      backend_(choice.backend),
      engines_(choice.engines),
      executor_(shared_.bundle, backend_, shared_.sessions,
                {choice.variant, choice.engines,
                 sharing.empty() ? sharing_words(options, backend_->name()) : sharing, options.low_memory}) {
    check_variant(*shared_.bundle, choice.variant);
    for (const auto& [name, entry] : manifest_.tokenizers) {
        encoders_[name] = std::make_unique<text::PromptEncoder>(shared_.bundle->file(entry.file), entry);
    }
    if (manifest_.schedules)
        schedule_.emplace(shared_.bundle->file(manifest_.schedules->file), *manifest_.schedules);
    set_limits();
}

void Editor::set_limits() {
    if (const core::Axis* batch = manifest_.axes.find("batch")) {
        limits_.batch_min = batch->min.value_or(1);
        limits_.batch_max = batch->max.value_or(1);
    }
    std::int64_t least = std::numeric_limits<std::int64_t>::max(), most = 0;
    const bool bounded =
        !engines_.empty() && std::all_of(engines_.begin(), engines_.end(), [&](const std::string& key) {
            const auto* sizes = manifest_.engines.at(key).shapes.find("batch");
            if (sizes == nullptr) return false;
            least = std::min(least, (*sizes)[0]);
            most = std::max(most, (*sizes)[2]);
            return true;
        });
    if (bounded) {
        limits_.batch_min = std::max(limits_.batch_min, least);
        limits_.batch_max = std::min(limits_.batch_max, most);
    }
    limits_.size = policy(limits_.batch_min);
    if (schedule_) {
        const core::Schedules& section = *manifest_.schedules;
        limits_.steps.emplace_back(section.default_sampler, schedule_->accepted(section.default_sampler));
        for (const auto& [name, sampler] : section.samplers) {
            if (name != section.default_sampler) limits_.steps.emplace_back(name, schedule_->accepted(name));
        }
        limits_.default_steps = section.default_steps;
        if (section.strength) limits_.default_strength = section.strength->default_strength;
    }
    for (const core::Guidance& guidance : manifest_.guidance) {
        limits_.guidance.emplace_back(guidance.name, guidance.default_scale);
    }
    limits_.rank = manifest_.deltas ? manifest_.deltas->rank : 0;
    for (const auto& [name, tensor] : manifest_.tensors) {
        if (tensor.source != core::TensorSource::image) continue;
        limits_.photos = std::max(limits_.photos, static_cast<std::size_t>(tensor.index.value_or(0)) + 1);
    }
    limits_.edits = manifest_.results.image.has_value();
    limits_.generates = !manifest_.results.deltas.empty();
}

std::optional<core::ImagePolicy> Editor::policy(std::int64_t batch) const {
    for (const std::string& key : engines_) {
        const core::Engine& engine = manifest_.engines.at(key);
        if (!engine.covers({{"batch", batch}})) return core::narrowed(manifest_, engine);
    }
    return manifest_.image;
}

void Editor::edit(const EditOptions& options, const Place& place) {
    if (!manifest_.results.image) {
        throw Error(ErrorKind::unsupported, "This bundle makes no images",
                    "It holds a generator of deltas alone, or a module that is no editor",
                    "Use `generate` or `run`, or export with a base");
    }
    const std::string& image = *manifest_.results.image;
    Samples batch = samples(options.count, options.photos, options.size);
    batch.prompts = options.prompts.empty() ? std::vector<std::string>(options.count) : options.prompts;
    batch.negative_prompts =
        options.negative_prompts.empty() ? std::vector<std::string>(options.count) : options.negative_prompts;
    for (std::size_t i = 0; i < options.count; ++i) {
        batch.seeds.push_back(options.seeds.empty() ? Seed{options.seed, static_cast<std::uint32_t>(i)}
                                                    : Seed{options.seeds[i], 0});
    }
    batch.scales = scales(options);
    batch.strengths = per_sample("delta_strength", options.strengths, options.count);

    std::vector<Array> kept;
    NamedViews inputs = given(options.inputs, options.latents, kept);
    core::Deltas deltas;
    if (!options.deltas.empty()) {
        deltas = checked(options.deltas, options.count);
        for (const auto& [name, array] : deltas) inputs.emplace_back(name, View(*array));
    }
    const bool guided = core::is_guided(manifest_.guidance, &batch.scales);
    std::set<std::string> names;
    for (const auto& [name, view] : inputs) names.insert(name);
    const Plan plan = make_plan(manifest_, {image}, names, guided);
    add_absent(plan, batch.strengths, inputs, kept);

    std::optional<core::Rows> rows;
    if (schedule_) {
        rows = schedule_->rows(options.sampler, options.steps, options.strength);
    } else if (options.sampler || options.steps || options.strength) {
        throw Error(ErrorKind::input, "This bundle has no schedule",
                    "Expected neither `steps` nor `sampler` nor `strength`", "Leave them out");
    }
    std::vector<std::string> generated;
    for (const std::string& name : manifest_.results.deltas) {
        if (options.deltas.empty() && names.count(name) == 0) generated.push_back(name);
    }
    void* out = nullptr;
    run(
        plan, batch, inputs, rows, std::move(generated), options,
        [&](const Axes& axes) { out = place(resolve_shape(manifest_, image, axes)); },
        [&](const std::string&, backends::DeviceTensor& tensor) { tensor.read(out, tensor.bytes()); });
}

core::Deltas Editor::generate(const GenerateOptions& options) {
    const std::vector<std::string>& wanted = manifest_.results.deltas;
    if (wanted.empty()) {
        throw Error(ErrorKind::unsupported, "This bundle has no generator", "Deltas are given to `edit`",
                    "Export with a generator");
    }
    std::vector<Array> kept;
    NamedViews inputs = given(options.inputs, {}, kept);
    const std::size_t count = batch_of(inputs);
    check_batch(count);
    std::vector<Photo> photos;  // the same for each sample
    for (std::size_t i = 0; i < count; ++i) {
        photos.insert(photos.end(), options.photos.begin(), options.photos.end());
    }
    Samples batch = samples(count, photos, options.size);
    batch.prompts.assign(count, options.prompt);
    batch.negative_prompts.assign(count, "");
    for (std::size_t i = 0; i < count; ++i) batch.seeds.push_back({0, static_cast<std::uint32_t>(i)});
    EditOptions defaults;
    defaults.count = count;
    defaults.cancelled = options.cancelled;
    batch.scales = scales(defaults);
    batch.strengths.assign(count, 1.0);

    std::set<std::string> names;
    for (const auto& [name, view] : inputs) names.insert(name);
    const Plan plan = make_plan(manifest_, wanted, names);
    add_absent(plan, batch.strengths, inputs, kept);
    std::map<std::string, Array> made;
    run(
        plan, batch, inputs, {}, {}, defaults, [](const Axes&) {},
        [&](const std::string& name, backends::DeviceTensor& tensor) {
            Array array(tensor.dtype(), tensor.shape());
            tensor.read(array.data(), array.bytes());
            made.insert_or_assign(name, std::move(array));
        });
    for (const auto& [name, array] : made) {
        const float* values = array.as<float>();
        if (std::all_of(values, values + array.size(), [](float x) { return std::isfinite(x); })) continue;
        throw Error(ErrorKind::delta,
                    "The generator made values of " + show(name, 200) + " that are not finite",
                    "Expected finite numbers", "Check the bundle and the request's inputs");
    }
    return core::Deltas(std::move(made));
}

std::vector<std::pair<std::string, Array>> Editor::run(const RunOptions& options) {
    const std::vector<std::string>& named = manifest_.results.outputs;
    if (named.empty()) {
        throw Error(ErrorKind::unsupported, "This bundle names no outputs", "It makes images or deltas",
                    "Use `edit` or `generate`, or make a bundle with hywu_export.trace");
    }
    const std::vector<std::string> wanted = options.outputs.empty() ? named : options.outputs;
    for (const std::string& name : wanted) {
        if (std::find(named.begin(), named.end(), name) != named.end()) continue;
        std::string known;
        for (const std::string& output : named) known += (known.empty() ? "" : ", ") + output;
        throw Error(ErrorKind::input, "This bundle has no output " + show(name), "It has: " + known,
                    "Correct `outputs`");
    }
    std::vector<Array> kept;
    NamedViews inputs = given(options.inputs, {}, kept);
    const std::size_t count = batch_of(inputs);
    Samples batch = samples(count, {}, {});
    batch.prompts.assign(count, "");
    batch.negative_prompts.assign(count, "");
    for (std::size_t i = 0; i < count; ++i) batch.seeds.push_back({0, static_cast<std::uint32_t>(i)});
    EditOptions defaults;
    defaults.count = count;
    defaults.cancelled = options.cancelled;
    batch.scales = scales(defaults);
    batch.strengths = per_sample("delta_strength", options.strengths, count);
    core::Deltas deltas;
    if (!options.deltas.empty()) {
        deltas = checked(options.deltas, count);
        for (const auto& [name, array] : deltas) inputs.emplace_back(name, View(*array));
    }
    std::set<std::string> names;
    for (const auto& [name, view] : inputs) names.insert(name);
    const Plan plan = make_plan(manifest_, wanted, names);
    add_absent(plan, batch.strengths, inputs, kept);
    std::vector<std::string> generated;
    for (const std::string& name : manifest_.results.deltas) {
        if (options.deltas.empty() && names.count(name) == 0) generated.push_back(name);
    }
    std::vector<std::pair<std::string, Array>> made;
    run(
        plan, batch, inputs, {}, std::move(generated), defaults, [](const Axes&) {},
        [&](const std::string& name, backends::DeviceTensor& tensor) {
            Array array(tensor.dtype(), tensor.shape());
            tensor.read(array.data(), array.bytes());
            made.emplace_back(name, std::move(array));
        });
    return made;
}

std::size_t Editor::batch_of(const NamedViews& inputs) const {
    for (const auto& [name, view] : inputs) {
        const core::Dims& shape = manifest_.signatures.at(name).shape;
        if (!shape.empty() && shape[0].axis == "batch" && !view.shape.empty()) {
            return static_cast<std::size_t>(view.shape[0]);
        }
    }
    return 1;
}

void Editor::warm_up() {
    const bool guided = core::is_guided(manifest_.guidance);
    const core::Results& results = manifest_.results;
    const Plan plan = make_plan(manifest_,
                                results.image              ? std::vector<std::string>{*results.image}
                                : !results.outputs.empty() ? results.outputs
                                                           : results.deltas,
                                {}, guided);
    {
        const Turn turn(*this);
        executor_.load(plan);
    }
    const bool missing =
        std::any_of(plan.provided.begin(), plan.provided.end(), [&](const std::string& name) {
            return manifest_.tensors.at(name).source == core::TensorSource::input;
        });
    if (!manifest_.results.image || missing) return;
    const Size size = warm_up_size();
    const Array gray = [&] {
        Array array(Dtype::uint8, {size.height, size.width, 3});
        std::memset(array.data(), 128, array.bytes());
        return array;
    }();
    EditOptions options;
    options.count = static_cast<std::size_t>(limits_.batch_min);
    options.photos.assign(options.count * limits_.photos, {gray.as<unsigned char>(), size.width, size.height,
                                                           static_cast<std::size_t>(3 * size.width)});
    if (manifest_.image) options.size = size;
    options.strengths = {plan.absent.empty() ? 1.0 : 0.0};
    if (schedule_ && !limits_.steps[0].second.empty()) options.steps = limits_.steps[0].second[0];
    Array picture;
    edit(options, [&](const core::Shape& shape) {
        picture = Array(Dtype::uint8, shape);
        return picture.data();
    });
}

Size Editor::warm_up_size() const {
    const std::vector<std::string> axes = core::sides(manifest_);
    if (!engines_.empty() && axes.size() == 2) {
        const auto& shapes = manifest_.engines.at(engines_[0]).shapes;
        const auto *height = shapes.find(axes[0]), *width = shapes.find(axes[1]);
        if (height != nullptr && width != nullptr) return {(*width)[1], (*height)[1]};
    }
    if (!manifest_.image) return {64, 64};
    const std::int64_t multiple = manifest_.image->multiple;
    const std::int64_t side = (manifest_.image->min + multiple - 1) / multiple * multiple;
    return {side, side};
}

Size Editor::working_size(std::int64_t width, std::int64_t height, const std::optional<Size>& wanted) const {
    // An explicit size is the user's: whether an engine takes it is seen when all axes are known.
    return working_size(width, height, wanted, wanted ? manifest_.image : limits_.size);
}

Size Editor::working_size(std::int64_t width, std::int64_t height, const std::optional<Size>& wanted,
                          const std::optional<core::ImagePolicy>& policy) const {
    if (width < 1 || height < 1) {
        throw Error(
            ErrorKind::input,
            "The photo is an array uint8 [" + std::to_string(height) + ", " + std::to_string(width) + ", 3]",
            "Expected uint8 [H, W, 3]", "Give a photo with pixels");
    }
    if (width > max_pixels || height > max_pixels || width * height > max_pixels) {
        throw Error(ErrorKind::input,
                    "The photo has " + std::to_string(width) + "x" + std::to_string(height) + " pixels",
                    "Expected at most " + std::to_string(max_pixels), "Make it smaller");
    }
    if (!policy) return {width, height};
    std::optional<std::pair<int, int>> size;
    if (wanted) {
        const auto whole = [](std::int64_t n) {
            return static_cast<int>(std::clamp<std::int64_t>(n, -1, 1 << 30));
        };
        size.emplace(whole(wanted->width), whole(wanted->height));
    }
    const auto [w, h] =
        images::working_size(*policy, static_cast<int>(width), static_cast<int>(height), size);
    return {w, h};
}

Timings Editor::timings() {
    const Turn turn(*this);
    return executor_.timings();
}

Editor::Memory Editor::memory() {
    const Turn turn(*this);
    return {executor_.buffer_bytes(), executor_.constant_bytes(), executor_.session_count(),
            shared_.sessions->size()};
}

void Editor::check_batch(std::size_t count) const {
    if (count >= static_cast<std::size_t>(limits_.batch_min) &&
        count <= static_cast<std::size_t>(limits_.batch_max))
        return;
    throw Error(
        ErrorKind::input, "The batch has " + std::to_string(count) + " photos",
        "This bundle takes " + std::to_string(limits_.batch_min) + " to " + std::to_string(limits_.batch_max),
        "Split the batch");
}

Editor::Samples Editor::samples(std::size_t count, const std::vector<Photo>& photos,
                                const std::optional<Size>& size) const {
    check_batch(count);
    Samples result;
    result.count = count;
    std::vector<std::pair<std::string, const core::ProvidedTensor*>> tensors;
    for (const bool derived : {false, true}) {  // what others start from comes first
        for (const auto& [name, tensor] : manifest_.tensors) {
            if (tensor.source != core::TensorSource::image || tensor.origin.has_value() != derived) continue;
            tensors.emplace_back(name, &tensor);
            result.pictures[name];
        }
    }
    if (!photos.empty() && photos.size() != count * limits_.photos) {
        throw Error(ErrorKind::input, "There are " + std::to_string(photos.size()) + " photos",
                    "This bundle takes " + std::to_string(limits_.photos) + " for each of " +
                        std::to_string(count) + " samples",
                    "Give so many, or export with other --images");
    }
    const auto own = this->policy(static_cast<std::int64_t>(count));
    std::map<std::string, std::vector<images::Size>> fitted;  // the first sample's sizes, for all
    for (std::size_t sample = 0; sample * limits_.photos < photos.size(); ++sample) {
        const Photo* given = photos.data() + sample * limits_.photos;
        for (const auto& [name, tensor] : tensors) {
            const Photo& photo = given[tensor->index.value_or(0)];
            if (photo.data == nullptr) continue;  // missing; this is noticed if the bundle needs it
            std::vector<Array>& made = result.pictures.at(name);
            if (!tensor->resize.empty()) {
                if (!tensor->origin)
                    working_size(photo.width, photo.height, {}, {});  // that there are pixels
                const Array start =
                    tensor->origin ? result.pictures.at(*tensor->origin).back() : whole(photo);
                auto& sizes = fitted[name];
                if (sizes.empty()) {
                    sizes = images::resized_sizes(tensor->resize, static_cast<int>(start.shape()[1]),
                                                  static_cast<int>(start.shape()[0]));
                }
                Array pixels = start;
                for (std::size_t i = 0; i < sizes.size(); ++i) {
                    pixels = resized(pixels, {sizes[i].first, sizes[i].second}, tensor->resize[i].filter);
                }
                made.push_back(std::move(pixels));
                continue;
            }
            // An explicit size is the user's: whether an engine takes it is seen when all axes are known.
            const bool chosen = size && manifest_.image && manifest_.image->tensor == name;
            std::optional<Size> wanted = chosen ? size : std::nullopt;
            const auto& policy = chosen ? manifest_.image : own;
            if (policy && !made.empty()) wanted = Size{made[0].shape()[1], made[0].shape()[0]};
            const Size target = working_size(photo.width, photo.height, wanted, policy);
            made.push_back(resized(whole(photo), target, core::Filter::lanczos));
        }
    }
    return result;
}

std::map<std::string, std::vector<double>> Editor::scales(const EditOptions& options) const {
    std::map<std::string, std::vector<double>> result;
    for (const core::Guidance& guidance : manifest_.guidance)
        result[guidance.name] = {guidance.default_scale};
    for (const auto& [name, values] : options.guidance) {
        const auto found = result.find(name);
        if (found == result.end()) {
            std::string known;
            for (const core::Guidance& g : manifest_.guidance) known += (known.empty() ? "" : ", ") + g.name;
            throw Error(ErrorKind::input, "This bundle has no guidance scale " + show(name),
                        "It has: " + (known.empty() ? "none" : known), "Leave it out");
        }
        found->second = values;
    }
    for (auto& [name, values] : result) values = per_sample("guidance " + name, values, options.count);
    return result;
}

NamedViews Editor::given(const NamedViews& inputs, const std::optional<View>& latents,
                         std::vector<Array>& kept) const {
    std::set<std::string> late;
    for (const core::Call& call : manifest_.program) {
        if (call.phase != core::Phase::step) continue;
        for (const auto& [port, name] : manifest_.writes(call)) late.insert(name);
    }
    for (const core::State& state : manifest_.state) late.insert(state.tensor);
    if (manifest_.deltas) {
        for (const auto& [name, shape] : manifest_.deltas->tensors) late.insert(name);
    }
    for (const auto& [name, tensor] : manifest_.tensors) {
        if (tensor.changes()) late.insert(name);
    }
    NamedViews result;
    const auto position = [&](const std::string& name) {
        return std::find_if(result.begin(), result.end(),
                            [&](const auto& entry) { return entry.first == name; });
    };
    for (const auto& [name, view] : inputs) {
        if (manifest_.signatures.count(name) == 0 || late.count(name)) {
            throw Error(ErrorKind::input, show(name) + " cannot be given as an input",
                        "Expected a tensor that the bundle knows before the steps, and that is no delta",
                        "See `hywu inspect`");
        }
        if (position(name) != result.end()) {
            throw Error(ErrorKind::input, "The input " + show(name) + " is given twice",
                        "Expected each name once", "Leave one out");
        }
        result.emplace_back(name, view);
    }
    if (latents) {
        std::vector<std::string> names;
        for (const auto& [name, tensor] : manifest_.tensors) {
            if (tensor.draw == core::Draw::initial) names.push_back(name);
        }
        if (names.size() != 1) {
            throw Error(ErrorKind::input,
                        "This bundle draws " + std::to_string(names.size()) + " initial noise tensors",
                        "`latents` stands for exactly one", "Give them by name as `inputs`");
        }
        kept.push_back(floats("latents", *latents));
        if (const auto place = position(names[0]); place != result.end()) {
            place->second = View(kept.back());
        } else {
            result.emplace_back(names[0], View(kept.back()));
        }
    }
    return result;
}

core::Deltas Editor::checked(const std::vector<const core::Deltas*>& deltas, std::size_t batch) const {
    if (!manifest_.deltas) {
        throw Error(ErrorKind::delta, "This bundle takes no deltas", "It was exported without targets",
                    "Leave `deltas` out, or export with targets");
    }
    const core::DeltaSpec& spec = *manifest_.deltas;
    core::Deltas result;
    if (deltas.size() == 1) {
        result = deltas[0]->pad(spec);
    } else if (deltas.size() == batch) {
        std::vector<core::Deltas> padded;
        for (const core::Deltas* set : deltas) padded.push_back(set->pad(spec));
        std::vector<const core::Deltas*> sets;
        for (const core::Deltas& set : padded) sets.push_back(&set);
        result = core::Deltas::stack(sets).pad(spec);
    } else {
        throw Error(ErrorKind::delta, "`deltas` is a list of " + std::to_string(deltas.size()),
                    "Expected a Deltas, or a list of " + std::to_string(batch) + " of them",
                    "Give one set for each photo");
    }
    result.check(spec, static_cast<std::int64_t>(batch));
    return result;
}

// Deltas that nobody makes: zeros, which is what strength 0 means, or an error.
void Editor::add_absent(const Plan& plan, const std::vector<double>& strengths, NamedViews& given,
                        std::vector<Array>& kept) const {
    if (plan.absent.empty() || !manifest_.deltas) return;
    const core::DeltaSpec& spec = *manifest_.deltas;
    if (std::any_of(strengths.begin(), strengths.end(), [](double s) { return s != 0; })) {
        throw Error(ErrorKind::delta, "This bundle has no generator, and no deltas were given",
                    "It takes " + std::to_string(spec.targets.size()) + " targets of rank " +
                        std::to_string(spec.rank),
                    "Give `deltas`, or delta_strength=0 for the base model");
    }
    for (const std::string& name : plan.absent) {
        core::Shape shape = spec.tensors.at(name);
        shape.insert(shape.begin(), 1);
        kept.emplace_back(Dtype::float32, std::move(shape));
        given.emplace_back(name, View(kept.back()));
    }
}

void Editor::run(const Plan& plan, const Samples& batch, const NamedViews& given,
                 const std::optional<core::Rows>& rows, std::vector<std::string> finite,
                 const EditOptions& options, const std::function<void(const Axes&)>& ready,
                 const std::function<void(const std::string&, backends::DeviceTensor&)>& result) {
    std::vector<Array> kept;  // what the views below look at
    Request request;
    std::vector<std::pair<std::string, const core::ProvidedTensor*>> sized;
    for (const std::string& name : plan.provided) {
        if (std::any_of(given.begin(), given.end(), [&](const auto& entry) { return entry.first == name; }))
            continue;
        const core::ProvidedTensor& tensor = manifest_.tensors.at(name);
        if (needs_axes(tensor)) {
            sized.emplace_back(name, &tensor);
        } else {
            kept.push_back(value(name, batch, rows));
            request.values.emplace_back(name, View(kept.back()));
        }
    }
    // Last, so that it is the caller's tensor that is blamed for a size.
    request.values.insert(request.values.end(), given.begin(), given.end());
    request.axes = resolve_axes(manifest_, static_cast<std::int64_t>(batch.count), request.values);
    std::optional<Array> noise;
    for (const auto& [name, tensor] : sized) {
        if (tensor->draw == core::Draw::initial) {
            const core::Shape shape = resolve_shape(manifest_, name, request.axes);
            check_noise(shape);
            Array array(Dtype::float32, shape);
            draw(array.as<float>(), array.size(), batch.seeds, 0);
            kept.push_back(std::move(array));
            request.values.emplace_back(name, View(kept.back()));
        } else if (tensor->draw == core::Draw::step) {
            const core::Shape shape = resolve_shape(manifest_, name, request.axes);
            if (options.noise && !noise) noise = floats("noise", *options.noise);
            request.per_step.push_back(step_noise(name, shape, batch, rows, noise, kept));
        } else if (rows) {
            request.per_step.push_back(column(name, *tensor, *rows));
        }
    }
    request.evaluations = rows ? rows->size() : 1;
    request.finite = std::move(finite);
    request.progress = options.progress;
    request.cancelled = options.cancelled;
    ready(request.axes);
    const Turn turn(*this);
    executor_.run(plan, request, result);
}

// A provided tensor whose size the request alone determines.
Array Editor::value(const std::string& name, const Samples& batch,
                    const std::optional<core::Rows>& rows) const {
    const core::ProvidedTensor& tensor = manifest_.tensors.at(name);
    const auto numbers = [](const std::vector<double>& values) {
        Array array(Dtype::float32, {static_cast<std::int64_t>(values.size())});
        std::transform(values.begin(), values.end(), array.as<float>(),
                       [](double x) { return static_cast<float>(x); });
        return array;
    };
    switch (tensor.source) {
        case core::TensorSource::image: {
            const std::vector<Array>& pictures = batch.pictures.at(name);
            if (pictures.size() != batch.count) {
                throw Error(ErrorKind::input, "A photo is missing", "This bundle needs one for each request",
                            "Give a photo");
            }
            core::Shape shape = pictures[0].shape();
            for (const Array& pixels : pictures) {
                if (pixels.shape() == shape) continue;
                throw Error(ErrorKind::input, "The photos of the batch differ in size",
                            "This bundle has no output-size policy to bring them to one size", "Resize them");
            }
            shape.insert(shape.begin(), static_cast<std::int64_t>(batch.count));
            Array stacked(Dtype::uint8, std::move(shape));
            std::byte* out = stacked.data();
            for (const Array& pixels : pictures) {
                std::memcpy(out, pixels.data(), pixels.bytes());
                out += pixels.bytes();
            }
            return stacked;
        }
        case core::TensorSource::text:
            return encode(name, batch, false, tensor.dtype);
        case core::TensorSource::mask:
            return encode(tensor.of.value_or(""), batch, true, tensor.dtype);
        case core::TensorSource::guidance:
            return numbers(batch.scales.at(tensor.guidance.value_or("")));
        case core::TensorSource::gate:
            return numbers(batch.strengths);
        case core::TensorSource::schedule:
            if (tensor.column == core::Column::initial_scale && rows) {
                return Array(Dtype::float32, {}, &rows->initial_scale);
            }
            if (tensor.column == core::Column::start && rows && !rows->start.empty()) {
                const auto width = static_cast<std::int64_t>(rows->start.size());
                if (tensor.shape[0].size != width) {
                    throw Error(ErrorKind::bundle,
                                "The schedule starts with " + std::to_string(width) + " coefficients",
                                "Expected " + shape_text(tensor.shape) + ", as tensor " + show(name),
                                "Export the bundle again");
                }
                return Array(Dtype::float32, {width}, rows->start.data());
            }
            break;
        case core::TensorSource::noise:
        case core::TensorSource::input:
            break;
    }
    throw Error(ErrorKind::input, "The tensor " + show(name) + " is missing",
                "This bundle takes it from the caller", "Give inputs={" + show(name) + ": array}");
}

// Token ids or the mask of a text tensor, [count, max_length].
Array Editor::encode(const std::string& text, const Samples& batch, bool mask, Dtype dtype) const {
    const core::ProvidedTensor& tensor = manifest_.tensors.at(text);
    std::vector<std::string> texts;
    if (!tensor.text) {
        texts.assign(batch.count, tensor.constant.value_or(""));
    } else if (*tensor.text == "prompt") {
        texts = batch.prompts;
    } else if (*tensor.text == "negative_prompt") {
        texts = batch.negative_prompts;
    } else {
        throw Error(ErrorKind::unsupported, "The bundle asks for a text called " + show(*tensor.text),
                    "This runtime has prompt, negative_prompt",
                    "Give the token ids: inputs={" + show(text) + ": …}");
    }
    const text::Encoded encoded = encoders_.at(tensor.tokenizer.value_or(""))->encode(texts);
    const std::vector<std::int64_t>& values = mask ? encoded.mask : encoded.ids;
    const auto length = static_cast<std::int64_t>(values.size() / batch.count);
    Array array(dtype, {static_cast<std::int64_t>(batch.count), length});
    if (dtype == Dtype::int64) {
        std::memcpy(array.data(), values.data(), array.bytes());
    } else {
        std::transform(values.begin(), values.end(), array.as<std::int32_t>(),
                       [](std::int64_t id) { return static_cast<std::int32_t>(id); });
    }
    return array;
}

// The random numbers of the steps; zeros for a sampler that does not use them.
StepInput Editor::step_noise(const std::string& name, const core::Shape& shape, const Samples& batch,
                             const std::optional<core::Rows>& rows, const std::optional<Array>& noise,
                             std::vector<Array>& kept) const {
    if (noise) {
        core::Shape wanted = shape;
        wanted.insert(wanted.begin(), rows ? static_cast<std::int64_t>(rows->size()) : 1);
        if (noise->shape() != wanted) {
            throw Error(ErrorKind::input, "`noise` has shape " + shape_text(noise->shape()),
                        "Expected [evaluations, batch, …] = " + shape_text(wanted), "Correct it");
        }
        const std::byte* const data = noise->data();
        const std::size_t bytes = core::count(shape) * sizeof(float);
        return {name, [data, bytes](std::size_t k) { return data + k * bytes; }};
    }
    check_noise(shape);
    kept.emplace_back(Dtype::float32, shape);
    float* const out = kept.back().as<float>();
    if (rows && !manifest_.schedules->samplers.at(rows->sampler).stochastic) {
        return {name, [out](std::size_t) { return out; }};
    }
    const std::size_t count = kept.back().size();
    const std::vector<Seed>* const seeds = &batch.seeds;
    return {name, [out, count, seeds](std::size_t k) {
                draw(out, count, *seeds, static_cast<std::uint32_t>(k + 1));
                return out;
            }};
}

}  // namespace hywu::runtime
