#include "core/deltas.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <system_error>
#include <utility>

#include "core/error.hpp"
#include "core/files.hpp"
#include "core/safetensors.hpp"
#include "core/similarity.hpp"
#include "core/text.hpp"

namespace hywu::core {

namespace {

constexpr const char* mark = "hywu.deltas";
constexpr const char* version = "1";
constexpr std::size_t max_axes = 8;

Error delta_error(const std::string& wrong, const std::string& expected, const std::string& remedy) {
    return Error(ErrorKind::delta, wrong, expected, remedy);
}

Error shape_error(const std::string& name, const std::string& found, const std::string& expected) {
    return delta_error("Delta " + show(name, 200) + " has shape " + found, "Expected " + expected,
                       "Use deltas that were made for this model and its targets");
}

bool is_b(std::string_view name) { return ends_with(name, ".lora_B"); }

// The axis of the rank: B's last, A's first after D and, where there are any, after the experts.
std::size_t rank_axis(std::string_view name, const Array& array) {
    if (is_b(name)) return array.shape().size() - 1;
    return array.shape().size() == 4 ? 2 : 1;
}

void check_tensor(const std::string& name, Dtype dtype, const Shape& shape) {
    if ((!ends_with(name, ".lora_A") && !is_b(name)) || !is_utf8(name)) {
        throw delta_error("A delta is called " + show(name),
                          "Expected names that end in `.lora_A` or `.lora_B`",
                          "Convert an adapter with `hywu deltas convert`");
    }
    if (dtype != Dtype::float16 && dtype != Dtype::bfloat16 && dtype != Dtype::float32 &&
        dtype != Dtype::float64) {
        throw delta_error("Delta " + show(name) + " has dtype " + std::string(core::name(dtype)),
                          "Expected floating-point numbers", "Store it as float32");
    }
    if (shape.size() < 3 || shape.size() > max_axes ||
        std::find(shape.begin(), shape.end(), 0) != shape.end()) {
        throw delta_error("Delta " + show(name) + " has shape " + repr(shape),
                          "Expected [D, …] with 3 to 8 axes, none empty",
                          "Add the leading axis D = 1 if it is missing");
    }
}

float from_bits(std::uint32_t bits) {
    float number = 0;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

float from_half(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t{half} >> 15 << 31;
    const std::uint32_t exponent = half >> 10 & 0x1fU, fraction = half & 0x3ffU;
    if (exponent == 0) {  // zero and subnormal numbers: fraction · 2⁻²⁴
        const float size = static_cast<float>(fraction) * 0x1p-24F;
        return sign != 0 ? -size : size;
    }
    const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return from_bits(sign | wide << 23 | fraction << 13);
}

// Rounds to nearest; too large becomes infinite, as NumPy has it.
float from_double(double number) {
    constexpr double beyond = 0x1.ffffffp127;  // halfway between the largest float and 2¹²⁸
    if (std::abs(number) >= beyond) {
        return std::copysign(std::numeric_limits<float>::infinity(), number < 0 ? -1.0F : 1.0F);
    }
    return static_cast<float>(number);
}

template <class From, class Convert>
void convert_each(const Array& array, float* out, Convert convert) {
    const std::byte* data = array.data();
    for (std::size_t i = 0; i < array.size(); ++i) {
        From stored;
        std::memcpy(&stored, data + i * sizeof stored, sizeof stored);
        out[i] = convert(stored);
    }
}

Array to_float32(Array array) {
    if (array.dtype() == Dtype::float32) return array;
    Array result(Dtype::float32, array.shape());
    auto* out = result.as<float>();
    if (array.dtype() == Dtype::float16) {
        convert_each<std::uint16_t>(array, out, from_half);
    } else if (array.dtype() == Dtype::bfloat16) {  // the upper half of a float32
        convert_each<std::uint16_t>(array, out,
                                    [](std::uint16_t half) { return from_bits(std::uint32_t{half} << 16); });
    } else {
        convert_each<double>(array, out, from_double);
    }
    return result;
}

std::string listed(const std::vector<std::string>& names) {
    std::vector<std::string> shown;
    for (std::size_t i = 0; i < names.size() && i < 3; ++i) shown.push_back(show(names[i], 200));
    const std::string more = names.size() > 3 ? " and " + std::to_string(names.size() - 3) + " more" : "";
    return join(shown, ", ") + more;
}

// Both ascending.
void same_names(const std::vector<std::string>& expected, const std::vector<std::string>& found,
                const std::string& whose) {
    std::vector<std::string> missing, extra;
    std::set_difference(expected.begin(), expected.end(), found.begin(), found.end(),
                        std::back_inserter(missing));
    std::set_difference(found.begin(), found.end(), expected.begin(), expected.end(),
                        std::back_inserter(extra));
    if (missing.empty() && extra.empty()) return;
    std::vector<std::string> parts;
    if (!missing.empty()) parts.push_back("lack " + listed(missing));
    if (!extra.empty()) parts.push_back("have the extra " + listed(extra));
    const std::size_t common = expected.size() - missing.size();
    std::string hint;
    if (!extra.empty() && !missing.empty()) {
        if (missing.size() > 2000) missing.resize(2000);
        if (const auto name = nearest(extra[0], missing)) {
            hint = "; " + show(extra[0], 120) + " is nearest to " + show(*name, 120);
        }
    }
    throw delta_error("The deltas " + join(parts, " and "),
                      "Expected the " + std::to_string(expected.size()) + " tensors of " + whose +
                          ", of which " + std::to_string(common) + " are there" + hint,
                      "Use deltas that were made for this model and its targets");
}

std::vector<std::string> names_of(const Deltas& deltas) {
    std::vector<std::string> names;
    for (const auto& [name, array] : deltas) names.push_back(name);
    return names;
}

// The names of a bundle, in order.
std::vector<std::string> names_of(const DeltaSpec& spec) {
    std::vector<std::string> names;
    for (const auto& [name, shape] : spec.tensors) names.push_back(name);
    std::sort(names.begin(), names.end());
    return names;
}

// Copies `from`, times `scale`, into `to` at `start` along `axis`; the other axes are the same, but for the
// leading one: a `from` with D = 1 is repeated.
void place(const Array& from, float scale, Array& to, std::size_t axis, std::int64_t start) {
    const Shape &source = from.shape(), &target = to.shape();
    std::size_t inner = 1,
                outer = 1;  // elements behind the axis; slices between the leading axis and this one
    for (std::size_t i = axis + 1; i < source.size(); ++i) inner *= static_cast<std::size_t>(source[i]);
    for (std::size_t i = 1; i < axis; ++i) outer *= static_cast<std::size_t>(source[i]);
    const std::size_t length = static_cast<std::size_t>(source[axis]) * inner;
    const std::size_t stride = static_cast<std::size_t>(target[axis]) * inner;
    for (std::int64_t d = 0; d < target[0]; ++d) {
        const float* next =
            from.as<float>() + (source[0] == 1 ? 0 : static_cast<std::size_t>(d) * outer * length);
        float* out = to.as<float>() + static_cast<std::size_t>(d) * outer * stride +
                     static_cast<std::size_t>(start) * inner;
        for (std::size_t i = 0; i < outer; ++i, next += length, out += stride) {
            std::transform(next, next + length, out, [scale](float number) { return number * scale; });
        }
    }
}

// The array with zeros behind it along `axis` up to `rank`.
std::shared_ptr<const Array> padded(const std::shared_ptr<const Array>& array, std::size_t axis,
                                    std::int64_t rank) {
    if (array->shape()[axis] >= rank) return array;
    Shape shape = array->shape();
    shape[axis] = rank;
    const auto result = std::make_shared<Array>(Dtype::float32, std::move(shape));
    place(*array, 1, *result, axis, 0);
    return result;
}

// Whether the shapes are the same but for these axes.
bool alike(const Shape& a, const Shape& b, std::initializer_list<std::size_t> except) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (a[i] != b[i] && std::find(except.begin(), except.end(), i) == except.end()) return false;
    }
    return true;
}

Error unequal_shapes(const std::string& name, const std::vector<const Deltas*>& sets) {
    std::vector<std::string> shapes;
    shapes.reserve(sets.size());
    for (const Deltas* set : sets) shapes.push_back(repr(set->find(name)->shape()));
    return shape_error(name, "[" + join(shapes, ", ") + "]", "equal shapes but for the rank");
}

}  // namespace

