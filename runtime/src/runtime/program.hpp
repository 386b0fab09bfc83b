// Executes a manifest's program: calls, phases, carried state. It knows no model, and touches no number.
//
// make_plan decides what must run for the wanted tensors; Executor holds sessions and buffers and runs a
// plan.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "core/array.hpp"
#include "core/bundle.hpp"
#include "core/manifest.hpp"

namespace hywu::runtime {

using Axes = std::map<std::string, std::int64_t, std::less<>>;

// A dense, row-major array in host memory that somebody else holds.
struct View {
    core::Dtype dtype = core::Dtype::float32;
    core::Shape shape;
    const void* data = nullptr;

    View() = default;
    View(core::Dtype d, core::Shape s, const void* p) : dtype(d), shape(std::move(s)), data(p) {}
    explicit View(const core::Array& array) : View(array.dtype(), array.shape(), array.data()) {}
    std::size_t bytes() const { return core::count(shape) * core::item_size(dtype); }
};
using NamedViews = std::vector<std::pair<std::string, View>>;

// What runs for some wanted tensors, and what the caller must provide for it.
struct Plan {
    std::array<std::vector<std::size_t>, 4> calls;  // by phase, indices into the program
    std::set<std::string> provided;                 // tensors with a source that something reads
    std::set<std::string> absent;  // deltas that something reads, no call makes and the caller has not given
    std::set<std::string> given;
    bool guided = false;
    std::vector<std::string> wanted;

    const std::vector<std::size_t>& in(core::Phase phase) const {
        return calls[static_cast<std::size_t>(phase)];
    }
    bool operator==(const Plan& other) const;
};

// Works backwards from the wanted tensors, see "Graphs and program" in docs/bundle.md.
Plan make_plan(const core::Manifest& manifest, const std::vector<std::string>& wanted,
               const std::set<std::string>& given = {}, bool guided = false);

// A tensor with another value in every step: a function of the evaluation (0, 1, …) that gives its bytes,
// which stay as they are until it is called again. It allocates nothing.
struct StepInput {
    std::string name;
    std::function<const void*(std::size_t)> value;
};

// What a plan is run with.
struct Request {
    Axes axes;
    NamedViews values;  // everything the plan needs that does not change between steps
    std::vector<StepInput> per_step;
    std::size_t evaluations = 0;
    // Refused if the request phase makes a value of these that is not finite, where looking is free; where it
    // is not, what the steps made of them is looked at.
    std::vector<std::string> finite;
    std::function<void(std::size_t, std::size_t)> progress;  // evaluations done, and in all
    std::function<bool()> cancelled;
};

// Seconds of the last run.
struct Timings {
    std::vector<std::pair<std::string, double>>
        graphs;                 // by graph in the order of running, without the step phase
    std::vector<double> steps;  // by evaluation
    double load = 0, total = 0;
};

// The loaded graphs of a bundle, shared by its editors as long as one of them holds them. For several
// threads.
class SessionPool {
public:
    // Who may share: the same backend with the same options, and the same file.
    using Key = std::pair<std::string, std::filesystem::path>;
    using Load = std::function<std::shared_ptr<backends::Session>()>;

    // The graph, loaded by `load` unless somebody holds it; two that ask for one graph at once load it once.
    std::shared_ptr<backends::Session> get(const Key& key, const Load& load);
    // How many graphs are held.
    std::size_t size() const;

private:
    struct Entry {
        std::mutex mutex;
        std::weak_ptr<backends::Session> session;
    };
    mutable std::mutex mutex_;
    std::map<Key, std::shared_ptr<Entry>> entries_;
};

// Holds an editor's sessions and buffers. Not for several threads at once.
//
// Buffers and bindings stay as they are from request to request while the plan and the axes do; only their
// content goes.
class Executor {
public:
    struct Options {
        std::optional<std::string> variant;
        std::vector<std::string> engines;  // that a backend with a target may use, the newest first
        std::string sharing;      // the backend and its options in words: editors that agree share sessions
        bool low_memory = false;  // keep only the session that runs (in the step phase: those of the steps),
                                  // load anew each time
    };

    Executor(std::shared_ptr<const core::Bundle> bundle, std::shared_ptr<backends::Backend> backend,
             std::shared_ptr<SessionPool> pool, Options options);
    ~Executor();
    Executor(const Executor&) = delete;
    Executor& operator=(const Executor&) = delete;

