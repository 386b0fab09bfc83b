#include "api/errors.hpp"

#include <utility>

namespace hywu::api {
namespace {

struct Kept {
    hywu_status status = HYWU_OK;
    bool constant = true;  // whether the texts below are literals, because there was no memory for others
    const char *wrong_literal = "", *expected_literal = "", *remedy_literal = "";
    std::string text, wrong, expected, remedy;
};

Kept& kept() noexcept {
    static thread_local Kept instance;
    return instance;
}

hywu_status status_of(core::ErrorKind kind) noexcept {
    switch (kind) {
        case core::ErrorKind::bundle:
            return HYWU_ERROR_BUNDLE;
        case core::ErrorKind::checkpoint:
            return HYWU_ERROR_CHECKPOINT;
        case core::ErrorKind::unsupported:
            return HYWU_ERROR_UNSUPPORTED;
        case core::ErrorKind::delta:
            return HYWU_ERROR_DELTA;
        case core::ErrorKind::engine:
            return HYWU_ERROR_ENGINE;
        case core::ErrorKind::device:
            return HYWU_ERROR_DEVICE;
        case core::ErrorKind::input:
            return HYWU_ERROR_INPUT;
        case core::ErrorKind::cancelled:
            return HYWU_ERROR_CANCELLED;
    }
    return HYWU_ERROR_INTERNAL;
}

hywu_status out_of_memory() noexcept {
    Kept& k = kept();
    k.status = HYWU_ERROR_MEMORY;
    k.constant = true;
    k.wrong_literal = "Memory ran out";
    k.expected_literal = "Expected the request to fit";
    k.remedy_literal = "Use a smaller size or batch, or low_memory=True";
    return k.status;
}

}  // namespace

LastError last_error() noexcept {
    const Kept& k = kept();
    if (!k.constant) return {k.status, k.text.c_str(), k.wrong.c_str(), k.expected.c_str(), k.remedy.c_str()};
    const char* const text =
        k.status == HYWU_OK
            ? ""
            : "Memory ran out. Expected the request to fit. Use a smaller size or batch, or low_memory=True.";
    return {k.status, text, k.wrong_literal, k.expected_literal, k.remedy_literal};
}

hywu_status keep(hywu_status status, const char* wrong, const char* expected, const char* remedy) noexcept {
    try {
        const core::Error error(core::ErrorKind::input, wrong, expected, remedy);
        keep(error);
        return kept().status = status;
    } catch (...) {
        return out_of_memory();
    }
}

hywu_status keep(const core::Error& error) noexcept {
    Kept& k = kept();
    try {
        k.text = error.what();
        k.wrong = error.wrong();
        k.expected = error.expected();
        k.remedy = error.remedy();
    } catch (...) {
        return out_of_memory();
    }
    k.constant = false;
    return k.status = status_of(error.kind());
}

hywu_status keep_current() noexcept {
    try {
        throw;
    } catch (const core::Error& error) {
        return keep(error);
    } catch (const CallbackError& error) {
        try {
            const std::string wrong =
                std::string("The ") + error.callback + " callback threw a C++ exception";
            return keep(HYWU_ERROR_CALLBACK, wrong.c_str(), "Expected it to return",
                        "Catch exceptions in the callback");
        } catch (...) {
            return out_of_memory();
        }
    } catch (const std::bad_alloc&) {
        return out_of_memory();
    } catch (const std::exception& error) {
        return keep(HYWU_ERROR_INTERNAL, error.what(), "Expected no such failure",
                    "Report it with what led to it");
    } catch (...) {
        return keep(HYWU_ERROR_INTERNAL, "An unknown exception was thrown", "Expected no such failure",
                    "Report it with what led to it");
    }
}

core::Error input_error(std::string wrong, std::string expected, std::string remedy) {
    return core::Error(core::ErrorKind::input, std::move(wrong), std::move(expected), std::move(remedy));
}

void need(const void* pointer, const char* what) {
    if (pointer == nullptr)
        throw input_error(std::string("`") + what + "` is NULL", "Expected a pointer", "Pass one");
}

}  // namespace hywu::api
