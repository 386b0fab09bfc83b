// Arguments of the C ABI: struct sizes, NULL, lengths, texts, shapes. What a caller promises (that memory is
// as large as it says) is kept; everything else is made up. Whatever comes in, there is a status, and a good
// request still gives the same.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <string>
#include <vector>

#include "hywu/hywu.h"

namespace {

constexpr std::size_t most_bytes = std::size_t{1} << 16;

void demand(bool condition) {
    if (!condition) std::abort();
}

// Arguments, and the memory behind them.
class Arguments {
public:
    explicit Arguments(FuzzedDataProvider& data) : data_(data) {}

    bool rarely() { return data_.ConsumeIntegralInRange<int>(0, 9) == 0; }
    const char* text() {
        if (rarely()) return nullptr;
        static const std::vector<const char*> known = {"text",       "image",        "even",    "wild",
                                                       "ids.words",  "region",       "latents", "ids.marks",
                                                       "mix.lora_A", "cache.initial"};
        if (data_.ConsumeBool())
            return data_.PickValueInArray({known[0], known[1], known[2], known[3], known[4], known[5],
                                           known[6], known[7], known[8], known[9]});
        texts_.push_back(data_.ConsumeRandomLengthString(40));
        return texts_.back().c_str();
    }
    // `bytes` of memory, exactly.
    std::uint8_t* memory(std::size_t bytes) {
        blocks_.emplace_back(std::max<std::size_t>(bytes, 1));
        std::vector<std::uint8_t>& block = blocks_.back();
        const std::vector<std::uint8_t> given =
            data_.ConsumeBytes<std::uint8_t>(std::min<std::size_t>(bytes, 64));
        std::copy(given.begin(), given.end(), block.begin());
        for (std::size_t i = given.size(); i < bytes; ++i) block[i] = static_cast<std::uint8_t>(i * 37);
        return blocks_.back().data();
    }
    hywu_pixels pixels() {
        hywu_pixels result = {};
        result.width = rarely() ? data_.ConsumeIntegral<std::int32_t>() : data_.ConsumeIntegralInRange(1, 40);
        result.height =
            rarely() ? data_.ConsumeIntegral<std::int32_t>() : data_.ConsumeIntegralInRange(1, 40);
        result.stride = rarely() ? data_.ConsumeIntegral<std::size_t>() : 0;
        const std::int64_t row = std::max<std::int64_t>(3 * std::int64_t{result.width}, 1);
        const std::size_t stride = result.stride != 0 ? result.stride : static_cast<std::size_t>(row);
        const std::int64_t height = std::max(result.height, 1);
        if (row > std::int64_t{most_bytes} || stride > most_bytes ||
            static_cast<std::size_t>(height) * stride > most_bytes) {
            // Such a picture is not in memory: it may be refused for its size alone.
            if (result.width > 0 && result.height > 0) result.width = 0;
            result.data = memory(1);
        } else {
            result.data =
                rarely() ? nullptr
                         : memory(static_cast<std::size_t>(height) * stride + static_cast<std::size_t>(row));
        }
        return result;
    }
    hywu_tensor tensor() {
        hywu_tensor result = {};
        result.name = text();
        result.dtype = data_.ConsumeIntegralInRange<std::int32_t>(-1, 9);
        result.rank = data_.ConsumeIntegralInRange<std::int32_t>(-1, 9);
        std::size_t bytes = 8;
        for (int i = 0; i < HYWU_MAX_RANK; ++i) {
            const std::int64_t size = rarely() ? data_.ConsumeIntegral<std::int64_t>()
                                               : data_.ConsumeIntegralInRange<std::int64_t>(0, 8);
            result.shape[i] = size;
            if (i < result.rank)
                bytes = size < 0 || static_cast<std::size_t>(size) > most_bytes || bytes > most_bytes
                            ? most_bytes + 1
                            : bytes * static_cast<std::size_t>(size);
        }
        result.data = bytes > most_bytes ? nullptr : memory(bytes);
        return result;
    }
    template <class T, class Make>
    const T* list(std::deque<std::vector<T>>& kept, std::size_t count, Make&& make) {
        if (data_.ConsumeBool()) return nullptr;
        kept.emplace_back();
        for (std::size_t i = 0; i < count; ++i) kept.back().push_back(make());
        return kept.back().data();
    }

