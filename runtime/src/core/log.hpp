// What the library has to say besides its results. Silent unless a sink is set.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace hywu::core {

enum class LogLevel { debug, info, warning, off };

using LogSink = std::function<void(LogLevel, const std::string& message)>;

// Sends messages of at least `level` to `sink`, for the whole process; an empty sink is silence. When this
// returns, the former sink has been called for the last time. Not to be called from a sink.
void set_log_sink(LogSink sink, LogLevel level);

// Gives a message, one line of UTF-8, to the sink, in the calling thread and one at a time. What the sink
// throws is passed on; messages that arise within a sink are dropped.
void log(LogLevel level, const std::string& message);

// Whether a message of this level would be heard: where it takes work to write it.
bool logs(LogLevel level) noexcept;

}  // namespace hywu::core
