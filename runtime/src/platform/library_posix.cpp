#include <dlfcn.h>

#include <cstdlib>

#include "platform/library.hpp"

namespace hywu::platform {

std::optional<Library> Library::open(const std::vector<std::string>& names, std::string* why) {
    std::vector<std::string> tried;
    const std::filesystem::path beside = own_directory();
    for (const std::string& name : names) {
        std::vector<std::string> candidates = {name};
        if (name.find('/') == std::string::npos && !beside.empty())
            candidates.insert(candidates.begin(), (beside / name).string());
        for (const std::string& candidate : candidates) {
            std::error_code ignored;
            if (candidate != name && !std::filesystem::exists(candidate, ignored)) continue;
            if (void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL))
                return Library(handle, candidate);
            const char* reason = dlerror();
            tried.emplace_back(reason != nullptr ? reason : candidate);
        }
    }
    if (why != nullptr) {
        why->clear();
        for (const std::string& reason : tried) *why += (why->empty() ? "" : "; ") + reason;
    }
    return std::nullopt;
}

void* Library::address(const char* symbol) const { return dlsym(handle_, symbol); }

std::filesystem::path own_directory() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<void*>(&own_directory), &info) == 0 || info.dli_fname == nullptr) return {};
    std::error_code failed;
    const std::filesystem::path file = std::filesystem::canonical(info.dli_fname, failed);
    return failed ? std::filesystem::path() : file.parent_path();
}

std::optional<std::string> environment(const char* variable) {
    const char* value = std::getenv(variable);
    if (value == nullptr || *value == '\0') return std::nullopt;
    return value;
}

}  // namespace hywu::platform
