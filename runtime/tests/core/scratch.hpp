// What the tests of the core share.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

#include "core/error.hpp"

// A folder that is gone afterwards.
class Scratch {
public:
    Scratch() {
        static std::atomic<int> made{0};
        path_ = std::filesystem::temp_directory_path() /
                ("hywu_core_tests_" + std::to_string(reinterpret_cast<std::uintptr_t>(this)) + "_" +
                 std::to_string(made++));
        std::filesystem::remove_all(path_);
        std::filesystem::create_directories(path_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    const std::filesystem::path& path() const { return path_; }
    std::filesystem::path write(const std::string& name, std::string_view text) const {
        std::filesystem::create_directories((path_ / name).parent_path());
        std::ofstream(path_ / name, std::ios::binary) << text;
        return path_ / name;
    }

private:
    std::filesystem::path path_;
};

inline std::string contents(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
}

// Checks that `action` throws an Error of that kind with all three parts, and `word` in its text.
template <class Action>
void check_error(hywu::core::ErrorKind kind, std::string_view word, Action action) {
    try {
        action();
    } catch (const hywu::core::Error& error) {
        CHECK(error.kind() == kind);
        CHECK_MESSAGE(std::string_view(error.what()).find(word) != std::string_view::npos, error.what());
        CHECK_FALSE(error.wrong().empty());
        CHECK_FALSE(error.expected().empty());
        CHECK_FALSE(error.remedy().empty());
        return;
    }
    FAIL_CHECK("nothing was thrown, but an error with: ", word);
}
