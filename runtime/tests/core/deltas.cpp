#include "core/deltas.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "scratch.hpp"

using namespace hywu::core;

namespace {

DeltaSpec spec() {
    DeltaSpec result;
    result.rank = 4;
    for (const DeltaTarget& target : {DeltaTarget{"block.to_q", TargetKind::linear, 6, 5, 4, {}},
                                      DeltaTarget{"block.conv", TargetKind::conv, 3, 2, 2, {{3, 1}}}}) {
        result.tensors.add(target.a_name(), target.a_shape());
        result.tensors.add(target.b_name(), target.b_shape());
        result.targets.push_back(target);
    }
    return result;
}

Array filled(Shape shape, float first) {
    Array array(Dtype::float32, std::move(shape));
    for (std::size_t i = 0; i < array.size(); ++i) array.as<float>()[i] = first + static_cast<float>(i);
    return array;
}

// A set with small whole numbers, so that products are exact.
Deltas make(float first, std::int64_t rank = 4, std::int64_t batch = 1) {
    std::map<std::string, Array> tensors;
    for (DeltaTarget target : spec().targets) {
        target.rank = std::min(rank, target.rank);
        for (const auto& [name, inner] :
             {std::pair(target.a_name(), target.a_shape()), std::pair(target.b_name(), target.b_shape())}) {
            Shape shape = {batch};
            shape.insert(shape.end(), inner.begin(), inner.end());
            tensors.emplace(name, filled(shape, first));
        }
    }
    return Deltas(std::move(tensors));
}

// B·A of one sample of a module.
std::vector<float> product(const Deltas& deltas, const std::string& module, std::int64_t sample = 0) {
    const Array &a = *deltas.find(module + ".lora_A"), &b = *deltas.find(module + ".lora_B");
    const auto rank = static_cast<std::size_t>(a.shape()[1]), out = static_cast<std::size_t>(b.shape()[1]);
    const std::size_t inner = a.size() / static_cast<std::size_t>(a.shape()[0]) / rank;
    const float* a_data =
        a.as<float>() + (a.shape()[0] > 1 ? static_cast<std::size_t>(sample) * rank * inner : 0);
    const float* b_data =
        b.as<float>() + (b.shape()[0] > 1 ? static_cast<std::size_t>(sample) * out * rank : 0);
    std::vector<float> result(out * inner);
    for (std::size_t o = 0; o < out; ++o) {
        for (std::size_t r = 0; r < rank; ++r) {
            for (std::size_t i = 0; i < inner; ++i) {
                result[o * inner + i] += b_data[o * rank + r] * a_data[r * inner + i];
            }
        }
    }
    return result;
}

bool equal(const Deltas& a, const Deltas& b) {
    return a.size() == b.size() && std::all_of(a.begin(), a.end(), [&](const auto& entry) {
               const Array* other = b.find(entry.first);
               return other && other->shape() == entry.second->shape() &&
                      std::memcmp(other->data(), entry.second->data(), other->bytes()) == 0;
           });
}

Deltas one(const std::string& name, Array array) {
    std::map<std::string, Array> tensors;
    tensors.emplace(name, std::move(array));
    return Deltas(std::move(tensors));
}

}  // namespace

TEST_CASE("arrays own what they hold") {
    Array array(Dtype::int64, {2, 3});
    CHECK(array.size() == 6);
    CHECK(array.bytes() == 48);
    CHECK(reinterpret_cast<std::uintptr_t>(array.data()) % Array::alignment == 0);
    CHECK(array.as<std::int64_t>()[5] == 0);
    array.as<std::int64_t>()[5] = 7;
    Array copy = array;
    copy.as<std::int64_t>()[5] = 8;
    CHECK(array.as<std::int64_t>()[5] == 7);
    array = copy;
    const Array moved = std::move(copy);
    CHECK(array.as<std::int64_t>()[5] == moved.as<std::int64_t>()[5]);
    CHECK(count({}) == 1);
    CHECK(count({3, 0, INT64_MAX, INT64_MAX}) == 0);
    CHECK_THROWS_AS(count({1, -1}), std::length_error);
    CHECK_THROWS_AS(count({INT64_MAX, 2}), std::length_error);
    CHECK_THROWS_AS(count({1LL << 32, 1LL << 32, 1LL << 32}), std::length_error);
}

