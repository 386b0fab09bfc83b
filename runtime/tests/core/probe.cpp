// Reads one question as JSON from each line of standard input and answers it on a line of standard output, so
// that tests/cpp/test_cpp_core.py can compare the core with the Python runtime.
//
// An answer is {"ok": …} or {"error": class, "wrong": …, "expected": …, "remedy": …, "text": …}.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/bundle.hpp"
#include "core/deltas.hpp"
#include "core/engines.hpp"
#include "core/error.hpp"
#include "core/files.hpp"
#include "core/manifest.hpp"
#include "core/noise.hpp"
#include "core/schedule.hpp"
#include "core/sha256.hpp"
#include "core/similarity.hpp"
#include "core/text.hpp"

namespace core = hywu::core;
using json = nlohmann::ordered_json;

namespace {

// The structs as dataclasses.asdict gives them.

template <class T>
json dump(const T& value) {
    return value;
}

template <class T>
json dump(const std::optional<T>& value);
template <class T, class... Rest>
json dump(const std::vector<T, Rest...>& values);
template <class T>
json dump(const core::Ordered<T>& values);

json dump(const core::Dtype& value) { return core::name(value); }
json dump(const core::TensorSource& value) { return core::name(value); }
json dump(const core::Phase& value) { return core::name(value); }
json dump(const core::TargetKind& value) { return core::name(value); }
json dump(const core::Precision& value) { return core::name(value); }
json dump(const core::EngineBackend& value) { return core::name(value); }
json dump(const core::Draw& value) { return value == core::Draw::initial ? "initial" : "step"; }
json dump(const core::PadSide& value) { return value == core::PadSide::left ? "left" : "right"; }
json dump(const core::Column& value) {
    return value == core::Column::initial_scale ? "initial_scale"
           : value == core::Column::timesteps   ? "timesteps"
                                                : "coefficients";
}
json dump(const core::Dim& value) { return value.symbolic() ? json(value.axis) : json(value.size); }
json dump(const core::File& value) { return {{"size", value.size}, {"sha256", value.sha256}}; }
json dump(const core::Term& value) {
    return {{"of", value.of}, {"times", value.times}, {"divide", value.divide}};
}
json dump(const core::Axis& value) {
    return {{"min", dump(value.min)},       {"max", dump(value.max)}, {"multiple", value.multiple},
            {"one_or", dump(value.one_or)}, {"of", dump(value.of)},   {"divide", dump(value.divide)},
            {"sum", dump(value.sum)}};
}
json dump(const core::Resize& value) {
    return {{"filter", value.filter == core::Filter::lanczos ? "lanczos" : "bicubic"},
            {"multiple", value.multiple},
            {"area", dump(value.area)},
            {"min_area", dump(value.min_area)},
            {"max_area", dump(value.max_area)}};
}
json dump(const core::ProvidedTensor& value) {
    return {{"dtype", dump(value.dtype)},
            {"shape", dump(value.shape)},
            {"source", dump(value.source)},
            {"text", dump(value.text)},
            {"constant", dump(value.constant)},
            {"tokenizer", dump(value.tokenizer)},
            {"of", dump(value.of)},
            {"draw", dump(value.draw)},
            {"column", dump(value.column)},
            {"guidance", dump(value.guidance)},
            {"index", dump(value.index)},
            {"origin", dump(value.origin)},
            {"resize", dump(value.resize)}};
}
json dump(const core::Value& value) {
    return {{"name", value.name}, {"dtype", dump(value.dtype)}, {"shape", dump(value.shape)}};
}
json dump(const core::Graph& value) {
    return {{"file", value.file},
            {"inputs", dump(value.inputs)},
            {"outputs", dump(value.outputs)},
            {"stage", value.stage},
            {"stage_of", dump(value.stage_of)}};
}
json dump(const core::Implementation& value) {
    return {{"file", value.file}, {"class_name", value.class_name}};
}
json dump(const core::Call& value) {
    return {{"graph", value.graph},         {"phase", dump(value.phase)},
            {"inputs", dump(value.inputs)}, {"outputs", dump(value.outputs)},
            {"guided", dump(value.guided)}, {"implementation", dump(value.implementation)}};
}
json dump(const core::Results& value) {
    return {{"image", dump(value.image)}, {"deltas", dump(value.deltas)}, {"outputs", dump(value.outputs)}};
}
json dump(const core::State& value) {
    const auto* zeros = std::get_if<core::Zeros>(&value.initial);
    return {{"tensor", value.tensor},
            {"next", value.next},
            {"initial",
             zeros ? json{{"zeros", dump(zeros->zeros)}} : json(std::get<std::string>(value.initial))}};
}
json dump(const core::Sampler& value) {
    return {{"class_name", value.class_name},
            {"steps", value.steps},
            {"stochastic", value.stochastic},
            {"order", dump(value.order)}};
}
json dump(const core::Schedules& value) {
    return {{"file", value.file},
            {"default", value.default_sampler},
            {"default_steps", value.default_steps},
            {"samplers", dump(value.samplers)},
            {"strength", value.strength ? json{{"default", value.strength->default_strength}} : json()}};
}
json dump(const core::Guidance& value) {
    return {{"name", value.name},
            {"default", value.default_scale},
            {"above", dump(value.above)},
            {"at_least", dump(value.at_least)}};
}
json dump(const core::ImagePolicy& value) {
    return {{"tensor", value.tensor},  {"multiple", value.multiple},         {"min", value.min},
            {"max", value.max},        {"default_area", value.default_area}, {"sizes", dump(value.sizes)},
            {"enlarge", value.enlarge}};
}
json dump(const core::DeltaTarget& value) {
    return {{"module", value.module},
            {"kind", dump(value.kind)},
            {"in_features", value.in_features},
            {"out_features", value.out_features},
            {"rank", value.rank},
            {"kernel", value.kernel ? json(*value.kernel) : json()},
            {"experts", dump(value.experts)}};
}
json dump(const core::DeltaSpec& value) {
    return {
        {"rank", value.rank}, {"gate", value.gate}, {"axis", value.axis}, {"targets", dump(value.targets)}};
}
json dump(const core::Tokenizer& value) {
    return {{"file", value.file},          {"max_length", value.max_length},
            {"pad_id", value.pad_id},      {"pad_side", dump(value.pad_side)},
            {"truncate", value.truncate},  {"template", value.text_template},
            {"lowercase", value.lowercase}};
}
json dump(const core::SourceFile& value) {
    return {{"size", value.size}, {"header_sha256", value.header_sha256}};
}
json dump(const core::Source& value) {
    return {{"name", value.name}, {"licence", dump(value.licence)}, {"files", dump(value.files)}};
}
json dump(const core::LinkedTensor& value) {
    return {{"source", value.source}, {"file", value.file},         {"offset", value.offset},
            {"length", value.length}, {"dtype", dump(value.dtype)}, {"shape", value.shape}};
}
json dump(const core::Variant& value) {
    return {
        {"precision", dump(value.precision)}, {"graphs", dump(value.graphs)}, {"report", dump(value.report)}};
}
json dump(const core::Engine& value) {
    return {{"backend", dump(value.backend)},
            {"version", value.version},
            {"compute_capabilities", value.compute_capabilities},
            {"shapes", dump(value.shapes)},
            {"graphs", dump(value.graphs)},
            {"sources", dump(value.sources)},
            {"variant", dump(value.variant)},
            {"device", dump(value.device)},
            {"version_compatible", value.version_compatible},
            {"hardware_compatible", value.hardware_compatible},
            {"report", dump(value.report)}};
}
json dump(const core::Licence& value) {
    return {{"of", value.of}, {"licence", dump(value.licence)}, {"file", dump(value.file)}};
}

template <class T>
json dump(const std::optional<T>& value) {
    return value ? dump(*value) : json();
}
template <class T, class... Rest>
json dump(const std::vector<T, Rest...>& values) {
    json result = json::array();
    for (const T& value : values) result.push_back(dump(value));
    return result;
}
template <class T>
json dump(const core::Ordered<T>& values) {
    json result = json::object();
    for (const auto& [key, value] : values) result[key] = dump(value);
    return result;
}

json dump(const core::Manifest& value) {
    json signatures = json::object(), stale = json::object();
    for (const auto& [name, signature] : value.signatures) signatures[name] = dump(signature);
    for (const auto& [name, engine] : value.engines) stale[name] = dump(value.stale(name));
    json calls = json::array();
    for (const core::Call& call : value.program) calls.push_back({value.reads(call), value.writes(call)});
    return {{"format", value.format},
            {"name", value.name},
            {"family", dump(value.family)},
            {"producer", {{"name", value.producer.name}, {"version", value.producer.version}}},
            {"files", dump(value.files)},
            {"axes", dump(value.axes)},
            {"tensors", dump(value.tensors)},
            {"graphs", dump(value.graphs)},
            {"program", dump(value.program)},
            {"results", dump(value.results)},
            {"state", dump(value.state)},
            {"schedules", dump(value.schedules)},
            {"guidance", dump(value.guidance)},
            {"image", dump(value.image)},
            {"deltas", dump(value.deltas)},
            {"tokenizers", dump(value.tokenizers)},
            {"sources", dump(value.sources)},
            {"linked", dump(value.linked)},
            {"variants", dump(value.variants)},
            {"engines", dump(value.engines)},
            {"licences", dump(value.licences)},
            {"signatures", signatures},
            {"stale", stale},
            {"calls", calls}};
}

std::string bytes_digest(const void* data, std::size_t bytes) {
    return core::sha256({static_cast<const char*>(data), bytes});
}

json hex(const float* numbers, std::size_t count) {
    std::string text;
    for (std::size_t i = 0; i < count; ++i) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, numbers + i, sizeof bits);
        for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[bits >> shift & 15U];
    }
    return text;
}

