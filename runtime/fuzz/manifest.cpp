// Any bytes as a manifest.json: a manifest, or our error.
#include "core/manifest.hpp"

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hywu::core;
    try {
        const Manifest manifest = Manifest::parse({reinterpret_cast<const char*>(data), size});
        for (const Call& call : manifest.program) {
            for (const auto& [port, tensor] : manifest.reads(call)) manifest.signatures.at(tensor);
            for (const auto& [port, tensor] : manifest.writes(call)) manifest.signatures.at(tensor);
        }
        for (const auto& [name, engine] : manifest.engines) manifest.stale(name);
    } catch (const Error&) {
    }
    return 0;
}
