#include "core/log.hpp"

#include <atomic>
#include <mutex>
#include <utility>

namespace hywu::core {
namespace {

struct State {
    std::mutex mutex;
    LogSink sink;
    std::atomic<LogLevel> level{LogLevel::off};
};

State& state() {
    static auto* const instance = new State;  // never destroyed: other threads may log while the process ends
    return *instance;
}

}  // namespace

void set_log_sink(LogSink sink, LogLevel level) {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    s.level = sink ? level : LogLevel::off;
    s.sink = std::move(sink);
}

bool logs(LogLevel level) noexcept { return level >= state().level.load(std::memory_order_relaxed); }

void log(LogLevel level, const std::string& message) {
    if (!logs(level)) return;
    static thread_local bool inside = false;  // what a sink itself makes the library say is not heard
    if (inside) return;
    State& s = state();
    const std::lock_guard lock(s.mutex);
    if (!s.sink || level < s.level) return;
    struct Inside {
        Inside() { inside = true; }
        ~Inside() { inside = false; }
    } const guard;
    s.sink(level, message);
}

}  // namespace hywu::core
