#include "core/files.hpp"

#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <thread>

#include "core/bundle.hpp"
#include "core/sha256.hpp"
#include "scratch.hpp"

using namespace hywu::core;
namespace fs = std::filesystem;
using json = nlohmann::ordered_json;

namespace {

constexpr const char* header = R"({"mix":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})";

std::string checkpoint() {
    const std::string text = header;
    std::string file(8, '\0');
    file[0] = static_cast<char>(text.size());
    return file + text + "0123456789abcdef";
}

// A bundle with one graph, whose weight is linked to a checkpoint. Gives the bundle's root.
fs::path bundle(const Scratch& scratch) {
    const std::string graph = "not looked at";
    const std::string weights = checkpoint();
    scratch.write("checkpoint/w.safetensors", weights);
    scratch.write("bundle/sub/g.onnx", graph);
    const json manifest = {
        {"format", 1},
        {"name", "test"},
        {"family", nullptr},
        {"producer", {{"name", "test"}, {"version", "1"}}},
        {"files", {{"sub/g.onnx", {{"size", graph.size()}, {"sha256", sha256(graph)}}}}},
        {"axes", {{"batch", {{"min", 1}, {"max", 4}}}}},
        {"tensors", {{"x", {{"dtype", "float32"}, {"shape", {"batch", 2, 2}}, {"source", "input"}}}}},
        {"graphs",
         {{"g",
           {{"file", "sub/g.onnx"},
            {"inputs", json::array({{{"name", "x"}, {"dtype", "float32"}, {"shape", {"batch", 2, 2}}}})},
            {"outputs",
             json::array({{{"name", "y.lora_A"}, {"dtype", "float32"}, {"shape", {"batch", 2, 2}}}})}}}}},
        {"program", json::array({{{"graph", "g"}, {"phase", "request"}}})},
        {"results", {{"deltas", {"y.lora_A"}}}},
        {"sources",
         {{"base",
           {{"name", "base"},
            {"files",
             {{"w.safetensors",
               {{"size", weights.size()},
                {"header_sha256", sha256(weights.substr(0, weights.size() - 16))}}}}}}}}},
        {"linked",
         {{"sub/g.onnx",
           {{"mix",
             {{"source", "base"},
              {"file", "w.safetensors"},
              {"offset", weights.size() - 16},
              {"length", 16},
              {"dtype", "float32"},
              {"shape", {4}}}}}}}},
    };
    scratch.write("bundle/manifest.json", manifest.dump());
    return scratch.path() / "bundle";
}

OpenOptions options(const Scratch& scratch, bool verify = false) {
    OpenOptions result;
    result.verify = verify;
    result.sources["base"] = scratch.path() / "checkpoint";
    return result;
}

}  // namespace

TEST_CASE("a bundle is opened, its weights are mapped") {
    const Scratch scratch;
    const fs::path root = bundle(scratch);
    std::vector<Weight> weights;
    {
        Bundle opened = Bundle::open(root, options(scratch, true));
        const Bundle moved = std::move(opened);
        CHECK(moved.root() == root);
        CHECK(moved.file("sub/g.onnx") == root / "sub" / "g.onnx");
        CHECK(moved.graph_file("g") == "sub/g.onnx");
        CHECK(moved.initializers("ghost.onnx").empty());
        weights = moved.initializers("sub/g.onnx");
        CHECK(weights.at(0).data == moved.initializers("sub/g.onnx").at(0).data);  // one mapping for all
        check_error(ErrorKind::input, "fp16", [&] { moved.graph_file("g", "fp16"); });
    }
    REQUIRE(weights.size() == 1);  // and they outlive it
    CHECK(weights[0].name == "mix");
    CHECK(weights[0].dtype == Dtype::float32);
    CHECK(weights[0].shape == std::vector<std::int64_t>{4});
    CHECK(std::string_view(reinterpret_cast<const char*>(weights[0].data), weights[0].bytes) ==
          "0123456789abcdef");
    CHECK(Bundle::open(root / "manifest.json", options(scratch)).root() == root);
}

TEST_CASE("bundles whose files are not what the manifest says") {
    const Scratch scratch;
    const fs::path root = bundle(scratch);
    const std::string graph = contents(root / "sub/g.onnx");
    const auto open = [&](bool verify = false) {
        return [&, verify] { Bundle::open(root, options(scratch, verify)); };
    };
    for (std::size_t length = 0; length < graph.size(); ++length) {
        scratch.write("bundle/sub/g.onnx", graph.substr(0, length));
        check_error(ErrorKind::bundle, "bytes", open());
    }
    scratch.write("bundle/sub/g.onnx", "Not looked at");
    CHECK_NOTHROW(open()());
    check_error(ErrorKind::bundle, "SHA-256", open(true));
    fs::remove(root / "sub/g.onnx");
    check_error(ErrorKind::bundle, "sub/g.onnx is missing", open());
    fs::create_directory(root / "sub/g.onnx");
    check_error(ErrorKind::bundle, "sub/g.onnx is missing", open());
    fs::remove(root / "manifest.json");
    check_error(ErrorKind::bundle, "No bundle", open());
    check_error(ErrorKind::bundle, "No bundle", [] { Bundle::open(fs::path()); });
}

