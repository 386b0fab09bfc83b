// Sets of low-rank weight deltas: in memory, in files, combined.
//
// A target module has "<module>.lora_A" [D, r, in] (convolution [D, r, in, kh, kw], experts [D, E, r, in])
// and
// "<module>.lora_B" [D, out, r] (experts [D, E, out, r]), any scale already in B. D is 1, one set for the
// batch, or the batch, one set per sample.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/array.hpp"
#include "core/manifest.hpp"

namespace hywu::core {

// An immutable map of tensor name to float32 array, by name. Copies share the arrays.
class Deltas {
public:
    using Map = std::map<std::string, std::shared_ptr<const Array>, std::less<>>;

    Deltas() = default;
    // float16, bfloat16 and float64 are converted to float32.
    // Throws Error(delta): a name does not end in ".lora_A" or ".lora_B", or a tensor is not floating-point
    // with at least 3 axes, none empty.
    explicit Deltas(std::map<std::string, Array>&& tensors);

    // Reads a delta file (safetensors; F32, F16, BF16 or F64). Throws Error(delta): not a readable delta
    // file.
    static Deltas load(const std::filesystem::path& path);
    // Writes a delta file, whole or not at all; equal sets give equal bytes, those that Python writes.
    // Throws Error(input): the file cannot be written.
    void save(const std::filesystem::path& path) const;

    // The weighted sum of sets of the same targets, exactly: ranks are concatenated and each weight is folded
    // into B. Throws Error(delta): nothing to blend, targets or batches differ, a weight is not finite, or
    // the ranks add up to more than `max_rank`, a bundle's `deltas.rank`.
    static Deltas blend(const std::vector<const Deltas*>& sets, const std::vector<double>& weights,
                        std::optional<std::int64_t> max_rank = {});
    // One set for a batch, sample i using sets[i]; smaller ranks are padded with zeros.
    // Throws Error(delta): no set, a set that is for several samples, or sets whose targets or shapes differ.
    static Deltas stack(const std::vector<const Deltas*>& sets);

    // The set of one sample, with D = 1. Throws Error(delta): there is no such sample.
    Deltas select(std::int64_t sample) const;
    // The same deltas with every rank filled up with zeros to the bundle's, which changes nothing.
    Deltas pad(const DeltaSpec& spec) const;
    // Checks that the set is exactly what a bundle takes, for `batch` samples if given; pad it first if its
    // rank is smaller. Throws Error(delta): a missing, extra, mis-shaped or non-finite tensor, by name.
    void check(const DeltaSpec& spec, std::optional<std::int64_t> batch = {}) const;

    // The largest rank among the targets; 0 for an empty set.
    std::int64_t rank() const;
    // D: 1, or the number of samples; 0 for an empty set.
    std::int64_t batch() const;

    std::size_t size() const noexcept { return tensors_.size(); }
    bool empty() const noexcept { return tensors_.empty(); }
    Map::const_iterator begin() const noexcept { return tensors_.begin(); }
    Map::const_iterator end() const noexcept { return tensors_.end(); }
    // The array, or null.
    const Array* find(std::string_view name) const;

private:
    Map tensors_;
};

}  // namespace hywu::core
