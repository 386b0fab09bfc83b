#include "core/manifest.hpp"

#include <algorithm>
#include <system_error>

#include "core/codec.hpp"
#include "core/error.hpp"
#include "core/files.hpp"
#include "core/json.hpp"
#include "core/text.hpp"
#include "core/validation.hpp"

namespace hywu::core {

namespace {

// What a value must satisfy beyond its JSON type.

struct NameRule {
    static std::string what() { return "a name of 1 to 512 printable characters"; }
    static bool test(const std::string& text) {
        return !text.empty() && length(text) <= 512 && is_printable(text);
    }
};

struct PathRule {
    static std::string what() {
        return "a relative path with `/` between parts, without `..`, `.`, empty parts, drives or "
               "backslashes";
    }
    static bool test(const std::string& text) { return is_safe_path(text); }
};

struct DigestRule {
    static std::string what() { return "64 lower-case hexadecimal digits"; }
    static bool test(const std::string& text) {
        return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
    }
};

struct TemplateRule {
    static std::string what() { return "a text of at most 65536 characters with `{}` in it once"; }
    static bool test(const std::string& text) {
        const std::size_t gap = text.find("{}");
        return gap != std::string::npos && text.find("{}", gap + 2) == std::string::npos &&
               core::length(text) <= 65536;
    }
};

struct CountRule {
    static std::string what() { return "an integer of at least 0"; }
    static bool test(std::int64_t number) { return number >= 0; }
};

template <std::int64_t low, std::int64_t high>
struct RangeRule {
    static std::string what() {
        return "an integer from " + std::to_string(low) + " to " + std::to_string(high);
    }
    static bool test(std::int64_t number) { return low <= number && number <= high; }
};

struct PartRule {
    static std::string what() { return "a number above 0 and at most 1"; }
    static bool test(double number) { return 0 < number && number <= 1; }
};

struct TokenIdRule {
    static std::string what() { return "a token id"; }
    static bool test(std::int64_t number) { return 0 <= number && number <= max_dimension; }
};

struct RankRule {
    static std::string what() { return "at most 8 dimensions"; }
    template <class Item>
    static bool test(const std::vector<Item>& items) {
        return items.size() <= 8;
    }
};

struct FactorsRule {
    static std::string what() { return "at most 4 names of axes"; }
    static bool test(const std::vector<std::string>& items) { return items.size() <= 4; }
};

struct TermsRule {
    static std::string what() { return "1 to 16 terms"; }
    static bool test(const std::vector<Term>& items) { return !items.empty() && items.size() <= 16; }
};

struct TwoRule {
    static std::string what() { return "two integers"; }
    static bool test(const std::vector<std::int64_t>& items) { return items.size() == 2; }
};

struct StepsRule {
    static std::string what() { return "two integers, smallest first"; }
    static bool test(const std::vector<std::int64_t>& items) {
        return items.size() == 2 && items[0] <= items[1];
    }
};

struct PairRule {
    static std::string what() { return "a width and a height"; }
    static bool test(const std::vector<std::int64_t>& items) { return items.size() == 2; }
};

struct ThreeRule {
    static std::string what() { return "three integers: smallest, best, largest"; }
    static bool test(const std::vector<std::int64_t>& items) {
        return items.size() == 3 && items[0] <= items[1] && items[1] <= items[2];
    }
};

struct CapabilityRule {
    static std::string what() { return R"(a compute capability as "8.6")"; }
    // [1-9][0-9]?[.][0-9]
    static bool test(const std::string& text) {
        const auto digit = [](char c) { return '0' <= c && c <= '9'; };
        const std::size_t point = text.size() - 2;
        return (text.size() == 3 || text.size() == 4) && text[0] != '0' && digit(text[0]) &&
               (point == 1 || digit(text[1])) && text[point] == '.' && digit(text[point + 1]);
    }
};

struct SomeCapabilitiesRule {
    static std::string what() { return "at least one compute capability"; }
    static bool test(const std::vector<std::string>& items) { return !items.empty(); }
};

using codec::Boolean;
using codec::Either;
using codec::Integer;
using codec::List;
using codec::Narrowed;
using codec::Nullable;
using codec::Number;
using codec::Record;
using codec::Table;
using codec::Text;
using codec::Word;

using Name = Narrowed<Text, NameRule>;
using FilePath = Narrowed<Text, PathRule>;
using Digest = Narrowed<Text, DigestRule>;
using Count = Narrowed<Integer, CountRule>;
using Size = Narrowed<Integer, RangeRule<1, max_dimension>>;
using Part = Narrowed<Number, PartRule>;
using Stage = Narrowed<Integer, RangeRule<0, 255>>;
using Length = Narrowed<Integer, RangeRule<1, 1048576>>;
using TokenId = Narrowed<Integer, TokenIdRule>;
using Template = Narrowed<Text, TemplateRule>;

struct Dimension {
    using type = Dim;
    using Kind = Either<Size, Name>;
    static std::string what() { return Kind::what(); }
    static bool fits(const Json& value) { return Kind::fits(value); }
    static type decode(const Json& value, const std::string& where) {
        const Kind::type found = Kind::decode(value, where);
        return found.index() == 0 ? Dim{std::get<0>(found), ""} : Dim{0, std::get<1>(found)};
    }
};
using Dimensions = Narrowed<List<Dimension>, RankRule>;

// So many integers, under a rule that sees to their number.
template <std::size_t size, class Rule>
struct Sizes {
    using type = std::array<std::int64_t, size>;
    using Kind = Narrowed<List<Size>, Rule>;
    static std::string what() { return Kind::what(); }
    static bool fits(const Json& value) { return Kind::fits(value); }
    static type decode(const Json& value, const std::string& where) {
        const std::vector<std::int64_t> items = Kind::decode(value, where);
        type result;
        std::copy_n(items.begin(), size, result.begin());
        return result;
    }
};

// The literal 1.
struct FormatVersion {
    using type = std::int64_t;
    static std::string what() { return "one of 1"; }
    static bool fits(const Json& value) { return value.integer() && *value.integer() == format_version; }
    static type decode(const Json& value, const std::string& where) {
        if (!fits(value)) codec::refuse(value, where, what());
        return format_version;
    }
};

template <class Enum>
using WordPair = std::pair<std::string_view, Enum>;

struct DtypeWords {
    using type = Dtype;
    static constexpr std::array<WordPair<Dtype>, 5> all = {{{"uint8", Dtype::uint8},
                                                            {"int32", Dtype::int32},
                                                            {"int64", Dtype::int64},
                                                            {"float16", Dtype::float16},
                                                            {"float32", Dtype::float32}}};
};
struct WeightDtypeWords {
    using type = Dtype;
    static constexpr std::array<WordPair<Dtype>, 9> all = {{{"uint8", Dtype::uint8},
                                                            {"int8", Dtype::int8},
                                                            {"int32", Dtype::int32},
                                                            {"int64", Dtype::int64},
                                                            {"float16", Dtype::float16},
                                                            {"bfloat16", Dtype::bfloat16},
                                                            {"float32", Dtype::float32},
                                                            {"float64", Dtype::float64},
                                                            {"bool", Dtype::boolean}}};
};
struct SourceWords {
    using type = TensorSource;
    static constexpr std::array<WordPair<TensorSource>, 8> all = {{{"image", TensorSource::image},
                                                                   {"text", TensorSource::text},
                                                                   {"mask", TensorSource::mask},
                                                                   {"noise", TensorSource::noise},
                                                                   {"schedule", TensorSource::schedule},
                                                                   {"guidance", TensorSource::guidance},
                                                                   {"gate", TensorSource::gate},
                                                                   {"input", TensorSource::input}}};
};
struct DrawWords {
    using type = Draw;
    static constexpr std::array<WordPair<Draw>, 2> all = {{{"initial", Draw::initial}, {"step", Draw::step}}};
};
struct ColumnWords {
    using type = Column;
    static constexpr std::array<WordPair<Column>, 4> all = {{{"initial_scale", Column::initial_scale},
                                                             {"timesteps", Column::timesteps},
                                                             {"coefficients", Column::coefficients},
                                                             {"start", Column::start}}};
};
struct FilterWords {
    using type = Filter;
    static constexpr std::array<WordPair<Filter>, 2> all = {
        {{"lanczos", Filter::lanczos}, {"bicubic", Filter::bicubic}}};
};
struct PhaseWords {
    using type = Phase;
    static constexpr std::array<WordPair<Phase>, 4> all = {
        {{"load", Phase::load}, {"request", Phase::request}, {"step", Phase::step}, {"final", Phase::final}}};
};
struct TargetWords {
    using type = TargetKind;
    static constexpr std::array<WordPair<TargetKind>, 3> all = {
        {{"linear", TargetKind::linear}, {"conv", TargetKind::conv}, {"experts", TargetKind::experts}}};
};
struct PrecisionWords {
    using type = Precision;
    static constexpr std::array<WordPair<Precision>, 4> all = {{{"fp16", Precision::fp16},
                                                                {"bf16", Precision::bf16},
                                                                {"int8", Precision::int8},
                                                                {"int8-weights", Precision::int8_weights}}};
};
struct BackendWords {
    using type = EngineBackend;
    static constexpr std::array<WordPair<EngineBackend>, 2> all = {
        {{"tensorrt", EngineBackend::tensorrt}, {"tensorrt-rtx", EngineBackend::tensorrt_rtx}}};
};
struct SideWords {
    using type = PadSide;
    static constexpr std::array<WordPair<PadSide>, 2> all = {
        {{"left", PadSide::left}, {"right", PadSide::right}}};
};

template <class WordList>
std::string_view word(typename WordList::type value) {
    for (const auto& [text, meaning] : WordList::all) {
        if (meaning == value) return text;
    }
    return "";
}

}  // namespace

// The keys of each struct, in the order of docs/bundle.md. `visit(kind, key, field)` is a key that must be
// there, `visit.optional` one that may be absent.

template <class Visitor>
static void fields(Visitor& visit, Producer& value) {
    visit(Name{}, "name", value.name);
    visit(Name{}, "version", value.version);
}

template <class Visitor>
static void fields(Visitor& visit, File& value) {
    visit(Count{}, "size", value.size);
    visit(Digest{}, "sha256", value.sha256);
}

template <class Visitor>
static void fields(Visitor& visit, Term& value) {
    visit.optional(Narrowed<List<Name>, FactorsRule>{}, "of", value.of);
    visit.optional(Size{}, "times", value.times);
    visit.optional(Size{}, "divide", value.divide);
}

template <class Visitor>
static void fields(Visitor& visit, Axis& value) {
    visit.optional(Nullable<Size>{}, "min", value.min);
    visit.optional(Nullable<Size>{}, "max", value.max);
    visit.optional(Size{}, "multiple", value.multiple);
    visit.optional(Nullable<Name>{}, "one_or", value.one_or);
    visit.optional(Nullable<Name>{}, "of", value.of);
    visit.optional(Nullable<Size>{}, "divide", value.divide);
    visit.optional(Narrowed<List<Record<Term>>, TermsRule>{}, "sum", value.sum);
}

template <class Visitor>
static void fields(Visitor& visit, Resize& value) {
    visit(Word<FilterWords>{}, "filter", value.filter);
    visit(Size{}, "multiple", value.multiple);
    visit.optional(Nullable<Size>{}, "area", value.area);
    visit.optional(Nullable<Size>{}, "min_area", value.min_area);
    visit.optional(Nullable<Size>{}, "max_area", value.max_area);
}

template <class Visitor>
static void fields(Visitor& visit, ProvidedTensor& value) {
    visit(Word<DtypeWords>{}, "dtype", value.dtype);
    visit(Dimensions{}, "shape", value.shape);
    visit(Word<SourceWords>{}, "source", value.source);
    visit.optional(Nullable<Name>{}, "text", value.text);
    visit.optional(Nullable<Text>{}, "constant", value.constant);
    visit.optional(Nullable<Name>{}, "tokenizer", value.tokenizer);
    visit.optional(Nullable<Name>{}, "of", value.of);
    visit.optional(Nullable<Word<DrawWords>>{}, "draw", value.draw);
    visit.optional(Nullable<Word<ColumnWords>>{}, "column", value.column);
    visit.optional(Nullable<Name>{}, "guidance", value.guidance);
    visit.optional(Nullable<Count>{}, "index", value.index);
    visit.optional(Nullable<Name>{}, "from", value.origin);
    visit.optional(List<Record<Resize>>{}, "resize", value.resize);
}

template <class Visitor>
static void fields(Visitor& visit, Value& value) {
    visit(Name{}, "name", value.name);
    visit(Word<DtypeWords>{}, "dtype", value.dtype);
    visit(Dimensions{}, "shape", value.shape);
}

template <class Visitor>
static void fields(Visitor& visit, Graph& value) {
    visit(FilePath{}, "file", value.file);
    visit(List<Record<Value>>{}, "inputs", value.inputs);
    visit(List<Record<Value>>{}, "outputs", value.outputs);
    visit.optional(Stage{}, "stage", value.stage);
    visit.optional(Nullable<Name>{}, "stage_of", value.stage_of);
}

template <class Visitor>
static void fields(Visitor& visit, Implementation& value) {
    visit(Name{}, "file", value.file);
    visit(Name{}, "class", value.class_name);
}

template <class Visitor>
static void fields(Visitor& visit, Call& value) {
    visit(Name{}, "graph", value.graph);
    visit(Word<PhaseWords>{}, "phase", value.phase);
    visit.optional(Table<Name, Name>{}, "inputs", value.inputs);
    visit.optional(Table<Name, Name>{}, "outputs", value.outputs);
    visit.optional(Nullable<Boolean>{}, "guided", value.guided);
    visit.optional(Nullable<Record<Implementation>>{}, "implementation", value.implementation);
}

template <class Visitor>
static void fields(Visitor& visit, Results& value) {
    visit.optional(Nullable<Name>{}, "image", value.image);
    visit.optional(List<Name>{}, "deltas", value.deltas);
    visit.optional(List<Name>{}, "outputs", value.outputs);
}

template <class Visitor>
static void fields(Visitor& visit, Zeros& value) {
    visit(Dimensions{}, "zeros", value.zeros);
}

template <class Visitor>
static void fields(Visitor& visit, State& value) {
    visit(Name{}, "tensor", value.tensor);
    visit(Name{}, "next", value.next);
    visit(Either<Name, Record<Zeros>>{}, "initial", value.initial);
}

template <class Visitor>
static void fields(Visitor& visit, Sampler& value) {
    visit(Name{}, "class", value.class_name);
    visit(Sizes<2, StepsRule>{}, "steps", value.steps);
    visit.optional(Boolean{}, "stochastic", value.stochastic);
    visit.optional(Nullable<Size>{}, "order", value.order);
}

template <class Visitor>
static void fields(Visitor& visit, Strength& value) {
    visit(Part{}, "default", value.default_strength);
}

template <class Visitor>
static void fields(Visitor& visit, Schedules& value) {
    visit(FilePath{}, "file", value.file);
    visit(Name{}, "default", value.default_sampler);
    visit(Size{}, "default_steps", value.default_steps);
    visit(Table<Name, Record<Sampler>>{}, "samplers", value.samplers);
    visit.optional(Nullable<Record<Strength>>{}, "strength", value.strength);
}

template <class Visitor>
static void fields(Visitor& visit, Guidance& value) {
    visit(Name{}, "name", value.name);
    visit(Number{}, "default", value.default_scale);
    visit.optional(Nullable<Number>{}, "above", value.above);
    visit.optional(Nullable<Number>{}, "at_least", value.at_least);
}

template <class Visitor>
static void fields(Visitor& visit, ImagePolicy& value) {
    visit(Name{}, "tensor", value.tensor);
    visit(Size{}, "multiple", value.multiple);
    visit(Size{}, "min", value.min);
    visit(Size{}, "max", value.max);
    visit(Size{}, "default_area", value.default_area);
    visit.optional(List<Sizes<2, PairRule>>{}, "sizes", value.sizes);
    visit.optional(Boolean{}, "enlarge", value.enlarge);
}

template <class Visitor>
static void fields(Visitor& visit, DeltaTarget& value) {
    visit(Name{}, "module", value.module);
    visit(Word<TargetWords>{}, "kind", value.kind);
    visit(Size{}, "in", value.in_features);
    visit(Size{}, "out", value.out_features);
    visit(Size{}, "rank", value.rank);
    visit.optional(Nullable<Sizes<2, TwoRule>>{}, "kernel", value.kernel);
    visit.optional(Nullable<Size>{}, "experts", value.experts);
}

template <class Visitor>
static void fields(Visitor& visit, DeltaSpec& value) {
    visit(Size{}, "rank", value.rank);
    visit(Name{}, "gate", value.gate);
    visit(Name{}, "axis", value.axis);
    visit(List<Record<DeltaTarget>>{}, "targets", value.targets);
}

template <class Visitor>
static void fields(Visitor& visit, Tokenizer& value) {
    visit(FilePath{}, "file", value.file);
    visit(Length{}, "max_length", value.max_length);
    visit(TokenId{}, "pad_id", value.pad_id);
    visit.optional(Word<SideWords>{}, "pad_side", value.pad_side);
    visit.optional(Boolean{}, "truncate", value.truncate);
    visit.optional(Template{}, "template", value.text_template);
    visit.optional(Boolean{}, "lowercase", value.lowercase);
}

template <class Visitor>
static void fields(Visitor& visit, SourceFile& value) {
    visit(Count{}, "size", value.size);
    visit(Digest{}, "header_sha256", value.header_sha256);
}

template <class Visitor>
static void fields(Visitor& visit, Source& value) {
    visit(Text{}, "name", value.name);
    visit.optional(Nullable<Text>{}, "licence", value.licence);
    visit.optional(Table<FilePath, Record<SourceFile>>{}, "files", value.files);
}

template <class Visitor>
static void fields(Visitor& visit, LinkedTensor& value) {
    visit(Name{}, "source", value.source);
    visit(FilePath{}, "file", value.file);
    visit(Count{}, "offset", value.offset);
    visit(Count{}, "length", value.length);
    visit(Word<WeightDtypeWords>{}, "dtype", value.dtype);
    visit(Narrowed<List<Count>, RankRule>{}, "shape", value.shape);
}

template <class Visitor>
static void fields(Visitor& visit, Variant& value) {
    visit(Word<PrecisionWords>{}, "precision", value.precision);
    visit(Table<Name, FilePath>{}, "graphs", value.graphs);
    visit.optional(Nullable<FilePath>{}, "report", value.report);
}

template <class Visitor>
static void fields(Visitor& visit, Engine& value) {
    visit(Word<BackendWords>{}, "backend", value.backend);
    visit(Name{}, "version", value.version);
    visit(Narrowed<List<Narrowed<Text, CapabilityRule>>, SomeCapabilitiesRule>{}, "compute_capabilities",
          value.compute_capabilities);
    visit(Table<Name, Sizes<3, ThreeRule>>{}, "shapes", value.shapes);
    visit(Table<Name, FilePath>{}, "graphs", value.graphs);
    visit(Table<FilePath, Digest>{}, "sources", value.sources);
    visit.optional(Nullable<Name>{}, "variant", value.variant);
    visit.optional(Nullable<Name>{}, "device", value.device);
    visit.optional(Boolean{}, "version_compatible", value.version_compatible);
    visit.optional(Boolean{}, "hardware_compatible", value.hardware_compatible);
    visit.optional(Nullable<FilePath>{}, "report", value.report);
}

template <class Visitor>
static void fields(Visitor& visit, Licence& value) {
    visit(Name{}, "of", value.of);
    visit.optional(Nullable<Text>{}, "licence", value.licence);
    visit.optional(Nullable<FilePath>{}, "file", value.file);
}

template <class Visitor>
static void fields(Visitor& visit, Manifest& value) {
    visit(FormatVersion{}, "format", value.format);
    visit(Text{}, "name", value.name);
    visit(Nullable<Text>{}, "family", value.family);
    visit(Record<Producer>{}, "producer", value.producer);
    visit(Table<FilePath, Record<File>>{}, "files", value.files);
    visit(Table<Name, Record<Axis>>{}, "axes", value.axes);
    visit(Table<Name, Record<ProvidedTensor>>{}, "tensors", value.tensors);
    visit(Table<Name, Record<Graph>>{}, "graphs", value.graphs);
    visit(List<Record<Call>>{}, "program", value.program);
    visit(Record<Results>{}, "results", value.results);
    visit.optional(List<Record<State>>{}, "state", value.state);
    visit.optional(Nullable<Record<Schedules>>{}, "schedules", value.schedules);
    visit.optional(List<Record<Guidance>>{}, "guidance", value.guidance);
    visit.optional(Nullable<Record<ImagePolicy>>{}, "image", value.image);
    visit.optional(Nullable<Record<DeltaSpec>>{}, "deltas", value.deltas);
    visit.optional(Table<Name, Record<Tokenizer>>{}, "tokenizers", value.tokenizers);
    visit.optional(Table<Name, Record<Source>>{}, "sources", value.sources);
    visit.optional(Table<FilePath, Table<Name, Record<LinkedTensor>>>{}, "linked", value.linked);
    visit.optional(Table<Name, Record<Variant>>{}, "variants", value.variants);
    visit.optional(Table<Name, Record<Engine>>{}, "engines", value.engines);
    visit.optional(List<Record<Licence>>{}, "licences", value.licences);
}

std::string_view name(TensorSource source) { return word<SourceWords>(source); }
std::string_view name(Phase phase) { return word<PhaseWords>(phase); }
std::string_view name(Precision precision) { return word<PrecisionWords>(precision); }
std::string_view name(EngineBackend backend) { return word<BackendWords>(backend); }
std::string_view name(TargetKind kind) { return word<TargetWords>(kind); }

bool is_safe_path(std::string_view path) {
    if (length(path) > 1024 || !is_utf8(path)) return false;
    for (const char c : path) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte == 0x7f || std::string_view("\\:*?\"<>|").find(c) != std::string_view::npos) {
            return false;
        }
    }
    for (std::size_t start = 0; start <= path.size();) {
        const std::size_t end = std::min(path.find('/', start), path.size());
        const std::string_view part = path.substr(start, end - start);
        if (part.empty() || part == "." || part == ".." || part.back() == ' ' || part.back() == '.')
            return false;
        start = end + 1;
    }
    return true;
}

