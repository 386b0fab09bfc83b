// Any bytes as a delta file: a set that can be combined, saved and loaded again, or our error.
#include "core/deltas.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/error.hpp"

namespace {

using namespace hywu::core;

const std::filesystem::path& folder() {
    static const std::filesystem::path path = [] {
        // In memory where that is possible.
        const std::filesystem::path shared = "/dev/shm";
        std::string name =
            (std::filesystem::exists(shared) ? shared : std::filesystem::temp_directory_path()) /
            "hywu_fuzz_XXXXXX";
        if (!mkdtemp(name.data())) std::abort();
        std::atexit([] { std::filesystem::remove_all(folder()); });
        return std::filesystem::path(name);
    }();
    return path;
}

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
    const auto path = folder() / "in", out = folder() / "out";
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
