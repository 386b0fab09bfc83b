// The manifest of a bundle: typed and validated. The structs mirror hywu_runtime.manifest; docs/bundle.md
// says what every section means. What a bundle may say is decided here and in validation.cpp, so that nothing
// behind it checks again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "core/dtype.hpp"
#include "core/ordered.hpp"

namespace hywu::core {

inline constexpr std::int64_t format_version = 1;
inline constexpr std::string_view manifest_file_name = "manifest.json";
inline constexpr std::size_t max_manifest_bytes = std::size_t{64} << 20;
inline constexpr std::int64_t max_dimension = 2147483647;

// Whether `path` is relative, normal and portable, so that it cannot leave its directory.
bool is_safe_path(std::string_view path);

// A dimension of a shape: a size, or the name of an axis.
struct Dim {
    std::int64_t size = 0;
    std::string axis;

    bool symbolic() const noexcept { return !axis.empty(); }
    bool operator==(const Dim& other) const { return size == other.size && axis == other.axis; }
    bool operator!=(const Dim& other) const { return !(*this == other); }
};
using Dims = std::vector<Dim>;

// The program that wrote the bundle.
struct Producer {
    std::string name, version;
};

// One file of the bundle: size in bytes and SHA-256 in lower-case hexadecimal.
struct File {
    std::int64_t size = 0;
    std::string sha256;
};

// A part of a size: `times` the product of the sizes of the axes `of`, divided by `divide`.
struct Term {
    std::vector<std::string> of;
    std::int64_t times = 1, divide = 1;
};

// A dynamic axis: limits (min, max, multiple, one_or), `of` another, `divide`d, or a `sum` of terms.
struct Axis {
    std::optional<std::int64_t> min, max;
    std::int64_t multiple = 1;
    std::optional<std::string> one_or, of;
    std::optional<std::int64_t> divide;
    std::vector<Term> sum;

    // Whether its size follows from those of other axes.
    bool derived() const noexcept { return of.has_value() || !sum.empty(); }

    // The size of a derived axis, or nothing where that of an axis that it depends on is not known.
    // `size_of(name)` points to a size, or nowhere.
    template <class SizeOf>
    std::optional<std::int64_t> size(const SizeOf& size_of) const {
        const auto quotient = [&](const std::vector<std::string>& names, std::int64_t product,
                                  std::int64_t divisor) -> std::optional<std::int64_t> {
            for (const std::string& name : names) {
                const std::int64_t* size = size_of(name);
                if (size == nullptr) return std::nullopt;
                product *= *size;  // below 2^53 for sizes within their limits
            }
            return product / divisor;
        };
        if (of) return quotient({*of}, 1, divide.value_or(1));
        std::int64_t total = 0;
        for (const Term& term : sum) {
            const auto part = quotient(term.of, term.times, term.divide);
            if (!part) return std::nullopt;
            total += *part;
        }
        return total;
    }
};

enum class TensorSource { image, text, mask, noise, schedule, guidance, gate, input };
enum class Draw { initial, step };
enum class Column { initial_scale, timesteps, coefficients, start };
enum class Phase { load, request, step, final };
enum class TargetKind { linear, conv, experts };
enum class PadSide { left, right };
// The words of the manifest.
std::string_view name(TensorSource source);
std::string_view name(Phase phase);
std::string_view name(TargetKind kind);

enum class Filter { lanczos, bicubic };

// How a photograph is brought to another size: sides are multiples of `multiple`; areas in pixels.
struct Resize {
    Filter filter = Filter::lanczos;
    std::int64_t multiple = 1;
    std::optional<std::int64_t> area, min_area, max_area;
};

// A tensor that the runtime provides; `source` says from what, the other keys depend on it.
struct ProvidedTensor {
    Dtype dtype = Dtype::float32;
    Dims shape;
    TensorSource source = TensorSource::input;
    std::optional<std::string> text, constant, tokenizer, of;
    std::optional<Draw> draw;
    std::optional<Column> column;
    std::optional<std::string> guidance;
    std::optional<std::int64_t> index;
    std::optional<std::string> origin;
    std::vector<Resize> resize;

