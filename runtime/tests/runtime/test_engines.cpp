// Backends that run engines: which engine of a bundle is taken, and what it refuses.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "fake_backend.hpp"
#include "runtime/editor.hpp"
#include "toy.hpp"

using namespace hywu;
using namespace hywu::testing;
using Json = nlohmann::ordered_json;

namespace {

// The toy with engines, in a folder of its own.
class EngineBundle {
public:
    explicit EngineBundle(const std::function<void(Json&)>& change) {
        std::filesystem::remove_all(path_);
        std::filesystem::copy(toy_path(), path_, std::filesystem::copy_options::recursive);
        Json manifest = Json::parse(std::ifstream(path_ / "manifest.json"));
        Json graphs = Json::object(), sources = Json::object();
        for (const auto& [name, graph] : manifest["graphs"].items()) {
            graphs[name] = graph["file"];  // stands for a plan file
            sources[graph["file"].get<std::string>()] =
                manifest["files"][graph["file"].get<std::string>()]["sha256"];
        }
        manifest["engines"]["first"] = {{"backend", "tensorrt"},
                                        {"version", "10.3.0"},
                                        {"compute_capabilities", {"8.7"}},
                                        {"shapes", {{"batch", {1, 1, 2}}, {"height", {8, 8, 32}}}},
                                        {"graphs", graphs},
                                        {"sources", sources}};
        change(manifest);
        std::ofstream(path_ / "manifest.json") << manifest.dump();
    }
    ~EngineBundle() { std::filesystem::remove_all(path_); }
    EngineBundle(const EngineBundle&) = delete;
    EngineBundle& operator=(const EngineBundle&) = delete;

    runtime::SharedBundle open() const {
        return {std::make_shared<const core::Bundle>(core::Bundle::open(path_)),
                std::make_shared<runtime::SessionPool>()};
    }

private:
    std::filesystem::path path_ = std::filesystem::temp_directory_path() / "hywu-tests-engines";
};

class EngineBackend final : public backends::Backend {
public:
    std::string_view name() const override { return "tensorrt"; }
    std::shared_ptr<Session> load(const std::filesystem::path& file,
                                  const std::vector<core::Weight>& weights) override {
        return inner_.load(file, weights);
    }
    std::unique_ptr<DeviceTensor> allocate(core::Dtype dtype, const std::vector<int64_t>& shape) override {
        return inner_.allocate(dtype, shape);
    }
    bool uses_engines() const override { return true; }
    std::optional<std::string> refuses(const core::Engine& engine) const override {
        if (engine.version == "10.3.0") return std::nullopt;
        return "is of version " + engine.version;
    }

private:
    FakeBackend inner_{std::make_shared<FakeLog>()};
};

std::unique_ptr<runtime::Editor> editor_of(const EngineBundle& bundle,
                                           std::optional<std::string> variant = {}) {
    runtime::EditorOptions options;
    options.variant = std::move(variant);
    return std::make_unique<runtime::Editor>(bundle.open(), std::make_shared<EngineBackend>(), "engines",
                                             options);
}

}  // namespace

TEST_CASE("an engine of the backend, the variant and the version is taken, and its shapes hold") {
    const EngineBundle bundle([](Json& manifest) {
        Json other = manifest["engines"]["first"];
        other["backend"] = "tensorrt-rtx";
        Json engines = {{"other", other}, {"first", manifest["engines"]["first"]}};
        manifest["engines"] = engines;
    });
    const auto editor = editor_of(bundle);
    const ToyRequest one, two(2), three(3);
    runtime::Editor plain(toy_bundle(), std::make_shared<FakeBackend>(std::make_shared<FakeLog>()), "fake",
                          {});
    CHECK(edit(*editor, one.options) == edit(plain, one.options));
    CHECK(edit(*editor, two.options) == edit(plain, two.options));
    CHECK_THROWS_WITH_AS(edit(*editor, three.options),
                         doctest::Contains("Axis batch has size 3, which engine 'first' does not take"),
                         core::Error);
}

TEST_CASE("engines that do not fit are refused, each with its reason") {
    const auto refused = [](const char* words, const std::function<void(Json&)>& change) {
        const EngineBundle bundle(change);
        CHECK_THROWS_WITH_AS(editor_of(bundle), doctest::Contains(words), core::Error);
    };
    refused("The bundle has no engine that tensorrt can run here.", [](Json& m) { m.erase("engines"); });
    refused("'first' is for tensorrt-rtx",
            [](Json& m) { m["engines"]["first"]["backend"] = "tensorrt-rtx"; });
    refused("'first' is of version 11.0", [](Json& m) { m["engines"]["first"]["version"] = "11.0"; });
    refused("'first' is stale: step.onnx has changed since",
            [](Json& m) { m["engines"]["first"]["sources"]["step.onnx"] = std::string(64, '0'); });
    const EngineBundle bundle([](Json& m) {
        m["variants"]["fp16"] = {{"precision", "fp16"}, {"graphs", Json::object()}};
    });
    CHECK_THROWS_WITH_AS(editor_of(bundle, "fp16"),
                         doctest::Contains("'first' is of the bundle's own graphs"), core::Error);
    const EngineBundle partial([](Json& m) { m["engines"]["first"]["graphs"].erase("step"); });
    const auto editor = editor_of(partial);
    const ToyRequest request;
    CHECK_THROWS_WITH_AS(edit(*editor, request.options),
                         doctest::Contains("Engine 'first' has no graph 'step'"), core::Error);
}
