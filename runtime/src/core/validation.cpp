#include "core/validation.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <set>

#include "core/codec.hpp"
#include "core/error.hpp"
#include "core/text.hpp"

namespace hywu::core {

namespace {

using codec::at;
using codec::malformed;

// Of all calls together: graphs are listed once and called often, so that a short manifest could make a long
// program.
constexpr std::int64_t max_pictures = 64;  // of one request
constexpr std::size_t max_ports = std::size_t{1} << 20;

// Names in a set; they live in the manifest.
using Names = std::set<std::string_view>;

std::string str(std::string_view text) { return std::string(text); }

bool contains(const Names& names, std::string_view name) { return names.count(name) > 0; }
template <class T>
bool contains(const Ordered<T>& entries, std::string_view name) {
    return entries.contains(name);
}
template <class T>
bool contains(const std::map<std::string_view, T>& entries, std::string_view name) {
    return entries.count(name) > 0;
}

const std::string_view& key_of(const std::string_view& name) { return name; }
template <class Key, class T>
const Key& key_of(const std::pair<Key, T>& entry) {
    return entry.first;
}

template <class Container>
void known(const std::string& where, std::string_view name, const Container& all, const std::string& what) {
    if (contains(all, name)) return;
    Names names;
    for (const auto& entry : all) names.insert(key_of(entry));
    std::vector<std::string> listed;
    for (const std::string_view known_name : names) {
        if (listed.size() == 8) {
            listed.emplace_back("…");
            break;
        }
        listed.push_back(str(inside(show(known_name))));
    }
    throw malformed(where, "names " + show(name) + ", which is not " + what,
                    names.empty() ? what + "; there is none" : "one of: " + join(listed, ", "));
}

// A shape as Python writes it: [4, 'batch'].
std::string written(const Dims& shape) {
    std::string text = "[";
    for (const Dim& dim : shape) {
        if (text.size() > 1) text += ", ";
        text += dim.symbolic() ? repr(dim.axis) : std::to_string(dim.size);
    }
    return text + "]";
}

std::string written(Dtype dtype, const Dims& shape) { return str(name(dtype)) + " " + written(shape); }

bool is_axis(const Dim& dim, std::string_view axis) { return dim.symbolic() && dim.axis == axis; }

bool derived(const Axis& axis) { return axis.derived() || axis.one_or; }

class Validator {
public:
    explicit Validator(Manifest& manifest) : m_(manifest) {}

    void run() {
        files();
        axes();
        guidance();
        schedules();
        deltas();
        tensors();
        graphs();
        program();
        image();
        linked();
        engines();
    }

private:
    void files() const;
    template <class Additions>
    void additions(const std::string& section, const Additions& all,
                   std::vector<std::pair<std::string, const std::string*>>& references) const;
    void axes() const;
    void term(const std::string& where, const Term& term) const;
    std::int64_t least(const std::string& axis) const;
    void guidance();
    void schedules() const;
    void deltas() const;
    void tensors() const;
    void keys(const std::string& where, const ProvidedTensor& tensor) const;
    void picture(const std::string& where, const ProvidedTensor& tensor) const;
    void source(const std::string& where, const ProvidedTensor& tensor) const;
    void graphs() const;
    void program();
    void signatures();
    void flow(const std::vector<std::size_t>& order, bool guided) const;
    void image() const;
    void linked() const;
    void engines() const;

    // What a run through the calls knows.
    struct Made {
        const Value* value;
        std::size_t call;
    };
    struct Flow {
        std::map<std::string_view, Made> made;
        Names states;
        Names fixed;  // tensors that a load call may read
    };
    void readable(const std::string& where, const std::string& tensor, const Call& call,
                  const Flow& flow) const;
    void state(const Flow& flow) const;
    void results(const Flow& flow) const;

    void shape(const std::string& where, const Dims& shape) const;
    void agree(const std::string& where, const Value& value, const Value& other) const;
    bool same(const Dim& a, const Dim& b) const;
    bool is_delta(std::string_view name) const { return m_.deltas && m_.deltas->tensors.contains(name); }
    const Value& signature(std::string_view name) const { return m_.signatures.find(name)->second; }

