#include "core/safetensors.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "core/json.hpp"

namespace hywu::core {

namespace {

struct StoredDtype {
    std::string_view word;
    unsigned bits;
    std::optional<Dtype> dtype;
};

constexpr std::array<StoredDtype, 22> stored_dtypes = {{
    {"BOOL", 8, Dtype::boolean},
    {"F4", 4, {}},
    {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},
    {"U8", 8, Dtype::uint8},
    {"I8", 8, Dtype::int8},
    {"F8_E5M2", 8, {}},
    {"F8_E4M3", 8, {}},
    {"F8_E8M0", 8, {}},
    {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},
    {"I16", 16, {}},
    {"U16", 16, {}},
    {"F16", 16, Dtype::float16},
    {"BF16", 16, Dtype::bfloat16},
    {"I32", 32, Dtype::int32},
    {"U32", 32, {}},
    {"F32", 32, Dtype::float32},
    {"C64", 64, {}},
    {"F64", 64, Dtype::float64},
    {"I64", 64, Dtype::int64},
    {"U64", 64, {}},
}};

const StoredDtype* find_dtype(std::string_view word) {
    const auto* found = std::find_if(stored_dtypes.begin(), stored_dtypes.end(),
                                     [&](const StoredDtype& entry) { return entry.word == word; });
    return found == stored_dtypes.end() ? nullptr : found;
}

[[noreturn]] void fail(const std::string& problem) { throw SafetensorsError(problem); }

std::uint64_t unsigned_integer(const Json& value, const std::string& what) {
    const std::int64_t* number = value.integer();
    if (!number || *number < 0) fail(what + " is not a whole number of at least 0");
    return static_cast<std::uint64_t>(*number);
}

const Json& member(const Json& object, std::string_view key, const std::string& whose) {
    const Json* found = object.member(key);
    if (!found) fail(whose + " has no `" + std::string(key) + "`");
    return *found;
}

const Json::Items& items(const Json& value, const std::string& what) {
    if (!value.items()) fail(what + " is not an array");
    return *value.items();
}

// Throws if the product does not fit 64 bits, as the library does.
std::uint64_t multiply(std::uint64_t a, std::uint64_t b, const std::string& whose) {
    if (b != 0 && a > std::numeric_limits<std::uint64_t>::max() / b) fail(whose + " is too large");
    return a * b;
}

// `begin` and `end` count from the end of the header.
struct Entry {
    std::string name;
    StoredTensor tensor;
    std::uint64_t begin = 0, end = 0;
};

Entry read_entry(const std::string& name, const Json& value) {
    const std::string whose = "tensor " + show(name, 200);
    if (!value.members()) fail(whose + " is not an object");
    Entry entry;
    entry.name = name;
    const std::string* word = member(value, "dtype", whose).string();
    const StoredDtype* dtype = word ? find_dtype(*word) : nullptr;
    if (!dtype) fail("the dtype of " + whose + " is unknown");
    entry.tensor.dtype = *word;
    std::uint64_t elements = 1;
    for (const Json& size : items(member(value, "shape", whose), "the shape of " + whose)) {
        const std::uint64_t number = unsigned_integer(size, "a dimension of " + whose);
        elements = multiply(elements, number, whose);
        entry.tensor.shape.push_back(static_cast<std::int64_t>(number));
    }
    const auto& offsets = items(member(value, "data_offsets", whose), "`data_offsets` of " + whose);
    if (offsets.size() != 2) fail("`data_offsets` of " + whose + " are not two");
    entry.begin = unsigned_integer(offsets[0], "an offset of " + whose);
    entry.end = unsigned_integer(offsets[1], "an offset of " + whose);
    if (entry.end < entry.begin) fail("the offsets of " + whose + " are invalid");
    entry.tensor.bytes = entry.end - entry.begin;
    const std::uint64_t bits = multiply(elements, dtype->bits, whose);
    if (bits % 8 != 0 || entry.tensor.bytes != bits / 8) {
        fail("the offsets of " + whose + " do not fit its dtype and shape");
    }
    return entry;
}

}  // namespace

std::optional<Dtype> stored_dtype(std::string_view word) {
    const StoredDtype* found = find_dtype(word);
    return found ? found->dtype : std::nullopt;
}

SafetensorsHeader SafetensorsHeader::parse(std::string_view json, std::uint64_t file_size) {
    Json value;
    try {
        value = Json::parse(json);
    } catch (const JsonError& error) {
        fail(std::string("its header is not valid JSON: ") + error.what());
    }
    if (!value.members()) fail("its header is not an object");
    SafetensorsHeader header;
    std::vector<Entry> entries;
    for (const auto& [name, entry] : *value.members()) {
        if (name != "__metadata__") {
            entries.push_back(read_entry(name, entry));
        } else if (const Json::Members* members = entry.members()) {
            for (const auto& [key, text] : *members) {
                if (!text.string()) fail("its metadata " + show(key) + " is not a string");
                header.metadata[key] = *text.string();
            }
        } else if (!entry.is_null()) {
            fail("its metadata is not an object");
        }
    }
    // The tensors cover what follows the header, without holes and without overlap.
    std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
        return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    std::uint64_t at = 0;
    const std::uint64_t start = 8 + json.size();
    for (Entry& entry : entries) {
        if (entry.begin != at) fail("the offsets of tensor " + show(entry.name, 200) + " are invalid");
        at = entry.end;
        entry.tensor.offset = start + entry.begin;
        header.tensors.emplace(std::move(entry.name), std::move(entry.tensor));
    }
    if (file_size < start || at != file_size - start) fail("its tensors do not cover the file");
    return header;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(path) {
    std::array<unsigned char, 8> prefix{};
    if (file_.read_at(0, prefix.data(), prefix.size()) < prefix.size()) fail("it is shorter than 8 bytes");
    std::uint64_t length = 0;
    for (std::size_t i = 8; i-- > 0;) length = length << 8 | prefix[i];
    if (length > SafetensorsHeader::max_bytes) fail("its header is too large");
    if (length > file_.size() - std::min<std::uint64_t>(8, file_.size())) fail("its header is cut off");
    std::string json(static_cast<std::size_t>(length), '\0');
    if (file_.read_at(8, json.data(), json.size()) < json.size()) fail("its header is cut off");
    header_ = SafetensorsHeader::parse(json, file_.size());
}

Array SafetensorsFile::read(const StoredTensor& tensor, Dtype dtype) const {
    Array array(dtype, tensor.shape);
    if (file_.read_at(tensor.offset, array.data(), array.bytes()) < array.bytes()) fail("it is cut off");
    return array;
}

std::string safetensors_header(const std::map<std::string, std::string>& metadata,
                               const std::map<std::string, const Array*>& tensors) {
    std::string text = "{\"__metadata__\":" + nlohmann::json(metadata).dump();
    std::uint64_t offset = 0;
    for (const auto& [name, array] : tensors) {
        const std::uint64_t end = offset + array->bytes();
        text += "," + nlohmann::json(name).dump() + R"(:{"dtype":"F32","shape":)" +
                nlohmann::json(array->shape()).dump() + R"(,"data_offsets":[)" + std::to_string(offset) +
                "," + std::to_string(end) + "]}";
        offset = end;
    }
    text += "}";
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::string prefix;
    for (int shift = 0; shift < 64; shift += 8) {
        prefix += static_cast<char>(static_cast<std::uint64_t>(text.size()) >> shift & 0xff);
    }
    return prefix + text;
}

}  // namespace hywu::core
