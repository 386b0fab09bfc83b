#include "core/noise.hpp"

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "scratch.hpp"

using namespace hywu::core;

namespace {

const nlohmann::json& vectors() {
    static const nlohmann::json all =
        nlohmann::json::parse(contents(HYWU_REPOSITORY_DIR "/tests/data/noise.json"));
    return all;
}

std::uint32_t word(const nlohmann::json& hex) {
    return static_cast<std::uint32_t>(std::stoul(hex.get<std::string>(), nullptr, 16));
}

}  // namespace

TEST_CASE("Philox: the answers that its authors published") {
    REQUIRE(vectors().at("philox").size() >= 3);
    for (const auto& entry : vectors().at("philox")) {
        std::array<std::uint32_t, 4> counter{}, expected{};
        for (std::size_t i = 0; i < 4; ++i) {
            counter[i] = word(entry.at("counter")[i]);
            expected[i] = word(entry.at("words")[i]);
        }
        CHECK(noise::philox(counter, {word(entry.at("key")[0]), word(entry.at("key")[1])}) == expected);
    }
}

TEST_CASE("noise: the vectors that this project publishes") {
    REQUIRE(vectors().at("normal").size() >= 3);
    for (const auto& entry : vectors().at("normal")) {
        std::vector<float> numbers(entry.at("length").get<std::size_t>());
        noise::normal(numbers.data(), numbers.size(), std::stoull(entry.at("seed").get<std::string>()),
                      entry.at("sample"), entry.at("draw"));
        const auto& expected = entry.at("float32");  // all, or the last ones
        for (std::size_t i = 0; i < expected.size(); ++i) {
            std::uint32_t bits = 0;
            std::memcpy(&bits, &numbers[numbers.size() - expected.size() + i], sizeof bits);
            CHECK(bits == word(expected[i]));
        }
    }
}

TEST_CASE("noise: a length that is no multiple of four is the start of a longer one") {
    std::vector<float> whole(64), part(70, 7);
    noise::normal(whole.data(), whole.size(), 99, 1, 2);
    for (std::size_t length = 0; length <= 64; ++length) {
        part.assign(70, 7);
        noise::normal(part.data(), length, 99, 1, 2);
        CHECK(std::equal(part.begin(), part.begin() + static_cast<std::ptrdiff_t>(length), whole.begin()));
        CHECK(part[length] == 7);
    }
}

TEST_CASE("noise is standard normal, and another for every seed, sample and draw") {
    constexpr std::size_t length = 40'000;
    std::vector<std::vector<float>> all;
    for (const auto& [seed, sample, draw] :
         std::vector<std::array<std::uint32_t, 3>>{{5, 0, 0}, {5, 1, 0}, {5, 0, 1}, {6, 0, 0}}) {
        all.emplace_back(length);
        noise::normal(all.back().data(), length, seed, sample, draw);
    }
    for (const auto& a : all) {
        for (const auto& b : all) {
            double mean = 0, product = 0;
            for (std::size_t i = 0; i < length; ++i) {
                mean += a[i] / length;
                product += double{a[i]} * b[i] / length;
            }
            CHECK(std::abs(mean) < 0.02);
            CHECK(std::abs(product - (&a == &b ? 1 : 0)) < 0.03);
        }
    }
}
