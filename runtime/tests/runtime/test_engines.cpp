// Backends that run engines: which one of a bundle serves a request, and what is said where none does.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/log.hpp"
#include "fake_backend.hpp"
#include "runtime/choice.hpp"
#include "runtime/editor.hpp"
#include "toy.hpp"

using namespace hywu;
using namespace hywu::testing;
using Json = nlohmann::ordered_json;

namespace {

const core::Target here = {"tensorrt", "10.3.0.30", "8.9", "Pretended GPU"};

// An engine for a manifest, of all its graphs, whose plans are the graphs' own files.
Json engine_of(const Json& manifest) {
    Json graphs = Json::object(), sources = Json::object();
    for (const auto& [name, graph] : manifest["graphs"].items()) {
        const std::string file = graph["file"];
        graphs[name] = file;
        sources[file] = manifest["files"][file]["sha256"];
    }
    return {{"backend", here.backend},
            {"version", here.version},
            {"compute_capabilities", {here.capability}},
            {"shapes", {{"batch", {1, 1, 2}}, {"height", {8, 8, 16}}, {"width", {8, 8, 24}}}},
            {"graphs", graphs},
            {"sources", sources}};
}

// The toy with an engine called `first`, in a folder of its own.
class EngineBundle {
public:
    explicit EngineBundle(const std::function<void(Json&)>& change = [](Json&) {}) {
        std::filesystem::remove_all(path_);
        std::filesystem::copy(toy_path(), path_, std::filesystem::copy_options::recursive);
        Json manifest = Json::parse(std::ifstream(path_ / "manifest.json"));
        manifest["engines"]["first"] = engine_of(manifest);
        change(manifest);
        std::ofstream(path_ / "manifest.json") << manifest.dump();
    }
    ~EngineBundle() { std::filesystem::remove_all(path_); }
    EngineBundle(const EngineBundle&) = delete;
    EngineBundle& operator=(const EngineBundle&) = delete;

    const std::filesystem::path& path() const { return path_; }
    std::string command() const { return "hywu build " + path_.string() + " --backend tensorrt"; }
    runtime::SharedBundle open() const {
        return {std::make_shared<const core::Bundle>(core::Bundle::open(path_)),
                std::make_shared<runtime::SessionPool>()};
    }

private:
    std::filesystem::path path_ = std::filesystem::temp_directory_path() / "hywu-tests-engines";
};

// A backend of engines, whose tensors cannot be looked at without a copy to the host.
class DeviceSide final : public FakeBackend {
public:
    DeviceSide(std::shared_ptr<FakeLog> log, core::Target target, bool copies)
        : FakeBackend(std::move(log), copies, false), target_(std::move(target)) {}
    std::string_view name() const override { return target_.backend; }
    std::optional<core::Target> target() const override { return target_; }

private:
    core::Target target_;
};

struct Machine {
    std::shared_ptr<FakeLog> log = std::make_shared<FakeLog>();
    core::Target target = here;
    std::optional<std::string> missing;  // why its TensorRT cannot be used
    bool copies = true;

