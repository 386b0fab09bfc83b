#include "backends/tensorrt/tensorrt.hpp"

#include <NvInferRuntime.h>
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "core/error.hpp"
#include "core/log.hpp"
#include "fake_cuda.hpp"

namespace fs = std::filesystem;
using hywu::backends::Backend;
using hywu::backends::Binding;
using hywu::backends::DeviceTensor;
using hywu::backends::Entry;
using hywu::backends::Options;
using hywu::core::Dtype;
using hywu::core::Error;
using hywu::core::ErrorKind;

namespace {

#if defined(TRT_MAJOR_RTX)
Entry entry() { return hywu::backends::tensorrt_rtx::entry(); }
const std::string version = "1.6.0.27", product = "TensorRT-RTX";
#else
Entry entry() { return hywu::backends::tensorrt::entry(); }
const std::string version = "10.3.0.30", product = "TensorRT";
#endif

// A folder of its own, gone afterwards.
struct Folder {
    Folder()
        : path(fs::temp_directory_path() /
               ("hywu-tensorrt-" + std::to_string(reinterpret_cast<std::uintptr_t>(this)))) {
        fs::remove_all(path);
        fs::create_directories(path);
    }
    ~Folder() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
    fs::path write(const std::string& name, const std::string& text) const {
        std::ofstream(path / name, std::ios::binary) << text;
        return path / name;
    }
    fs::path plan(const std::string& body, const std::string& name = "graph.plan") const {
        return write(name, "fake plan " + version + " 8.9\n" + body + "end\n");
    }
    fs::path path;
};

const std::string add_plan =
    "input a float32 1x1 8x4\ninput b float32 1x1 8x4\noutput sum float32 a\nadd sum a b\nscratch 100\n";

std::vector<float> read(DeviceTensor& tensor) {
    std::vector<float> values(tensor.bytes() / sizeof(float));
    tensor.read(values.data(), tensor.bytes());
    return values;
}

void write(DeviceTensor& tensor, const std::vector<float>& values) {
    tensor.write(values.data(), values.size() * sizeof(float));
}

std::unique_ptr<Backend> make() { return entry().create(Options{}); }

// The error that `run` throws.
template <class Run>
Error failure(Run&& run) {
    try {
        run();
    } catch (const Error& error) {
        return error;
    }
    FAIL("nothing was thrown");
    return Error(ErrorKind::input, "");
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// What the log says while it lives.
struct Log {
    Log() {
        hywu::core::set_log_sink(
            [this](hywu::core::LogLevel, const std::string& line) { text += line + "\n"; },
            hywu::core::LogLevel::debug);
    }
    ~Log() { hywu::core::set_log_sink({}, hywu::core::LogLevel::off); }
    std::string text;
};

}  // namespace

TEST_SUITE("tensorrt") {
    TEST_CASE("it can be used, and says on what") {
        const Log log;
        CHECK_FALSE(entry().missing());
        const auto backend = make();
        const auto target = backend->target();
        REQUIRE(target);
        CHECK(target->backend == entry().name);
        CHECK(target->version == version);
        CHECK(target->capability == "8.9");
        CHECK(target->device == "Pretended GPU");
        CHECK(entry().version() == version);
        CHECK(backend->copies_state());
        CHECK(backend->name() == entry().name);
        CHECK(has(log.text, product + " " + version + " on Pretended GPU, compute capability 8.9"));
        CHECK(fake_cuda()->contexts == 0);
    }

    TEST_CASE("a GPU that is not there") {
        Options options;
        options.device = 3;
        const Error error = failure([&] { entry().create(options); });
        CHECK(error.kind() == ErrorKind::device);
        CHECK(error.wrong() == "There is no GPU 3");
        CHECK(error.expected() == "This machine has 1, counted from 0");
    }

    TEST_CASE("buffers are aligned, zero, and keep what is written") {
        const auto backend = make();
        std::vector<std::unique_ptr<DeviceTensor>> tensors;
        for (const std::int64_t size : {1, 3, 1000, 300000}) {
            tensors.push_back(backend->allocate(Dtype::float32, {size}));
            CHECK(read(*tensors.back()) == std::vector<float>(static_cast<std::size_t>(size), 0.0F));
        }
        // The source may change as soon as write() returns, whether it is staged (up to 1 MiB) or not.
        for (auto& tensor : tensors) {
            std::vector<float> values(tensor->bytes() / 4, 2.5F);
            write(*tensor, values);
            std::fill(values.begin(), values.end(), -1.0F);
        }
        for (auto& tensor : tensors) CHECK(read(*tensor) == std::vector<float>(tensor->bytes() / 4, 2.5F));
    }

    TEST_CASE("more than the pinned memory holds is written in turn") {
        const auto backend = make();
        std::vector<std::unique_ptr<DeviceTensor>> tensors;
        for (int i = 0; i < 12; ++i) {
            tensors.push_back(backend->allocate(Dtype::float32, {200000}));
            write(*tensors.back(), std::vector<float>(200000, static_cast<float>(i)));
        }
        for (int i = 0; i < 12; ++i)
            CHECK(read(*tensors[static_cast<std::size_t>(i)])[199999] == static_cast<float>(i));
    }

    TEST_CASE("nothing of a request stays after wiping") {
        const auto backend = make();
        const auto tensor = backend->allocate(Dtype::float32, {100});
        write(*tensor, std::vector<float>(100, 1.0F));
        CHECK_FALSE(fake_cuda()->pinned_is_zero());
        tensor->wipe();
        CHECK(fake_cuda()->pinned_is_zero());
        CHECK(read(*tensor) == std::vector<float>(100, 0.0F));
    }

    TEST_CASE("device memory that is used up, or not aligned") {
        const auto backend = make();
        FakeCuda& cuda = *fake_cuda();
        const int before = cuda.allocations;
        cuda.limit = cuda.bytes + 1000;
        Error error = failure([&] { backend->allocate(Dtype::float32, {1000}); });
        CHECK(error.kind() == ErrorKind::device);
        CHECK(has(error.wrong(), "The GPU has no memory for a buffer of 4000 bytes"));
        CHECK(has(error.remedy(), "low_memory"));
        CHECK(backend->allocate(Dtype::float32, {100}) != nullptr);
        cuda.limit = std::size_t{1} << 40;
        cuda.misalign = 64;
        error = failure([&] { backend->allocate(Dtype::float32, {10}); });
        cuda.misalign = 0;
        CHECK(has(error.wrong(), "no multiple of 256"));
        CHECK(cuda.allocations == before);
        CHECK(fake_cuda()->contexts == 0);
    }

    TEST_CASE("one graph's output is another's input, in place") {
        const Folder folder;
        const auto backend = make();
        const auto session = backend->load(folder.plan(add_plan), {});
        const auto a = backend->allocate(Dtype::float32, {2, 2}),
                   b = backend->allocate(Dtype::float32, {2, 2}),
                   c = backend->allocate(Dtype::float32, {2, 2}),
                   d = backend->allocate(Dtype::float32, {2, 2});
        const auto first = session->bind({{"a", a.get()}, {"b", b.get()}}, {{"sum", c.get()}});
        const auto second = session->bind({{"a", c.get()}, {"b", c.get()}}, {{"sum", d.get()}});
        write(*a, {1, 2, 3, 4});
        write(*b, {10, 20, 30, 40});
        fake_cuda()->reset();
        first->run();
        second->run();
        CHECK(read(*d) == std::vector<float>{22, 44, 66, 88});
        CHECK(fake_cuda()->device_copies == 0);
        CHECK(fake_cuda()->contexts == 0);
    }

    TEST_CASE("graphs that run in turn share the memory that they work in") {
        const Folder folder;
        const auto backend = make();
        const auto session = backend->load(folder.plan(add_plan), {});
        std::vector<std::unique_ptr<DeviceTensor>> small, large;
        for (int i = 0; i < 3; ++i) small.push_back(backend->allocate(Dtype::float32, {1, 4}));
        for (int i = 0; i < 3; ++i) large.push_back(backend->allocate(Dtype::float32, {8, 4}));
        const auto bind = [&](auto& t) {
            return session->bind({{"a", t[0].get()}, {"b", t[1].get()}}, {{"sum", t[2].get()}});
        };
        const int before = fake_cuda()->allocations;
        auto one = bind(large);
        CHECK(fake_cuda()->allocations == before + 1);
        auto two = bind(small), three = bind(large);
        CHECK(fake_cuda()->allocations == before + 1);
        write(*small[0], {1, 1, 1, 1});
        two->run();
        CHECK(read(*small[2]) == std::vector<float>{1, 1, 1, 1});
    }

    TEST_CASE("a step is captured once and replayed for every request") {
        const Folder folder;
        const auto backend = make();
        // One step: next = latents + noise, twice = next + next; then next is carried to latents.
        const auto session = backend->load(folder.plan(add_plan), {});
        const auto latents = backend->allocate(Dtype::float32, {1, 2}),
                   noise = backend->allocate(Dtype::float32, {1, 2}),
                   next = backend->allocate(Dtype::float32, {1, 2}),
                   twice = backend->allocate(Dtype::float32, {1, 2});
        const auto add = session->bind({{"a", latents.get()}, {"b", noise.get()}}, {{"sum", next.get()}});
        const auto more = session->bind({{"a", next.get()}, {"b", next.get()}}, {{"sum", twice.get()}});
        const auto step = backend->sequence({add.get(), more.get()}, {{next.get(), latents.get()}});
        FakeCuda& cuda = *fake_cuda();
        cuda.reset();
        const auto request = [&](float start, int steps) {
            write(*latents, {start, -start});
            float expected = start;
            for (int k = 1; k <= steps; ++k) {
                write(*noise, {static_cast<float>(k), 0.0F});
                step->run();
                expected += static_cast<float>(k);
            }
            CHECK(read(*latents) == std::vector<float>{expected, -start});
            CHECK(read(*twice) == std::vector<float>{2 * expected, -2 * start});
        };
        request(100, 1);
        CHECK(cuda.captures == 0);  // the first run is an ordinary one
        request(100, 5);
        CHECK(cuda.captures == 1);
        CHECK(cuda.launches == 5);
        cuda.most_pending = 0;
        request(-7, 8);
        // The host is one step ahead of the device at most: two steps are under way, each with its inputs
        // (two in the first step, one in others) and an event.
        CHECK(cuda.most_pending == 7);
        request(3, 1);
        CHECK(cuda.captures == 1);
        CHECK(cuda.launches == 14);
        CHECK(cuda.device_copies == 2);  // run once, captured once
        CHECK(fake_cuda()->contexts == 0);
    }

    TEST_CASE("copies alone are a unit as well") {
        const auto backend = make();
        const auto from = backend->allocate(Dtype::float32, {2}), to = backend->allocate(Dtype::float32, {2});
        const auto unit = backend->sequence({}, {{from.get(), to.get()}});
        for (float value = 1; value < 5; ++value) {
            write(*from, {value, -value});
            unit->run();
            CHECK(read(*to) == std::vector<float>{value, -value});
        }
    }

    TEST_CASE("a step that cannot be captured runs call by call") {
        const Folder folder;
        const auto backend = make();
        const auto session = backend->load(folder.plan(add_plan + "uncapturable\n"), {});
        const auto a = backend->allocate(Dtype::float32, {1, 1}),
                   b = backend->allocate(Dtype::float32, {1, 1}),
                   sum = backend->allocate(Dtype::float32, {1, 1});
        const auto call = session->bind({{"a", a.get()}, {"b", b.get()}}, {{"sum", sum.get()}});
        const auto step = backend->sequence({call.get()}, {{sum.get(), a.get()}});
        write(*b, {1});
        const Log log;
        fake_cuda()->reset();
        for (int i = 0; i < 6; ++i) step->run();
        CHECK(read(*a) == std::vector<float>{6});
        CHECK(fake_cuda()->captures == 1);
        CHECK(fake_cuda()->launches == 0);
        CHECK(has(log.text,
                  "cannot be captured as a CUDA graph, and runs call by call: "
                  "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"));
    }

    TEST_CASE("a graph that cannot be run") {
        const Folder folder;
        const auto backend = make();
        const auto session = backend->load(folder.plan(add_plan + "broken\n"), {});
        const auto a = backend->allocate(Dtype::float32, {1, 1}),
                   sum = backend->allocate(Dtype::float32, {1, 1});
        const auto call = session->bind({{"a", a.get()}, {"b", a.get()}}, {{"sum", sum.get()}});
        const Error error = failure([&] { call->run(); });
        CHECK(error.kind() == ErrorKind::engine);
        CHECK(error.wrong() == product + " cannot run 'graph.plan': this plan cannot be run");
        CHECK(fake_cuda()->contexts == 0);
    }

    TEST_CASE("plans that cannot be loaded say what was found and what is needed") {
        const Folder folder;
        const auto backend = make();
        const std::string whole = "fake plan " + version + " 8.9\n" + add_plan + "end\n";
        const std::vector<std::pair<std::string, std::string>> cases = {
            {"fake plan 9.1.2.3 8.9\n" + add_plan + "end\n", "the plan was built with version 9.1.2.3"},
            {"fake plan " + version + " 7.5\n" + add_plan + "end\n",
             "the plan was built for compute capability 7.5"},
            {whole.substr(0, whole.size() - 5), "the plan is truncated"},
            {"", "it is empty"},
            {"ONNX", "magic tag does not match"}};
        for (const auto& [text, reason] : cases) {
            const Error error =
                failure([&, &text = text] { backend->load(folder.write("step.plan", text), {}); });
            CHECK(error.kind() == ErrorKind::engine);
            CHECK(error.wrong().find("The plan " + folder.path.filename().string() +
                                     "/step.plan cannot be loaded: ") == 0);
            CHECK(has(error.wrong(), reason));
            CHECK(error.expected() ==
                  "Expected a whole plan of " + product + " " + version + " for a GPU of 8.9");
            CHECK(has(error.remedy(), "hywu build"));
        }
        const Error error = failure([&] { backend->load(folder.path / "absent.plan", {}); });
        CHECK(error.kind() == ErrorKind::bundle);
        CHECK(fake_cuda()->contexts == 0);
    }

    TEST_CASE("an engine that is not what the manifest says") {
        const Folder folder;
        const auto backend = make();
        const auto a = backend->allocate(Dtype::float32, {1, 4}),
                   wide = backend->allocate(Dtype::float32, {1, 9}),
                   ids = backend->allocate(Dtype::int64, {1, 4});
        const auto bind = [&](const std::string& body, const hywu::backends::TensorMap& in,
                              const hywu::backends::TensorMap& out) {
            return failure([&] { backend->load(folder.plan(body), {})->bind(in, out); });
        };
        const hywu::backends::TensorMap both = {{"a", a.get()}, {"b", a.get()}}, sum = {{"sum", a.get()}};
        const Error unknown = bind(add_plan, {{"a", a.get()}}, sum);
        CHECK(unknown.kind() == ErrorKind::bundle);
        CHECK(unknown.wrong() == "The engine 'graph.plan' has an input 'b'");
        CHECK(bind(add_plan, both, {}).wrong() == "The engine 'graph.plan' has an output 'sum'");
        CHECK(bind(add_plan, {{"a", a.get()}, {"b", a.get()}, {"c", a.get()}}, sum).wrong() ==
              "The engine 'graph.plan' has no tensor 'c'");
        CHECK(bind(add_plan, {{"a", a.get()}, {"b", ids.get()}}, sum).wrong() ==
              "The engine 'graph.plan' has input 'b' of dtype float32");
        CHECK(has(bind("input a fp8 1x1 8x4\noutput sum float32 a\n", {{"a", a.get()}}, sum).wrong(),
                  "of dtype that is not known"));
        CHECK(has(bind(add_plan + "host b\n", both, sum).wrong(), "wants input 'b' in host memory"));
        const Error shape = bind(add_plan, {{"a", wide.get()}, {"b", wide.get()}}, {{"sum", wide.get()}});
        CHECK(shape.kind() == ErrorKind::input);
        CHECK(shape.wrong() == "'a' is [1, 9]");
        CHECK(shape.expected() == "The engine 'graph.plan' takes [1, 1] to [8, 4]");
        const Error other = bind("input a float32 1x4 1x4\noutput sum float32 1x5\n", {{"a", a.get()}}, sum);
        CHECK(other.kind() == ErrorKind::bundle);
        CHECK(other.wrong() == "The engine 'graph.plan' makes 'sum' [1, 5]");
        CHECK(other.expected() == "The manifest says [1, 4]");
    }

    TEST_CASE("editors in several threads share an engine") {
        const Folder folder;
        const fs::path plan = folder.plan(add_plan);
        const auto loader = make();
        const auto session = loader->load(plan, {});
        std::vector<std::thread> threads;
        std::vector<float> results(4);
        for (std::size_t t = 0; t < results.size(); ++t) {
            threads.emplace_back([&, t] {
                const auto backend = make();
                const auto a = backend->allocate(Dtype::float32, {1, 1}),
                           b = backend->allocate(Dtype::float32, {1, 1}),
                           sum = backend->allocate(Dtype::float32, {1, 1});
                const auto call = session->bind({{"a", a.get()}, {"b", b.get()}}, {{"sum", sum.get()}});
                const auto step = backend->sequence({call.get()}, {{sum.get(), a.get()}});
                write(*b, {static_cast<float>(t + 1)});
                for (int i = 0; i < 50; ++i) step->run();
                results[t] = read(*a)[0];
            });
        }
        for (std::thread& thread : threads) thread.join();
        CHECK(results == std::vector<float>{50, 100, 150, 200});
    }

    TEST_CASE("everything is given back") {
        const int before = fake_cuda()->allocations;
        const Folder folder;
        {
            const auto backend = make();
            const auto session = backend->load(folder.plan(add_plan), {});
            const auto a = backend->allocate(Dtype::float32, {1, 1});
            const auto call = session->bind({{"a", a.get()}, {"b", a.get()}}, {{"sum", a.get()}});
            const auto step = backend->sequence({call.get()}, {});
            for (int i = 0; i < 3; ++i) step->run();
            CHECK(fake_cuda()->allocations > before);
        }
        CHECK(fake_cuda()->allocations == before);
        CHECK(fake_cuda()->contexts == 0);
    }

#if defined(TRT_MAJOR_RTX)
    TEST_CASE("kernels that were compiled are kept beside the plan") {
        const Folder folder;
        const fs::path plan = folder.plan(add_plan), file = folder.path / "runtime.cache";
        const auto use = [&] {
            const auto backend = make();
            const auto session = backend->load(plan, {});
            const auto a = backend->allocate(Dtype::float32, {1, 1}),
                       sum = backend->allocate(Dtype::float32, {1, 1});
            const auto call = session->bind({{"a", a.get()}, {"b", a.get()}}, {{"sum", sum.get()}});
            call->run();
            // As soon as there is something new, not only at the end.
            CHECK(fs::exists(file));
        };
        const auto content = [&] {
            std::ifstream in(file);
            return std::string(std::istreambuf_iterator<char>(in), {});
        };
        use();
        CHECK(content() == "cache 1");
        use();
        CHECK(content() == "cache 2");  // it was read, and has one more
        {
            std::ofstream(file) << "rubbish";
            const Log log;
            use();
            CHECK(has(log.text, "cannot be used (this is no runtime cache), and is made anew"));
        }
        CHECK(content() == "cache 1");
        CHECK(std::distance(fs::directory_iterator(folder.path), {}) == 2);  // no temporary files
    }

    TEST_CASE("a folder where no cache can be written is used all the same") {
        const Folder folder;
        const fs::path plan = folder.plan(add_plan);
        fs::create_directories(folder.path / "runtime.cache");  // in the way, whoever asks
        const Log log;
        const auto backend = make();
        const auto session = backend->load(plan, {});
        const auto a = backend->allocate(Dtype::float32, {1, 1}),
                   sum = backend->allocate(Dtype::float32, {1, 1});
        const auto call = session->bind({{"a", a.get()}, {"b", a.get()}}, {{"sum", sum.get()}});
        write(*a, {4});
        call->run();
        CHECK(read(*sum) == std::vector<float>{8});
        CHECK(has(log.text, "runtime.cache cannot be written"));
    }
#endif
}

TEST_SUITE("no_driver") {
    TEST_CASE("no NVIDIA driver") {
        REQUIRE(entry().missing());
        CHECK(has(*entry().missing(), "there is no NVIDIA driver (/nonexistent/libcuda.so.1"));
        const Error error = failure([] { make(); });
        CHECK(error.kind() == ErrorKind::device);
        CHECK(has(error.remedy(), "ort-cpu, which works here"));
    }
}

TEST_SUITE("no_gpu") {
    TEST_CASE("a driver and no GPU") {
        REQUIRE(entry().missing());
        CHECK(*entry().missing() ==
              "the NVIDIA driver finds no usable GPU (CUDA_ERROR_NO_DEVICE: no CUDA-capable device is "
              "detected)");
    }
}

TEST_SUITE("no_library") {
    TEST_CASE("a GPU and no TensorRT") {
        REQUIRE(entry().missing());
        CHECK(has(*entry().missing(), "the library of " + product));
        CHECK(has(*entry().missing(), "/nonexistent/nvinfer"));
        CHECK(has(*entry().missing(), "may name its file"));
    }
}

TEST_SUITE("other_library") {
    TEST_CASE("a TensorRT of another layout") {
        REQUIRE(entry().missing());
#if defined(TRT_MAJOR_RTX)
        CHECK(has(*entry().missing(), "is TensorRT-RTX 1.4.0.76, and this library was built for 1.6"));
#else
        CHECK(has(*entry().missing(), "is TensorRT 11.1.0.20, and this library was built for 10.3"));
#endif
    }
}