Deltas::Deltas(std::map<std::string, Array>&& tensors) {
    for (auto& [name, array] : tensors) {
        check_tensor(name, array.dtype(), array.shape());
        tensors_.emplace(name, std::make_shared<const Array>(to_float32(std::move(array))));
    }
}

Deltas Deltas::load(const std::filesystem::path& path) {
    const auto unreadable = [&](const std::string& reason) {
        return delta_error(display(path) + " cannot be read as deltas: " + reason,
                           "Expected a safetensors file", "Check the path, or write the file again");
    };
    try {
        const SafetensorsFile file(path);
        const auto& [metadata, tensors] = file.header();
        const auto found = metadata.find(mark);
        if (found == metadata.end() || found->second != version) {
            throw delta_error(display(path) + " is not marked as a delta file of version 1",
                              "Expected the metadata `hywu.deltas` = `1`",
                              "Convert a LoRA file with `hywu deltas convert`");
        }
        for (const auto& [name, tensor] : tensors) {
            if (tensor.dtype != "F16" && tensor.dtype != "BF16" && tensor.dtype != "F32" &&
                tensor.dtype != "F64") {
                throw delta_error("Delta " + show(name, 200) + " has dtype " + tensor.dtype,
                                  "Expected F32, F16, BF16 or F64", "Store it as float32");
            }
        }
        for (const auto& [name, tensor] : tensors)
            check_tensor(name, *stored_dtype(tensor.dtype), tensor.shape);
        Deltas deltas;
        for (const auto& [name, tensor] : tensors) {
            Array array = to_float32(file.read(tensor, *stored_dtype(tensor.dtype)));
            deltas.tensors_.emplace(name, std::make_shared<const Array>(std::move(array)));
        }
        return deltas;
    } catch (const SafetensorsError& error) {
        throw unreadable(error.what());
    } catch (const std::system_error& error) {
        throw unreadable(error.code().message());
    }
}

