// Files, where POSIX and Windows differ. Errors are std::system_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace hywu::core {

// A path as UTF-8, for messages.
std::string display(const std::filesystem::path& path);
// A path from UTF-8 text.
std::filesystem::path path_of(std::string_view utf8);

// A regular file, open for reading.
class InputFile {
public:
    explicit InputFile(const std::filesystem::path& path);
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;
    ~InputFile();

    std::uint64_t size() const noexcept { return size_; }
    // Reads up to `bytes` bytes; fewer only at the end of the file.
    std::size_t read_at(std::uint64_t offset, void* data, std::size_t bytes) const;

private:
    friend class MappedFile;

    std::uint64_t size_ = 0;
#ifdef _WIN32
    void* handle_ = nullptr;
#else
    int descriptor_ = -1;
#endif
};

// A whole file, mapped read-only. Reading a mapping whose file has been truncated since kills the process, as
// with any memory map.
class MappedFile {
public:
    explicit MappedFile(const std::filesystem::path& path);
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    ~MappedFile();

    const std::byte* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }

private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

// The first bytes of a file, at most `limit`.
std::string read_file(const std::filesystem::path& path, std::size_t limit);

// Writes the pieces one after the other to a temporary sibling of `path` that then takes its place: the file
// is written whole or not at all.
void write_atomically(const std::filesystem::path& path, const std::vector<std::string_view>& pieces);

}  // namespace hywu::core