json dump(const core::Deltas& deltas) {
    json result = {{"rank", deltas.rank()}, {"batch", deltas.batch()}, {"tensors", json::object()}};
    for (const auto& [name, array] : deltas) {
        result["tensors"][name] = {array->shape(), bytes_digest(array->data(), array->bytes())};
    }
    return result;
}

core::DeltaSpec spec_of(const json& question) {
    core::DeltaSpec spec;
    for (const json& entry : question.at("targets")) {
        core::DeltaTarget target;
        target.module = entry.at("module");
        target.in_features = entry.at("in");
        target.out_features = entry.at("out");
        target.rank = entry.at("rank");
        if (entry.contains("kernel")) {
            target.kind = core::TargetKind::conv;
            target.kernel = entry.at("kernel").get<std::array<std::int64_t, 2>>();
        }
        if (entry.contains("experts")) {
            target.kind = core::TargetKind::experts;
            target.experts = entry.at("experts").get<std::int64_t>();
        }
        spec.rank = std::max(spec.rank, target.rank);
        spec.tensors.add(target.a_name(), target.a_shape());
        spec.tensors.add(target.b_name(), target.b_shape());
        spec.targets.push_back(target);
    }
    return spec;
}

std::filesystem::path path_of(const json& question, const char* key) {
    return core::path_of(question.at(key).get<std::string>());
}