    // Whether the tensor has another value in every step.
    bool changes() const noexcept {
        return draw == Draw::step || column == Column::timesteps || column == Column::coefficients;
    }
};

// An input or output of a graph; also a tensor's signature.
struct Value {
    std::string name;
    Dtype dtype = Dtype::float32;
    Dims shape;
};

// An ONNX file and its signature. `stage`: where it runs if there are several devices. `stage_of`: the graph
// that it is a part of; information only.
struct Graph {
    std::string file;
    std::vector<Value> inputs, outputs;
    std::int64_t stage = 0;
    std::optional<std::string> stage_of;
};

// Where in the toolchain a graph's code lives. Information only.
struct Implementation {
    std::string file, class_name;
};

// One use of a graph. `inputs`, `outputs`: the graph's name to tensor; others keep their name.
struct Call {
    std::string graph;
    Phase phase = Phase::request;
    Ordered<std::string> inputs, outputs;
    std::optional<bool> guided;
    std::optional<Implementation> implementation;

    // Whether the call belongs to guided (or unguided) requests.
    bool runs(bool guided_request) const noexcept { return !guided || *guided == guided_request; }
    // The tensor behind one of the graph's inputs or outputs.
    const std::string& input(const std::string& port) const {
        const std::string* tensor = inputs.find(port);
        return tensor ? *tensor : port;
    }
    const std::string& output(const std::string& port) const {
        const std::string* tensor = outputs.find(port);
        return tensor ? *tensor : port;
    }
};

// What the program is for.
struct Results {
    std::optional<std::string> image;
    std::vector<std::string> deltas, outputs;
};

// An initial state of zeros.
struct Zeros {
    Dims zeros;
};

// A tensor carried from step to step.
struct State {
    std::string tensor, next;
    std::variant<std::string, Zeros> initial;
};

// One table of the schedule file. `steps` are the smallest and the largest step count, `order` the number of
// evaluations that a step stands for, where the sampler may start midway.
struct Sampler {
    std::string class_name;
    std::array<std::int64_t, 2> steps = {1, 1};
    bool stochastic = false;
    std::optional<std::int64_t> order;
};

// How much of the schedule a request runs that starts midway, from its photo: 1 is all of it.
struct Strength {
    double default_strength = 1;
};

// The schedule file and its samplers.
struct Schedules {
    std::string file, default_sampler;
    std::int64_t default_steps = 1;
    Ordered<Sampler> samplers;
    std::optional<Strength> strength;
};

// A guidance scale; a request is guided only if it is above `above`, or at least `at_least`.
struct Guidance {
    std::string name;
    double default_scale = 0;
    std::optional<double> above, at_least;

    // Whether it has a say in whether a request is guided; otherwise graphs merely read it.
    bool decides() const noexcept { return above.has_value() || at_least.has_value(); }
    // Whether `scale` asks for guidance.
    bool satisfied(double scale) const noexcept {
        return above ? scale > *above : at_least.has_value() && scale >= *at_least;
    }
};

// Whether a request is guided: there is a condition, and each one holds for at least one sample. `scales`:
// the values of each scale, one per sample; null stands for the defaults.
bool is_guided(const std::vector<Guidance>& guidance,
               const std::map<std::string, std::vector<double>>* scales = nullptr);

// How a photograph's size becomes a working size; lengths in pixels. `sizes`: width, height.
struct ImagePolicy {
    std::string tensor;
    std::int64_t multiple = 1, min = 1, max = 1, default_area = 1;
    std::vector<std::array<std::int64_t, 2>> sizes;
    bool enlarge = false;
};

// A module that takes a delta. `kernel` (convolutions alone) is the kernel's height and width, `experts`
// (experts alone) their number.
struct DeltaTarget {
    std::string module;
    TargetKind kind = TargetKind::linear;
    std::int64_t in_features = 1, out_features = 1, rank = 1;
    std::optional<std::array<std::int64_t, 2>> kernel = std::nullopt;
    std::optional<std::int64_t> experts = std::nullopt;

