// The executor's wiring, against a reference that has no buffers: a table of tensors by name.
#include <doctest/doctest.h>

#include <cmath>
#include <map>
#include <set>
#include <thread>

#include "core/noise.hpp"
#include "fake_backend.hpp"
#include "runtime/editor.hpp"
#include "text/prompt_encoder.hpp"
#include "toy.hpp"

using namespace hywu;
using namespace hywu::testing;
using core::Phase;

namespace {

std::vector<std::string> graphs(const core::Manifest& manifest, const runtime::Plan& plan, Phase phase) {
    std::vector<std::string> names;
    for (const std::size_t i : plan.in(phase)) names.push_back(manifest.program[i].graph);
    return names;
}

using Table = std::map<std::string, std::vector<double>>;

// Runs the toy's program as docs/bundle.md says, one tensor a name.
std::vector<std::uint8_t> reference(const core::Bundle& bundle, const ToyRequest& request, bool guided) {
    const core::Manifest& manifest = bundle.manifest();
    const runtime::EditOptions& options = request.options;
    const core::Schedule schedule(bundle.file(manifest.schedules->file), *manifest.schedules);
    const core::Rows rows = schedule.rows(options.sampler, options.steps);
    const auto batch = static_cast<std::int64_t>(options.count);
    const runtime::Axes axes = {{"batch", batch}, {"delta_batch", batch}, {"height", 8},
                                {"width", 16},    {"latent_height", 2},   {"latent_width", 4}};
    const auto size = [&](const std::string& name) {
        return core::count(runtime::resolve_shape(manifest, name, axes));
    };
    Table table;
    for (const auto& [name, tensor] : manifest.tensors) {
        std::vector<double>& values = table[name];
        if (tensor.source == core::TensorSource::image) {
            for (const auto& photo : request.pixels) values.insert(values.end(), photo.begin(), photo.end());
        } else if (tensor.source == core::TensorSource::text || tensor.source == core::TensorSource::mask) {
            const core::ProvidedTensor& text =
                tensor.source == core::TensorSource::mask ? manifest.tensors.at(*tensor.of) : tensor;
            const core::Tokenizer& entry = manifest.tokenizers.at(*text.tokenizer);
            const text::PromptEncoder encoder(bundle.file(entry.file), entry);
            const auto encoded = encoder.encode(
                text.constant ? std::vector<std::string>(options.count, *text.constant) : options.prompts);
            const auto& numbers = tensor.source == core::TensorSource::mask ? encoded.mask : encoded.ids;
            values.assign(numbers.begin(), numbers.end());
        } else if (tensor.source == core::TensorSource::noise && tensor.draw == core::Draw::initial) {
            std::vector<float> noise(size(name));
            for (std::size_t i = 0; i < options.count; ++i) {
                core::noise::normal(noise.data() + i * noise.size() / options.count,
                                    noise.size() / options.count, options.seed, static_cast<std::uint32_t>(i),
                                    0);
            }
            values.assign(noise.begin(), noise.end());
        } else if (tensor.source == core::TensorSource::guidance) {
            values.assign(options.count, guided ? 2.0 : 0.5);
        } else if (tensor.source == core::TensorSource::gate) {
            values.assign(options.count, 1.0);
        } else if (tensor.source == core::TensorSource::input) {
            values.assign(request.region.begin(), request.region.end());
        } else if (tensor.column == core::Column::initial_scale) {
            values = {static_cast<double>(rows.initial_scale)};
        }
    }
    const auto call = [&](const core::Call& c) {
        Table inputs, outputs;
        for (const auto& [port, name] : manifest.reads(c)) inputs[port] = table.at(name);
        for (const auto& [port, name] : manifest.writes(c)) {
            std::vector<double> values(size(name));
            fake_graph(c.graph + ".onnx", inputs, port, values);
            std::vector<std::byte> bytes(values.size() * 4);
            const core::Dtype dtype = manifest.signatures.at(name).dtype;
            from_doubles(values, dtype, bytes.data());
            outputs[name] = to_doubles(dtype, bytes.data(), values.size() * core::item_size(dtype));
        }
        for (auto& [name, values] : outputs) table[name] = values;
    };
    const auto phase = [&](Phase p) {
        for (const core::Call& c : manifest.program) {
            if (c.phase == p && c.runs(guided)) call(c);
        }
    };
    phase(Phase::load);
    phase(Phase::request);
    for (const core::State& state : manifest.state)
        table[state.tensor] = table.at(std::get<std::string>(state.initial));
    for (std::size_t k = 0; k < rows.size(); ++k) {
        table["timestep"] = {static_cast<double>(rows.timesteps[k])};
        table["coefficients"].assign(rows.row(k), rows.row(k) + rows.width);
        std::vector<float> noise(size("noise.step"));
        if (manifest.schedules->samplers.at(rows.sampler).stochastic) {
            for (std::size_t i = 0; i < options.count; ++i) {
                core::noise::normal(noise.data() + i * noise.size() / options.count,
                                    noise.size() / options.count, options.seed, static_cast<std::uint32_t>(i),
                                    static_cast<std::uint32_t>(k + 1));
            }
        }
        table["noise.step"].assign(noise.begin(), noise.end());
        phase(Phase::step);
        for (const core::State& state : manifest.state) table[state.tensor] = table.at(state.next);
    }
    phase(Phase::final);
    std::vector<std::uint8_t> picture;
    for (const double value : table.at("edited")) picture.push_back(static_cast<std::uint8_t>(value));
    return picture;
}

runtime::EditorOptions no_options() { return {}; }

}  // namespace