#ifndef _WIN32
TEST_CASE("links out of the bundle, and links in a circle") {
    const Scratch scratch;
    const fs::path root = bundle(scratch);
    const auto open = [&] { Bundle::open(root, options(scratch)); };
    fs::rename(root / "sub/g.onnx", scratch.path() / "outside");
    fs::create_symlink(scratch.path() / "outside", root / "sub/g.onnx");
    check_error(ErrorKind::bundle, "leads out", open);
    fs::remove(root / "sub/g.onnx");
    fs::create_symlink("g.onnx", root / "sub/g.onnx");
    check_error(ErrorKind::bundle, "missing", open);
    fs::remove(root / "sub/g.onnx");
    fs::rename(scratch.path() / "outside", root / "real");
    fs::create_symlink("../real", root / "sub/g.onnx");
    CHECK_NOTHROW(open());
    fs::create_directory_symlink(root, scratch.path() / "link");
    CHECK_NOTHROW(Bundle::open(scratch.path() / "link", options(scratch, true)));
}
#endif

TEST_CASE("checkpoints that are not the one that was exported") {
    const Scratch scratch;
    const fs::path root = bundle(scratch);
    const std::string whole = checkpoint();
    check_error(ErrorKind::bundle, "linked to source 'base'", [&] { Bundle::open(root); });
    OpenOptions lazy;
    lazy.links = false;
    check_error(ErrorKind::bundle, "linked to source 'base'",
                [&] { Bundle::open(root, lazy).initializers("sub/g.onnx"); });
    lazy.sources["ghost"] = root;
    check_error(ErrorKind::input, "ghost", [&] { Bundle::open(root, lazy); });
    for (std::size_t length = 0; length < whole.size(); ++length) {
        scratch.write("checkpoint/w.safetensors", whole.substr(0, length));
        check_error(ErrorKind::bundle, "bytes, not", [&] { Bundle::open(root, options(scratch)); });
        OpenOptions unchecked = options(scratch);
        unchecked.links = false;
        check_error(ErrorKind::bundle, "w.safetensors",
                    [&] { Bundle::open(root, unchecked).initializers("sub/g.onnx"); });
    }
    std::string other = whole;
    other[9] ^= 1;
    scratch.write("checkpoint/w.safetensors", other);
    check_error(ErrorKind::bundle, "header", [&] { Bundle::open(root, options(scratch)); });
    fs::remove(scratch.path() / "checkpoint/w.safetensors");
    check_error(ErrorKind::bundle, "not a file", [&] { Bundle::open(root, options(scratch)); });
}

TEST_CASE("weights are mapped from several threads") {
    const Scratch scratch;
    const Bundle opened = Bundle::open(bundle(scratch), options(scratch));
    std::vector<const std::byte*> found(8);
    std::vector<std::thread> threads;
    for (const std::byte*& place : found) {
        threads.emplace_back([&] { place = opened.initializers("sub/g.onnx").at(0).data; });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(std::set<const std::byte*>(found.begin(), found.end()).size() == 1);
}

TEST_CASE("files are written whole or not at all") {
    const Scratch scratch;
    const fs::path path = scratch.path() / "ü.bin";
    write_atomically(path, {"one", "", " two"});
    CHECK(contents(path) == "one two");
    write_atomically(path, {"three"});
    CHECK(contents(path) == "three");
    CHECK_THROWS_AS(write_atomically(scratch.path() / "ghost" / "file", {"x"}), std::system_error);
    fs::create_directory(scratch.path() / "dir");
    CHECK_THROWS_AS(write_atomically(scratch.path() / "dir", {"x"}), std::system_error);
    std::set<std::string> left;
    for (const auto& entry : fs::directory_iterator(scratch.path()))
        left.insert(entry.path().filename().u8string());
    CHECK(left == std::set<std::string>{"dir", "ü.bin"});
    CHECK(read_file(path, 2) == "th");
    CHECK_THROWS_AS(read_file(scratch.path() / "dir", 2), std::system_error);
    CHECK_THROWS_AS(MappedFile(scratch.write("empty", "")), std::system_error);
}