    // Runs a plan and calls `result` with each wanted tensor, in their order. No data of the request is kept.
    // Throws Error(cancelled): `request.cancelled` said so; Error(bundle, engine, device): a graph cannot be
    // loaded or run; Error(delta): see Request::finite; Error(input): the size of an axis is not known, or no
    // engine takes it; and what callbacks throw.
    void run(const Plan& plan, const Request& request,
             const std::function<void(const std::string&, backends::DeviceTensor&)>& result);
    // Loads the graphs of a plan beforehand; does nothing in low-memory mode.
    void load(const Plan& plan);

    const Timings& timings() const noexcept { return timings_; }
    // Bytes of buffers, bytes of load-phase results, loaded graphs.
    std::size_t buffer_bytes() const;
    std::size_t constant_bytes() const;
    std::size_t session_count() const noexcept { return sessions_.size(); }

private:
    using DeviceTensor = backends::DeviceTensor;
    using Binding = backends::Binding;
    // The buffers of one name: its own; zeros, for an initial state; two that the steps write in turn, for a
    // carried tensor; one for what a call makes although the caller has given it; and where a state is read
    // by a backend that copies it.
    enum class Which { own, zeros, even, odd, spare, state };
    using Slot = std::pair<std::string, Which>;
    // Which buffers a call sees: where a state is read, and where its next value is written.
    struct Turn {
        Which read, write;
        bool operator<(const Turn& o) const { return read != o.read ? read < o.read : write < o.write; }
    };

    Turn first_turn() const;
    Turn step_turn(std::size_t evaluation) const;
    Turn last_turn(std::size_t evaluations) const;

    // Takes the engine that serves a plan at some sizes; another one's graphs and buffers go.
    void choose_engine(const Plan& plan, const Axes& axes);
    // Refuses generated values that are not finite; gives whether there are some that cannot be looked at.
    bool check_finite(const std::vector<std::string>& names);
    // Refuses carried values that are not finite; they are small, and a wrong delta shows in them.
    void check_result(const Plan& plan, Turn after);
    void run_load(const Plan& plan);
    void run_phase(const std::vector<std::size_t>& calls, const Request& request, Turn turn);
    void run_steps(const Plan& plan, const Request& request);
    // The states that something of the steps or after them reads.
    std::vector<const core::State*> carried(const Plan& plan) const;
    void start_states(const Plan& plan);
    void timed(std::size_t index, Binding& binding);
    // A call bound to a turn's buffers. In low-memory mode other sessions go first, unless `keep`.
    Binding& binding(std::size_t index, Turn turn, bool keep = false);
    // All calls of a step as one.
    Binding& step(const Plan& plan, Turn turn);
    backends::Session& session(const std::string& graph);
    std::shared_ptr<backends::Session> load_plan(const std::string& graph);
    // Drops the sessions of all other graphs, and the bindings that hold them.
    void keep_sessions(const std::set<std::string>& graphs);
    void release() noexcept;

    DeviceTensor& tensor(const std::string& name, Turn turn);  // where `name` is read
    Slot source(const std::string& name, Turn turn) const;
    Slot target(const std::string& name, Turn turn) const;  // where it is written
    DeviceTensor& buffer(const Slot& slot);

    const std::shared_ptr<const core::Bundle> bundle_;
    const core::Manifest& manifest_;
    const std::shared_ptr<backends::Backend> backend_;
    const std::shared_ptr<SessionPool> pool_;
    const Options options_;
    std::map<std::string, const core::State*> states_;
    std::set<std::string> nexts_;

    Timings timings_;
    std::string engine_;  // the one in use
    std::map<std::string, std::shared_ptr<backends::Session>> sessions_;
    using Made = std::map<std::string, std::unique_ptr<DeviceTensor>>;
    std::map<std::pair<std::size_t, std::int64_t>, Made> constants_;  // by load call and batch size
    std::map<std::string, DeviceTensor*> fixed_;                      // those of them that the plan reads
    std::map<Slot, std::unique_ptr<DeviceTensor>> buffers_;
    std::map<std::pair<std::size_t, Turn>, std::unique_ptr<Binding>> bindings_;
    std::map<Turn, std::unique_ptr<Binding>> steps_;
    std::unique_ptr<Binding> start_;
    std::optional<std::pair<Plan, Axes>> layout_;
};

// A tensor's shape with the sizes of its axes filled in. Throws Error(input): the size of an axis is not
// known.
core::Shape resolve_shape(const core::Manifest& manifest, const std::string& name, const Axes& axes);

// The size of every axis that a batch size and some tensors determine.
// Throws Error(input): an array does not have the tensor's dtype and shape, or an axis is outside its limits.
Axes resolve_axes(const core::Manifest& manifest, std::int64_t batch, const NamedViews& arrays);

// "[1, 64, 64, 3]"
std::string shape_text(const core::Shape& shape);
std::string shape_text(const core::Dims& shape);

}  // namespace hywu::runtime
