#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <random>
#include <system_error>

#include "core/files.hpp"

namespace hywu::core {

namespace {

[[noreturn]] void fail(int code = errno) { throw std::system_error(code, std::generic_category()); }

// Removes the file unless it was renamed.
class Temporary {
public:
    explicit Temporary(const std::filesystem::path& target) {
        std::random_device random;
        for (int attempt = 0; attempt < 100; ++attempt) {
            const std::string name =
                "." + target.filename().native().substr(0, 64) + "." + std::to_string(random());
            path_ = target.parent_path() / name;
            // Mode 0666, of which the process's mask takes away what it does from every new file.
            descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
            if (descriptor_ >= 0) return;
            if (errno != EEXIST) break;
        }
        fail();
    }
    Temporary(const Temporary&) = delete;
    Temporary& operator=(const Temporary&) = delete;
    ~Temporary() {
        if (descriptor_ >= 0) ::close(descriptor_);
        if (!renamed_) ::unlink(path_.c_str());
    }

    void write(std::string_view data) const {
        while (!data.empty()) {
            const ssize_t written =
                ::write(descriptor_, data.data(), std::min<std::size_t>(data.size(), 1 << 30));
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) fail();
            data.remove_prefix(static_cast<std::size_t>(written));
        }
    }

    void rename(const std::filesystem::path& target) {
        const int closed = ::close(descriptor_);
        descriptor_ = -1;
        if (closed != 0 || ::rename(path_.c_str(), target.c_str()) != 0) fail();
        renamed_ = true;
    }

private:
    std::filesystem::path path_;
    int descriptor_ = -1;
    bool renamed_ = false;
};

}  // namespace

InputFile::InputFile(const std::filesystem::path& path) {
    // O_NONBLOCK: to open a pipe must not wait for a writer.
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) fail();
    struct stat status {};
    const int problem = ::fstat(descriptor_, &status) != 0 ? errno
                        : S_ISDIR(status.st_mode)          ? EISDIR
                        : !S_ISREG(status.st_mode)         ? EINVAL
                                                           : 0;
    if (problem != 0) {
        ::close(descriptor_);
        fail(problem);
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
}

InputFile::~InputFile() { ::close(descriptor_); }

std::size_t InputFile::read_at(std::uint64_t offset, void* data, std::size_t bytes) const {
    std::size_t done = 0;
    while (done < bytes) {
        const ssize_t got =
            ::pread(descriptor_, static_cast<char*>(data) + done,
                    std::min<std::size_t>(bytes - done, 1 << 30), static_cast<off_t>(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail();
        if (got == 0) break;
        done += static_cast<std::size_t>(got);
    }
    return done;
}

MappedFile::MappedFile(const std::filesystem::path& path) {
    const InputFile file(path);
    if (file.size() == 0) throw std::system_error(std::make_error_code(std::errc::invalid_argument));
    size_ = static_cast<std::size_t>(file.size());
    void* address = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.descriptor_, 0);
    if (address == MAP_FAILED) fail();
    data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() { ::munmap(const_cast<std::byte*>(data_), size_); }

void write_atomically(const std::filesystem::path& path, const std::vector<std::string_view>& pieces) {
    Temporary temporary(path);
    for (const std::string_view piece : pieces) temporary.write(piece);
    temporary.rename(path);
}

}  // namespace hywu::core
