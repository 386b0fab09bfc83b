#include "core/bundle.hpp"

#include <algorithm>
#include <array>
#include <set>
#include <system_error>
#include <utility>

#include "core/error.hpp"
#include "core/files.hpp"
#include "core/sha256.hpp"
#include "core/text.hpp"

namespace hywu::core {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view engine_folder = "engines/";
constexpr std::uint64_t max_header = 100 << 20;  // of a safetensors file: at least what the library takes

Error damaged(const std::string& wrong, const std::string& expected) {
    return Error(ErrorKind::bundle, wrong, expected, "The bundle is damaged: copy or export it again");
}

Error unreadable(const std::string& path, const std::system_error& error) {
    return damaged(path + " cannot be read: " + error.code().message(), "Expected a readable file");
}

Error other_checkpoint(const std::string& source, const fs::path& file, const std::string& problem) {
    return Error(ErrorKind::bundle, display(file) + " " + problem,
                 "Expected the checkpoint that source " + show(source) + " was exported from",
                 "Give that checkpoint's directory, or export again from this one");
}

bool begins_with(const fs::path& path, const fs::path& start) {
    return std::mismatch(path.begin(), path.end(), start.begin(), start.end()).second == start.end();
}

// SHA-256 of the first `bytes` bytes of a file.
std::string digest(const InputFile& file, std::uint64_t bytes) {
    Sha256 digest;
    std::vector<char> buffer(1 << 20);
    for (std::uint64_t at = 0; at < bytes;) {
        const std::size_t wanted =
            static_cast<std::size_t>(std::min<std::uint64_t>(buffer.size(), bytes - at));
        const std::size_t got = file.read_at(at, buffer.data(), wanted);
        digest.update(buffer.data(), got);
        if (got < wanted) break;  // it has been cut while we read
        at += got;
    }
    return digest.hex();
}

template <class Entries>
std::vector<std::string> names_of(const Entries& entries) {
    std::vector<std::string> names;
    for (const auto& [name, entry] : entries) names.push_back(name);
    std::sort(names.begin(), names.end());
    return names;
}

}  // namespace

std::string header_sha256(const fs::path& path) {
    const InputFile file(path);
    std::array<unsigned char, 8> prefix{};
    file.read_at(0, prefix.data(), prefix.size());
    std::uint64_t length = 0;
    for (std::size_t i = 8; i-- > 0;) length = length << 8 | prefix[i];
    return digest(file, std::min(file.size(), 8 + std::min(length, max_header)));
}

Bundle::Bundle(fs::path root, Manifest manifest, std::map<std::string, fs::path> sources)
    : root_(std::move(root)),
      manifest_(std::move(manifest)),
      sources_(std::move(sources)),
      maps_(std::make_unique<Maps>()) {}

Bundle::Bundle(Bundle&&) noexcept = default;
Bundle& Bundle::operator=(Bundle&&) noexcept = default;
Bundle::~Bundle() = default;

Bundle Bundle::open(const fs::path& path, const OpenOptions& options) {
    Manifest manifest = Manifest::read(path);
    std::error_code ignored;
    fs::path root = fs::is_directory(path, ignored) ? path : path.parent_path();
    if (root.empty()) root = ".";
    for (const auto& [name, directory] : options.sources) {
        if (!manifest.sources.contains(name)) {
            throw Error(ErrorKind::input, "The bundle has no source " + show(name),
                        "It has " + repr(names_of(manifest.sources)), "Correct `sources`");
        }
    }
    Bundle bundle(std::move(root), std::move(manifest), options.sources);
    for (const auto& [file, entry] : bundle.manifest_.files) {
        if (options.verify || file.compare(0, engine_folder.size(), engine_folder) != 0)
            bundle.check(file, options.verify);
    }
    if (options.links) bundle.check_links();
    return bundle;
}

fs::path Bundle::file(std::string_view path) const {
    fs::path file = root_ / path_of(path);
    bool inside = true, is_file = false;
    try {
        const fs::path resolved = fs::weakly_canonical(file);
        inside = is_safe_path(path) && begins_with(resolved, fs::weakly_canonical(root_));
        is_file = inside && fs::is_regular_file(resolved);
    } catch (const fs::filesystem_error&) {
        // a loop of links, a path that the system refuses
    }
    if (!inside) {
        throw Error(ErrorKind::bundle, std::string(path) + " leads out of the bundle",
                    "Expected a file inside it",
                    "Do not use this bundle unless you know where it comes from");
    }
    if (!is_file) throw damaged(std::string(path) + " is missing", "Expected a file that the manifest lists");
    return file;
}