bool is_guided(const std::vector<Guidance>& guidance,
               const std::map<std::string, std::vector<double>>* scales) {
    bool conditions = false;
    for (const Guidance& scale : guidance) {
        if (!scale.decides()) continue;
        const std::vector<double> values =
            scales == nullptr ? std::vector<double>{scale.default_scale} : scales->at(scale.name);
        const bool holds =
            std::any_of(values.begin(), values.end(), [&](double value) { return scale.satisfied(value); });
        if (!holds) return false;
        conditions = true;
    }
    return conditions;
}

std::vector<std::int64_t> DeltaTarget::a_shape() const {
    if (experts) return {*experts, rank, in_features};
    if (!kernel) return {rank, in_features};
    return {rank, in_features, (*kernel)[0], (*kernel)[1]};
}

std::vector<std::int64_t> DeltaTarget::b_shape() const {
    if (experts) return {*experts, out_features, rank};
    return {out_features, rank};
}

std::optional<std::string> Engine::covers(
    const std::map<std::string, std::int64_t, std::less<>>& axes) const {
    for (const auto& [axis, range] : shapes) {
        const auto given = axes.find(axis);
        if (given != axes.end() && (given->second < range[0] || given->second > range[2])) return axis;
    }
    return std::nullopt;
}

std::optional<std::string> Manifest::stale(std::string_view engine) const {
    for (const auto& [path, digest] : engines.at(engine).sources) {
        const File* entry = files.find(path);
        if (!entry || entry->sha256 != digest) return path;
    }
    return std::nullopt;
}