TEST_CASE("deltas are saved and loaded") {
    const Scratch scratch;
    const auto path = scratch.path() / "d.safetensors";
    const Deltas deltas = make(-3, 4, 2);
    CHECK(deltas.rank() == 4);
    CHECK(deltas.batch() == 2);
    deltas.save(path);
    CHECK(equal(Deltas::load(path), deltas));
    const std::string whole = contents(path);
    CHECK(whole.size() % 4 == 0);
    CHECK(whole.substr(8, 42) == R"({"__metadata__":{"hywu.deltas":"1"},"block)");
    Deltas().save(path);
    CHECK(Deltas::load(path).empty());
    for (std::size_t length = 0; length < whole.size(); length += length < 400 ? 1 : 37) {
        scratch.write("d.safetensors", whole.substr(0, length));
        check_error(ErrorKind::delta, "cannot be read as deltas", [&] { Deltas::load(path); });
    }
    for (std::size_t at = 0; at < 400; ++at) {
        std::string damaged = whole;
        damaged[at] = static_cast<char>(damaged[at] ^ 1 << at % 8);
        scratch.write("d.safetensors", damaged);
        try {
            Deltas::load(path).check(spec());
        } catch (const Error& error) {
            CHECK(error.kind() == ErrorKind::delta);
        }
    }
    check_error(ErrorKind::delta, "ghost", [&] { Deltas::load(scratch.path() / "ghost"); });
    check_error(ErrorKind::input, "cannot be written", [&] { deltas.save(scratch.path() / "no" / "file"); });
}

TEST_CASE("other dtypes become float32") {
    const std::vector<std::uint16_t> halves = {0x3c00, 0xc000, 0x0001, 0x8000, 0x7bff, 0x7c00};
    const Deltas half = one("x.lora_A", Array(Dtype::float16, {1, 2, 3}, halves.data()));
    const float* h = half.find("x.lora_A")->as<float>();
    CHECK(std::vector<float>(h, h + 5) == std::vector<float>{1, -2, 0x1p-24F, 0, 65504});
    CHECK(std::signbit(h[3]));
    CHECK(std::isinf(h[5]));
    const std::vector<std::uint16_t> brains = {0x3f80, 0xc000, 0x7f80};
    const Deltas brain = one("x.lora_B", Array(Dtype::bfloat16, {1, 1, 3}, brains.data()));
    CHECK(brain.find("x.lora_B")->as<float>()[1] == -2);
    const std::vector<double> doubles = {0.1, 1e300, -1e300};
    const Deltas wide = one("x.lora_B", Array(Dtype::float64, {1, 1, 3}, doubles.data()));
    CHECK(wide.find("x.lora_B")->as<float>()[0] == 0.1F);
    CHECK(wide.find("x.lora_B")->as<float>()[2] == -std::numeric_limits<float>::infinity());
}

TEST_CASE("a blend is the weighted sum") {
    const Deltas a = make(-2, 1), b = make(1, 2, 3);
    const Deltas blend = Deltas::blend({&a, &b, &a}, {0.5, -2, 1}, 4);
    CHECK(blend.rank() == 4);
    CHECK(blend.batch() == 3);
    for (const std::string module : {"block.to_q", "block.conv"}) {
        for (std::int64_t sample = 0; sample < 3; ++sample) {
            const auto found = product(blend, module, sample);
            const auto first = product(a, module), second = product(b, module, sample);
            for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i] == 1.5F * first[i] - 2 * second[i]);
        }
    }
    check_error(ErrorKind::delta, "nothing to blend", [] { Deltas::blend({}, {}); });
    check_error(ErrorKind::delta, "2 weights", [&] { Deltas::blend({&a}, {1, 2}); });
    check_error(ErrorKind::delta, "rank 3", [&] { Deltas::blend({&a, &b}, {1, 1}, 2); });
    check_error(ErrorKind::delta, "inf", [&] { Deltas::blend({&a}, {HUGE_VAL}); });
    const Deltas c = make(0, 1, 2);
    check_error(ErrorKind::delta, "[2, 3] samples", [&] { Deltas::blend({&b, &c}, {1, 1}); });
    const Deltas other = one("block.to_q.lora_A", filled({1, 2, 2}, 0));
    check_error(ErrorKind::delta, "lack 'block.conv.lora_A'", [&] { Deltas::blend({&a, &other}, {1, 1}); });
    const Deltas same = one("x.lora_A", filled({1, 2, 2}, 0)),
                 deep = one("x.lora_A", filled({1, 2, 2, 1}, 0));
    check_error(ErrorKind::delta, "[[1, 2, 2], [1, 2, 2, 1]]", [&] {
        Deltas::blend({&same, &deep}, {1, 1});
    });
    check_error(ErrorKind::delta, "shape", [&] { Deltas::stack({&same, &deep}); });
}