std::string Bundle::graph_file(std::string_view graph, const std::optional<std::string>& variant) const {
    if (variant) {
        const Variant* found = manifest_.variants.find(*variant);
        if (!found) {
            const std::string have = join(names_of(manifest_.variants), ", ");
            throw Error(ErrorKind::input, "The bundle has no variant " + show(*variant),
                        "It has: " + (have.empty() ? "none" : have),
                        "Choose one of these, or make it with `hywu calibrate`");
        }
        if (const std::string* file = found->graphs.find(graph)) return *file;
    }
    return manifest_.graphs.at(graph).file;
}

std::vector<Weight> Bundle::initializers(std::string_view graph_file) const {
    std::vector<Weight> weights;
    if (const Ordered<LinkedTensor>* tensors = manifest_.linked.find(graph_file)) {
        for (const auto& [name, tensor] : *tensors) weights.push_back(map(name, tensor));
    }
    return weights;
}

void Bundle::check(const std::string& path, bool verify) const {
    const File& entry = manifest_.files.at(path);
    const fs::path file = this->file(path);
    try {
        // The file is opened even where its size alone is compared: what cannot be read is found here, not in
        // the middle of a request.
        const InputFile opened(file);
        if (opened.size() != static_cast<std::uint64_t>(entry.size)) {
            throw damaged(path + " has " + std::to_string(opened.size()) + " bytes",
                          "Expected " + std::to_string(entry.size));
        }
        if (!verify) return;
        const std::string found = digest(opened, opened.size());
        if (found != entry.sha256) throw damaged(path + " has SHA-256 " + found, "Expected " + entry.sha256);
    } catch (const std::system_error& error) {
        throw unreadable(path, error);
    }
}

void Bundle::check_links() const {
    std::set<std::pair<std::string, std::string>> used;
    for (const auto& [graph_file, tensors] : manifest_.linked) {
        for (const auto& [name, tensor] : tensors) used.emplace(tensor.source, tensor.file);
    }
    for (const auto& [source, path] : used) {
        const fs::path file = source_file(source, path);
        const SourceFile& expected = manifest_.sources.at(source).files.at(path);
        try {
            const std::uint64_t size = InputFile(file).size();
            if (size != static_cast<std::uint64_t>(expected.size)) {
                throw other_checkpoint(
                    source, file,
                    "has " + std::to_string(size) + " bytes, not " + std::to_string(expected.size));
            }
            if (header_sha256(file) != expected.header_sha256) {
                throw other_checkpoint(source, file, "has another safetensors header");
            }
        } catch (const std::system_error& error) {
            throw other_checkpoint(source, file, "cannot be read: " + error.code().message());
        }
    }
}

fs::path Bundle::source_file(const std::string& source, const std::string& path) const {
    const auto root = sources_.find(source);
    if (root == sources_.end()) {
        throw Error(
            ErrorKind::bundle,
            "The weights of this bundle are linked to source " + show(source) + " (" +
                show(manifest_.sources.at(source).name) + ")",
            "Expected the directory of that checkpoint",
            "Give it: sources={" + repr(source) + ": DIRECTORY}, or --source " + source + "=DIRECTORY");
    }
    // Checkpoints in a hub's cache are symbolic links: these are followed.
    fs::path file = root->second / path_of(path);
    std::error_code ignored;
    if (!is_safe_path(path) || !fs::is_regular_file(file, ignored)) {
        throw other_checkpoint(source, file, "is not a file");
    }
    return file;
}

Weight Bundle::map(const std::string& name, const LinkedTensor& tensor) const {
    const fs::path file = source_file(tensor.source, tensor.file);
    std::shared_ptr<const MappedFile> mapped;
    {
        const std::lock_guard lock(maps_->mutex);
        std::shared_ptr<const MappedFile>& known = maps_->files[file];
        try {
            if (!known) known = std::make_shared<const MappedFile>(file);
        } catch (const std::system_error& error) {
            throw other_checkpoint(tensor.source, file, "cannot be mapped: " + error.code().message());
        }
        mapped = known;
    }
    const auto offset = static_cast<std::uint64_t>(tensor.offset),
               length = static_cast<std::uint64_t>(tensor.length);
    if (length == 0 || offset + length > mapped->size()) {
        throw other_checkpoint(tensor.source, file,
                               "holds no " + std::to_string(length) + " bytes at " + std::to_string(offset));
    }
    return {name,  mapped->data() + offset, static_cast<std::size_t>(length), tensor.dtype, tensor.shape,
            mapped};
}

}  // namespace hywu::core
