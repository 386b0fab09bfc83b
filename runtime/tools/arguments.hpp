// Command-line arguments of the executables, and how they end.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "hywu/hywu.hpp"

namespace hywu::tools {

// An option of a command: `--name VALUE`, `--name=VALUE`, or a flag without a value.
struct Option {
    std::string name;   // "--steps"
    std::string value;  // "N"; empty: a flag
    std::string help;
    bool repeats = false;
};

inline Error bad_argument(std::string wrong, std::string expected, std::string remedy) {
    return Error(Status::input, std::move(wrong), std::move(expected), std::move(remedy));
}

// What a command line says. Throws Error(input).
class Arguments {
public:
    Arguments(int count, char** values, const std::vector<Option>& options) {
        bool plain = false;  // after `--`
        for (int i = 1; i < count; ++i) {
            std::string text = values[i];
            if (plain || text.size() < 2 || text[0] != '-') {
                positional.push_back(text);
                continue;
            }
            if (text == "--") {
                plain = true;
                continue;
            }
            const std::size_t equals = text.find('=');
            const std::string name = text.substr(0, equals);
            const Option* option = nullptr;
            for (const Option& candidate : options) {
                if (candidate.name == name) option = &candidate;
            }
            if (option == nullptr)
                throw bad_argument("There is no option " + name, "Expected one of --help", "See --help");
            if (option->value.empty()) {
                if (equals != std::string::npos) {
                    throw bad_argument(name + " was given a value", "Expected the flag alone",
                                       "Leave the value out");
                }
                given_[name] = {""};
                continue;
            }
            if (equals == std::string::npos && i + 1 >= count) {
                throw bad_argument(name + " lacks its value", "Expected " + name + " " + option->value,
                                   "Add it");
            }
            std::vector<std::string>& list = given_[name];
            if (!list.empty() && !option->repeats) {
                throw bad_argument(name + " was given twice", "Expected it once", "Leave one out");
            }
            list.push_back(equals == std::string::npos ? values[++i] : text.substr(equals + 1));
        }
    }

    std::vector<std::string> positional;