TEST_CASE("a plan runs what the wanted tensors need, and no more") {
    const runtime::SharedBundle shared = toy_bundle();
    const core::Manifest& manifest = shared.bundle->manifest();
    const std::set<std::string> deltas = {"mix.lora_A", "mix.lora_B"};

    const runtime::Plan guided = runtime::make_plan(manifest, {"edited"}, {}, true);
    CHECK(graphs(manifest, guided, Phase::load) == std::vector<std::string>{"words"});
    CHECK(graphs(manifest, guided, Phase::request) ==
          std::vector<std::string>{"words", "marks", "encode", "generate", "prepare"});
    CHECK(graphs(manifest, guided, Phase::step) == std::vector<std::string>{"step"});
    CHECK(graphs(manifest, guided, Phase::final) == std::vector<std::string>{"final"});

    const runtime::Plan unguided = runtime::make_plan(manifest, {"edited"}, deltas, false);
    CHECK(unguided.in(Phase::load).empty());
    CHECK(graphs(manifest, unguided, Phase::request) ==
          std::vector<std::string>{"words", "encode", "prepare"});
    CHECK(graphs(manifest, unguided, Phase::step) == std::vector<std::string>{"step_plain"});
    CHECK(unguided.provided.count("guidance.text") == 0);
    CHECK(unguided.provided.count("ids.marks") == 0);

    const runtime::Plan generate = runtime::make_plan(manifest, {"mix.lora_A", "mix.lora_B"});
    CHECK(graphs(manifest, generate, Phase::request) ==
          std::vector<std::string>{"words", "marks", "generate"});
    CHECK(generate.in(Phase::step).empty());
}

TEST_CASE("the executor computes what the program says, whether states are swapped or copied") {
    for (const bool copies : {false, true}) {
        const runtime::SharedBundle shared = toy_bundle();
        const auto log = std::make_shared<FakeLog>();
        runtime::Editor editor(shared, std::make_shared<FakeBackend>(log, copies), "fake", no_options());
        for (const std::size_t count : {1U, 3U}) {
            for (const bool guided : {true, false}) {
                for (const char* sampler : {"even", "wild"}) {
                    for (const std::int64_t steps : {2, 3, 4}) {
                        ToyRequest request(count, static_cast<unsigned>(steps));
                        request.options.sampler = sampler;
                        request.options.steps = steps;
                        request.options.guidance = {{"text", {guided ? 2.0 : 0.5}}};
                        CAPTURE(copies);
                        CAPTURE(sampler);
                        CAPTURE(steps);
                        CHECK(edit(editor, request.options) == reference(*shared.bundle, request, guided));
                    }
                }
            }
        }
    }
}

TEST_CASE("load-phase results are kept for each batch size, unless they are the caller's") {
    const auto log = std::make_shared<FakeLog>();
    log->record = true;
    const runtime::SharedBundle shared = toy_bundle();
    runtime::Editor editor(shared, std::make_shared<FakeBackend>(log), "fake", no_options());
    const auto word_runs = [&] {
        const auto runs = std::count(log->ran.begin(), log->ran.end(), "words.onnx");
        log->ran.clear();
        return runs;
    };
    const ToyRequest one, three(3);
    const auto first = edit(editor, one.options);
    CHECK(word_runs() == 2);
    edit(editor, one.options);
    CHECK(word_runs() == 1);
    edit(editor, three.options);
    CHECK(word_runs() == 2);
    CHECK(edit(editor, one.options) == first);
    CHECK(word_runs() == 1);

    const std::vector<std::int64_t> ids(8, 7);
    ToyRequest other;
    other.options.inputs.emplace_back("ids.base", runtime::View(core::Dtype::int64, {1, 8}, ids.data()));
    const auto changed = edit(editor, other.options);
    CHECK(word_runs() == 2);
    CHECK(changed != first);
    CHECK(edit(editor, one.options) == first);  // what the caller gave is not kept
    CHECK(word_runs() == 1);
}

TEST_CASE("buffers hold zeros after a request") {
    for (const bool copies : {false, true}) {
        const auto log = std::make_shared<FakeLog>();
        log->record = true;
        runtime::Editor editor(toy_bundle(), std::make_shared<FakeBackend>(log, copies), "fake",
                               no_options());
        const ToyRequest request;
        edit(editor, request.options);
        std::size_t kept = 0;
        for (FakeTensor* tensor : log->alive) {
            const std::byte* data = tensor->memory().data();
            kept += std::all_of(data, data + tensor->bytes(), [](std::byte b) { return b == std::byte{0}; })
                        ? 0
                        : 1;
        }
        CHECK(log->alive.size() > 10);
        CHECK(kept == 1);  // the load phase's constant
    }
}