    std::deque<std::vector<hywu_pixels>> pixel_lists;
    std::deque<std::vector<const char*>> text_lists;
    std::deque<std::vector<std::size_t>> length_lists;
    std::deque<std::vector<double>> double_lists;
    std::deque<std::vector<std::uint64_t>> seed_lists;
    std::deque<std::vector<hywu_guidance>> guidance_lists;
    std::deque<std::vector<hywu_tensor>> tensor_lists;
    std::deque<std::vector<const hywu_deltas*>> delta_lists;

private:
    FuzzedDataProvider& data_;
    std::deque<std::string> texts_;
    std::deque<std::vector<std::uint8_t>> blocks_;
};

// The toy on ONNX Runtime; null where its library is not.
hywu_editor* editor() {
    static hywu_editor* const instance = [] {
        const std::string toy =
            (std::filesystem::path(__FILE__).parent_path().parent_path() / "tests/data/toy").u8string();
        hywu_editor_params params;
        demand(hywu_editor_params_init(&params, sizeof params) == HYWU_OK);
        params.threads = 1;
        hywu_editor* made = nullptr;
        hywu_editor_load(toy.c_str(), nullptr, &params, &made);
        return made;
    }();
    return instance;
}

std::vector<std::uint8_t> good_request(const hywu_deltas* deltas) {
    std::vector<std::uint8_t> rgb(8 * 8 * 3, 99), out(rgb.size());
    const std::vector<float> region(4, 0.5F);
    const hywu_pixels photo = {rgb.data(), 8, 8, 0};
    const char* prompt = "abc";
    const hywu_tensor input = {"region", region.data(), HYWU_DTYPE_FLOAT32, 4, {1, 1, 2, 2}};
    hywu_edit_params params;
    demand(hywu_edit_params_init(&params, sizeof params) == HYWU_OK);
    params.photos = &photo;
    params.prompts = &prompt;
    params.inputs = &input;
    params.input_count = 1;
    params.deltas = &deltas;
    params.delta_count = deltas != nullptr ? 1 : 0;
    demand(hywu_edit_into(editor(), &params, out.data(), out.size(), nullptr, nullptr) == HYWU_OK);
    return out;
}

std::int32_t progress(void*, std::int32_t done, std::int32_t total) {
    demand(done >= 1 && done <= total);
    return 0;
}

void fuzz_edit(FuzzedDataProvider& data, hywu_deltas* deltas) {
    Arguments make(data);
    hywu_edit_params params;
    demand(hywu_edit_params_init(&params, sizeof params) == HYWU_OK);
    if (make.rarely()) params.struct_size = data.ConsumeIntegralInRange<std::size_t>(0, sizeof params);
    const auto count = static_cast<std::size_t>(data.ConsumeIntegralInRange(0, 5));
    params.count = make.rarely() ? std::max<std::size_t>(data.ConsumeIntegral<std::size_t>(), 5) : count;
    params.photos = make.list(make.pixel_lists, count, [&] { return make.pixels(); });
    params.prompts = make.list(make.text_lists, count, [&] { return make.text(); });
    if (params.prompts != nullptr) {
        params.prompt_lengths = make.list(make.length_lists, count, [&, i = std::size_t{0}]() mutable {
            const char* const text = params.prompts[i++];
            return text == nullptr ? 7 : data.ConsumeBool() ? HYWU_TERMINATED : std::strlen(text);
        });
    }
    params.negative_prompts = make.list(make.text_lists, count, [&] { return make.text(); });
    params.seed = data.ConsumeIntegral<std::uint64_t>();
    params.seeds = make.list(make.seed_lists, count, [&] { return data.ConsumeIntegral<std::uint64_t>(); });
    const auto doubles = [&] {
        return make.list(make.double_lists, count, [&] { return data.ConsumeFloatingPoint<double>(); });
    };
    params.guidance_count = data.ConsumeIntegralInRange<std::size_t>(0, 2);
    params.guidance = make.list(make.guidance_lists, params.guidance_count, [&] {
        return hywu_guidance{make.text(), data.ConsumeFloatingPoint<double>(), doubles()};
    });
    params.delta_strength = data.ConsumeFloatingPoint<double>();
    params.delta_strengths = doubles();
    params.delta_count =
        make.rarely() ? data.ConsumeIntegral<std::size_t>() : data.ConsumeIntegralInRange<std::size_t>(0, 1);
    params.deltas = make.list(make.delta_lists, std::max<std::size_t>(count, 1),
                              [&] { return make.rarely() ? nullptr : deltas; });
    params.sampler = data.ConsumeBool() ? nullptr : make.text();
    params.steps = make.rarely() ? data.ConsumeIntegral<std::int32_t>() : data.ConsumeIntegralInRange(0, 5);
    if (make.rarely()) params.width = data.ConsumeIntegral<std::int32_t>();
    if (make.rarely()) params.height = data.ConsumeIntegral<std::int32_t>();
    const auto tensors = [&](std::size_t n) {
        return make.list(make.tensor_lists, n, [&] { return make.tensor(); });
    };
    if (make.rarely()) params.noise = tensors(1);
    if (make.rarely()) params.latents = tensors(1);
    params.input_count = data.ConsumeIntegralInRange<std::size_t>(0, 3);
    params.inputs = tensors(params.input_count);
    if (make.rarely())
        params.input_count = std::max<std::size_t>(data.ConsumeIntegral<std::size_t>(), 100000);
    params.progress = progress;
    hywu_images* images = nullptr;
    const hywu_status status = hywu_edit(editor(), &params, &images);
    demand((status == HYWU_OK) == (images != nullptr));
    demand(status == HYWU_OK || std::strlen(hywu_last_error()) > 0);
    demand(status != HYWU_ERROR_INTERNAL);
    hywu_images_free(images);
}

hywu_deltas* fuzz_deltas(FuzzedDataProvider& data) {
    Arguments make(data);
    const auto count = data.ConsumeIntegralInRange<std::size_t>(0, 3);
    const hywu_tensor* const tensors = make.list(make.tensor_lists, count, [&] { return make.tensor(); });
    hywu_deltas* made = nullptr;
    const hywu_status status = hywu_deltas_create(tensors, count, &made);
    demand((status == HYWU_OK) == (made != nullptr));
    demand(status != HYWU_ERROR_INTERNAL);
    if (made != nullptr) {
        const std::vector<const hywu_deltas*> sets(data.ConsumeIntegralInRange<std::size_t>(0, 3), made);
        const std::vector<double> weights(sets.size(), data.ConsumeFloatingPoint<double>());
        hywu_deltas* other = nullptr;
        hywu_deltas_blend(sets.data(), weights.data(), sets.size(),
                          data.ConsumeIntegralInRange<std::int64_t>(-1, 9), &other);
        hywu_deltas_free(other);
        other = nullptr;
        hywu_deltas_stack(sets.data(), sets.size(), &other);
        hywu_deltas_free(other);
        other = nullptr;
        hywu_deltas_select(made, data.ConsumeIntegralInRange<std::int64_t>(-1, 3), &other);
        hywu_deltas_free(other);
        hywu_tensor tensor;
        for (std::size_t i = 0; i <= hywu_deltas_count(made); ++i) hywu_deltas_tensor(made, i, &tensor);
        hywu_deltas_check(made, editor(), data.ConsumeIntegralInRange<std::int64_t>(-1, 3));
    }
    return made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
    FuzzedDataProvider data(bytes, size);
    hywu_deltas* const deltas = fuzz_deltas(data);
    if (editor() != nullptr) {
        static const std::vector<std::uint8_t> expected = good_request(nullptr);
        fuzz_edit(data, deltas);
        if (data.ConsumeBool()) demand(good_request(nullptr) == expected);
        Arguments make(data);
        hywu_generate_params params;
        demand(hywu_generate_params_init(&params, sizeof params) == HYWU_OK);
        const hywu_pixels photo = make.pixels();
        params.photo = &photo;
        params.prompt = make.text();
        params.input_count = data.ConsumeIntegralInRange<std::size_t>(0, 2);
        params.inputs = make.list(make.tensor_lists, params.input_count, [&] { return make.tensor(); });
        hywu_deltas* made = nullptr;
        demand(hywu_generate(editor(), &params, &made) != HYWU_ERROR_INTERNAL);
        hywu_deltas_free(made);
    }
    hywu_deltas_free(deltas);
    std::vector<std::uint8_t> memory(static_cast<std::size_t>(data.ConsumeIntegralInRange(1, 5000)));
    hywu_edit_params_init(reinterpret_cast<hywu_edit_params*>(memory.data()), memory.size());
    return 0;
}