    std::string a_name() const { return module + ".lora_A"; }
    std::string b_name() const { return module + ".lora_B"; }
    // Shapes without the leading delta batch: [r, in], [r, in, kh, kw] or [experts, r, in]; [out, r] or
    // [experts, out, r].
    std::vector<std::int64_t> a_shape() const;
    std::vector<std::int64_t> b_shape() const;
};

// Which deltas the bundle takes.
struct DeltaSpec {
    std::int64_t rank = 1;
    std::string gate, axis;
    std::vector<DeltaTarget> targets;
    // Tensor name to shape without the leading delta batch, in the order of `targets`.
    Ordered<std::vector<std::int64_t>> tensors;
};

// A Hugging Face tokenizer file and how prompts are brought to one length.
struct Tokenizer {
    std::string file;
    std::int64_t max_length = 1, pad_id = 0;
    PadSide pad_side = PadSide::right;
    bool truncate = true;
    std::string text_template = "{}";  // a text stands in the place of `{}`
    bool lowercase = false;            // texts are stripped and lowercased before
};

// A checkpoint file that linked weights point into.
struct SourceFile {
    std::int64_t size = 0;
    std::string header_sha256;
};

// A checkpoint that the bundle was made from.
struct Source {
    std::string name;
    std::optional<std::string> licence;
    Ordered<SourceFile> files;
};

// Where an initializer's bytes are: little-endian, row-major, `offset` from the start of the file.
struct LinkedTensor {
    std::string source, file;
    std::int64_t offset = 0, length = 0;
    Dtype dtype = Dtype::float32;
    std::vector<std::int64_t> shape;
};

enum class Precision { fp16, bf16, int8, int8_weights };
enum class EngineBackend { tensorrt, tensorrt_rtx };
std::string_view name(Precision precision);
std::string_view name(EngineBackend backend);

// The graphs in another precision, with the same signatures. Graphs that are not named keep their file.
struct Variant {
    Precision precision = Precision::fp16;
    Ordered<std::string> graphs;
    std::optional<std::string> report;
};

// Compiled graphs for a device. `shapes`: axis to its smallest, best and largest size. `sources` are the
// files that it was built from, with the hash they had: where one has changed since, the engine is stale.
struct Engine {
    EngineBackend backend = EngineBackend::tensorrt;
    std::string version;
    std::vector<std::string> compute_capabilities;
    Ordered<std::array<std::int64_t, 3>> shapes;
    Ordered<std::string> graphs, sources;
    std::optional<std::string> variant, device;
    bool version_compatible = false, hardware_compatible = false;
    std::optional<std::string> report;

    // The first of the axes whose size the engine does not take.
    std::optional<std::string> covers(const std::map<std::string, std::int64_t, std::less<>>& axes) const;
};

// The licence of a source, and the file of the bundle with its text.
struct Licence {
    std::string of;
    std::optional<std::string> licence, file;
};

// A bundle's manifest.
class Manifest {
public:
    std::int64_t format = format_version;
    std::string name;
    std::optional<std::string> family;
    Producer producer;
    Ordered<File> files;
    Ordered<Axis> axes;
    Ordered<ProvidedTensor> tensors;
    Ordered<Graph> graphs;
    std::vector<Call> program;
    Results results;
    std::vector<State> state;
    std::optional<Schedules> schedules;
    std::vector<Guidance> guidance;
    std::optional<ImagePolicy> image;
    std::optional<DeltaSpec> deltas;
    Ordered<Tokenizer> tokenizers;
    Ordered<Source> sources;
    Ordered<Ordered<LinkedTensor>> linked;
    Ordered<Variant> variants;
    Ordered<Engine> engines;
    std::vector<Licence> licences;
    // Every tensor of the bundle with its dtype and shape: provided, made by calls, carried, deltas.
    std::map<std::string, Value, std::less<>> signatures;

    // Reads and validates the manifest of a bundle directory (or a path to manifest.json itself).
    // Throws Error(bundle): there is none, or it is not a valid one; the message names the key.
    static Manifest read(const std::filesystem::path& path);
    // The same of the text of a manifest.json.
    static Manifest parse(std::string_view json);

    // The first file that an engine was built from and that is another one by now.
    std::optional<std::string> stale(std::string_view engine) const;

    // A call's graph inputs, and its outputs: graph name and tensor name, in the order of the graph's
    // signature.
    std::vector<std::pair<std::string, std::string>> reads(const Call& call) const;
    std::vector<std::pair<std::string, std::string>> writes(const Call& call) const;
};

}  // namespace hywu::core
