#include "runtime/program.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/engines.hpp"
#include "core/error.hpp"

namespace hywu::runtime {

using core::Error;
using core::ErrorKind;
using core::Phase;
using core::show;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

void check_cancelled(const Request& request) {
    if (request.cancelled && request.cancelled())
        throw Error(ErrorKind::cancelled, "The request was cancelled");
}

Error mismatch(const std::string& name, const View& array, const core::Value& signature) {
    return Error(ErrorKind::input,
                 "Tensor " + show(name) + " is " + std::string(core::name(array.dtype)) + " " +
                     shape_text(array.shape),
                 "Expected " + std::string(core::name(signature.dtype)) + " " + shape_text(signature.shape) +
                     ", one size for an axis",
                 "Correct the array");
}

}  // namespace

std::string shape_text(const core::Shape& shape) {
    std::string text = "[";
    for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

std::string shape_text(const core::Dims& shape) {
    std::string text = "[";
    for (const core::Dim& dim : shape) {
        text += (text.size() > 1 ? ", " : "") + (dim.symbolic() ? dim.axis : std::to_string(dim.size));
    }
    return text + "]";
}

bool Plan::operator==(const Plan& other) const {
    return calls == other.calls && provided == other.provided && absent == other.absent &&
           given == other.given && guided == other.guided && wanted == other.wanted;
}

Plan make_plan(const core::Manifest& manifest, const std::vector<std::string>& wanted,
               const std::set<std::string>& given, bool guided) {
    std::map<std::string, std::size_t> makers;
    for (std::size_t i = 0; i < manifest.program.size(); ++i) {
        const core::Call& call = manifest.program[i];
        if (!call.runs(guided)) continue;
        for (const auto& [port, name] : manifest.writes(call)) makers[name] = i;
    }
    std::map<std::string_view, const core::State*> states;
    for (const core::State& state : manifest.state) states[state.tensor] = &state;

    Plan plan;
    std::set<std::size_t> needed;
    std::set<std::string> seen;
    std::vector<std::string> todo = wanted;
    while (!todo.empty()) {
        const std::string name = std::move(todo.back());
        todo.pop_back();
        if (given.count(name) || !seen.insert(name).second) continue;
        if (const auto state = states.find(name); state != states.end()) {
            todo.push_back(state->second->next);
            if (const auto* initial = std::get_if<std::string>(&state->second->initial))
                todo.push_back(*initial);
        } else if (manifest.tensors.contains(name)) {
            plan.provided.insert(name);
        } else if (const auto maker = makers.find(name); maker != makers.end()) {
            if (needed.insert(maker->second).second) {
                for (const auto& [port, read] : manifest.reads(manifest.program[maker->second]))
                    todo.push_back(read);
            }
        } else {
            plan.absent.insert(name);
        }
    }
    for (const std::size_t i : needed)
        plan.calls[static_cast<std::size_t>(manifest.program[i].phase)].push_back(i);
    plan.given = given;
    plan.guided = guided;
    plan.wanted = wanted;
    return plan;
}

std::shared_ptr<backends::Session> SessionPool::get(const Key& key, const Load& load) {
    std::shared_ptr<Entry> entry;
    {
        const std::lock_guard lock(mutex_);
        std::shared_ptr<Entry>& found = entries_[key];
        if (!found) found = std::make_shared<Entry>();
        entry = found;
    }
    const std::lock_guard lock(entry->mutex);
    std::shared_ptr<backends::Session> session = entry->session.lock();
    if (!session) entry->session = session = load();
    return session;
}

std::size_t SessionPool::size() const {
    std::vector<std::shared_ptr<Entry>> entries;
    {
        const std::lock_guard lock(mutex_);
        for (const auto& [key, entry] : entries_) entries.push_back(entry);
    }
    std::size_t held = 0;
    for (const auto& entry : entries) {
        const std::lock_guard lock(entry->mutex);
        held += entry->session.expired() ? 0 : 1;
    }
    return held;
}

Executor::Executor(std::shared_ptr<const core::Bundle> bundle, std::shared_ptr<backends::Backend> backend,
                   std::shared_ptr<SessionPool> pool, Options options)
    : bundle_(std::move(bundle)),
      manifest_(bundle_->manifest()),
      backend_(std::move(backend)),
      pool_(std::move(pool)),
      options_(std::move(options)) {
    for (const core::State& state : manifest_.state) {
        states_[state.tensor] = &state;
        nexts_.insert(state.next);
    }
}

Executor::~Executor() { release(); }

void Executor::run(const Plan& plan, const Request& request,
                   const std::function<void(const std::string&, DeviceTensor&)>& result) {
    const Clock::time_point start = Clock::now();
    timings_ = {};
    choose_engine(plan, request.axes);
    if (!layout_ || !(layout_->first == plan) || layout_->second != request.axes) {
        release();
        layout_ = {plan, request.axes};
    }
    try {
        for (const auto& [name, view] : request.values) {
            buffer({name, Which::own}).write(view.data, view.bytes());
        }
        run_load(plan);
        run_phase(plan.in(Phase::request), request, first_turn());
        const bool unseen = check_finite(request.finite);
        run_steps(plan, request);
        const Turn last = last_turn(request.evaluations);
        run_phase(plan.in(Phase::final), request, last);
        if (unseen) check_result(plan, last);
        for (const std::string& name : plan.wanted) result(name, tensor(name, last));
        for (const auto& [slot, held] : buffers_) held->wipe();
    } catch (...) {
        release();
        if (options_.low_memory) keep_sessions({});
        timings_.total = seconds_since(start);
        throw;
    }
    if (options_.low_memory) keep_sessions({});
    timings_.total = seconds_since(start);
}

void Executor::load(const Plan& plan) {
    if (options_.low_memory) return;
    choose_engine(plan, {});
    for (const auto& calls : plan.calls) {
        for (const std::size_t i : calls) session(manifest_.program[i].graph);
    }
}

std::size_t Executor::buffer_bytes() const {
    std::size_t total = 0;
    for (const auto& [slot, held] : buffers_) total += held->bytes();
    return total;
}

std::size_t Executor::constant_bytes() const {
    std::size_t total = 0;
    for (const auto& [key, made] : constants_) {
        for (const auto& [name, held] : made) total += held->bytes();
    }
    return total;
}

void Executor::release() noexcept {
    start_.reset();
    steps_.clear();
    bindings_.clear();
    buffers_.clear();
    fixed_.clear();
    layout_.reset();
}

Executor::Turn Executor::first_turn() const {
    return backend_->copies_state() ? Turn{Which::state, Which::even} : Turn{Which::own, Which::even};
}

Executor::Turn Executor::step_turn(std::size_t evaluation) const {
    if (backend_->copies_state() || evaluation == 0) return first_turn();
    return evaluation % 2 ? Turn{Which::even, Which::odd} : Turn{Which::odd, Which::even};
}

Executor::Turn Executor::last_turn(std::size_t evaluations) const {
    if (backend_->copies_state()) return first_turn();
    return evaluations % 2 ? Turn{Which::even, Which::even} : Turn{Which::odd, Which::odd};
}

void Executor::choose_engine(const Plan& plan, const Axes& axes) {
    const std::optional<core::Target> target = backend_->target();
    if (!target) return;
    std::set<std::string> graphs;
    for (const auto& calls : plan.calls) {
        for (const std::size_t i : calls) graphs.insert(manifest_.program[i].graph);
    }
    std::string key = core::covering(bundle_->root(), manifest_, options_.engines, axes, graphs, *target);
    if (key == engine_) return;
    release();
    sessions_.clear();
    constants_.clear();
    engine_ = std::move(key);
}

bool Executor::check_finite(const std::vector<std::string>& names) {
    bool unseen = false;
    for (const std::string& name : names) {
        const std::optional<bool> finite = tensor(name, first_turn()).finite();
        if (!finite) unseen = true;
        if (finite == false) {
            throw Error(ErrorKind::delta,
                        "The generator made values of " + show(name, 200) + " that are not finite",
                        "Expected finite numbers", "Check the bundle and the request's inputs");
        }
    }
    return unseen;
}

void Executor::check_result(const Plan& plan, Turn after) {
    std::set<std::string> names(plan.wanted.begin(), plan.wanted.end());
    for (const std::size_t i : plan.in(Phase::final)) {
        for (const auto& [port, name] : manifest_.reads(manifest_.program[i])) {
            if (states_.count(name)) names.insert(name);
        }
    }
    for (const std::string& name : names) {
        DeviceTensor& held = tensor(name, after);
        if (held.dtype() != core::Dtype::float32 && held.dtype() != core::Dtype::float16) continue;
        core::Array values(held.dtype(), held.shape());
        held.read(values.data(), values.bytes());
        if (core::all_finite(values.dtype(), values.data(), values.bytes())) continue;
        throw Error(ErrorKind::delta, "The steps made values of " + show(name, 200) + " that are not finite",
                    "Expected finite numbers: the generated deltas are not, or the graphs overflow with them",
                    "Look at `hywu deltas generate`, or use another variant");
    }
}

void Executor::run_load(const Plan& plan) {
    const std::int64_t batch = layout_->second.at("batch");
    fixed_.clear();
    std::set<std::string> of_request = plan.given;  // the caller's tensors, and what is made from them
    for (const std::size_t i : plan.in(Phase::load)) {
        const core::Call& call = manifest_.program[i];
        const auto reads = manifest_.reads(call);
        const auto writes = manifest_.writes(call);
        if (std::any_of(reads.begin(), reads.end(),
                        [&](const auto& read) { return of_request.count(read.second) != 0; })) {
            timed(i, binding(i, first_turn()));  // as in the request phase: nothing of it is kept
            for (const auto& [port, name] : writes) of_request.insert(name);
            continue;
        }
        auto made = constants_.find({i, batch});
        if (made == constants_.end()) {
            timed(i, binding(i, first_turn()));
            Made outputs;
            for (const auto& [port, name] : writes) {
                auto held = buffers_.extract(target(name, first_turn()));
                outputs[name] = std::move(held.mapped());
            }
            bindings_.erase({i, first_turn()});
            made = constants_.emplace(std::make_pair(i, batch), std::move(outputs)).first;
        }
        for (const auto& [name, held] : made->second) {
            if (!plan.given.count(name)) fixed_[name] = held.get();
        }
    }
}

void Executor::run_phase(const std::vector<std::size_t>& calls, const Request& request, Turn turn) {
    for (const std::size_t i : calls) {
        check_cancelled(request);
        timed(i, binding(i, turn));
    }
}

void Executor::run_steps(const Plan& plan, const Request& request) {
    const std::vector<std::size_t>& calls = plan.in(Phase::step);
    if (calls.empty()) return;
    if (options_.low_memory) {
        std::set<std::string> graphs;
        for (const std::size_t i : calls) graphs.insert(manifest_.program[i].graph);
        keep_sessions(graphs);
    }
    std::vector<std::pair<DeviceTensor*, const StepInput*>> inputs;
    for (const StepInput& input : request.per_step) {
        inputs.emplace_back(&buffer({input.name, Which::own}), &input);
    }
    timings_.steps.reserve(request.evaluations);
    if (backend_->copies_state()) start_states(plan);
    for (std::size_t k = 0; k < request.evaluations;
         ++k) {  // allocates nothing once all turns have been taken
        check_cancelled(request);
        Binding& unit = step(plan, step_turn(k));
        const Clock::time_point start = Clock::now();
        for (const auto& [held, input] : inputs) held->write(input->value(k), held->bytes());
        unit.run();
        timings_.steps.push_back(seconds_since(start));
        if (request.progress) request.progress(k + 1, request.evaluations);
    }
}

std::vector<const core::State*> Executor::carried(const Plan& plan) const {
    std::set<std::string> read(plan.wanted.begin(), plan.wanted.end());
    for (const Phase phase : {Phase::step, Phase::final}) {
        for (const std::size_t i : plan.in(phase)) {
            for (const auto& [port, name] : manifest_.reads(manifest_.program[i])) read.insert(name);
        }
    }
    std::vector<const core::State*> states;
    for (const core::State& state : manifest_.state) {
        if (read.count(state.tensor)) states.push_back(&state);
    }
    return states;
}

// Where a backend copies states: the first values.
void Executor::start_states(const Plan& plan) {
    std::vector<std::pair<DeviceTensor*, DeviceTensor*>> copies;
    for (const core::State* state : carried(plan)) {
        DeviceTensor& held = tensor(state->tensor, first_turn());
        if (const auto* initial = std::get_if<std::string>(&state->initial)) {
            copies.emplace_back(&tensor(*initial, first_turn()), &held);
        } else {
            held.wipe();
        }
    }
    if (!start_) start_ = backend_->sequence({}, copies);
    start_->run();
}

Executor::Binding& Executor::step(const Plan& plan, Turn turn) {
    std::unique_ptr<Binding>& unit = steps_[turn];
    if (!unit) {
        std::vector<Binding*> parts;
        for (const std::size_t i : plan.in(Phase::step)) parts.push_back(&binding(i, turn, true));
        std::vector<std::pair<DeviceTensor*, DeviceTensor*>> copies;
        if (backend_->copies_state()) {
            for (const core::State* state : carried(plan))
                copies.emplace_back(&tensor(state->next, turn), &tensor(state->tensor, turn));
        }
        unit = backend_->sequence(std::move(parts), std::move(copies));
    }
    return *unit;
}

void Executor::timed(std::size_t index, Binding& binding) {
    const std::string& graph = manifest_.program[index].graph;
    const Clock::time_point start = Clock::now();
    binding.run();
    const double seconds = seconds_since(start);
    for (auto& [name, total] : timings_.graphs) {
        if (name == graph) {
            total += seconds;
            return;
        }
    }
    timings_.graphs.emplace_back(graph, seconds);
}

Executor::Binding& Executor::binding(std::size_t index, Turn turn, bool keep) {
    if (const auto found = bindings_.find({index, turn}); found != bindings_.end()) return *found->second;
    const core::Call& call = manifest_.program[index];
    if (options_.low_memory && !keep) keep_sessions({call.graph});
    backends::Session& graph = session(call.graph);
    backends::TensorMap inputs, outputs;
    for (const auto& [port, name] : manifest_.reads(call)) inputs[port] = &tensor(name, turn);
    for (const auto& [port, name] : manifest_.writes(call)) outputs[port] = &buffer(target(name, turn));
    return *bindings_.emplace(std::make_pair(index, turn), graph.bind(inputs, outputs)).first->second;
}

backends::Session& Executor::session(const std::string& graph) {
    if (const auto found = sessions_.find(graph); found != sessions_.end()) return *found->second;
    const Clock::time_point start = Clock::now();
    std::shared_ptr<backends::Session> loaded;
    if (!engine_.empty()) {
        loaded = load_plan(graph);
    } else {
        const std::string path = bundle_->graph_file(graph, options_.variant);
        const std::filesystem::path file = bundle_->file(path);
        loaded = pool_->get({options_.sharing, file}, [&] {
            return backend_->load_stage(file, bundle_->initializers(path), manifest_.graphs.at(graph).stage);
        });
    }
    backends::Session& held = *sessions_.emplace(graph, std::move(loaded)).first->second;
    timings_.load += seconds_since(start);
    return held;
}

std::shared_ptr<backends::Session> Executor::load_plan(const std::string& graph) {
    const core::Engine& engine = manifest_.engines.at(engine_);
    const std::string& path = engine.graphs.at(graph);
    try {
        bundle_->check(path);
        const std::filesystem::path file = bundle_->file(path);
        return pool_->get({options_.sharing, file}, [&] { return backend_->load(file, {}); });
    } catch (const Error& error) {
        if (error.kind() != ErrorKind::bundle && error.kind() != ErrorKind::engine) throw;
        const std::string command = core::build_command(bundle_->root(), manifest_, *backend_->target(),
                                                        engine.variant, engine.shapes);
        throw Error(ErrorKind::engine, error.wrong(), error.expected(),
                    "Build it again: " + command + " --rebuild");
    }
}

void Executor::keep_sessions(const std::set<std::string>& graphs) {
    const bool others = std::any_of(sessions_.begin(), sessions_.end(),
                                    [&](const auto& entry) { return graphs.count(entry.first) == 0; });
    if (!others) return;
    start_.reset();
    steps_.clear();
    bindings_.clear();
    for (auto it = sessions_.begin(); it != sessions_.end();) {
        it = graphs.count(it->first) ? std::next(it) : sessions_.erase(it);
    }
}

Executor::DeviceTensor& Executor::tensor(const std::string& name, Turn turn) {
    const Slot slot = source(name, turn);
    if (slot.second == Which::own) {
        if (const auto found = fixed_.find(slot.first); found != fixed_.end()) return *found->second;
    }
    return buffer(slot);
}

Executor::Slot Executor::source(const std::string& name, Turn turn) const {
    if (const auto found = states_.find(name); found != states_.end()) {
        const core::State& state = *found->second;
        if (turn.read == Which::state) return {name, Which::state};
        if (turn.read != Which::own) return {state.next, turn.read};
        if (const auto* initial = std::get_if<std::string>(&state.initial)) return {*initial, Which::own};
        return {name, Which::zeros};
    }
    return {name, nexts_.count(name) ? turn.write : Which::own};
}

Executor::Slot Executor::target(const std::string& name, Turn turn) const {
    if (layout_ && layout_->first.given.count(name)) return {name, Which::spare};
    return {name, nexts_.count(name) ? turn.write : Which::own};
}

Executor::DeviceTensor& Executor::buffer(const Slot& slot) {
    if (const auto found = buffers_.find(slot); found != buffers_.end()) return *found->second;
    const core::Shape shape = resolve_shape(manifest_, slot.first, layout_->second);
    const core::Dtype dtype = manifest_.signatures.at(slot.first).dtype;
    return *buffers_.emplace(slot, backend_->allocate(dtype, shape)).first->second;
}

core::Shape resolve_shape(const core::Manifest& manifest, const std::string& name, const Axes& axes) {
    core::Shape shape;
    for (const core::Dim& dim : manifest.signatures.at(name).shape) {
        const auto axis = dim.symbolic() ? axes.find(dim.axis) : axes.end();
        if (dim.symbolic() && axis == axes.end()) {
            throw Error(ErrorKind::input,
                        "The size of axis " + show(dim.axis) + " of tensor " + show(name) + " is not known",
                        "Expected it from an image or from a given tensor",
                        "Give a tensor that has this axis");
        }
        shape.push_back(dim.symbolic() ? axis->second : dim.size);
    }
    return shape;
}

Axes resolve_axes(const core::Manifest& manifest, std::int64_t batch, const NamedViews& arrays) {
    std::vector<std::pair<std::string, std::int64_t>> sizes = {{"batch", batch}};  // in the order of finding
    const auto size_of = [&](const std::string& name) -> std::int64_t* {
        for (auto& [known, size] : sizes) {
            if (known == name) return &size;
        }
        return nullptr;
    };
    for (const auto& [name, array] : arrays) {
        const core::Value& signature = manifest.signatures.find(name)->second;
        if (array.dtype != signature.dtype || array.shape.size() != signature.shape.size()) {
            throw mismatch(name, array, signature);
        }
        for (std::size_t i = 0; i < array.shape.size(); ++i) {
            const core::Dim& dim = signature.shape[i];
            std::int64_t size = array.shape[i];
            if (!dim.symbolic()) {
                if (size != dim.size) throw mismatch(name, array, signature);
                continue;
            }
            std::string base = dim.axis;
            if (const core::Axis* axis = manifest.axes.find(base); axis && !axis->sum.empty())
                continue;  // compared when all sizes are known
            if (const core::Axis* axis = manifest.axes.find(base); axis && axis->of) {
                const std::int64_t factor = axis->divide.value_or(1);
                if (size > core::max_dimension || factor > core::max_dimension)
                    throw mismatch(name, array, signature);
                base = *axis->of;
                size *= factor;
            }
            if (const std::int64_t* known = size_of(base)) {
                if (*known != size) throw mismatch(name, array, signature);
            } else {
                sizes.emplace_back(base, size);
            }
        }
    }
    for (const auto& [name, axis] : manifest.axes) {
        if (axis.one_or && !size_of(name)) {
            if (const std::int64_t* other = size_of(*axis.one_or)) sizes.emplace_back(name, *other);
        }
    }
    for (const auto& [name, size] : sizes) {
        const core::Axis* axis = manifest.axes.find(name);
        if (axis == nullptr || axis->derived()) continue;
        const std::int64_t low = axis->min.value_or(1), high = axis->max.value_or(1);
        if (size < low || size > high || size % axis->multiple != 0) {
            const std::string multiples =
                axis->multiple > 1 ? " that are multiples of " + std::to_string(axis->multiple) : "";
            throw Error(
                ErrorKind::input, "Axis " + name + " has size " + std::to_string(size),
                "This bundle takes " + std::to_string(low) + " to " + std::to_string(high) + multiples,
                "Choose a size within these limits");
        }
        if (axis->one_or) {
            const std::int64_t* other = size_of(*axis->one_or);
            if (size != 1 && other && size != *other) {
                throw Error(ErrorKind::input, "Axis " + name + " has size " + std::to_string(size),
                            "Expected 1 or the size of " + *axis->one_or + ", " + std::to_string(*other),
                            "Give one set for all samples, or one for each");
            }
        }
    }
    for (const auto& [name, axis] : manifest.axes) {
        const std::optional<std::int64_t> size = axis.derived() ? axis.size(size_of) : std::nullopt;
        if (!size) continue;
        if (std::int64_t* own = size_of(name)) {
            *own = *size;
        } else {
            sizes.emplace_back(name, *size);
        }
    }
    for (const auto& [name, array] : arrays) {
        const core::Value& signature = manifest.signatures.find(name)->second;
        for (std::size_t i = 0; i < array.shape.size(); ++i) {
            const core::Dim& dim = signature.shape[i];
            const std::int64_t* size = dim.symbolic() ? size_of(dim.axis) : nullptr;
            if (size && *size != array.shape[i]) throw mismatch(name, array, signature);
        }
    }
    Axes axes;
    for (const auto& [name, size] : sizes) axes.emplace(name, size);
    return axes;
}

}  // namespace hywu::runtime
