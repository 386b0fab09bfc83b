// What people see while a command works, and what it used.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#if defined(_WIN32)
#include <io.h>
#else
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace hywu::tools {

// A bar on stderr if that is a terminal; nothing otherwise.
class ProgressBar {
public:
    ProgressBar() {
#if defined(_WIN32)
        visible_ = _isatty(_fileno(stderr)) != 0;
#else
        visible_ = isatty(STDERR_FILENO) != 0;
#endif
    }
    ~ProgressBar() { clear(); }
    void show(std::int32_t done, std::int32_t total) {
        if (!visible_ || total < 1) return;
        const int width = 30, filled = width * done / total;
        std::fprintf(stderr, "\r  [%s%s]  step %d of %d",
                     std::string(static_cast<std::size_t>(filled), '#').c_str(),
                     std::string(static_cast<std::size_t>(width - filled), '-').c_str(), done, total);
        drawn_ = true;
    }
    void clear() {
        if (drawn_) std::fprintf(stderr, "\r%60s\r", "");
        drawn_ = false;
    }

private:
    bool visible_ = false, drawn_ = false;
};

// Seconds for people: "0.42 s", "12.3 s", "3 min 05 s".
inline std::string time_text(double seconds) {
    char text[64];
    if (seconds >= 60) {
        std::snprintf(text, sizeof text, "%d min %02d s", static_cast<int>(seconds) / 60,
                      static_cast<int>(seconds) % 60);
    } else {
        std::snprintf(text, sizeof text, seconds < 10 ? "%.2f s" : "%.1f s", seconds);
    }
    return text;
}

// The largest resident memory of this process so far, in bytes; 0 where it cannot be found out.
inline std::uint64_t peak_memory() {
#if defined(_WIN32)
    return 0;
#else
    rusage usage = {};
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#if defined(__APPLE__)
    return static_cast<std::uint64_t>(usage.ru_maxrss);
#else
    return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
#endif
#endif
}

}  // namespace hywu::tools