    std::shared_ptr<backends::Backend> backend() const {
        return std::make_shared<DeviceSide>(log, target, copies);
    }
    // What it has: TensorRT and TensorRT-RTX, each as `target` is, and a backend of plain graphs.
    std::vector<backends::Entry> entries() const {
        std::vector<backends::Entry> made;
        for (const char* const name : {"tensorrt", "tensorrt-rtx"}) {
            core::Target of = target;
            of.backend = name;
            made.push_back({name, [reason = missing] { return reason; },
                            [of, log = log](const backends::Options&) -> std::unique_ptr<backends::Backend> {
                                return std::make_unique<DeviceSide>(log, of, true);
                            }});
        }
        made.push_back({"ort-cpu", [] { return std::optional<std::string>(); },
                        [log = log](const backends::Options&) -> std::unique_ptr<backends::Backend> {
                            return std::make_unique<FakeBackend>(log);
                        }});
        return made;
    }
    runtime::Choice choose(const EngineBundle& bundle, const runtime::Wish& wish = {}) const {
        return runtime::choose(*bundle.open().bundle, wish, entries());
    }
};

std::unique_ptr<runtime::Editor> editor_of(const EngineBundle& bundle, const Machine& machine = {},
                                           const runtime::EditorOptions& options = {}) {
    return std::make_unique<runtime::Editor>(bundle.open(), machine.backend(), "engines", options);
}

std::unique_ptr<runtime::Editor> plain_editor() {
    return std::make_unique<runtime::Editor>(toy_bundle(),
                                             std::make_shared<FakeBackend>(std::make_shared<FakeLog>()),
                                             "fake", runtime::EditorOptions());
}

runtime::Wish wish(std::optional<std::string> engine, std::optional<std::string> variant = {},
                   std::string backend = "auto") {
    runtime::Wish result;
    result.backend = std::move(backend);
    result.variant = std::move(variant);
    result.engine = std::move(engine);
    return result;
}

// The error that `run` throws.
template <class Run>
core::Error failure(Run&& run) {
    try {
        run();
    } catch (const core::Error& error) {
        return error;
    }
    FAIL("nothing was thrown");
    return core::Error(core::ErrorKind::input, "");
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// What the log says while it lives.
struct Log {
    Log() {
        core::set_log_sink([this](core::LogLevel, const std::string& line) { text += line + "\n"; },
                           core::LogLevel::info);
    }
    ~Log() { core::set_log_sink({}, core::LogLevel::off); }
    std::string text;
};

}  // namespace

TEST_CASE("engines give what graphs give, within their shapes") {
    const EngineBundle bundle;
    const auto plain = plain_editor();
    for (const bool copies : {false, true}) {
        Machine machine;
        machine.copies = copies;
        const auto editor = editor_of(bundle, machine);
        const ToyRequest one, two(2), three(3);
        CHECK(edit(*editor, one.options) == edit(*plain, one.options));
        CHECK(edit(*editor, two.options) == edit(*plain, two.options));
        const core::Error many = failure([&] { edit(*editor, three.options); });
        CHECK(many.kind() == core::ErrorKind::input);
        CHECK(many.expected() == "This bundle takes 1 to 2");
    }
}

TEST_CASE("a size outside the shapes names the axis, the range and the command") {
    const EngineBundle bundle;
    const auto editor = editor_of(bundle);
    ToyRequest request;
    request.options.size = runtime::Size{24, 32};
    const std::vector<float> region(48, 0.5F);
    request.options.inputs = {{"region", runtime::View(core::Dtype::float32, {1, 1, 8, 6}, region.data())}};
    const core::Error error = failure([&] { edit(*editor, request.options); });
    CHECK(error.kind() == core::ErrorKind::input);
    CHECK(error.wrong() == "Axis height has size 32");
    CHECK(error.expected() == "Engine first takes 8 to 16");
    CHECK(error.remedy() == "Choose a size within it, or build one: " + bundle.command() +
                                " --shapes 8x8:8x8:24x32 --batch 1:1:2");
}

TEST_CASE("limits and sizes are those of the engines") {
    const EngineBundle bundle([](Json& manifest) {
        Json wide = manifest["engines"]["first"];
        wide["shapes"]["batch"] = {2, 2, 4};
        wide["shapes"]["height"] = wide["shapes"]["width"] = {16, 16, 64};
        manifest["engines"] = {{"wide", wide}, {"first", manifest["engines"]["first"]}};
    });
    const auto editor = editor_of(bundle);
    CHECK(editor->limits().batch_min == 1);
    CHECK(editor->limits().batch_max == 4);
    CHECK(editor->limits().size->min == 8);
    CHECK(editor->limits().size->max == 16);
    CHECK(editor->working_size(100, 60).width == 16);
    CHECK(editor->working_size(100, 60, runtime::Size{64, 32}).width == 64);
    CHECK(plain_editor()->limits().size->max == 64);

    // Three photos are for the other engine alone, at a size that it takes.
    ToyRequest request(3);
    std::vector<std::uint8_t> large(100 * 60 * 3, 77);
    request.options.photos.assign(3, {large.data(), 100, 60, 300});
    const runtime::Size size = editor_of(bundle, {},
                                         [] {
                                             runtime::EditorOptions options;
                                             options.engine = "wide";
                                             return options;
                                         }())
                                   ->working_size(100, 60);
    const std::vector<float> region(static_cast<std::size_t>(3 * size.height * size.width / 16), 0.5F);
    request.options.inputs = {
        {"region",
         runtime::View(core::Dtype::float32, {3, 1, size.height / 4, size.width / 4}, region.data())}};
    CHECK(size.width > 16);
    CHECK(edit(*editor, request.options).size() ==
          static_cast<std::size_t>(3 * 3 * size.height * size.width));
}

TEST_CASE("the newest engine that has every graph and covers the sizes serves a request") {
    const EngineBundle bundle([](Json& manifest) {
        const Json old = manifest["engines"]["first"];
        Json recent = old, part = old;
        recent["shapes"]["batch"] = {1, 1, 1};
        part["graphs"].erase("generate");
        // Each has plans of its own, so that it can be seen which one runs.
        for (auto& [graph, file] : recent["graphs"].items()) {
            const std::string from = file, to = "engines/new/" + from;
            manifest["files"][to] = manifest["files"][from];
            file = to;
        }
        manifest["engines"] = {{"old", old}, {"new", recent}, {"part", part}};
    });
    std::filesystem::create_directories(bundle.path() / "engines/new");
    for (const auto& entry : std::filesystem::directory_iterator(bundle.path())) {
        if (entry.path().extension() == ".onnx")
            std::filesystem::copy_file(entry.path(), bundle.path() / "engines/new" / entry.path().filename());
    }
    Machine machine;
    machine.log->record = true;
    CHECK(machine.choose(bundle).engines == std::vector<std::string>{"part", "new", "old"});
    const auto editor = editor_of(bundle, machine), plain = plain_editor();
    const ToyRequest one, two(2);
    const auto used = [&] {
        bool recent = false;
        for (const std::string& folder : machine.log->folders) recent |= folder == "new";
        machine.log->folders.clear();
        return recent ? "new" : "old";
    };
    CHECK(edit(*editor, one.options) == edit(*plain, one.options));
    CHECK(used() == std::string("new"));
    CHECK(edit(*editor, two.options) == edit(*plain, two.options));
    CHECK(used() == std::string("old"));
    CHECK(machine.log->loads == 2 * machine.log->sessions);  // what the other engine held is gone
    CHECK(edit(*editor, one.options) == edit(*plain, one.options));
    CHECK(used() == std::string("new"));

    runtime::EditorOptions options;
    options.engine = "part";
    const auto partial = editor_of(bundle, machine, options);
    const core::Error error = failure([&] { edit(*partial, one.options); });
    CHECK(error.kind() == core::ErrorKind::engine);
    CHECK(error.wrong() == "Engine part has no graph generate");
    CHECK(has(error.remedy(), bundle.command() + " --shapes 8x8:8x8:24x16 --batch 1:1:2"));
}

TEST_CASE(
    "engines that do not suit are refused with the command that builds one; auto goes on, and says so") {
    const auto refused = [](const std::string& words, const std::function<void(Json&)>& change) {
        const EngineBundle bundle([&](Json& manifest) { change(manifest["engines"]["first"]); });
        const Machine machine;
        for (const auto& asked : {wish({}, {}, "tensorrt"), wish("first")}) {
            const core::Error error = failure([&] { machine.choose(bundle, asked); });
            CHECK(error.kind() == core::ErrorKind::engine);
            CHECK(has(error.wrong(), words));
            CHECK(error.remedy() ==
                  "Build it: " + bundle.command() + " --shapes 8x8:8x8:24x16 --batch 1:1:2");
        }
        const Log log;
        const runtime::Choice choice = machine.choose(bundle);
        CHECK(choice.backend->name() == "fake");
        CHECK(choice.engines.empty());
        CHECK(has(log.text, "engines of tensorrt are passed over: "));
        CHECK(has(log.text, words));
    };
    refused("it was built by version 10.4, here is 10.3.0.30", [](Json& e) { e["version"] = "10.4"; });
    refused("it was built for compute capability 12.0, Pretended GPU has 8.9",
            [](Json& e) { e["compute_capabilities"] = {"12.0"}; });
    refused("it is stale: step.onnx is not what it was built from",
            [](Json& e) { e["sources"]["step.onnx"] = std::string(64, '0'); });
}

TEST_CASE("auto takes TensorRT only where the bundle has an engine that can be used") {
    const EngineBundle bundle;
    Machine machine;
    {
        const Log log;
        const runtime::Choice choice = machine.choose(bundle);
        CHECK(choice.backend->name() == "tensorrt");
        CHECK(choice.engines == std::vector<std::string>{"first"});
        CHECK(has(log.text, "backend tensorrt chosen on Pretended GPU, engine first"));
    }
    const EngineBundle other(
        [](Json& manifest) { manifest["engines"]["first"]["backend"] = "tensorrt-rtx"; });
    CHECK(machine.choose(other).backend->name() == "tensorrt-rtx");
    const core::Error none = failure([&] { machine.choose(other, wish({}, {}, "tensorrt")); });
    CHECK(none.wrong() == "The bundle has no tensorrt engine of the bundle's own graphs");
    CHECK(none.remedy() == "Build it: " + other.command());

    machine.missing = "there is no NVIDIA driver";
    const Log log;
    CHECK(machine.choose(other).backend->name() == "fake");
    CHECK(has(log.text, "engines of tensorrt-rtx are passed over: there is no NVIDIA driver"));
    const core::Error gone = failure([&] { machine.choose(other, wish("first")); });
    CHECK(gone.kind() == core::ErrorKind::device);
    const EngineBundle bare([](Json& manifest) { manifest.erase("engines"); });
    machine.missing.reset();
    CHECK(machine.choose(bare).backend->name() == "fake");
    CHECK(machine.choose(bare, wish({}, {}, "ort-cpu")).backend->name() == "fake");
}

TEST_CASE("variants have engines of their own, and what contradicts an engine is refused") {
    const EngineBundle bundle([](Json& manifest) {
        manifest["variants"]["fp16"] = {{"precision", "fp16"}, {"graphs", Json::object()}};
        manifest["engines"]["half"] = manifest["engines"]["first"];
        manifest["engines"]["half"]["variant"] = "fp16";
    });
    const Machine machine;
    CHECK(machine.choose(bundle).engines == std::vector<std::string>{"first"});
    CHECK(machine.choose(bundle, wish({}, "fp16")).engines == std::vector<std::string>{"half"});
    const runtime::Choice half = machine.choose(bundle, wish("half"));
    CHECK(half.variant == "fp16");
    CHECK(half.backend->name() == "tensorrt");
    const auto refused = [&](const runtime::Wish& asked, const char* wrong, const char* expected) {
        const core::Error error = failure([&] { machine.choose(bundle, asked); });
        CHECK(error.kind() == core::ErrorKind::input);
        CHECK(error.wrong() == wrong);
        CHECK(error.expected() == expected);
    };
    refused(wish("first", "fp16"), "Engine first is for variant none, not fp16",
            "Expected `variant` to be left out beside it");
    refused(wish("half", {}, "ort-cpu"), "Engine half is for backend tensorrt, not ort-cpu",
            "Expected `backend` tensorrt beside it");
    refused(wish("nothing"), "The bundle has no engine 'nothing'", "It has: first, half");
}

TEST_CASE("a plan that is damaged is named with the command that makes it anew") {
    const EngineBundle bundle([](Json& manifest) {
        manifest["files"]["engines/first/step.plan"] = {{"size", 10}, {"sha256", std::string(64, '0')}};
        manifest["engines"]["first"]["graphs"]["step"] = "engines/first/step.plan";
    });
    const auto refused = [&](const std::string& wrong) {
        const auto editor = editor_of(bundle);
        const ToyRequest request;
        const core::Error error = failure([&] { edit(*editor, request.options); });
        CHECK(error.kind() == core::ErrorKind::engine);
        CHECK(error.wrong() == wrong);
        CHECK(error.remedy() ==
              "Build it again: " + bundle.command() + " --shapes 8x8:8x8:24x16 --batch 1:1:2 --rebuild");
    };
    refused("engines/first/step.plan is missing");
    std::filesystem::create_directories(bundle.path() / "engines/first");
    std::ofstream(bundle.path() / "engines/first/step.plan") << "short";
    refused("engines/first/step.plan has 5 bytes");
    // The rest of the bundle works.
    runtime::Editor plain(bundle.open(), std::make_shared<FakeBackend>(std::make_shared<FakeLog>()), "fake",
                          {});
    const ToyRequest request;
    CHECK(edit(plain, request.options) == edit(*plain_editor(), request.options));
}

TEST_CASE("deltas that cannot be looked at and are not finite are found in what the steps made of them") {
    const EngineBundle bundle;
    for (const bool copies : {false, true}) {
        Machine machine;
        machine.copies = copies;
        const auto editor = editor_of(bundle, machine);
        const ToyRequest request;
        const auto good = edit(*editor, request.options);
        machine.log->poison = true;
        const core::Error error = failure([&] { edit(*editor, request.options); });
        CHECK(error.kind() == core::ErrorKind::delta);
        CHECK(has(error.wrong(), "The steps made values of "));
        CHECK(has(error.wrong(), " that are not finite"));
        machine.log->poison = false;
        CHECK(edit(*editor, request.options) == good);
    }
}

TEST_CASE("a state that only the end reads is carried as well") {
    const EngineBundle bundle([](Json& manifest) {
        for (const char* const graph : {"step", "step_plain"}) {
            Json& inputs = manifest["graphs"][graph]["inputs"];
            inputs.erase(std::find_if(inputs.begin(), inputs.end(),
                                      [](const Json& input) { return input["name"] == "cache"; }));
        }
        for (Json& call : manifest["program"]) {
            if (call["phase"] == "step") call["inputs"].erase("cache");
        }
    });
    std::vector<std::uint8_t> pictures[2];
    for (const bool copies : {false, true}) {
        runtime::Editor editor(
            bundle.open(), std::make_shared<FakeBackend>(std::make_shared<FakeLog>(), copies), "fake", {});
        for (unsigned seed = 1; seed < 3; ++seed) {
            const ToyRequest request(1, seed);
            pictures[copies] = edit(editor, request.options);
        }
    }
    CHECK(pictures[0] == pictures[1]);
}

TEST_CASE("warming up takes the size that the newest engine is tuned for") {
    const EngineBundle bundle([](Json& manifest) {
        Json& shapes = manifest["engines"]["first"]["shapes"];
        shapes["height"] = {16, 16, 24};
        shapes["width"] = {24, 24, 32};
        shapes["batch"] = {2, 2, 4};
        // Nothing from the caller, so that an edit is run.
        for (auto& [name, tensor] : manifest["tensors"].items()) {
            if (tensor["source"] == "input")
                tensor = {{"dtype", tensor["dtype"]},
                          {"shape", tensor["shape"]},
                          {"source", "noise"},
                          {"draw", "initial"}};
        }
    });
    Machine machine;
    machine.log->record = true;
    const auto editor = editor_of(bundle, machine);
    CHECK(editor->limits().batch_min == 2);
    editor->warm_up();
    CHECK(machine.log->shapes.count({2, 16, 24, 3}) == 1);
}