json manifest(const json& question) { return dump(core::Manifest::read(path_of(question, "path"))); }

json bundle(const json& question) {
    core::OpenOptions options;
    options.verify = question.value("verify", false);
    options.links = question.value("links", true);
    const json sources = question.value("sources", json::object());
    for (const auto& [name, path] : sources.items()) {
        options.sources[name] = core::path_of(path.get<std::string>());
    }
    const core::Bundle opened = core::Bundle::open(path_of(question, "path"), options);
    json files = json::object(), weights = json::object();
    for (const auto& [name, entry] : opened.manifest().files) files[name] = opened.file(name).u8string();
    std::optional<std::string> variant;
    if (question.contains("variant")) variant = question.at("variant");
    for (const auto& [name, graph] : opened.manifest().graphs) {
        const std::string file = opened.graph_file(name, variant);
        weights[file] = json::object();
        for (const core::Weight& weight : opened.initializers(file)) {
            weights[file][weight.name] = {core::name(weight.dtype), weight.shape,
                                          bytes_digest(weight.data, weight.bytes)};
        }
    }
    return {{"root", opened.root().u8string()}, {"files", files}, {"weights", weights}};
}

json schedule(const json& question) {
    core::Schedules section;
    section.default_sampler = question.at("default");
    section.default_steps = question.at("default_steps");
    for (const json& name : question.at("samplers")) {
        core::Sampler sampler;
        if (const auto orders = question.find("orders"); orders != question.end() && orders->contains(name))
            sampler.order = orders->at(name.get<std::string>());
        section.samplers.add(name.get<std::string>(), sampler);
    }
    std::optional<double> strength;
    if (question.contains("default_strength"))
        section.strength = core::Strength{question.at("default_strength")};
    if (!question.value("strength", json()).is_null()) strength = question.at("strength");
    const core::Schedule schedule(path_of(question, "path"), section);
    std::optional<std::string> sampler;
    std::optional<std::int64_t> steps;
    if (!question.value("sampler", json()).is_null()) sampler = question.at("sampler");
    if (!question.value("steps", json()).is_null()) steps = question.at("steps");
    const core::Rows rows = schedule.rows(sampler, steps, strength);
    return {{"sampler", rows.sampler},
            {"steps", rows.steps},
            {"width", rows.width},
            {"initial_scale", hex(&rows.initial_scale, 1)},
            {"timesteps", hex(rows.timesteps.data(), rows.timesteps.size())},
            {"coefficients", hex(rows.coefficients.data(), rows.coefficients.size())},
            {"start", hex(rows.start.data(), rows.start.size())},
            {"accepted", schedule.accepted(rows.sampler)}};
}

json noise(const json& question) {
    std::vector<float> numbers(question.at("length").get<std::size_t>());
    core::noise::normal(numbers.data(), numbers.size(), std::stoull(question.at("seed").get<std::string>()),
                        question.at("sample"), question.at("draw"));
    return hex(numbers.data(), numbers.size());
}

