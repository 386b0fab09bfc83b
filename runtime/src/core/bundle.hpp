// A bundle on disk: its manifest, and its files found, checked and mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.hpp"
#include "core/manifest.hpp"

namespace hywu::core {

class MappedFile;

// A linked initializer: raw little-endian bytes, mapped read-only from the checkpoint, valid as long as
// `owner` lives.
struct Weight {
    std::string name;
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
    Dtype dtype = Dtype::float32;
    std::vector<std::int64_t> shape;
    std::shared_ptr<const void> owner;
};

struct OpenOptions {
    // Compare the SHA-256 of every file too, engines included; sizes are always compared.
    bool verify = false;
    // For a bundle with linked weights: source id to the checkpoint's directory.
    std::map<std::string, std::filesystem::path> sources;
    // Check the checkpoints that weights are linked to; without it, `sources` are not needed until a graph is
    // loaded.
    bool links = true;
};

// An opened bundle. Its const members may be called from several threads at once.
class Bundle {
public:
    // Reads the manifest and checks every file of the bundle. Those of engines are checked when they are
    // used, or with `verify`: whatever happens to them, the bundle is sound. Throws Error(bundle): the
    // manifest is invalid, or a file is missing, of another size or hash, or outside the bundle; a linked
    // checkpoint is not the one that was exported. Error(input): `sources` names a source that the bundle
    // does not have.
    static Bundle open(const std::filesystem::path& path, const OpenOptions& options = {});

    Bundle(Bundle&&) noexcept;
    Bundle& operator=(Bundle&&) noexcept;
    ~Bundle();

    const std::filesystem::path& root() const noexcept { return root_; }
    const Manifest& manifest() const noexcept { return manifest_; }

    // The file that the manifest calls `path`, inside the bundle.
    // Throws Error(bundle): it is outside (by a symbolic link), or not a file.
    std::filesystem::path file(std::string_view path) const;

    // Compares a file's size with the manifest, and with `verify` its hash. Throws Error(bundle).
    void check(const std::string& path, bool verify = false) const;

    // The path, as the manifest names it, of a graph's ONNX file.
    // Throws Error(input): there is no such variant.
    std::string graph_file(std::string_view graph, const std::optional<std::string>& variant = {}) const;

    // The linked initializers of a graph, memory-mapped; each mapping is shared by all that ask for it.
    // Throws Error(bundle): the root of a source was not given, or its file cannot be mapped.
    std::vector<Weight> initializers(std::string_view graph_file) const;

private:
    Bundle(std::filesystem::path root, Manifest manifest,
           std::map<std::string, std::filesystem::path> sources);
    void check_links() const;
    std::filesystem::path source_file(const std::string& source, const std::string& path) const;
    Weight map(const std::string& name, const LinkedTensor& tensor) const;

    // Behind a pointer, so that a Bundle can be moved.
    struct Maps {
        std::mutex mutex;
        std::map<std::filesystem::path, std::shared_ptr<const MappedFile>> files;
    };

    std::filesystem::path root_;
    Manifest manifest_;
    std::map<std::string, std::filesystem::path> sources_;
    std::unique_ptr<Maps> maps_;
};

// SHA-256 of a safetensors header: 8 bytes (n, little-endian) and the n bytes of JSON after them.
// Throws std::system_error.
std::string header_sha256(const std::filesystem::path& path);

}  // namespace hywu::core
