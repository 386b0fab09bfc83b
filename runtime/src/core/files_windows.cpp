#include <windows.h>

#include <algorithm>
#include <random>
#include <system_error>

#include "core/files.hpp"

namespace hywu::core {

namespace {

[[noreturn]] void fail(DWORD code = GetLastError()) {
    throw std::system_error(static_cast<int>(code), std::system_category());
}

// Deletes the file unless it was renamed.
class Temporary {
public:
    explicit Temporary(const std::filesystem::path& target) {
        std::random_device random;
        for (int attempt = 0; attempt < 100; ++attempt) {
            const std::wstring name =
                L"." + target.filename().native().substr(0, 64) + L"." + std::to_wstring(random());
            path_ = target.parent_path() / name;
            handle_ = CreateFileW(path_.c_str(), GENERIC_WRITE, 0, nullptr, CREATE_NEW, FILE_ATTRIBUTE_NORMAL,
                                  nullptr);
            if (handle_ != INVALID_HANDLE_VALUE) return;
            if (GetLastError() != ERROR_FILE_EXISTS) break;
        }
        fail();
    }
    Temporary(const Temporary&) = delete;
    Temporary& operator=(const Temporary&) = delete;
    ~Temporary() {
        if (handle_ != INVALID_HANDLE_VALUE) CloseHandle(handle_);
        if (!renamed_) DeleteFileW(path_.c_str());
    }

    void write(std::string_view data) const {
        while (!data.empty()) {
            DWORD written = 0;
            const auto piece = static_cast<DWORD>(std::min<std::size_t>(data.size(), 1 << 30));
            if (!WriteFile(handle_, data.data(), piece, &written, nullptr)) fail();
            data.remove_prefix(written);
        }
    }

    void rename(const std::filesystem::path& target) {
        CloseHandle(handle_);
        handle_ = INVALID_HANDLE_VALUE;
        if (!MoveFileExW(path_.c_str(), target.c_str(), MOVEFILE_REPLACE_EXISTING)) fail();
        renamed_ = true;
    }

private:
    std::filesystem::path path_;
    HANDLE handle_ = INVALID_HANDLE_VALUE;
    bool renamed_ = false;
};

}  // namespace

InputFile::InputFile(const std::filesystem::path& path) {
    handle_ = CreateFileW(path.c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, nullptr,
                          OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
    if (handle_ == INVALID_HANDLE_VALUE) fail();
    LARGE_INTEGER size{};
    const DWORD problem = GetFileType(handle_) != FILE_TYPE_DISK ? ERROR_INVALID_PARAMETER
                          : !GetFileSizeEx(handle_, &size)       ? GetLastError()
                                                                 : 0;
    if (problem != 0) {
        CloseHandle(handle_);
        fail(problem);
    }
    size_ = static_cast<std::uint64_t>(size.QuadPart);
}

InputFile::~InputFile() { CloseHandle(handle_); }

std::size_t InputFile::read_at(std::uint64_t offset, void* data, std::size_t bytes) const {
    std::size_t done = 0;
    while (done < bytes) {
        OVERLAPPED place{};
        place.Offset = static_cast<DWORD>(offset + done);
        place.OffsetHigh = static_cast<DWORD>((offset + done) >> 32);
        DWORD got = 0;
        const auto piece = static_cast<DWORD>(std::min<std::size_t>(bytes - done, 1 << 30));
        if (!ReadFile(handle_, static_cast<char*>(data) + done, piece, &got, &place)) {
            if (GetLastError() == ERROR_HANDLE_EOF) break;
            fail();
        }
        if (got == 0) break;
        done += got;
    }
    return done;
}

MappedFile::MappedFile(const std::filesystem::path& path) {
    const InputFile file(path);
    size_ = static_cast<std::size_t>(file.size());
    HANDLE mapping = CreateFileMappingW(file.handle_, nullptr, PAGE_READONLY, 0, 0, nullptr);
    if (mapping == nullptr) fail();
    const void* address = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
    const DWORD problem = address == nullptr ? GetLastError() : 0;
    CloseHandle(mapping);  // the view keeps what it needs
    if (problem != 0) fail(problem);
    data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() { UnmapViewOfFile(data_); }

void write_atomically(const std::filesystem::path& path, const std::vector<std::string_view>& pieces) {
    Temporary temporary(path);
    for (const std::string_view piece : pieces) temporary.write(piece);
    temporary.rename(path);
}

}  // namespace hywu::core