    bool has(const std::string& name) const { return given_.count(name) != 0; }
    std::optional<std::string> text(const std::string& name) const {
        const auto found = given_.find(name);
        return found == given_.end() ? std::nullopt : std::optional<std::string>(found->second[0]);
    }
    std::vector<std::string> texts(const std::string& name) const {
        const auto found = given_.find(name);
        return found == given_.end() ? std::vector<std::string>() : found->second;
    }
    // A decimal integer from `least` to `most`.
    std::optional<std::int64_t> integer(const std::string& name, std::int64_t least,
                                        std::int64_t most) const {
        const std::optional<std::string> given = text(name);
        if (!given) return std::nullopt;
        char* end = nullptr;
        errno = 0;
        const long long number = std::strtoll(given->c_str(), &end, 10);
        if (given->empty() || *end != '\0' || errno != 0 || number < least || number > most) {
            throw bad_argument(
                name + " is \"" + *given + "\"",
                "Expected an integer from " + std::to_string(least) + " to " + std::to_string(most),
                "Correct it");
        }
        return number;
    }
    std::optional<std::uint64_t> unsigned_integer(const std::string& name) const {
        const std::optional<std::string> given = text(name);
        if (!given) return std::nullopt;
        char* end = nullptr;
        errno = 0;
        const unsigned long long number = std::strtoull(given->c_str(), &end, 10);
        if (given->empty() || given->find_first_not_of("0123456789") != std::string::npos || *end != '\0' ||
            errno != 0) {
            throw bad_argument(name + " is \"" + *given + "\"", "Expected an integer from 0 to 2**64 - 1",
                               "Correct it");
        }
        return number;
    }
    std::optional<double> number(const std::string& name) const {
        const std::optional<std::string> given = text(name);
        if (!given) return std::nullopt;
        char* end = nullptr;
        const double value = std::strtod(given->c_str(), &end);
        if (given->empty() || *end != '\0') {
            throw bad_argument(name + " is \"" + *given + "\"", "Expected a number", "Correct it");
        }
        return value;
    }
    // A number above 0 and at most 1.
    std::optional<double> part(const std::string& name) const {
        const std::optional<double> value = number(name);
        if (value && !(*value > 0 && *value <= 1)) {
            throw bad_argument(name + " is \"" + *text(name) + "\"",
                               "Expected a number above 0 and at most 1", "Correct it");
        }
        return value;
    }
    // X, the scale called text, or NAME=X, repeated.
    std::map<std::string, std::vector<double>> scales(const std::string& name) const {
        std::map<std::string, std::vector<double>> result;
        for (const std::string& given : texts(name)) {
            const std::size_t equals = given.rfind('=');
            const std::string number = equals == std::string::npos ? given : given.substr(equals + 1);
            char* end = nullptr;
            const double value = std::strtod(number.c_str(), &end);
            if (number.empty() || *end != '\0') {
                throw bad_argument(name + " is \"" + given + "\"", "Expected a number, or NAME=NUMBER",
                                   "Correct it");
            }
            result[equals == std::string::npos ? "text" : given.substr(0, equals)] = {value};
        }
        return result;
    }
    // WIDTHxHEIGHT, or one number for a square.
    std::optional<std::pair<std::int32_t, std::int32_t>> size(const std::string& name) const {
        const std::optional<std::string> given = text(name);
        if (!given) return std::nullopt;
        const std::size_t cross = given->find('x');
        const std::string first = given->substr(0, cross);
        const std::string second = cross == std::string::npos ? first : given->substr(cross + 1);
        const auto sound = [](const std::string& side) {
            return !side.empty() && side.size() <= 6 &&
                   side.find_first_not_of("0123456789") == std::string::npos;
        };
        if (!sound(first) || !sound(second)) {
            throw bad_argument(name + " is \"" + *given + "\"", "Expected WIDTHxHEIGHT in pixels",
                               "Correct it");
        }
        return std::make_pair(std::stoi(first), std::stoi(second));
    }
    // ID=DIR, repeated.
    std::map<std::string, std::filesystem::path> sources(const std::string& name) const {
        std::map<std::string, std::filesystem::path> result;
        for (const std::string& given : texts(name)) {
            const std::size_t equals = given.find('=');
            if (equals == std::string::npos || equals == 0 || equals + 1 == given.size() ||
                !result.emplace(given.substr(0, equals), given.substr(equals + 1)).second) {
                throw bad_argument(name + " \"" + given + "\" is not understood",
                                   "Expected ID=DIR, each ID once", "Correct it");
            }
        }
        return result;
    }

private:
    std::map<std::string, std::vector<std::string>> given_;
};

inline void print_help(const char* usage, const char* what, const std::vector<Option>& options) {
    std::printf("Usage: %s\n\n%s\n\nOptions:\n", usage, what);
    std::size_t widest = 0;
    for (const Option& option : options)
        widest = std::max(widest, option.name.size() + option.value.size() + 1);
    for (const Option& option : options) {
        const std::string left = option.name + (option.value.empty() ? "" : " " + option.value);
        std::printf("  %-*s  %s\n", static_cast<int>(widest), left.c_str(), option.help.c_str());
    }
}

// The exit code that fits an error: 2 for bad input, 130 where the user stopped it, 1 otherwise.
inline int exit_code(Status status) {
    switch (status) {
        case Status::bundle:
        case Status::checkpoint:
        case Status::unsupported:
        case Status::delta:
        case Status::input:
            return 2;
        case Status::cancelled:
            return 130;
        default:
            return 1;
    }
}

// Runs a command; what it throws goes to stderr.
inline int run(const std::function<int()>& command) {
    try {
        return command();
    } catch (const Error& error) {
        std::fprintf(stderr, "Error: %s\n", error.what());
        return exit_code(error.status());
    } catch (const core::Error& error) {  // of an image file
        std::fprintf(stderr, "Error: %s\n", error.what());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "Error: %s\n", error.what());
        return 1;
    }
}

}  // namespace hywu::tools
