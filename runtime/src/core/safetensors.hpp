// safetensors files: 8 bytes (n, little-endian), n bytes of JSON, then the tensors. Refuses what the library
// of that name refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "core/array.hpp"
#include "core/files.hpp"

namespace hywu::core {

// Not such a file; what() says why.
class SafetensorsError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct StoredTensor {
    std::string dtype;  // the word of the file: "F32", "BF16", …
    Shape shape;
    std::uint64_t offset = 0;  // from the start of the file
    std::uint64_t bytes = 0;
};

struct SafetensorsHeader {
    std::map<std::string, std::string, std::less<>> metadata;
    std::map<std::string, StoredTensor, std::less<>> tensors;

    static constexpr std::uint64_t max_bytes = 100'000'000;  // of JSON: the library's own limit

    // The JSON of a file of `file_size` bytes in all. Throws SafetensorsError.
    static SafetensorsHeader parse(std::string_view json, std::uint64_t file_size);
};

// The dtype behind a word of the file, if an Array can hold it.
std::optional<Dtype> stored_dtype(std::string_view word);

// An open file.
class SafetensorsFile {
public:
    // Reads the header. Throws SafetensorsError, std::system_error.
    explicit SafetensorsFile(const std::filesystem::path& path);

    const SafetensorsHeader& header() const noexcept { return header_; }
    // The elements of a tensor, whose dtype is the given one. Throws SafetensorsError, std::system_error.
    Array read(const StoredTensor& tensor, Dtype dtype) const;

private:
    InputFile file_;
    SafetensorsHeader header_;
};

// The header of a file with float32 tensors in this order and this metadata, as the library writes it: 8
// bytes, JSON, and spaces up to a multiple of 8.
std::string safetensors_header(const std::map<std::string, std::string>& metadata,
                               const std::map<std::string, const Array*>& tensors);

}  // namespace hywu::core
