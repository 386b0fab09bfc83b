#include "backends/backend.hpp"

#include <stdexcept>
#include <string>

#include "core/array.hpp"
#include "core/error.hpp"

namespace hywu::backends {
namespace {

size_t bytes_of(core::Dtype dtype, const std::vector<int64_t>& shape) {
    try {
        const size_t count = core::count(shape);
        if (count <= SIZE_MAX / core::item_size(dtype)) return count * core::item_size(dtype);
    } catch (const std::length_error&) {
    }
    throw core::Error(core::ErrorKind::device, "There is no memory for a tensor of that size",
                      "Expected the buffers to fit", "Use a smaller size or batch");
}

// One after the other; copies go through the host.
class Sequence final : public Binding {
public:
    Sequence(std::vector<Binding*> bindings, std::vector<std::pair<DeviceTensor*, DeviceTensor*>> copies)
        : bindings_(std::move(bindings)), copies_(std::move(copies)) {
        size_t largest = 0;
        for (const auto& [from, to] : copies_) {
            if (from->bytes() != to->bytes())
                throw std::logic_error("a copy between tensors of different sizes");
            largest = std::max(largest, from->bytes());
        }
        host_.resize(largest);
    }
    void run() override {
        for (Binding* binding : bindings_) binding->run();
        for (const auto& [from, to] : copies_) {
            from->read(host_.data(), from->bytes());
            to->write(host_.data(), to->bytes());
        }
    }

private:
    std::vector<Binding*> bindings_;
    std::vector<std::pair<DeviceTensor*, DeviceTensor*>> copies_;
    std::vector<std::byte> host_;
};

}  // namespace

DeviceTensor::DeviceTensor(core::Dtype dtype, std::vector<int64_t> shape)
    : dtype_(dtype), shape_(std::move(shape)), bytes_(bytes_of(dtype_, shape_)) {}

std::unique_ptr<Binding> Backend::sequence(std::vector<Binding*> bindings,
                                           std::vector<std::pair<DeviceTensor*, DeviceTensor*>> copies) {
    return std::make_unique<Sequence>(std::move(bindings), std::move(copies));
}

}  // namespace hywu::backends