Manifest Manifest::read(const std::filesystem::path& path) {
    std::string reason;
    std::string text;
    std::filesystem::path file = path;
    try {
        if (path.native().find(std::filesystem::path::value_type{}) !=
            std::filesystem::path::string_type::npos) {
            throw std::runtime_error("embedded null byte");
        }
        if (std::filesystem::is_directory(path)) file /= manifest_file_name;
        if (std::filesystem::exists(file) && !std::filesystem::is_regular_file(file)) {
            throw std::runtime_error("not a file");
        }
        text = read_file(file, max_manifest_bytes + 1);
    } catch (const std::system_error& error) {
        reason = error.code().message();
    } catch (const std::runtime_error& error) {
        reason = error.what();
    }
    if (!reason.empty()) {
        throw Error(ErrorKind::bundle, "No bundle can be read at " + show(display(file), 300) + ": " + reason,
                    "Expected a directory with a " + std::string(manifest_file_name),
                    "Check the path, or make a bundle with `hywu export`");
    }
    if (text.size() > max_manifest_bytes) {
        throw Error(ErrorKind::bundle,
                    std::string(manifest_file_name) + " is larger than " +
                        std::to_string(max_manifest_bytes >> 20) + " MiB",
                    "A manifest names files, it does not hold them", "Copy or export the bundle again");
    }
    return parse(text);
}

