// Any bytes as a delta file: a set that can be combined, saved and loaded again, or our error.
#include "core/deltas.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

#include "core/error.hpp"

namespace {

using namespace hywu::core;

// A folder in memory where that is possible, gone after the input.
class Folder {
public:
    Folder() {
        static const bool shared = std::filesystem::exists("/dev/shm");
        path_ = shared ? "/dev/shm/hywu_fuzz_XXXXXX"
                       : std::filesystem::temp_directory_path() / "hywu_fuzz_XXXXXX";
        if (!mkdtemp(path_.data())) std::abort();
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    std::filesystem::path path(const char* name) const { return std::filesystem::path(path_) / name; }

private:
    std::string path_;
};

DeltaSpec spec_of(const Deltas& deltas) {
    DeltaSpec spec;
    for (const auto& [name, array] : deltas) {
        Shape shape(array->shape().begin() + 1, array->shape().end());
        shape.back() += 1;
        spec.tensors.add(name, std::move(shape));
    }
    return spec;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const Folder folder;
    const auto path = folder.path("in"), out = folder.path("out");
    std::ofstream(path, std::ios::binary | std::ios::trunc)
        .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
    Deltas deltas;
    try {
        deltas = Deltas::load(path);
    } catch (const Error&) {
        return 0;
    }
    deltas.save(out);
    const Deltas again = Deltas::load(out);
    if (again.size() != deltas.size()) std::abort();
    for (const auto& [name, array] : deltas) {
        const Array* other = again.find(name);
        if (!other || other->shape() != array->shape() ||
            std::memcmp(other->data(), array->data(), array->bytes()) != 0) {
            std::abort();
        }
    }
    const DeltaSpec spec = spec_of(deltas);
    const auto attempt = [](auto action) {
        try {
            action();
        } catch (const Error&) {
        }
    };
    attempt([&] { Deltas::blend({&deltas, &again, &deltas}, {0.5, -1, 2}); });
    attempt([&] { Deltas::stack({&deltas, &again}); });
    attempt([&] { deltas.select(deltas.batch() - 1); });
    attempt([&] { deltas.pad(spec).check(spec, deltas.batch()); });
    return 0;
}