TEST_CASE("whatever operation fails, the error comes out, nothing leaks, and the next request is right") {
    const ToyRequest request(2);
    for (const bool low_memory : {false, true}) {
        for (const bool copies : {false, true}) {
            const auto log = std::make_shared<FakeLog>();
            runtime::EditorOptions options;
            options.low_memory = low_memory;
            const runtime::SharedBundle shared = toy_bundle();
            runtime::Editor clean(shared, std::make_shared<FakeBackend>(log, copies), "fake", options);
            const auto expected = edit(clean, request.options);
            const int operations = log->operations;
            for (int fail_at = 0; fail_at < operations; ++fail_at) {
                const auto failing = std::make_shared<FakeLog>();
                {
                    runtime::Editor editor(toy_bundle(), std::make_shared<FakeBackend>(failing, copies),
                                           "fake", options);
                    failing->fail_at = fail_at;
                    CHECK_THROWS_WITH_AS(edit(editor, request.options), doctest::Contains("Fake: "),
                                         core::Error);
                    CHECK(edit(editor, request.options) == expected);
                }
                CHECK(failing->tensors == 0);
                CHECK(failing->sessions == 0);
            }
        }
    }
}

TEST_CASE("in low-memory mode sessions come and go") {
    const auto log = std::make_shared<FakeLog>();
    runtime::EditorOptions options;
    options.low_memory = true;
    runtime::Editor editor(toy_bundle(), std::make_shared<FakeBackend>(log), "fake", options);
    ToyRequest request;
    int most = 0;
    request.options.progress = [&](std::size_t, std::size_t) { most = std::max(most, log->sessions.load()); };
    edit(editor, request.options);
    CHECK(most == 1);
    CHECK(log->sessions == 0);
    CHECK(log->loads == 7);
    edit(editor, request.options);
    CHECK(log->loads == 14);
    editor.warm_up();
    CHECK(log->sessions == 0);
}

TEST_CASE("editors of one bundle load a graph once, and keep it as long as one of them lives") {
    const auto log = std::make_shared<FakeLog>();
    const runtime::SharedBundle shared = toy_bundle();
    std::vector<std::unique_ptr<runtime::Editor>> editors;
    for (int i = 0; i < 4; ++i) {
        editors.push_back(std::make_unique<runtime::Editor>(shared, std::make_shared<FakeBackend>(log),
                                                            "fake", no_options()));
    }
    const ToyRequest request;
    const auto expected = edit(*editors[0], request.options);
    const int loads = log->loads;
    std::vector<std::thread> threads;
    std::vector<std::vector<std::uint8_t>> pictures(editors.size());
    for (std::size_t i = 0; i < editors.size(); ++i) {
        threads.emplace_back([&, i] { pictures[i] = edit(*editors[i], request.options); });
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& picture : pictures) CHECK(picture == expected);
    CHECK(log->loads == loads);
    CHECK(editors[0]->memory().shared == static_cast<std::size_t>(loads));
    runtime::Editor other(shared, std::make_shared<FakeBackend>(log), "another device", no_options());
    edit(other, request.options);
    CHECK(log->loads == 2 * loads);
    editors.clear();
    CHECK(log->sessions == loads);
}

TEST_CASE("axes: mismatches are refused, and the caller's tensor is blamed") {
    const runtime::SharedBundle shared = toy_bundle();
    runtime::Editor editor(shared, std::make_shared<FakeBackend>(std::make_shared<FakeLog>()), "fake",
                           no_options());
    const std::vector<float> numbers(256);
    const auto with_region = [&](core::Dtype dtype, core::Shape shape) {
        ToyRequest request;
        request.options.inputs = {{"region", runtime::View(dtype, std::move(shape), numbers.data())}};
        edit(editor, request.options);
    };
    CHECK_THROWS_WITH_AS(with_region(core::Dtype::float32, {1, 1, 3, 4}),
                         doctest::Contains("Tensor 'region' is float32 [1, 1, 3, 4]"), core::Error);
    CHECK_THROWS_WITH_AS(with_region(core::Dtype::int32, {1, 1, 2, 4}), doctest::Contains("is int32"),
                         core::Error);
    CHECK_THROWS_WITH_AS(with_region(core::Dtype::float32, {2, 1, 2, 4}), doctest::Contains("region"),
                         core::Error);
    CHECK_THROWS_WITH_AS(with_region(core::Dtype::float32, {1, 1, 2}), doctest::Contains("region"),
                         core::Error);
    CHECK_THROWS_WITH_AS(with_region(core::Dtype::float32, {0, 1, 2, 4}), doctest::Contains("region"),
                         core::Error);
    ToyRequest missing;
    missing.options.inputs.clear();
    CHECK_THROWS_WITH_AS(edit(editor, missing.options),
                         "The tensor 'region' is missing. This bundle takes it from the caller. Give "
                         "inputs={'region': array}.",
                         core::Error);
}