// Loads the sets of `paths`, does what `operation` says, saves the result to `out` if that is given.
json deltas(const json& question) {
    std::vector<core::Deltas> sets;
    std::vector<const core::Deltas*> pointers;
    for (const json& path : question.at("paths")) {
        sets.push_back(core::Deltas::load(core::path_of(path.get<std::string>())));
    }
    for (const core::Deltas& set : sets) pointers.push_back(&set);
    const std::string operation = question.value("operation", "load");
    core::Deltas result;
    if (operation == "blend") {
        std::vector<double> weights;
        for (const json& weight : question.at("weights")) {  // texts, for there may be infinities
            weights.push_back(std::strtod(weight.get<std::string>().c_str(), nullptr));
        }
        std::optional<std::int64_t> max_rank;
        if (!question.value("max_rank", json()).is_null()) max_rank = question.at("max_rank");
        result = core::Deltas::blend(pointers, weights, max_rank);
    } else if (operation == "stack") {
        result = core::Deltas::stack(pointers);
    } else if (operation == "select") {
        result = sets.at(0).select(question.at("sample"));
    } else if (operation == "pad") {
        result = sets.at(0).pad(spec_of(question));
    } else {
        result = sets.at(0);
    }
    if (operation == "check") {
        std::optional<std::int64_t> batch;
        if (!question.value("batch", json()).is_null()) batch = question.at("batch");
        result.check(spec_of(question), batch);
    }
    if (question.contains("out")) result.save(path_of(question, "out"));
    return dump(result);
}

json sha256(const json& question) {
    core::Sha256 digest;
    const std::string text = core::read_file(path_of(question, "path"), std::size_t{1} << 30);
    const std::size_t piece = question.value("piece", text.size() + 1);
    for (std::size_t at = 0; at < text.size(); at += piece) {
        digest.update(text.data() + at, std::min(piece, text.size() - at));
    }
    return digest.hex();
}

json text(const json& question) {
    const std::string given = question.at("text");
    json nearest;
    if (const auto found = core::nearest(given, question.value("candidates", std::vector<std::string>()))) {
        nearest = *found;
    }
    return {{"show", core::show(given, question.value("limit", std::size_t{60}))},
            {"repr", core::repr(given)},
            {"printable", core::is_printable(given)},
            {"length", core::length(given)},
            {"safe_path", core::is_safe_path(given)},
            {"nearest", nearest}};
}

// Which engines of a bundle's manifest a target can use; with `graphs`, the one that serves `axes`; with
// `command`, what would build one.
json engines(const json& question) {
    const core::Manifest manifest = core::Manifest::read(path_of(question, "path"));
    const std::filesystem::path root = path_of(question, "root");
    const json& given = question.at("target");
    const core::Target target = {given.at("backend"), given.at("version"), given.at("capability"),
                                 given.at("device")};
    const auto optional = [&](const char* key) {
        const json value = question.value(key, json());
        return value.is_null() ? std::nullopt : std::optional<std::string>(value.get<std::string>());
    };
    if (question.contains("shapes")) {
        core::AxisRanges shapes;
        for (const auto& [axis, range] : question.at("shapes").items())
            shapes.add(axis, range.get<std::array<std::int64_t, 3>>());
        return core::build_command(root, manifest, target, optional("variant"), shapes);
    }
    const std::vector<std::string> keys =
        core::usable(root, manifest, target, optional("variant"), optional("key"));
    json sizes = json::array();
    for (const std::string& key : keys)
        sizes.push_back(dump(core::narrowed(manifest, manifest.engines.at(key))));
    if (!question.contains("graphs")) return {{"keys", keys}, {"sizes", sizes}};
    return core::covering(root, manifest, keys,
                          question.at("axes").get<std::map<std::string, std::int64_t, std::less<>>>(),
                          question.at("graphs").get<std::set<std::string>>(), target);
}

json number(const json& question) { return core::repr(question.at("number").get<double>()); }

json answer(const json& question) {
    static const std::map<std::string, std::function<json(const json&)>> commands = {
        {"manifest", manifest}, {"bundle", bundle}, {"schedule", schedule},
        {"noise", noise},       {"deltas", deltas}, {"sha256", sha256},
        {"text", text},         {"number", number}, {"engines", engines},
    };
    try {
        return {{"ok", commands.at(question.at("command"))(question)}};
    } catch (const core::Error& error) {
        return {{"error", core::name(error.kind())},
                {"wrong", error.wrong()},
                {"expected", error.expected()},
                {"remedy", error.remedy()},
                {"text", error.what()}};
    }
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);)
        std::cout << answer(json::parse(line)).dump() << std::endl;
    return 0;
}
