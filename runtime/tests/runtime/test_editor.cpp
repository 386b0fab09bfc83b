// Requests: what is refused, what is cancelled, what the caller may give; allocations.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include "api/errors.hpp"
#include "core/noise.hpp"
#include "counting.hpp"
#include "fake_backend.hpp"
#include "runtime/editor.hpp"
#include "toy.hpp"

using namespace hywu;
using namespace hywu::testing;

namespace {

struct Fixture {
    std::shared_ptr<FakeLog> log = std::make_shared<FakeLog>();
    runtime::SharedBundle shared = toy_bundle();
    runtime::Editor editor{shared, std::make_shared<FakeBackend>(log), "fake", {}};
};

core::Deltas deltas_of(std::int64_t batch, std::int64_t rank, float value) {
    core::Array a(core::Dtype::float32, {batch, rank, 4}), b(core::Dtype::float32, {batch, 4, rank});
    std::fill_n(a.as<float>(), a.size(), value);
    std::fill_n(b.as<float>(), b.size(), value);
    std::map<std::string, core::Array> tensors;
    tensors.emplace("mix.lora_A", std::move(a));
    tensors.emplace("mix.lora_B", std::move(b));
    return core::Deltas(std::move(tensors));
}

// The decorator of a backend whose own allocations are not ours.
class Apart final : public backends::Backend {
public:
    explicit Apart(std::unique_ptr<backends::Backend> inner) : inner_(std::move(inner)) {}
    std::string_view name() const override { return inner_->name(); }
    std::shared_ptr<backends::Session> load(const std::filesystem::path& file,
                                            const std::vector<core::Weight>& weights) override {
        const Excluded apart;
        return std::make_shared<SessionApart>(inner_->load(file, weights));
    }
    std::unique_ptr<backends::DeviceTensor> allocate(core::Dtype dtype,
                                                     const std::vector<std::int64_t>& shape) override {
        const Excluded apart;
        return inner_->allocate(dtype, shape);
    }

private:
    struct BindingApart final : backends::Binding {
        explicit BindingApart(std::unique_ptr<backends::Binding> inner) : inner_(std::move(inner)) {}
        void run() override {
            const Excluded apart;
            inner_->run();
        }
        std::unique_ptr<backends::Binding> inner_;
    };
    struct SessionApart final : backends::Session {
        explicit SessionApart(std::shared_ptr<backends::Session> inner) : inner_(std::move(inner)) {}
        std::unique_ptr<backends::Binding> bind(const backends::TensorMap& inputs,
                                                const backends::TensorMap& outputs) override {
            const Excluded apart;
            return std::make_unique<BindingApart>(inner_->bind(inputs, outputs));
        }
        std::shared_ptr<backends::Session> inner_;
    };
    std::unique_ptr<backends::Backend> inner_;
};

std::unique_ptr<backends::Backend> onnxruntime() {
    for (const backends::Entry& entry : backends::entries()) {
        if (entry.name == "ort-cpu" && !entry.missing()) return entry.create({std::nullopt, 1});
    }
    MESSAGE("ONNX Runtime's library is not here: HYWU_ONNXRUNTIME_LIBRARY may name it");
    return nullptr;
}

bool allocations_are_ours() {
    if (replaced()) return true;
    MESSAGE("operator new is another tool's: allocations are not looked at");
    return false;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "given deltas: for all, for the batch, for each; smaller ranks are padded") {
    const ToyRequest plain(2);
    const auto generated = edit(editor, plain.options);
    const core::Deltas one = deltas_of(1, 3, 0.5F), low = deltas_of(1, 2, 0.5F), two = deltas_of(2, 3, 0.5F);
    const auto with = [&](std::vector<const core::Deltas*> sets) {
        ToyRequest request(2);
        request.options.deltas = std::move(sets);
        return edit(editor, request.options);
    };
    const auto whole = with({&two});
    CHECK(whole == with({&one, &one}));
    CHECK(whole != generated);
    CHECK(with({&low}) == with({&low}));
    CHECK(with({&low, &low}) != whole);
    CHECK(edit(editor, plain.options) == generated);
    const core::Deltas three = deltas_of(3, 3, 0.5F), wide = deltas_of(1, 4, 0.5F);
    CHECK_THROWS_AS(with({&three}), core::Error);
    CHECK_THROWS_AS(with({&wide}), core::Error);
    const core::Deltas nan = deltas_of(1, 3, std::numeric_limits<float>::quiet_NaN());
    CHECK_THROWS_WITH_AS(with({&nan}), doctest::Contains("not finite"), core::Error);
}

TEST_CASE_FIXTURE(Fixture, "generated deltas that are not finite are refused") {
    const ToyRequest request;
    log->poison = true;
    CHECK_THROWS_WITH_AS(edit(editor, request.options), doctest::Contains("'mix.lora_A' that are not finite"),
                         core::Error);
    log->poison = false;
    const auto expected = edit(editor, request.options);
    const core::Deltas given = deltas_of(1, 3, 0.5F);
    ToyRequest other;
    other.options.deltas = {&given};
    log->poison = true;
    CHECK_NOTHROW(edit(editor, other.options));  // the generator does not run
    log->poison = false;
    CHECK(edit(editor, request.options) == expected);
}

TEST_CASE_FIXTURE(Fixture, "seeds: one gives each sample its own noise; a list, what each alone gives") {
    ToyRequest batch(3), alone(1);
    batch.options.seed = 9;
    const auto first = edit(editor, batch.options);
    batch.options.seeds = {9, 9, 9};
    const auto same = edit(editor, batch.options);
    CHECK(first != same);
    batch.options.seeds = {9, std::numeric_limits<std::uint64_t>::max(), 0};
    CHECK(edit(editor, batch.options) != same);
}

TEST_CASE_FIXTURE(Fixture, "noise and latents in place of random numbers") {
    ToyRequest request;
    request.options.sampler = "wild";
    request.options.steps = 2;
    const auto drawn = edit(editor, request.options);
    std::vector<float> latents(4 * 2 * 4), noise(3 * latents.size());
    core::noise::normal(latents.data(), latents.size(), 1, 0, 0);
    for (std::uint32_t k = 0; k < 3; ++k)
        core::noise::normal(noise.data() + k * latents.size(), latents.size(), 1, 0, k + 1);
    request.options.latents = runtime::View(core::Dtype::float32, {1, 4, 2, 4}, latents.data());
    request.options.noise = runtime::View(core::Dtype::float32, {3, 1, 4, 2, 4}, noise.data());
    CHECK(edit(editor, request.options) == drawn);
    std::vector<double> wide(latents.begin(), latents.end());
    request.options.latents = runtime::View(core::Dtype::float64, {1, 4, 2, 4}, wide.data());
    CHECK(edit(editor, request.options) == drawn);
    std::vector<std::uint16_t> halves(latents.size(), 0x3C00);  // ones
    request.options.latents = runtime::View(core::Dtype::float16, {1, 4, 2, 4}, halves.data());
    std::fill(latents.begin(), latents.end(), 1.0F);
    const auto of_halves = edit(editor, request.options);
    request.options.latents = runtime::View(core::Dtype::float32, {1, 4, 2, 4}, latents.data());
    CHECK(edit(editor, request.options) == of_halves);

    request.options.noise = runtime::View(core::Dtype::float32, {2, 1, 4, 2, 4}, noise.data());
    CHECK_THROWS_WITH_AS(edit(editor, request.options),
                         doctest::Contains("`noise` has shape [2, 1, 4, 2, 4]"), core::Error);
    noise[5] = std::numeric_limits<float>::infinity();
    request.options.noise = runtime::View(core::Dtype::float32, {3, 1, 4, 2, 4}, noise.data());
    CHECK_THROWS_WITH_AS(edit(editor, request.options), doctest::Contains("or not finite"), core::Error);
}

TEST_CASE_FIXTURE(Fixture, "what cannot be used is refused, with words") {
    const auto refused = [&](const char* words, const std::function<void(runtime::EditOptions&)>& change) {
        ToyRequest request;
        change(request.options);
        CHECK_THROWS_WITH_AS(edit(editor, request.options), doctest::Contains(words), core::Error);
    };
    using Options = runtime::EditOptions;
    refused("has no sampler 'none'", [](Options& o) { o.sampler = "none"; });
    refused("6 steps cannot be made", [](Options& o) { o.steps = 6; });
    refused("-1 steps cannot be made", [](Options& o) { o.steps = -1; });
    refused("no guidance scale 'image'", [](Options& o) { o.guidance = {{"image", {1.0}}}; });
    refused("`guidance text` is nan", [](Options& o) { o.guidance = {{"text", {std::nan("")}}}; });
    refused("`guidance text` has 2 entries", [](Options& o) { o.guidance = {{"text", {1.0, 2.0}}}; });
    refused("`delta_strength` is inf",
            [](Options& o) { o.strengths = {std::numeric_limits<double>::infinity()}; });
    refused("`delta_strength` is 1e+39", [](Options& o) { o.strengths = {1e39}; });
    refused("The batch has 5 photos", [](Options& o) { o.count = 5; });
    refused("A photo is missing", [](Options& o) { o.photos.clear(); });
    refused("is not valid Unicode", [](Options& o) { o.prompts = {"\xff"}; });
    refused("'mix.lora_A' cannot be given", [](Options& o) { o.inputs = {{"mix.lora_A", {}}}; });
    refused("'latents' cannot be given", [](Options& o) { o.inputs = {{"latents", {}}}; });
    refused("'timestep' cannot be given", [](Options& o) { o.inputs = {{"timestep", {}}}; });
    refused("'nothing' cannot be given", [](Options& o) { o.inputs = {{"nothing", {}}}; });
    refused("is given twice", [](Options& o) { o.inputs.push_back(o.inputs[0]); });
    refused("The size", [](Options& o) { o.size = runtime::Size{12, 16}; });
    refused("The size", [](Options& o) { o.size = runtime::Size{-8, 16}; });
    refused("The size", [](Options& o) { o.size = runtime::Size{std::int64_t{1} << 40, 16}; });
    refused("pixels", [](Options& o) { o.photos[0].width = 1 << 30; });
}

TEST_CASE_FIXTURE(Fixture, "a cancelled request ends before the next graph or step, and the editor goes on") {
    const ToyRequest request;
    const auto expected = edit(editor, request.options);
    for (int after = 0; after < 10; ++after) {
        ToyRequest other;
        int asked = 0;
        other.options.cancelled = [&] { return asked++ == after; };
        if (after < 9) {  // 5 graphs, 3 steps, 1 graph
            CHECK_THROWS_WITH_AS(edit(editor, other.options), "The request was cancelled.", core::Error);
        } else {
            CHECK(edit(editor, other.options) == expected);
        }
        CHECK(edit(editor, request.options) == expected);
    }
    ToyRequest throwing;
    throwing.options.progress = [](std::size_t done, std::size_t) {
        if (done == 2) throw std::runtime_error("from the callback");
    };
    CHECK_THROWS_WITH(edit(editor, throwing.options), "from the callback");
    CHECK(edit(editor, request.options) == expected);
}

TEST_CASE_FIXTURE(Fixture, "a callback must not call its own editor; another thread waits") {
    ToyRequest request;
    const auto expected = edit(editor, request.options);
    std::string said;
    std::thread other;
    std::vector<std::uint8_t> waited;
    request.options.progress = [&](std::size_t done, std::size_t) {
        if (done != 1) return;
        const ToyRequest inner;
        try {
            edit(editor, inner.options);
        } catch (const core::Error& error) {
            said = error.wrong();
        }
        other = std::thread([&] {
            const ToyRequest outside;
            waited = edit(editor, outside.options);
        });
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(waited.empty());
    };
    CHECK(edit(editor, request.options) == expected);
    other.join();
    CHECK(said == "The editor is called from its own callback");
    CHECK(waited == expected);
}

TEST_CASE("the step loop allocates nothing once it is warm") {
    if (!allocations_are_ours()) return;
    const auto check = [](const std::shared_ptr<backends::Backend>& backend) {
        runtime::Editor editor(toy_bundle(), backend, "test", {});
        for (const char* sampler : {"even", "wild"}) {
            ToyRequest request(2);
            request.options.sampler = sampler;
            request.options.steps = 4;
            std::vector<std::uint8_t> picture(2 * 16 * 8 * 3);
            const auto place = [&](const core::Shape&) { return picture.data(); };
            std::optional<Counting> counting;
            std::size_t counted = 0, steps = 0;
            const auto measured = [&](std::size_t done,
                                      std::size_t total) {  // from the first step's end to the last's
                if (done == 1) counting.emplace();
                if (done == total) {
                    counted = counting->count();
                    counting.reset();
                    steps = done;
                }
            };
            editor.edit(request.options, place);
            request.options.progress = measured;
            editor.edit(request.options, place);
            CHECK(steps == (std::string(sampler) == "even" ? 4 : 7));
            CHECK(counted == 0);
        }
    };
    check(std::make_shared<Apart>(std::make_unique<FakeBackend>(std::make_shared<FakeLog>())));
    if (auto backend = onnxruntime()) check(std::make_shared<Apart>(std::move(backend)));
}

TEST_CASE("whichever allocation of ours fails, there is a status with a text, and the editor goes on") {
    if (!allocations_are_ours()) return;
    const auto check = [](const std::function<std::shared_ptr<backends::Backend>()>& make,
                          std::size_t stride) {
        const auto backend = make();
        if (!backend) return;
        const runtime::SharedBundle shared = toy_bundle();
        runtime::Editor editor(shared, backend, "test", {});
        const ToyRequest request(2);
        const auto expected = edit(editor, request.options);
        const core::Deltas given = deltas_of(1, 2, 0.5F);
        ToyRequest guided(1);
        guided.options.deltas = {&given};
        std::size_t n = 1, failures = 0;
        for (bool failed = true; failed;
             n += stride) {  // a request of another plan and size each time: all is made anew
            std::vector<std::uint8_t> picture;
            const runtime::EditOptions& options = n % 2 ? guided.options : request.options;
            hywu_status status = HYWU_OK;
            {
                const Failing failing(n);
                status = api::guard([&] {
                    picture = std::vector<std::uint8_t>(2 * 16 * 8 * 3);
                    editor.edit(options, [&](const core::Shape&) { return picture.data(); });
                });
                failed = failing.failed();
            }
            if (failed && status != HYWU_OK) {
                CHECK((status == HYWU_ERROR_MEMORY || status == HYWU_ERROR_DEVICE));
                CHECK(std::string(api::last_error().text).size() > 10);
                CHECK(std::string(api::last_error().wrong).size() > 5);
                ++failures;
            }
            if (n % 5 == 0) CHECK(edit(editor, request.options) == expected);
        }
        CHECK(failures > 100 / stride);
        CHECK(edit(editor, request.options) == expected);
    };
    check([] { return std::make_shared<FakeBackend>(std::make_shared<FakeLog>()); }, 1);
    check(
        [] {
            auto backend = onnxruntime();
            return backend ? std::make_shared<Apart>(std::move(backend)) : nullptr;
        },
        3);
}

TEST_CASE("whichever allocation of ours fails, opening a bundle gives a status with a text") {
    if (!allocations_are_ours()) return;
    std::size_t n = 1, failures = 0;
    for (bool failed = true; failed && n < 200000; n += 1 + n / 20) {  // every one at first, then ever fewer
        hywu_status status = HYWU_OK;
        {
            const Failing failing(n);
            status = api::guard([&] {
                runtime::Editor editor(
                    toy_bundle(), std::make_shared<FakeBackend>(std::make_shared<FakeLog>()), "fake", {});
            });
            failed = failing.failed();
        }
        if (failed && status != HYWU_OK) {
            CHECK(status == HYWU_ERROR_MEMORY);
            CHECK(std::string(api::last_error().text).size() > 10);
            ++failures;
        }
    }
    CHECK(failures > 50);
}

TEST_CASE("low memory, warm-up, working sizes, limits") {
    const auto log = std::make_shared<FakeLog>();
    runtime::Editor editor(toy_bundle(), std::make_shared<FakeBackend>(log), "fake", {});
    editor.warm_up();  // region is missing: graphs are loaded, and no edit is made
    CHECK(log->loads == 7);
    CHECK(log->runs == 0);
    const runtime::Limits& limits = editor.limits();
    CHECK(limits.batch_max == 4);
    CHECK(limits.rank == 3);
    CHECK(limits.steps[0].first == "even");
    CHECK(limits.steps[0].second == std::vector<std::int64_t>{1, 2, 3, 4, 5});
    CHECK(limits.steps[1].second == std::vector<std::int64_t>{2, 3, 4});
    const runtime::Size size = editor.working_size(640, 480);
    CHECK(size.width % 8 == 0);
    CHECK_THROWS_AS(editor.working_size(0, 5), core::Error);
    CHECK_THROWS_AS(editor.working_size(1 << 30, 1 << 30), core::Error);
}
