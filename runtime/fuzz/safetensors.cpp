// Any bytes as the header of a safetensors file: tensors that lie within the file, or our error.
#include "core/safetensors.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "core/array.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hywu::core;
    if (size < 8) return 0;
    // As in a file: the header's length, the header, the tensors.
    std::uint64_t length = 0;
    for (std::size_t i = 8; i-- > 0;) length = length << 8 | data[i];
    if (length > size - 8) length = size - 8;
    try {
        const auto header = SafetensorsHeader::parse(
            {reinterpret_cast<const char*>(data) + 8, static_cast<std::size_t>(length)}, size);
        std::uint64_t total = 8 + length;
        for (const auto& [name, tensor] : header.tensors) {
            total += tensor.bytes;
            if (tensor.offset + tensor.bytes > size) std::abort();
            const auto dtype = stored_dtype(tensor.dtype);
            if (dtype && count(tensor.shape) * item_size(*dtype) != tensor.bytes) std::abort();
        }
        if (total != size) std::abort();
    } catch (const SafetensorsError&) {
    }
    return 0;
}