TEST_CASE("stack, select and pad change no product") {
    const std::vector<Deltas> sets = {make(1, 4), make(2, 1), make(3, 2)};
    const Deltas stacked = Deltas::stack({&sets[0], &sets[1], &sets[2]});
    CHECK_NOTHROW(stacked.check(spec(), 3));
    for (std::int64_t i = 0; i < 3; ++i) {
        const Deltas& set = sets[static_cast<std::size_t>(i)];
        const Deltas padded = set.pad(spec());
        CHECK_NOTHROW(padded.check(spec(), 7));
        for (const std::string module : {"block.to_q", "block.conv"}) {
            CHECK(product(stacked.select(i), module) == product(set, module));
            CHECK(product(padded, module) == product(set, module));
        }
    }
    check_error(ErrorKind::delta, "nothing to stack", [] { Deltas::stack({}); });
    check_error(ErrorKind::delta, "Set 0 is for 3 samples", [&] { Deltas::stack({&stacked}); });
    for (const std::int64_t sample : {-1, 3}) {
        check_error(ErrorKind::delta, "no sample", [&] { stacked.select(sample); });
    }
}

TEST_CASE("experts: the rank comes after them") {
    std::map<std::string, Array> tensors;
    tensors.emplace("mlp.lora_A", filled({1, 3, 2, 6}, 0));
    tensors.emplace("mlp.lora_B", filled({1, 3, 5, 2}, 0));
    const Deltas experts(std::move(tensors));
    CHECK(experts.rank() == 2);
    const Deltas blend = Deltas::blend({&experts, &experts}, {1, 2});
    CHECK(blend.find("mlp.lora_A")->shape() == Shape{1, 3, 4, 6});
    CHECK(blend.find("mlp.lora_B")->shape() == Shape{1, 3, 5, 4});
    const float* b = blend.find("mlp.lora_B")->as<float>();
    CHECK(std::vector<float>(b, b + 8) == std::vector<float>{0, 1, 0, 2, 2, 3, 4, 6});
}

TEST_CASE("sets that do not fit are refused by name") {
    const auto with = [](const std::string& name, Array array) {
        std::map<std::string, Array> tensors;
        for (const auto& [key, value] : make(0)) tensors.emplace(key, *value);
        tensors.insert_or_assign(name, std::move(array));
        return Deltas(std::move(tensors));
    };
    CHECK_NOTHROW(make(0).check(spec(), 5));
    check_error(ErrorKind::delta, "have the extra 'x.lora_A'", [&] {
        with("x.lora_A", filled({1, 1, 1}, 0)).check(spec());
    });
    check_error(ErrorKind::delta, "'block.to_q.lora_A' has shape [1, 4, 7]. Expected [D, 4, 6]", [&] {
        with("block.to_q.lora_A", filled({1, 4, 7}, 0)).check(spec());
    });
    check_error(ErrorKind::delta, "'block.to_q.lora_A' has values that are not finite", [&] {
        with("block.to_q.lora_A", filled({1, 4, 6}, std::nanf(""))).check(spec());
    });
    check_error(ErrorKind::delta, "[1, 2] samples", [&] {
        with("block.to_q.lora_A", filled({2, 4, 6}, 0)).check(spec());
    });
    check_error(ErrorKind::delta, "for 2 samples", [] { make(0, 4, 2).check(spec(), 3); });
    check_error(ErrorKind::delta, "shape", [] { make(0, 1).check(spec()); });
    check_error(ErrorKind::delta, "'blocks.to_q.lora_A' is nearest to 'block.to_q.lora_A'", [&] {
        one("blocks.to_q.lora_A", filled({1, 1, 1}, 0)).check(spec());
    });
    check_error(ErrorKind::delta, "called 'x.weight'", [] { one("x.weight", filled({1, 1, 1}, 0)); });
    check_error(ErrorKind::delta, "called", [] { one("\xff.lora_A", filled({1, 1, 1}, 0)); });
    check_error(ErrorKind::delta, "int64", [] { one("x.lora_A", Array(Dtype::int64, {1, 1, 1})); });
    check_error(ErrorKind::delta, "[1, 1]", [] { one("x.lora_A", filled({1, 1}, 0)); });
    check_error(ErrorKind::delta, "[1, 0, 1]", [] { one("x.lora_A", filled({1, 0, 1}, 0)); });
}
