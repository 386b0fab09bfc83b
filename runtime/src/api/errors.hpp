// From exceptions to statuses: nothing is thrown across the C ABI.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "core/error.hpp"
#include "hywu/hywu.h"

namespace hywu::api {

// A callback of the caller's threw.
struct CallbackError : std::exception {
    explicit CallbackError(const char* which) : callback(which) {}
    const char* what() const noexcept override { return "a callback threw an exception"; }
    const char* callback;
};

// What the last failing call in this thread said.
struct LastError {
    hywu_status status = HYWU_OK;
    const char *text, *wrong, *expected, *remedy;
};
LastError last_error() noexcept;

hywu_status keep(const core::Error& error) noexcept;
hywu_status keep(hywu_status status, const char* wrong, const char* expected, const char* remedy) noexcept;
// Keeps the exception that is being handled. To be called in a catch block.
hywu_status keep_current() noexcept;

// Runs a function; its exception becomes a status.
template <class Function>
hywu_status guard(Function&& function) noexcept {
    try {
        function();
        return HYWU_OK;
    } catch (...) {
        return keep_current();
    }
}

core::Error input_error(std::string wrong, std::string expected, std::string remedy);
// Throws Error(input) for NULL.
void need(const void* pointer, const char* what);

}  // namespace hywu::api