void Deltas::save(const std::filesystem::path& path) const {
    std::map<std::string, const Array*> arrays;
    std::vector<std::string_view> pieces(1);
    for (const auto& [name, array] : tensors_) {
        arrays.emplace(name, array.get());
        pieces.emplace_back(reinterpret_cast<const char*>(array->data()), array->bytes());
    }
    const std::string header = safetensors_header({{mark, version}}, arrays);
    pieces[0] = header;
    try {
        write_atomically(path, pieces);
    } catch (const std::system_error& error) {
        throw Error(ErrorKind::input, display(path) + " cannot be written: " + error.code().message(),
                    "Expected a writable directory with room", "Choose another path, or free some space");
    }
}

Deltas Deltas::blend(const std::vector<const Deltas*>& sets, const std::vector<double>& weights,
                     std::optional<std::int64_t> max_rank) {
    if (sets.empty()) {
        throw delta_error("There is nothing to blend", "Expected at least one set of deltas", "Give one");
    }
    if (weights.size() != sets.size()) {
        throw delta_error("A blend of " + std::to_string(sets.size()) + " sets has " +
                              std::to_string(weights.size()) + " weights",
                          "Expected one for each set", "Correct the weights");
    }
    std::int64_t batch = 0, rank = 0;
    std::set<std::int64_t> batches;
    for (std::size_t i = 0; i < sets.size(); ++i) {
        if (!std::isfinite(weights[i])) {
            throw delta_error("A blend has the weight " + repr(weights[i]), "Expected finite weights",
                              "Correct the weight");
        }
        same_names(names_of(*sets[0]), names_of(*sets[i]), "the first set of the blend");
        batch = std::max(batch, sets[i]->batch());
        batches.insert(sets[i]->batch());
        rank += sets[i]->rank();
    }
    if (std::any_of(batches.begin(), batches.end(), [&](std::int64_t d) { return d != 1 && d != batch; })) {
        throw delta_error("A blend mixes sets for " +
                              repr(std::vector<std::int64_t>(batches.begin(), batches.end())) + " samples",
                          "Expected 1 or " + std::to_string(batch) + " everywhere",
                          "Use `select` or `stack`");
    }
    if (max_rank && rank > *max_rank) {
        throw delta_error("The blend has rank " + std::to_string(rank),
                          "The bundle takes up to rank " + std::to_string(*max_rank),
                          "Blend fewer or smaller sets, or export the bundle with a larger rank");
    }
    Deltas result;
    for (const auto& [name, first] : sets[0]->tensors_) {
        const std::size_t axis = rank_axis(name, *first);
        Shape shape = first->shape();
        shape[0] = batch;
        shape[axis] = 0;
        for (const Deltas* set : sets) {
            const Shape& part = set->find(name)->shape();
            if (!alike(part, first->shape(), {0, axis}) || (part[0] != 1 && part[0] != batch)) {
                throw unequal_shapes(name, sets);
            }
            shape[axis] += part[axis];
        }
        const auto sum = std::make_shared<Array>(Dtype::float32, std::move(shape));
        std::int64_t start = 0;
        for (std::size_t i = 0; i < sets.size(); ++i) {
            const Array& part = *sets[i]->find(name);
            place(part, is_b(name) ? from_double(weights[i]) : 1.0F, *sum, axis, start);
            start += part.shape()[axis];
        }
        result.tensors_.emplace(name, sum);
    }
    return result;
}

