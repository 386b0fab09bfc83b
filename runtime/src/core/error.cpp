#include "core/error.hpp"

#include <utility>

namespace hywu::core {

namespace {

// The part as a sentence, as errors.py makes it: stripped, and with one full stop.
void append_sentence(std::string& text, std::string_view part) {
    if (part.empty()) return;
    constexpr std::string_view space = " \t\n\r\f\v";
    const std::size_t first = part.find_first_not_of(space);
    part = first == std::string_view::npos ? std::string_view()
                                           : part.substr(first, part.find_last_not_of(space) + 1 - first);
    while (!part.empty() && part.back() == '.') part.remove_suffix(1);
    if (!text.empty()) text += ' ';
    text.append(part).append(".");
}

}  // namespace

std::string_view name(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::bundle:
            return "BundleError";
        case ErrorKind::checkpoint:
            return "CheckpointError";
        case ErrorKind::unsupported:
            return "UnsupportedError";
        case ErrorKind::delta:
            return "DeltaError";
        case ErrorKind::engine:
            return "EngineError";
        case ErrorKind::device:
            return "DeviceError";
        case ErrorKind::input:
            return "InputError";
        case ErrorKind::cancelled:
            return "CancelledError";
    }
    return "HywuError";
}

Error::Error(ErrorKind kind, std::string wrong, std::string expected, std::string remedy)
    : kind_(kind), wrong_(std::move(wrong)), expected_(std::move(expected)), remedy_(std::move(remedy)) {
    append_sentence(text_, wrong_);
    append_sentence(text_, expected_);
    append_sentence(text_, remedy_);
}

}  // namespace hywu::core
