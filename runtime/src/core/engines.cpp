#include "core/engines.hpp"

#include <algorithm>
#include <utility>

#include "core/error.hpp"
#include "core/files.hpp"
#include "core/text.hpp"

namespace hywu::core {

namespace {

constexpr std::string_view batch_axis = "batch";

// A version or a compute capability, part by part. A part is its digits without leading zeros, so that no
// number is too long; what is no number counts as 0.
class Number {
public:
    explicit Number(std::string_view text) {
        for (std::size_t start = 0; start <= text.size();) {
            const std::size_t end = std::min(text.find('.', start), text.size());
            std::string_view part = text.substr(start, end - start);
            if (part.find_first_not_of("0123456789") != std::string_view::npos) part = "";
            part.remove_prefix(std::min(part.find_first_not_of('0'), part.size()));
            parts_.emplace_back(part.size(), part);
            start = end + 1;
        }
    }
    bool operator<(const Number& other) const { return parts_ < other.parts_; }
    const std::pair<std::size_t, std::string>& first() const { return parts_[0]; }

private:
    std::vector<std::pair<std::size_t, std::string>> parts_;  // digits, and how many
};

// Whether a version-compatible engine of one version runs on another: the same major, not older.
bool follows(const std::string& built, const std::string& here) {
    const Number one(built), other(here);
    return one.first() == other.first() && !(other < one);
}

std::string of(const std::optional<std::string>& variant) {
    return variant ? "of variant " + *variant : "of the bundle's own graphs";
}

// A word as Python's shlex.quote writes it.
std::string shell_word(const std::string& word) {
    constexpr std::string_view safe =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-";
    if (!word.empty() && word.find_first_not_of(safe) == std::string::npos) return word;
    std::string result = "'";
    for (const char c : word) {
        if (c == '\'') {
            result += "'\"'\"'";
        } else {
            result += c;
        }
    }
    return result + "'";
}

// `shapes` with room for `axes`.
AxisRanges widened(const AxisRanges& shapes, const AxisSizes& axes) {
    AxisRanges result;
    for (const auto& [name, range] : shapes) {
        std::array<std::int64_t, 3> wider = range;
        if (const auto asked = axes.find(name); asked != axes.end()) {
            wider[0] = std::min(wider[0], asked->second);
            wider[2] = std::max(wider[2], asked->second);
        }
        result.add(name, wider);
    }
    return result;
}

// "1:2:4"
std::string range_text(const std::array<std::int64_t, 3>& sizes) {
    return std::to_string(sizes[0]) + ":" + std::to_string(sizes[1]) + ":" + std::to_string(sizes[2]);
}

bool has_all(const Engine& engine, const std::set<std::string>& graphs) {
    return std::all_of(graphs.begin(), graphs.end(),
                       [&](const std::string& graph) { return engine.graphs.contains(graph); });
}

}  // namespace

std::optional<std::string> obstacle(const Manifest& manifest, const std::string& key, const Target& target) {
    const Engine& engine = manifest.engines.at(key);
    if (name(engine.backend) != target.backend)
        return "it is for backend " + std::string(name(engine.backend));
    if (const auto changed = manifest.stale(key))
        return "it is stale: " + *changed + " is not what it was built from";
    if (engine.version != target.version &&
        !(engine.version_compatible && follows(engine.version, target.version))) {
        return "it was built by version " + engine.version + ", here is " + target.version;
    }
    const std::vector<std::string>& built = engine.compute_capabilities;
    const auto earlier = [](const std::string& a, const std::string& b) { return Number(a) < Number(b); };
    if (std::find(built.begin(), built.end(), target.capability) == built.end() &&
        !(engine.hardware_compatible &&
          !earlier(target.capability, *std::min_element(built.begin(), built.end(), earlier)))) {
        return "it was built for compute capability " + join(built, ", ") + ", " + target.device + " has " +
               target.capability;
    }
    return std::nullopt;
}

std::vector<std::string> usable(const std::filesystem::path& root, const Manifest& manifest,
                                const Target& target, const std::optional<std::string>& variant,
                                const std::optional<std::string>& key) {
    std::vector<std::string> candidates, found;
    if (key) {
        check_key(manifest, *key);
        candidates.push_back(*key);
    } else {
        for (const auto& [name, engine] : manifest.engines) {
            if (engine.variant == variant) candidates.insert(candidates.begin(), name);
        }
    }
    const std::optional<std::string>& wanted = key ? manifest.engines.at(*key).variant : variant;
    std::vector<std::pair<std::string, std::string>> obstacles;
    for (const std::string& candidate : candidates) {
        auto problem = obstacle(manifest, candidate, target);
        if (!problem) {
            found.push_back(candidate);
        } else if (key || name(manifest.engines.at(candidate).backend) == target.backend) {
            obstacles.emplace_back(candidate, std::move(*problem));
        }
    }
    if (!found.empty()) return found;
    if (obstacles.empty()) {
        throw Error(
            ErrorKind::engine, "The bundle has no " + target.backend + " engine " + of(wanted),
            "Expected one of version " + target.version + " for compute capability " + target.capability,
            "Build it: " + build_command(root, manifest, target, wanted));
    }
    std::vector<std::string> described;
    for (const auto& [candidate, problem] : obstacles) {
        described.emplace_back("engine ");
        described.back().append(candidate).append(": ").append(problem);
    }
    throw Error(ErrorKind::engine, "No engine " + of(wanted) + " can be used: " + join(described, "; "),
                "Expected one for " + target.backend + " " + target.version + " and compute capability " +
                    target.capability,
                "Build it: " + build_command(root, manifest, target, wanted,
                                             manifest.engines.at(obstacles[0].first).shapes));
}

std::string covering(const std::filesystem::path& root, const Manifest& manifest,
                     const std::vector<std::string>& keys, const AxisSizes& axes,
                     const std::set<std::string>& graphs, const Target& target) {
    std::vector<std::string> whole;
    for (const std::string& key : keys) {
        const Engine& engine = manifest.engines.at(key);
        if (!has_all(engine, graphs)) continue;
        if (!engine.covers(axes)) return key;
        whole.push_back(key);
    }
    if (whole.empty()) {
        const Engine& first = manifest.engines.at(keys.at(0));
        std::vector<std::string> lacking;
        for (const std::string& graph : graphs) {
            if (!first.graphs.contains(graph)) lacking.push_back(graph);
        }
        throw Error(ErrorKind::engine, "Engine " + keys[0] + " has no graph " + join(lacking, ", "),
                    "Expected every graph that the request needs",
                    "Build it: " + build_command(root, manifest, target, first.variant, first.shapes));
    }
    const Engine& engine = manifest.engines.at(whole[0]);
    const std::string axis = *engine.covers(axes);
    const std::array<std::int64_t, 3>& range = engine.shapes.at(axis);
    const std::string others = whole.size() > 1 ? ", and the " + std::to_string(whole.size() - 1) +
                                                      " other engines do not fit either"
                                                : "";
    throw Error(ErrorKind::input, "Axis " + axis + " has size " + std::to_string(axes.at(axis)),
                "Engine " + whole[0] + " takes " + std::to_string(range[0]) + " to " +
                    std::to_string(range[2]) + others,
                "Choose a size within it, or build one: " +
                    build_command(root, manifest, target, engine.variant, widened(engine.shapes, axes)));
}

void check_key(const Manifest& manifest, const std::string& key) {
    if (manifest.engines.contains(key)) return;
    std::vector<std::string> names;
    for (const auto& [name, engine] : manifest.engines) names.push_back(name);
    throw Error(ErrorKind::input, "The bundle has no engine " + show(key, 120),
                "It has: " + (names.empty() ? "none" : join(names, ", ")),
                "Choose one of these, or make one with `hywu build`");
}

std::optional<ImagePolicy> narrowed(const Manifest& manifest, const Engine& engine) {
    if (!manifest.image) return std::nullopt;
    ImagePolicy policy = *manifest.image;
    for (const std::string& side : sides(manifest)) {
        if (const auto* sizes = engine.shapes.find(side)) {
            policy.min = std::max(policy.min, (*sizes)[0]);
            policy.max = std::min(policy.max, (*sizes)[2]);
        }
    }
    return policy.min <= policy.max ? policy : manifest.image;
}

std::vector<std::string> sides(const Manifest& manifest) {
    std::vector<std::string> names;
    if (!manifest.image) return names;
    const Dims& shape = manifest.tensors.at(manifest.image->tensor).shape;
    for (std::size_t i = 1; i < std::min<std::size_t>(shape.size(), 3); ++i) {
        if (shape[i].symbolic()) names.push_back(shape[i].axis);
    }
    return names;
}

std::string build_command(const std::filesystem::path& root, const Manifest& manifest, const Target& target,
                          const std::optional<std::string>& variant, const AxisRanges& shapes) {
    std::vector<std::string> words = {"hywu", "build", display(root), "--backend", target.backend};
    const auto add = [&](const char* option, std::string value) {
        words.emplace_back(option);
        words.push_back(std::move(value));
    };
    if (target.backend == name(EngineBackend::tensorrt_rtx)) {  // TensorRT builds for the GPU that it runs on
        std::string digits = target.capability;
        digits.erase(std::remove(digits.begin(), digits.end(), '.'), digits.end());
        add("--compute-capability", digits);
    }
    if (variant) add("--variant", *variant);
    const std::vector<std::string> photo = sides(manifest);
    const bool sized = photo.size() == 2 && shapes.contains(photo[0]) && shapes.contains(photo[1]);
    if (sized) {
        const auto &heights = shapes.at(photo[0]), &widths = shapes.at(photo[1]);
        std::vector<std::string> sizes;
        for (std::size_t i = 0; i < heights.size(); ++i)
            sizes.push_back(std::to_string(widths[i]) + "x" + std::to_string(heights[i]));
        add("--shapes", join(sizes, ":"));
    }
    const auto* const batch = shapes.find(batch_axis);
    for (const auto& [axis, range] : shapes) {
        if (sized && (axis == photo[0] || axis == photo[1])) continue;
        if (axis == batch_axis) {
            add("--batch", range_text(range));
        } else if (manifest.deltas && axis == manifest.deltas->axis) {
            if (batch == nullptr || *batch != range) add("--delta-batch", range_text(range));  // the default
        } else {
            add("--axis", axis + "=" + range_text(range));
        }
    }
    for (std::string& word : words) word = shell_word(word);
    return join(words, " ");
}

}  // namespace hywu::core