Deltas Deltas::stack(const std::vector<const Deltas*>& sets) {
    if (sets.empty()) {
        throw delta_error("There is nothing to stack", "Expected at least one set of deltas",
                          "Give one for each sample");
    }
    for (std::size_t i = 0; i < sets.size(); ++i) {
        same_names(names_of(*sets[0]), names_of(*sets[i]), "the first set");
        for (const auto& [name, array] : *sets[i]) {
            if (array->shape()[0] == 1) continue;
            throw delta_error(
                "Set " + std::to_string(i) + " is for " + std::to_string(sets[i]->batch()) + " samples",
                "Expected sets for one sample each", "Use `select`");
        }
    }
    Deltas result;
    for (const auto& [name, first] : sets[0]->tensors_) {
        const std::size_t axis = rank_axis(name, *first);
        Shape shape = first->shape();
        shape[0] = static_cast<std::int64_t>(sets.size());
        for (const Deltas* set : sets) {
            const Shape& part = set->find(name)->shape();
            if (!alike(part, first->shape(), {axis})) throw unequal_shapes(name, sets);
            shape[axis] = std::max(shape[axis], part[axis]);
        }
        const auto whole = std::make_shared<Array>(Dtype::float32, shape);
        auto* out = whole->as<float>();
        for (const Deltas* set : sets) {
            const auto part = padded(set->tensors_.find(name)->second, axis, shape[axis]);
            out = std::copy_n(part->as<float>(), part->size(), out);
        }
        result.tensors_.emplace(name, whole);
    }
    return result;
}

Deltas Deltas::select(std::int64_t sample) const {
    if (sample < 0 || sample >= batch()) {
        throw delta_error("There is no sample " + std::to_string(sample),
                          "The set is for " + std::to_string(batch()), "Choose one of these");
    }
    Deltas result;
    const std::int64_t samples = batch();
    for (const auto& [name, array] : tensors_) {
        if (array->shape()[0] == 1) {
            result.tensors_.emplace(name, array);
            continue;
        }
        if (array->shape()[0] != samples) {
            throw shape_error(name, repr(array->shape()), "one D for all tensors");
        }
        Shape shape = array->shape();
        const std::size_t bytes = array->bytes() / static_cast<std::size_t>(shape[0]);
        shape[0] = 1;
        const std::byte* data = array->data() + static_cast<std::size_t>(sample) * bytes;
        result.tensors_.emplace(name, std::make_shared<const Array>(Dtype::float32, std::move(shape), data));
    }
    return result;
}

Deltas Deltas::pad(const DeltaSpec& spec) const {
    Deltas result;
    for (const auto& [name, array] : tensors_) {
        const auto* wanted = spec.tensors.find(name);
        const std::size_t axis = rank_axis(name, *array);
        const bool fits = wanted && wanted->size() + 1 == array->shape().size();
        result.tensors_.emplace(name, fits ? padded(array, axis, (*wanted)[axis - 1]) : array);
    }
    return result;
}

void Deltas::check(const DeltaSpec& spec, std::optional<std::int64_t> batch) const {
    same_names(names_of(spec), names_of(*this), "this bundle");
    std::set<std::int64_t> sizes;
    for (const auto& [name, array] : tensors_) sizes.insert(array->shape()[0]);
    for (const auto& [name, wanted] : spec.tensors) {
        const Array& array = *find(name);
        if (!std::equal(array.shape().begin() + 1, array.shape().end(), wanted.begin(), wanted.end())) {
            throw shape_error(name, repr(array.shape()), "[D, " + repr(wanted).substr(1));
        }
        const auto* data = array.as<float>();
        if (!std::all_of(data, data + array.size(), [](float number) { return std::isfinite(number); })) {
            throw delta_error("Delta " + show(name, 200) + " has values that are not finite",
                              "Expected finite numbers", "Generate or convert the deltas again");
        }
    }
    if (sizes.size() > 1) {
        throw delta_error(
            "Deltas are for " + repr(std::vector<std::int64_t>(sizes.begin(), sizes.end())) + " samples",
            "Expected one D for all tensors", "Use `stack` to make a set for a batch");
    }
    if (batch && !sizes.empty() && *sizes.begin() != 1 && *sizes.begin() != *batch) {
        throw delta_error("The deltas are for " + std::to_string(*sizes.begin()) + " samples",
                          "Expected 1 or " + std::to_string(*batch), "Use `stack` or `select`");
    }
}

std::int64_t Deltas::rank() const {
    std::int64_t largest = 0;
    for (const auto& [name, array] : tensors_)
        largest = std::max(largest, array->shape()[rank_axis(name, *array)]);
    return largest;
}

std::int64_t Deltas::batch() const {
    std::int64_t largest = 0;
    for (const auto& [name, array] : tensors_) largest = std::max(largest, array->shape()[0]);
    return largest;
}

const Array* Deltas::find(std::string_view name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : found->second.get();
}

}  // namespace hywu::core
