#include "core/manifest.hpp"

#include <functional>
#include <nlohmann/json.hpp>

#include "scratch.hpp"

using namespace hywu::core;
using json = nlohmann::ordered_json;

namespace {

// A manifest with everything that the format has.
const std::string& valid() {
    static const std::string text = contents(HYWU_SOURCE_DIR "/fuzz/corpus/manifest/valid.json");
    return text;
}

void refused(std::string_view word, const std::function<void(json&)>& change) {
    json value = json::parse(valid());
    change(value);
    check_error(ErrorKind::bundle, word, [&] { Manifest::parse(value.dump()); });
}

}  // namespace

TEST_CASE("a manifest is read") {
    const Manifest m = Manifest::parse(valid());
    CHECK(m.name == "made up");
    CHECK_FALSE(m.family);
    CHECK(m.graphs.begin()->first == "words");  // in the order of the file
    CHECK(m.axes.at("delta_batch").one_or == "batch");
    CHECK(m.axes.at("latent_height").divide == 4);
    const ProvidedTensor& text = m.tensors.at("ids.base");
    CHECK(text.source == TensorSource::text);
    CHECK(text.constant == "base");
    CHECK(text.shape == Dims{{0, "batch"}, {8, ""}});
    CHECK(m.tensors.at("timestep").changes());
    CHECK_FALSE(m.tensors.at("initial_scale").changes());
    REQUIRE(m.schedules);
    CHECK(m.schedules->samplers.at("wild").steps == std::array<std::int64_t, 2>{2, 4});
    CHECK(m.schedules->samplers.at("wild").stochastic);
    REQUIRE(m.deltas);
    CHECK(m.deltas->tensors.at("mix.lora_A") == std::vector<std::int64_t>{3, 4});
    CHECK(m.deltas->tensors.at("mix.lora_B") == std::vector<std::int64_t>{4, 3});
    CHECK(m.tokenizers.at("short").pad_side == PadSide::left);
    CHECK(m.tokenizers.at("long").truncate);
    CHECK(m.linked.at("step.onnx").at("mix").dtype == Dtype::bfloat16);
    CHECK(m.variants.at("fp16").precision == Precision::fp16);
    const Engine& engine = m.engines.at("one");
    CHECK(name(engine.backend) == "tensorrt-rtx");
    CHECK(engine.covers({{"batch", 4}}) == std::nullopt);
    CHECK(engine.covers({{"batch", 5}, {"height", 99}}) == "batch");
    CHECK(m.stale("one") == std::nullopt);
    CHECK(m.guidance[0].satisfied(1.5));
    CHECK_FALSE(m.guidance[0].satisfied(1.0));
    CHECK(is_guided(m.guidance));
    CHECK_FALSE(is_guided({{"distilled", 3.5, {}, {}}}));
    const Call& call = m.program[0];
    CHECK(m.reads(call)[0] == std::pair<std::string, std::string>("ids", "ids.base"));
    CHECK(m.writes(call)[0] == std::pair<std::string, std::string>("hidden", "base.words"));
    CHECK(m.program[7].runs(true) != m.program[7].runs(false));
    const Value& carried = m.signatures.at("latents");
    CHECK(carried.dtype == Dtype::float32);
    CHECK(carried.shape.size() == 4);
    CHECK(m.signatures.at("mix.lora_A").shape[0] == Dim{0, "delta_batch"});
}

TEST_CASE("manifests that are refused") {
    refused("format 1", [](json& m) { m["format"] = 2; });
    refused("`axes` is missing", [](json& m) { m.erase("axes"); });
    refused("colour", [](json& m) { m["graphs"]["step"]["colour"] = 1; });
    refused("size", [](json& m) { m["files"]["step.onnx"]["size"] = true; });
    refused("sha256", [](json& m) { m["files"]["step.onnx"]["sha256"] = "ab"; });
    refused("float8", [](json& m) { m["tensors"]["gate"]["dtype"] = "float8"; });
    refused("graphs['step'].file", [](json& m) { m["graphs"]["step"]["file"] = "../step.onnx"; });
    refused("ghost", [](json& m) { m["program"][0]["graph"] = "ghost"; });
    refused("batches", [](json& m) { m["tensors"]["gate"]["shape"] = {"batches"}; });
    refused("one producer", [](json& m) { m["program"].push_back(json(m["program"][4])); });
    refused("equal dtypes", [](json& m) { m["graphs"]["marks"]["inputs"][0]["dtype"] = "int32"; });
    refused("load phase", [](json& m) { m["program"][0]["inputs"]["ids"] = "ids.words"; });
    refused("step phase", [](json& m) { m["program"][5]["inputs"]["noise"] = "noise.step"; });
    refused("state[0].next", [](json& m) { m["state"][0]["next"] = "source"; });
    refused("results", [](json& m) { m["results"] = json::object(); });
    refused("rank", [](json& m) { m["deltas"]["targets"][0]["rank"] = 4; });
    refused("divide", [](json& m) { m["axes"]["latent_height"]["divide"] = 3; });
    refused("reads past", [](json& m) { m["linked"]["step.onnx"]["mix"]["offset"] = 990; });
    refused("a derived axis", [](json& m) { m["engines"]["one"]["shapes"]["latent_height"] = {1, 1, 1}; });
    refused("2^40", [](json& m) { m["graphs"]["step"]["inputs"][0]["shape"] = std::vector(8, 2147483647); });
    refused("2^20", [](json& m) {
        for (int i = 0; i < 100'000; ++i) {
            m["program"].push_back({{"graph", "step"}, {"phase", "step"}, {"guided", true}});
        }
    });
}

TEST_CASE("a manifest cut anywhere is refused") {
    const std::string& text = valid();
    for (std::size_t length = 0; length < text.size(); length += 17) {
        CHECK_THROWS_AS(Manifest::parse(std::string_view(text).substr(0, length)), Error);
    }
}

TEST_CASE("safe paths") {
    for (const char* path : {"a.onnx", "weights/a-b_c.1.safetensors", "..a/b..c", "ü"})
        CHECK(is_safe_path(path));
    for (const char* path :
         {"", "/a", "a/", "a//b", "./a", "a/./b", "..", "a/..", "a\\b", "C:/a", "a\nb", "a ", "a.", "\xff"}) {
        CHECK_FALSE(is_safe_path(path));
    }
    CHECK_FALSE(is_safe_path(std::string_view("a\0b", 3)));
    CHECK_FALSE(is_safe_path(std::string(2000, 'x')));
}
