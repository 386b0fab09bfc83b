// A backend without a library: every graph is a made-up function of all its inputs, and everything that is
// asked of it can be seen, and made to fail.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "core/array.hpp"
#include "core/error.hpp"

namespace hywu::testing {

using backends::Backend;
using backends::Binding;
using backends::DeviceTensor;
using backends::Session;
using backends::TensorMap;

// What the graph in `file` makes of its inputs: every output element depends on every input byte, on the
// graph's and the output's name and on its own place.
inline void fake_graph(const std::string& file, const std::map<std::string, std::vector<double>>& inputs,
                       const std::string& output, std::vector<double>& values) {
    double mixed = 0.1 * static_cast<double>(file.size()) + 0.01 * static_cast<double>(output.size()),
           place = 0;
    for (const auto& [port, elements] : inputs) {
        place += 0.1 * static_cast<double>(port.size());
        for (const double element : elements) mixed += std::sin(1.7 * element + (place += 1));
    }
    for (std::size_t i = 0; i < values.size(); ++i)
        values[i] = std::sin(mixed * 3 + 0.37 * static_cast<double>(i));
}

inline std::vector<double> to_doubles(core::Dtype dtype, const std::byte* data, std::size_t bytes) {
    std::vector<double> values(bytes / core::item_size(dtype));
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (dtype == core::Dtype::float32)
            values[i] = static_cast<double>(reinterpret_cast<const float*>(data)[i]);
        if (dtype == core::Dtype::int64)
            values[i] = static_cast<double>(reinterpret_cast<const int64_t*>(data)[i]);
        if (dtype == core::Dtype::uint8) values[i] = static_cast<double>(static_cast<unsigned char>(data[i]));
    }
    return values;
}

inline void from_doubles(const std::vector<double>& values, core::Dtype dtype, std::byte* data) {
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (dtype == core::Dtype::float32) reinterpret_cast<float*>(data)[i] = static_cast<float>(values[i]);
        if (dtype == core::Dtype::uint8)
            data[i] = static_cast<std::byte>(
                std::isfinite(values[i]) ? static_cast<int>(127.5 * (values[i] + 1)) : 0);
    }
}

class FakeTensor;

// What one fake backend, or several, saw.
struct FakeLog {
    std::atomic<int> loads{0}, sessions{0}, tensors{0}, runs{0}, operations{0};
    int fail_at = -1;                     // the number of the operation that fails
    std::vector<std::string> ran;         // files, in order; kept only if `record`
    std::vector<std::string> folders;     // of the files that were loaded; kept only if `record`
    std::set<core::Shape> shapes;         // of the tensors that were made; kept only if `record`
    bool record = false, poison = false;  // `poison`: a generated delta is not a number
    std::set<FakeTensor*> alive;          // for backends of one thread

    void operation(const char* what) {
        if (operations++ == fail_at) {
            throw core::Error(core::ErrorKind::engine, std::string("Fake: ") + what + " failed",
                              "Expected it to run", "Retry");
        }
    }
};

class FakeTensor final : public DeviceTensor {
public:
    FakeTensor(std::shared_ptr<FakeLog> log, core::Dtype dtype, const core::Shape& shape, bool visible)
        : DeviceTensor(dtype, shape), log_(std::move(log)), memory_(dtype, shape), visible_(visible) {
        ++log_->tensors;
        if (log_->record) {
            log_->alive.insert(this);
            log_->shapes.insert(shape);
        }
    }
    ~FakeTensor() override {
        --log_->tensors;
        if (log_->record) log_->alive.erase(this);
    }
    void write(const void* data, std::size_t size) override {
        log_->operation("write");
        if (size != bytes()) throw std::logic_error("size");
        std::memcpy(memory_.data(), data, size);
    }
    void read(void* data, std::size_t size) override {
        log_->operation("read");
        if (size != bytes()) throw std::logic_error("size");
        std::memcpy(data, memory_.data(), size);
    }
    void wipe() override {
        log_->operation("wipe");
        std::memset(memory_.data(), 0, bytes());
    }
    std::optional<bool> finite() override {
        if (!visible_) return std::nullopt;
        const auto values = to_doubles(dtype(), memory_.data(), bytes());
        return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
    }
    core::Array& memory() { return memory_; }

private:
    std::shared_ptr<FakeLog> log_;
    core::Array memory_;
    bool visible_;
};

class FakeBinding final : public Binding {
public:
    FakeBinding(std::shared_ptr<FakeLog> log, std::shared_ptr<Session> session, std::string file,
                const TensorMap& inputs, const TensorMap& outputs)
        : log_(std::move(log)),
          session_(std::move(session)),
          file_(std::move(file)),
          inputs_(inputs),
          outputs_(outputs) {
        for (const auto& [port, tensor] : inputs_) read_[port] = std::vector<double>();
        for (const auto& [port, tensor] : outputs_) {
            made_[port].resize(tensor->bytes() / core::item_size(tensor->dtype()));
        }
    }
    void run() override {
        log_->operation("run");
        ++log_->runs;
        if (log_->record) log_->ran.push_back(file_);
        for (const auto& [port, tensor] : inputs_) {
            auto* const held = static_cast<FakeTensor*>(tensor);
            read_[port] = to_doubles(held->dtype(), held->memory().data(), held->bytes());
        }
        for (const auto& [port, tensor] : outputs_) {
            auto* const held = static_cast<FakeTensor*>(tensor);
            fake_graph(file_, read_, port, made_[port]);
            if (log_->poison && file_ == "generate.onnx") made_[port][0] = std::nan("");
            from_doubles(made_[port], held->dtype(), held->memory().data());
        }
    }

private:
    std::shared_ptr<FakeLog> log_;
    std::shared_ptr<Session> session_;
    std::string file_;
    TensorMap inputs_, outputs_;
    std::map<std::string, std::vector<double>> read_, made_;
};

class FakeSession final : public Session, public std::enable_shared_from_this<FakeSession> {
public:
    FakeSession(std::shared_ptr<FakeLog> log, std::string file)
        : log_(std::move(log)), file_(std::move(file)) {
        ++log_->sessions;
    }
    ~FakeSession() override { --log_->sessions; }
    std::unique_ptr<Binding> bind(const TensorMap& inputs, const TensorMap& outputs) override {
        log_->operation("bind");
        return std::make_unique<FakeBinding>(log_, shared_from_this(), file_, inputs, outputs);
    }

private:
    std::shared_ptr<FakeLog> log_;
    std::string file_;
};

class FakeBackend : public Backend {
public:
    // `visible`: its tensors can be looked at without a copy.
    explicit FakeBackend(std::shared_ptr<FakeLog> log, bool copies = false, bool visible = true)
        : log_(std::move(log)), copies_(copies), visible_(visible) {}
    std::string_view name() const override { return "fake"; }
    std::shared_ptr<Session> load(const std::filesystem::path& file,
                                  const std::vector<core::Weight>&) override {
        log_->operation("load");
        ++log_->loads;
        if (log_->record) log_->folders.push_back(file.parent_path().filename().u8string());
        return std::make_shared<FakeSession>(log_, file.filename().u8string());
    }
    std::unique_ptr<DeviceTensor> allocate(core::Dtype dtype, const std::vector<int64_t>& shape) override {
        log_->operation("allocate");
        return std::make_unique<FakeTensor>(log_, dtype, shape, visible_);
    }
    bool copies_state() const override { return copies_; }

private:
    std::shared_ptr<FakeLog> log_;
    bool copies_, visible_;
};

}  // namespace hywu::testing