    Manifest& m_;
    Names scales_;  // of guidance
};

template <class Additions>
void Validator::additions(const std::string& section, const Additions& all,
                          std::vector<std::pair<std::string, const std::string*>>& references) const {
    for (const auto& [name, addition] : all) {
        const std::string where = at(section, name);
        for (const auto& [graph, file] : addition.graphs) {
            known(where + ".graphs", graph, m_.graphs, "a graph of this bundle");
            references.emplace_back(at(where + ".graphs", graph), &file);
        }
        if (addition.report) references.emplace_back(where + ".report", &*addition.report);
    }
}

void Validator::files() const {
    if (m_.files.contains(manifest_file_name)) {
        throw malformed("files", "lists " + str(manifest_file_name) + " itself",
                        "every file but the manifest");
    }
    std::vector<std::pair<std::string, const std::string*>> references;
    for (const auto& [name, graph] : m_.graphs)
        references.emplace_back(at("graphs", name) + ".file", &graph.file);
    for (const auto& [name, tokenizer] : m_.tokenizers) {
        references.emplace_back(at("tokenizers", name) + ".file", &tokenizer.file);
    }
    for (std::size_t i = 0; i < m_.licences.size(); ++i) {
        if (m_.licences[i].file) references.emplace_back(at("licences", i) + ".file", &*m_.licences[i].file);
    }
    if (m_.schedules) references.emplace_back("schedules.file", &m_.schedules->file);
    additions("variants", m_.variants, references);
    additions("engines", m_.engines, references);
    for (const auto& [where, file] : references) {
        if (!m_.files.contains(*file)) {
            throw malformed(where, "is " + show(*file) + ", which `files` does not list",
                            "a file of the bundle");
        }
    }
    for (std::size_t i = 0; i < m_.licences.size(); ++i) {
        known(at("licences", i) + ".of", m_.licences[i].of, m_.sources, "a source id");
    }
}

void Validator::axes() const {
    const Axis* batch = m_.axes.find("batch");
    if (batch && derived(*batch)) {
        throw malformed("axes.batch", "depends on another axis", "an axis with limits of its own");
    }
    for (const auto& [name, axis] : m_.axes) {
        const std::string where = at("axes", name);
        const int forms = (axis.min ? 1 : 0) + (axis.of ? 1 : 0) + (axis.sum.empty() ? 0 : 1);
        if (axis.of.has_value() != axis.divide.has_value() || axis.min.has_value() != axis.max.has_value() ||
            forms != 1) {
            throw malformed(where, "mixes the forms of an axis",
                            "either `min` and `max`, or `of` and `divide`, or `sum`");
        }
        if (axis.min && axis.max) {
            if (*axis.min > *axis.max) {
                throw malformed(
                    where, "has min " + std::to_string(*axis.min) + " above max " + std::to_string(*axis.max),
                    "min ≤ max");
            }
            if (*axis.max / axis.multiple * axis.multiple < *axis.min) {
                throw malformed(where,
                                "has no multiple of " + std::to_string(axis.multiple) + " within its limits",
                                "at least one size");
            }
        } else if (axis.multiple != 1 || axis.one_or) {
            throw malformed(where, "is derived and has `multiple` or `one_or`",
                            "`of` and `divide`, or `sum`, alone");
        }
        if (axis.one_or) {
            known(where + ".one_or", *axis.one_or, m_.axes, "an axis");
            if (derived(m_.axes.at(*axis.one_or)) || *axis.one_or == name) {
                throw malformed(where + ".one_or", "is " + show(*axis.one_or),
                                "an axis with limits of its own");
            }
        }
        if (axis.of) {
            known(where + ".of", *axis.of, m_.axes, "an axis");
            const Axis& base = m_.axes.at(*axis.of);
            if (derived(base)) {
                throw malformed(where + ".of", "is " + show(*axis.of) + ", itself derived",
                                "an axis with limits of its own");
            }
            if (base.multiple % *axis.divide != 0) {
                throw malformed(where + ".divide",
                                "is " + std::to_string(*axis.divide) +
                                    ", which does not divide every size of " + show(*axis.of),
                                "a divisor of its multiple, " + std::to_string(base.multiple));
            }
        }
        for (std::size_t i = 0; i < axis.sum.size(); ++i) term(at(where + ".sum", i), axis.sum[i]);
    }
}

void Validator::term(const std::string& where, const Term& term) const {
    double largest = static_cast<double>(term.times);  // of at most five factors below 2^31: to be compared
    std::int64_t divide = term.divide;                 // what is left of it, divided by what it divides
    const auto divisible_by = [&divide](std::int64_t factor) { divide /= std::gcd(divide, factor); };
    std::string multiple = std::to_string(term.times);
    divisible_by(term.times);
    for (const std::string& name : term.of) {
        known(where + ".of", name, m_.axes, "an axis");
        const Axis& base = m_.axes.at(name);
        if (derived(base)) {
            throw malformed(where + ".of", "has " + show(name) + ", itself derived",
                            "axes with limits of their own");
        }
        divisible_by(base.multiple);
        largest *= static_cast<double>(base.max.value_or(1));
    }
    if (largest > 9007199254740992.0) throw malformed(where, "may be larger than 2^53", "smaller limits");
    if (divide != 1) {
        throw malformed(where + ".divide",
                        "is " + std::to_string(term.divide) + ", which does not always divide",
                        "a divisor of times and the multiples");
    }
}

void Validator::guidance() {
    for (std::size_t i = 0; i < m_.guidance.size(); ++i) {
        const Guidance& guidance = m_.guidance[i];
        if (!scales_.insert(guidance.name).second) {
            throw malformed(at("guidance", i) + ".name", "repeats " + show(guidance.name),
                            "a name of its own");
        }
        if (guidance.above && guidance.at_least) {
            throw malformed(at("guidance", i), "has two conditions", "`above`, `at_least`, or neither");
        }
    }
}

void Validator::schedules() const {
    if (!m_.schedules) return;
    known("schedules.default", m_.schedules->default_sampler, m_.schedules->samplers, "a sampler");
    const auto [low, high] = m_.schedules->samplers.at(m_.schedules->default_sampler).steps;
    if (m_.schedules->default_steps < low || m_.schedules->default_steps > high) {
        throw malformed("schedules.default_steps", "is " + std::to_string(m_.schedules->default_steps),
                        std::to_string(low) + " to " + std::to_string(high) + ", as the sampler takes");
    }
    const std::optional<Strength>& strength = m_.schedules->strength;
    if (strength && strength->default_strength < 1 &&
        !m_.schedules->samplers.at(m_.schedules->default_sampler).order) {
        throw malformed("schedules.strength.default",
                        "is " + repr(strength->default_strength) + ", but the default sampler has no `order`",
                        "1, or a sampler that may start midway");
    }
}

void Validator::deltas() const {
    if (!m_.deltas) return;
    known("deltas.axis", m_.deltas->axis, m_.axes, "an axis");
    known("deltas.gate", m_.deltas->gate, m_.tensors, "a tensor that the runtime provides");
    if (m_.tensors.at(m_.deltas->gate).source != TensorSource::gate) {
        throw malformed("deltas.gate", "is " + show(m_.deltas->gate), "a tensor with source `gate`");
    }
    Names modules;
    for (std::size_t i = 0; i < m_.deltas->targets.size(); ++i) {
        const DeltaTarget& target = m_.deltas->targets[i];
        const std::string where = at("deltas.targets", i);
        if (!modules.insert(target.module).second) {
            throw malformed(where + ".module", "repeats " + show(target.module), "one entry for each module");
        }
        if ((target.kind == TargetKind::conv) != target.kernel.has_value()) {
            throw malformed(where + ".kernel", "does not go with kind " + str(name(target.kind)),
                            "`kernel` for conv and only there");
        }
        if ((target.kind == TargetKind::experts) != target.experts.has_value()) {
            throw malformed(where + ".experts", "does not go with kind " + str(name(target.kind)),
                            "`experts` for experts and only there");
        }
        if (target.rank > m_.deltas->rank) {
            throw malformed(where + ".rank", "is " + std::to_string(target.rank),
                            "at most `deltas.rank`, " + std::to_string(m_.deltas->rank));
        }
    }
}

void Validator::shape(const std::string& where, const Dims& shape) const {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    for (const Dim& dim : shape) {
        if (dim.symbolic()) known(where, dim.axis, m_.axes, "an axis");
    }
    std::int64_t elements = 1;  // at least so many
    for (const Dim& dim : shape) {
        const std::int64_t size = dim.symbolic() ? least(dim.axis) : dim.size;
        if (size > most / elements) {
            throw malformed(where, "has more than 2^40 elements", "a tensor that a machine could hold");
        }
        elements *= size;
    }
}

// The smallest size of an axis.
std::int64_t Validator::least(const std::string& axis) const {
    const auto own = [this](const std::string& name) { return &*m_.axes.at(name).min; };
    const Axis& found = m_.axes.at(axis);
    return found.derived() ? std::max<std::int64_t>(found.size(own).value_or(1), 1) : found.min.value_or(1);
}

void Validator::tensors() const {
    for (const auto& [name, tensor] : m_.tensors) {
        const std::string where = at("tensors", name);
        shape(where + ".shape", tensor.shape);
        keys(where, tensor);
        source(where, tensor);
    }
    if (!m_.deltas) return;
    for (const auto& [name, shape] : m_.deltas->tensors) {
        if (m_.tensors.contains(name)) {
            throw malformed(at("tensors", name), "is a delta", "deltas in `deltas` alone");
        }
    }
}

// The keys that each source needs and allows; of `text` and `constant`, exactly one, and of an image's any.
void Validator::keys(const std::string& where, const ProvidedTensor& tensor) const {
    struct Key {
        std::string_view name;
        bool given;
        TensorSource source;  // the one that it goes with
    };
    const std::array<Key, 10> all = {{
        {"text", tensor.text.has_value(), TensorSource::text},
        {"constant", tensor.constant.has_value(), TensorSource::text},
        {"tokenizer", tensor.tokenizer.has_value(), TensorSource::text},
        {"of", tensor.of.has_value(), TensorSource::mask},
        {"draw", tensor.draw.has_value(), TensorSource::noise},
        {"column", tensor.column.has_value(), TensorSource::schedule},
        {"guidance", tensor.guidance.has_value(), TensorSource::guidance},
        {"index", tensor.index.has_value(), TensorSource::image},
        {"from", tensor.origin.has_value(), TensorSource::image},
        {"resize", !tensor.resize.empty(), TensorSource::image},
    }};
    for (const Key& key : all) {
        const bool allowed = key.source == tensor.source;
        if (key.given && !allowed) {
            throw malformed(where + "." + str(key.name),
                            "does not go with source " + str(name(tensor.source)), "no such key");
        }
        const bool optional =
            key.source == TensorSource::image || key.name == "text" || key.name == "constant";
        if (!key.given && allowed && !optional) {
            throw malformed(where + "." + str(key.name), "is missing",
                            "it with source " + str(name(tensor.source)));
        }
    }
}

// Which of a request's photographs a tensor shows, and at what size.
void Validator::picture(const std::string& where, const ProvidedTensor& tensor) const {
    if (tensor.index.value_or(0) >= max_pictures) {
        throw malformed(where + ".index", "is " + std::to_string(*tensor.index),
                        "a number below " + std::to_string(max_pictures));
    }
    if (tensor.origin) {
        known(where + ".from", *tensor.origin, m_.tensors, "a tensor that the runtime provides");
        const ProvidedTensor& origin = m_.tensors.at(*tensor.origin);
        if (origin.source != TensorSource::image || !origin.resize.empty() ||
            origin.index.value_or(0) != tensor.index.value_or(0)) {
            throw malformed(where + ".from", "is " + show(*tensor.origin),
                            "a tensor with source `image`, the same `index` and no `resize`");
        }
        if (tensor.resize.empty()) throw malformed(where + ".resize", "is missing", "it with `from`");
    }
    for (const Resize& step : tensor.resize) {
        if (step.min_area && step.max_area && *step.min_area > *step.max_area) {
            throw malformed(where + ".resize", "has a min_area above its max_area", "the smaller one first");
        }
    }
}

// What each source fixes about a tensor's dtype and shape.
void Validator::source(const std::string& where, const ProvidedTensor& tensor) const {
    static const std::vector<Dtype> integers = {Dtype::int32, Dtype::int64}, floats = {Dtype::float32},
                                    bytes = {Dtype::uint8};
    const auto fixed = [&](const std::vector<Dtype>& dtypes, const std::optional<Dims>& wanted = {}) {
        if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
            std::vector<std::string> names;
            names.reserve(dtypes.size());
            for (const Dtype dtype : dtypes) names.emplace_back(name(dtype));
            throw malformed(where + ".dtype", "is " + str(name(tensor.dtype)),
                            join(names, " or ") + " with source " + str(name(tensor.source)));
        }
        if (wanted && tensor.shape != *wanted) {
            throw malformed(where + ".shape", "is " + written(tensor.shape),
                            written(*wanted) + " with source " + str(name(tensor.source)));
        }
    };
    const bool leads = !tensor.shape.empty() && is_axis(tensor.shape[0], "batch");
    switch (tensor.source) {
        case TensorSource::image:
        case TensorSource::text:
        case TensorSource::noise:
        case TensorSource::guidance:
        case TensorSource::gate:
            if (!leads) {
                throw malformed(where + ".shape", "is " + written(tensor.shape), "`batch` as the first axis");
            }
            break;
        default:
            break;
    }
    switch (tensor.source) {
        case TensorSource::image:
            fixed(bytes);
            if (tensor.shape.size() != 4 || tensor.shape[3] != Dim{3, ""}) {
                throw malformed(where + ".shape", "is " + written(tensor.shape),
                                R"(["batch", height, width, 3])");
            }
            picture(where, tensor);
            break;
        case TensorSource::text:
            if (tensor.text.has_value() == tensor.constant.has_value()) {
                throw malformed(where, "does not say which text", "exactly one of `text` and `constant`");
            }
            known(where + ".tokenizer", *tensor.tokenizer, m_.tokenizers, "a tokenizer");
            fixed(integers, Dims{{0, "batch"}, {m_.tokenizers.at(*tensor.tokenizer).max_length, ""}});
            break;
        case TensorSource::mask: {
            known(where + ".of", *tensor.of, m_.tensors, "a tensor that the runtime provides");
            const ProvidedTensor& text = m_.tensors.at(*tensor.of);
            if (text.source != TensorSource::text) {
                throw malformed(where + ".of", "is " + show(*tensor.of), "a tensor with source `text`");
            }
            fixed(integers, text.shape);
            break;
        }
        case TensorSource::noise:
            fixed(floats);
            break;
        case TensorSource::schedule:
            if (!m_.schedules) {
                throw malformed(where, "reads the schedule, but there is no `schedules`",
                                "a `schedules` section");
            }
            if (tensor.column == Column::start && !m_.schedules->strength) {
                throw malformed(where, "reads where a request starts, but there is no `schedules.strength`",
                                "`strength`");
            }
            if (tensor.column != Column::coefficients && tensor.column != Column::start) {
                fixed(floats, Dims{});
                break;
            }
            fixed(floats);
            if (tensor.shape.size() != 1 || tensor.shape[0].symbolic()) {
                throw malformed(where + ".shape", "is " + written(tensor.shape), "[K], an integer");
            }
            break;
        case TensorSource::guidance:
            known(where + ".guidance", *tensor.guidance, scales_, "a guidance scale");
            fixed(floats, Dims{{0, "batch"}});
            break;
        case TensorSource::gate:
            fixed(floats, Dims{{0, "batch"}});
            break;
        case TensorSource::input:
            break;
    }
}

void Validator::graphs() const {
    for (const auto& [name, graph] : m_.graphs) {
        const auto side = [this, &where = name](const std::string& label, const std::vector<Value>& values) {
            Names seen;
            for (std::size_t i = 0; i < values.size(); ++i) {
                const std::string key = at(at("graphs", where) + "." + label, i);
                if (!seen.insert(values[i].name).second) {
                    throw malformed(key + ".name", "repeats " + show(values[i].name), "a name of its own");
                }
                shape(key + ".shape", values[i].shape);
            }
        };
        side("inputs", graph.inputs);
        side("outputs", graph.outputs);
    }
}

// Every tensor of the bundle: provided, deltas, made by calls, carried.
void Validator::signatures() {
    for (const auto& [name, tensor] : m_.tensors) m_.signatures[name] = {name, tensor.dtype, tensor.shape};
    if (m_.deltas) {
        for (const auto& [name, shape] : m_.deltas->tensors) {
            Dims dims = {{0, m_.deltas->axis}};
            for (const std::int64_t size : shape) dims.push_back({size, ""});
            m_.signatures[name] = {name, Dtype::float32, std::move(dims)};
        }
    }
    for (const Call& call : m_.program) {
        for (const Value& value : m_.graphs.at(call.graph).outputs) {
            const std::string& name = call.output(value.name);
            m_.signatures.try_emplace(name, Value{name, value.dtype, value.shape});
        }
    }
    for (const State& state : m_.state) {
        const auto next = m_.signatures.find(state.next);
        if (next == m_.signatures.end()) continue;
        Value value = next->second;
        value.name = state.tensor;
        m_.signatures[state.tensor] = std::move(value);
    }
}

void Validator::program() {
    std::size_t ports = 0;
    for (std::size_t i = 0; i < m_.program.size(); ++i) {
        const Call& call = m_.program[i];
        const std::string where = at("program", i);
        known(where + ".graph", call.graph, m_.graphs, "a graph of this bundle");
        const Graph& graph = m_.graphs.at(call.graph);
        ports += graph.inputs.size() + graph.outputs.size();
        if (ports > max_ports) {
            throw malformed("program", "has more than 2^20 inputs and outputs",
                            "a program that a machine could run");
        }
        const auto side = [&](const std::string& label, const Ordered<std::string>& mapping,
                              const std::vector<Value>& values) {
            if (mapping.empty()) return;
            Names names;
            for (const Value& value : values) names.insert(value.name);
            const std::string key = codec::dot(where, label);
            const std::string what = "among the " + label + " of graph " + show(call.graph);
            for (const auto& [port, tensor] : mapping) known(key, port, names, what);
        };
        side("inputs", call.inputs, graph.inputs);
        side("outputs", call.outputs, graph.outputs);
    }
    Names made;
    for (const Call& call : m_.program) {
        for (const Value& value : m_.graphs.at(call.graph).outputs) made.insert(call.output(value.name));
    }
    for (std::size_t i = 0; i < m_.state.size(); ++i) {
        const State& state = m_.state[i];
        known(at("state", i) + ".next", state.next, made, "made by a call");
        if (m_.tensors.contains(state.tensor) || is_delta(state.tensor)) {
            throw malformed(at("state", i) + ".tensor",
                            "is " + show(state.tensor) + ", which has another source", "a name of its own");
        }
    }
    signatures();
    // Execution order: phase by phase, within a phase in the order of the list.
    std::vector<std::size_t> order(m_.program.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [this](std::size_t a, std::size_t b) {
        return m_.program[a].phase < m_.program[b].phase;
    });
    const bool both = std::any_of(m_.guidance.begin(), m_.guidance.end(),
                                  [](const Guidance& guidance) { return guidance.decides(); });
    for (const bool guided : {false, true}) {
        if (guided && !both) break;
        std::vector<std::size_t> part;
        std::copy_if(order.begin(), order.end(), std::back_inserter(part),
                     [&](std::size_t i) { return m_.program[i].runs(guided); });
        flow(part, guided);
    }
}

// Every tensor has one producer that comes before its readers, and both agree about dtype and shape.
void Validator::flow(const std::vector<std::size_t>& order, bool guided) const {
    Flow flow;
    for (const State& state : m_.state) flow.states.insert(state.tensor);
    if (flow.states.size() != m_.state.size()) {
        throw malformed("state", "names a tensor twice", "one entry for each tensor");
    }
    for (const std::size_t i : order) {
        const Call& call = m_.program[i];
        const Graph& graph = m_.graphs.at(call.graph);
        const std::string where = at("program", i);
        for (const Value& value : graph.inputs) {
            const std::string& tensor = call.input(value.name);
            const std::string key = at(where + ".inputs", value.name);
            readable(key, tensor, call, flow);
            agree(key, value, signature(tensor));
        }
        for (const Value& value : graph.outputs) {
            const std::string& tensor = call.output(value.name);
            const std::string key = at(where + ".outputs", value.name);
            const auto maker = flow.made.find(tensor);
            if (maker != flow.made.end()) {
                throw malformed(key,
                                "makes " + show(tensor) + ", which " + at("program", maker->second.call) +
                                    " makes too (guided: " + (guided ? "True" : "False") + ")",
                                "one producer for each tensor");
            }
            if (m_.tensors.contains(tensor) || contains(flow.states, tensor)) {
                throw malformed(key, "makes " + show(tensor) + ", which the runtime provides",
                                "a name of its own");
            }
            agree(key, value, signature(tensor));
            if (call.phase == Phase::load) {
                flow.fixed.insert(tensor);
                for (const Dim& dim : value.shape) {
                    if (dim.symbolic() && dim.axis != "batch") {
                        throw malformed(key, "has shape " + written(value.shape),
                                        "no axis but `batch` in the load phase");
                    }
                }
            }
            flow.made.insert({tensor, {&value, i}});
        }
    }
    state(flow);
    results(flow);
}

void Validator::readable(const std::string& where, const std::string& tensor, const Call& call,
                         const Flow& flow) const {
    const auto not_constant = [&] {
        return malformed(where, "reads " + show(tensor) + " in the load phase",
                         "constant texts and what is made of them");
    };
    if (const ProvidedTensor* provided = m_.tensors.find(tensor)) {
        const ProvidedTensor& text =
            provided->source == TensorSource::mask ? m_.tensors.at(*provided->of) : *provided;
        if (call.phase == Phase::load && !text.constant) throw not_constant();
        if (call.phase != Phase::step && provided->changes()) {
            throw malformed(where, "reads " + show(tensor) + " in phase " + str(name(call.phase)),
                            "the step phase, where it has a value");
        }
        return;
    }
    if (call.phase == Phase::load) {
        if (!contains(flow.fixed, tensor)) throw not_constant();
    } else if (contains(flow.states, tensor)) {
        if (call.phase == Phase::request) {
            throw malformed(where, "reads the state " + show(tensor) + " before the steps",
                            "a tensor of the request");
        }
    } else if (!contains(flow.made, tensor) && !is_delta(tensor)) {
        throw malformed(where, "reads " + show(tensor) + ", which nothing makes before",
                        "a tensor that exists by then");
    }
}

void Validator::agree(const std::string& where, const Value& value, const Value& other) const {
    if (value.dtype != other.dtype) {
        throw malformed(where,
                        "has dtype " + str(name(value.dtype)) + ", but " + show(other.name) + " is " +
                            str(name(other.dtype)),
                        "equal dtypes");
    }
    const bool equal = value.shape.size() == other.shape.size() &&
                       std::equal(value.shape.begin(), value.shape.end(), other.shape.begin(),
                                  [this](const Dim& a, const Dim& b) { return same(a, b); });
    if (equal) return;
    throw malformed(
        where,
        "has shape " + written(value.shape) + ", but " + show(other.name) + " has " + written(other.shape),
        "equal shapes");
}

// Equal dimensions; an axis that is `one_or` of another goes with that other.
bool Validator::same(const Dim& a, const Dim& b) const {
    const auto goes_with = [this](const Dim& x, const Dim& y) {
        return x.symbolic() && y.symbolic() && m_.axes.at(x.axis).one_or == y.axis;
    };
    return a == b || goes_with(a, b) || goes_with(b, a);
}

void Validator::state(const Flow& flow) const {
    for (std::size_t i = 0; i < m_.state.size(); ++i) {
        const State& state = m_.state[i];
        const std::string where = at("state", i);
        const auto next = flow.made.find(state.next);
        if (next == flow.made.end() || m_.program[next->second.call].phase != Phase::step) {
            throw malformed(where + ".next", "is " + show(state.next) + ", which no step call makes",
                            "an output of a step call");
        }
        const Value& carried = signature(state.tensor);
        if (const std::string* initial = std::get_if<std::string>(&state.initial)) {
            const ProvidedTensor* provided = m_.tensors.find(*initial);
            const auto maker = flow.made.find(*initial);
            const bool early =
                maker != flow.made.end() && (m_.program[maker->second.call].phase == Phase::load ||
                                             m_.program[maker->second.call].phase == Phase::request);
            if (provided ? provided->changes() : !early) {
                throw malformed(where + ".initial",
                                "is " + show(*initial) + ", which does not exist before the steps",
                                "a tensor made in the request or load phase, or provided");
            }
            agree(where + ".initial", signature(*initial), carried);
        } else {
            const Dims& zeros = std::get<Zeros>(state.initial).zeros;
            shape(where + ".initial.zeros", zeros);
            agree(where + ".initial", {state.tensor, carried.dtype, zeros}, carried);
        }
        agree(where + ".next", *next->second.value, carried);
    }
}

void Validator::results(const Flow& flow) const {
    if (!m_.results.image && m_.results.deltas.empty() && m_.results.outputs.empty()) {
        throw malformed("results", "is empty", "an `image`, `deltas` or `outputs`");
    }
    if (m_.results.image) {
        known("results.image", *m_.results.image, flow.made, "made by a call");
        const Value& value = signature(*m_.results.image);
        if (value.dtype != Dtype::uint8 || value.shape.size() != 4 || !is_axis(value.shape[0], "batch") ||
            value.shape[3] != Dim{3, ""}) {
            throw malformed("results.image", "is " + written(value.dtype, value.shape),
                            "uint8 [batch, height, width, 3]");
        }
    }
    for (std::size_t i = 0; i < m_.results.deltas.size(); ++i) {
        const std::string& result = m_.results.deltas[i];
        const std::string key = at("results.deltas", i);
        known(key, result, flow.made, "made by a call");
        const std::string_view tail =
            std::string_view(result).substr(result.size() - std::min<std::size_t>(7, result.size()));
        const Value& value = signature(result);
        if (m_.deltas) {
            known(key, result, m_.deltas->tensors, "in `deltas`");
        } else if (tail != ".lora_A" && tail != ".lora_B") {
            throw malformed(key, "is " + show(result), "a name that ends in `.lora_A` or `.lora_B`");
        } else if (value.dtype != Dtype::float32 || value.shape.size() < 3) {
            throw malformed(key, "is " + written(value.dtype, value.shape), "float32 with at least 3 axes");
        }
    }
    std::set<std::string> seen;
    for (std::size_t i = 0; i < m_.results.outputs.size(); ++i) {
        const std::string& result = m_.results.outputs[i];
        const std::string key = at("results.outputs", i);
        known(key, result, flow.made, "made by a call");
        if (!seen.insert(result).second) throw malformed(key, "repeats " + show(result), "each name once");
    }
}

void Validator::image() const {
    if (!m_.image) return;
    const ImagePolicy& policy = *m_.image;
    known("image.tensor", policy.tensor, m_.tensors, "a tensor that the runtime provides");
    if (m_.tensors.at(policy.tensor).source != TensorSource::image) {
        throw malformed("image.tensor", "is " + show(policy.tensor), "a tensor with source `image`");
    }
    if ((policy.min + policy.multiple - 1) / policy.multiple > policy.max / policy.multiple) {
        throw malformed("image",
                        "has no multiple of " + std::to_string(policy.multiple) + " from " +
                            std::to_string(policy.min) + " to " + std::to_string(policy.max),
                        "at least one size");
    }
    for (std::size_t i = 0; i < policy.sizes.size(); ++i) {
        const auto& [width, height] = policy.sizes[i];
        for (const std::int64_t side : policy.sizes[i]) {
            if (side % policy.multiple == 0 && side >= policy.min && side <= policy.max) continue;
            throw malformed(at("image.sizes", i),
                            "is [" + std::to_string(width) + ", " + std::to_string(height) + "]",
                            "multiples of " + std::to_string(policy.multiple) + " from " +
                                std::to_string(policy.min) + " to " + std::to_string(policy.max));
        }
    }
}

// The size of an array in bytes; saturates.
std::int64_t byte_size(const std::vector<std::int64_t>& shape, Dtype dtype) {
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    auto bytes = static_cast<std::int64_t>(item_size(dtype));
    for (const std::int64_t size : shape) {
        if (size > most / bytes) return most;
        bytes *= size;
    }
    return bytes;
}

void Validator::linked() const {
    Names graph_files;
    for (const auto& [name, graph] : m_.graphs) graph_files.insert(graph.file);
    for (const auto& [name, variant] : m_.variants) {
        for (const auto& [graph, file] : variant.graphs) graph_files.insert(file);
    }
    for (const auto& [graph_file, tensors] : m_.linked) {
        const std::string where = at("linked", graph_file);
        known("linked", graph_file, graph_files, "the file of a graph");
        for (const auto& [name, tensor] : tensors) {
            const std::string key = at(where, name);
            known(key + ".source", tensor.source, m_.sources, "a source id");
            const auto& files = m_.sources.at(tensor.source).files;
            known(key + ".file", tensor.file, files, "a file of source " + show(tensor.source));
            if (tensor.length != byte_size(tensor.shape, tensor.dtype)) {
                throw malformed(key + ".length", "is " + std::to_string(tensor.length),
                                "the size of " + str(core::name(tensor.dtype)) + " " + repr(tensor.shape));
            }
            if (tensor.offset + tensor.length > files.at(tensor.file).size) {
                throw malformed(key + ".offset",
                                "is " + std::to_string(tensor.offset) + ", which reads past the file's end",
                                "an offset within the file");
            }
        }
    }
}

void Validator::engines() const {
    for (const auto& [name, engine] : m_.engines) {
        const std::string where = at("engines", name);
        for (const auto& [axis, sizes] : engine.shapes) {
            const std::string key = at(where + ".shapes", axis);
            known(where + ".shapes", axis, m_.axes, "an axis");
            const Axis& limits = m_.axes.at(axis);
            if (!limits.min || !limits.max) {
                throw malformed(key, "is a derived axis", "an axis with limits of its own");
            }
            const bool fits = std::all_of(sizes.begin(), sizes.end(), [&](std::int64_t size) {
                return *limits.min <= size && size <= *limits.max && size % limits.multiple == 0;
            });
            if (!fits) {
                throw malformed(key, "is " + repr(std::vector<std::int64_t>(sizes.begin(), sizes.end())),
                                "multiples of " + std::to_string(limits.multiple) + " from " +
                                    std::to_string(*limits.min) + " to " + std::to_string(*limits.max));
            }
        }
    }
}

}  // namespace

void validate(Manifest& manifest) { Validator(manifest).run(); }

}  // namespace hywu::core