Manifest Manifest::parse(std::string_view json) {
    Json value;
    try {
        value = Json::parse(json);
    } catch (const JsonError& error) {
        throw Error(ErrorKind::bundle, std::string("manifest.json is not valid JSON: ") + error.what(),
                    "Expected a UTF-8 JSON object", "The file is damaged: copy or export the bundle again");
    }
    if (!value.members()) codec::refuse(value, "(top level)", "an object");
    const Json* version = value.member("format");
    const bool known =
        version && (FormatVersion::fits(*version) || (version->real() && *version->real() == 1.0));
    if (!known) {
        throw Error(ErrorKind::bundle,
                    "manifest.json: `format` is " + (version ? codec::show(*version) : "None"),
                    "This version of hywu_runtime reads format " + std::to_string(format_version),
                    "Install a version that reads it, or export the bundle again with this one");
    }
    Manifest manifest = Record<Manifest>::decode(value, "");
    if (manifest.deltas) {
        for (const DeltaTarget& target : manifest.deltas->targets) {
            manifest.deltas->tensors.add(target.a_name(), target.a_shape());
            manifest.deltas->tensors.add(target.b_name(), target.b_shape());
        }
    }
    validate(manifest);
    return manifest;
}

std::vector<std::pair<std::string, std::string>> Manifest::reads(const Call& call) const {
    std::vector<std::pair<std::string, std::string>> result;
    for (const Value& value : graphs.at(call.graph).inputs)
        result.emplace_back(value.name, call.input(value.name));
    return result;
}

std::vector<std::pair<std::string, std::string>> Manifest::writes(const Call& call) const {
    std::vector<std::pair<std::string, std::string>> result;
    for (const Value& value : graphs.at(call.graph).outputs) {
        result.emplace_back(value.name, call.output(value.name));
    }
    return result;
}

}  // namespace hywu::core
