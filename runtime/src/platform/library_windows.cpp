#include <windows.h>

#include "platform/library.hpp"

namespace hywu::platform {
namespace {

std::string message_of(DWORD code) { return "error " + std::to_string(code); }

}  // namespace

std::optional<Library> Library::open(const std::vector<std::string>& names, std::string* why) {
    std::string tried;
    const std::filesystem::path beside = own_directory();
    for (const std::string& name : names) {
        const std::filesystem::path plain = std::filesystem::u8path(name);
        std::vector<std::filesystem::path> candidates = {plain};
        if (!plain.has_parent_path() && !beside.empty())
            candidates.insert(candidates.begin(), beside / plain);
        for (const std::filesystem::path& candidate : candidates) {
            const DWORD flags = candidate.is_absolute() ? LOAD_WITH_ALTERED_SEARCH_PATH : 0;
            if (HMODULE handle = LoadLibraryExW(candidate.c_str(), nullptr, flags))
                return Library(reinterpret_cast<void*>(handle), candidate.u8string());
            tried += (tried.empty() ? "" : "; ") + candidate.u8string() + ": " + message_of(GetLastError());
        }
    }
    if (why != nullptr) *why = tried;
    return std::nullopt;
}

void* Library::address(const char* symbol) const {
    return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle_), symbol));
}

std::filesystem::path own_directory() {
    HMODULE module = nullptr;
    if (!GetModuleHandleExW(
            GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
            reinterpret_cast<LPCWSTR>(&own_directory), &module))
        return {};
    std::wstring file(32768, L'\0');
    file.resize(GetModuleFileNameW(module, file.data(), static_cast<DWORD>(file.size())));
    return std::filesystem::path(file).parent_path();
}

std::optional<std::string> environment(const char* variable) {
    const std::wstring wide = std::filesystem::u8path(variable).wstring();
    std::wstring value(32768, L'\0');
    value.resize(GetEnvironmentVariableW(wide.c_str(), value.data(), static_cast<DWORD>(value.size())));
    if (value.empty()) return std::nullopt;
    return std::filesystem::path(value).u8string();
}

}  // namespace hywu::platform
