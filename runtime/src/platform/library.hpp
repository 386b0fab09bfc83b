// Shared libraries that are opened at run time: those of the backends, which may be absent.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hywu::platform {

// An opened shared library. It stays loaded for the life of the process: backends start threads and register
// handlers that must not lose their code.
class Library {
public:
    // The first of `names` that opens. A name without a directory is looked for beside this library first,
    // then by the rules of the system (LD_LIBRARY_PATH, the linker's cache; the DLL search order). Nothing
    // opens: none, and `*why` says what was tried, with the system's reasons.
    static std::optional<Library> open(const std::vector<std::string>& names, std::string* why);

    // The address of a function; nullptr if the library has none of this name.
    template <class Function>
    Function* function(const char* symbol) const {
        return reinterpret_cast<Function*>(address(symbol));
    }

    // The file that was opened, for messages.
    const std::string& name() const noexcept { return name_; }

private:
    Library(void* handle, std::string name) : handle_(handle), name_(std::move(name)) {}
    void* address(const char* symbol) const;

    void* handle_;
    std::string name_;
};

// The directory of the file that this code is in: the shared library, or an executable with the same objects.
// Empty if it cannot be found out.
std::filesystem::path own_directory();

// An environment variable as UTF-8; nothing if it is not set or empty.
std::optional<std::string> environment(const char* variable);

}  // namespace hywu::platform
