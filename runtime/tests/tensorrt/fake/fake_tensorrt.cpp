// A TensorRT whose plans are text:
//
//     fake plan 10.3.0.30 8.9
//     input x float32 1x4 8x4          dtype, smallest and largest shape
//     output y float32 x               dtype, and whose shape it has; or its own: 1x4
//     add y x z                        y = x + z
//     scratch 1024                     device memory for each element of the first input
//     end
//
// Other lines: `host NAME` (a tensor that it wants in host memory), `uncapturable`, `broken` (cannot be run).
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "fake_cuda.hpp"

using namespace nvinfer1;

namespace {

ILogger* logger = nullptr;

void fail(const std::string& message) { logger->log(ILogger::Severity::kERROR, message.c_str()); }

// "10.3.0.30", or what the environment says.
std::vector<int> version() {
#if defined(HYWU_FAKE_RTX)
    const char* text = std::getenv("FAKE_TENSORRT_RTX_VERSION");
    std::istringstream in(text != nullptr ? text : "1.6.0.27");
#else
    const char* text = std::getenv("FAKE_TENSORRT_VERSION");
    std::istringstream in(text != nullptr ? text : "10.3.0.30");
#endif
    std::vector<int> parts;
    for (std::string part; std::getline(in, part, '.');) parts.push_back(std::atoi(part.c_str()));
    return parts;
}

std::string version_text() {
    std::string text;
    for (const int part : version()) text += (text.empty() ? "" : ".") + std::to_string(part);
    return text;
}

Dims dims(const std::string& text) {
    Dims result{};
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, 'x');) result.d[result.nbDims++] = std::atoll(part.c_str());
    return result;
}

std::int64_t count(const Dims& shape) {
    std::int64_t product = 1;
    for (int i = 0; i < shape.nbDims; ++i) product *= shape.d[i];
    return product;
}

struct Tensor {
    std::string name;
    DataType type = DataType::kFLOAT;
    bool input = false, host = false;
    Dims least{}, most{};
    std::string like;  // for outputs
};

struct Plan {
    std::vector<Tensor> tensors;
    std::vector<std::vector<std::string>> operations;
    std::int64_t scratch = 0;
    bool uncapturable = false, broken = false;

    const Tensor* find(const std::string& name) const {
        for (const Tensor& tensor : tensors)
            if (tensor.name == name) return &tensor;
        return nullptr;
    }
};

class Context final : public IExecutionContext {
public:
    Context(const Plan& plan, std::atomic<int>* compiled) : plan_(plan), compiled_(compiled) {}

    bool setInputShape(const char* name, const Dims& shape) noexcept override {
        const Tensor* tensor = plan_.find(name);
        if (tensor == nullptr || shape.nbDims != tensor->least.nbDims) return false;
        for (int i = 0; i < shape.nbDims; ++i)
            if (shape.d[i] < tensor->least.d[i] || shape.d[i] > tensor->most.d[i]) return false;
        shapes_[name] = shape;
        return true;
    }
    Dims getTensorShape(const char* name) const noexcept override {
        const Tensor* tensor = plan_.find(name);
        if (tensor->input) return shapes_.at(name);
        return tensor->like.find('x') == 1 ? dims(tensor->like) : shapes_.at(tensor->like);
    }
    bool setTensorAddress(const char* name, void* data) noexcept override {
        const std::size_t bytes = static_cast<std::size_t>(count(getTensorShape(name)));
        if (reinterpret_cast<std::uintptr_t>(data) % 256 != 0 || !fake_cuda_owns(data, bytes)) {
            fail("the address of " + std::string(name) + " is not aligned, or not that of a buffer");
            return false;
        }
        addresses_[name] = static_cast<float*>(data);
        return true;
    }
    std::size_t updateDeviceMemorySizeForShapes() noexcept override {
        return static_cast<std::size_t>(plan_.scratch * count(shapes_.begin()->second));
    }
    void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept override {
        scratch_ = memory;
        scratch_bytes_ = size;
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (plan_.broken) {
            fail("this plan cannot be run");
            return false;
        }
        if (plan_.scratch > 0 && !fake_cuda_owns(scratch_, static_cast<std::size_t>(scratch_bytes_))) {
            fail("there is no device memory to work in");
            return false;
        }
        if (plan_.uncapturable) fake_cuda_invalidate(stream);
        ++*compiled_;
        for (const auto& operation : plan_.operations) {
            float *to = addresses_.at(operation[1]), *a = addresses_.at(operation[2]),
                  *b = addresses_.at(operation[3]);
            const std::int64_t size = count(getTensorShape(operation[1].c_str()));
            fake_cuda_enqueue(stream, [=] {
                for (std::int64_t i = 0; i < size; ++i) to[i] = a[i] + b[i];
            });
        }
        return true;
    }

private:
    const Plan& plan_;
    std::atomic<int>* compiled_;
    std::map<std::string, Dims> shapes_;
    std::map<std::string, float*> addresses_;
    void* scratch_ = nullptr;
    std::int64_t scratch_bytes_ = 0;
};

#if defined(HYWU_FAKE_RTX)
class Memory final : public IHostMemory {
public:
    explicit Memory(std::string text) : text_(std::move(text)) {}
    void* data() const noexcept override { return const_cast<char*>(text_.data()); }
    std::size_t size() const noexcept override { return text_.size(); }

private:
    std::string text_;
};

// "cache 3": kernels for three runs.
class Cache final : public IRuntimeCache {
public:
    IHostMemory* serialize() const noexcept override {
        return new Memory(kernels > 0 ? "cache " + std::to_string(kernels.load()) : "");
    }
    bool deserialize(const void* blob, std::size_t size) noexcept override {
        const std::string text(static_cast<const char*>(blob), size);
        if (text.rfind("cache ", 0) != 0) {
            fail("this is no runtime cache");
            return false;
        }
        kernels = std::atoi(text.c_str() + 6);
        return true;
    }
    std::atomic<int> kernels = 0;
};

class Config final : public IRuntimeConfig {
public:
    void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy s) noexcept override {
        user_managed = s == ExecutionContextAllocationStrategy::kUSER_MANAGED;
    }
    IRuntimeCache* createRuntimeCache() const noexcept override { return new Cache; }
    bool setRuntimeCache(const IRuntimeCache& given) noexcept override {
        cache = const_cast<Cache*>(static_cast<const Cache*>(&given));
        return true;
    }
    void setDynamicShapesKernelSpecializationStrategy(
        DynamicShapesKernelSpecializationStrategy strategy) noexcept override {
        eager = strategy == DynamicShapesKernelSpecializationStrategy::kEAGER;
    }
    bool user_managed = false, eager = false;
    Cache* cache = nullptr;
};
#endif

class Engine final : public ICudaEngine {
public:
    explicit Engine(Plan plan) : plan_(std::move(plan)) {}

#if defined(HYWU_FAKE_RTX)
    IRuntimeConfig* createRuntimeConfig() noexcept override { return new Config; }
    IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept override {
        auto* mine = static_cast<Config*>(config);
        if (!mine->user_managed || !mine->eager) return nullptr;
        return new Context(plan_, mine->cache != nullptr ? &mine->cache->kernels : &runs_);
    }
#else
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
        if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) return nullptr;
        return new Context(plan_, &runs_);
    }
#endif
    std::int32_t getNbIOTensors() const noexcept override {
        return static_cast<std::int32_t>(plan_.tensors.size());
    }
    const char* getIOTensorName(std::int32_t index) const noexcept override {
        return plan_.tensors[static_cast<std::size_t>(index)].name.c_str();
    }
    TensorIOMode getTensorIOMode(const char* name) const noexcept override {
        return plan_.find(name)->input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    TensorLocation getTensorLocation(const char* name) const noexcept override {
        return plan_.find(name)->host ? TensorLocation::kHOST : TensorLocation::kDEVICE;
    }
    DataType getTensorDataType(const char* name) const noexcept override { return plan_.find(name)->type; }
    Dims getProfileShape(const char* name, std::int32_t, OptProfileSelector which) const noexcept override {
        return which == OptProfileSelector::kMIN ? plan_.find(name)->least : plan_.find(name)->most;
    }
    std::int64_t getDeviceMemorySizeV2() const noexcept override {
        return plan_.tensors.empty() ? 0 : plan_.scratch * count(plan_.tensors[0].most);
    }

private:
    Plan plan_;
    std::atomic<int> runs_ = 0;
};

class Runtime final : public IRuntime {
public:
    ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept override {
        std::istringstream in(std::string(static_cast<const char*>(blob), size));
        std::string word, made, capability;
        Plan plan;
        if (!(in >> word) || word != "fake" || !(in >> word >> made >> capability)) {
            fail("Serialization (magic tag does not match) in deserializeCudaEngine");
            return nullptr;
        }
        if (made != version_text()) {
            fail("the plan was built with version " + made + ", and this library is " + version_text());
            return nullptr;
        }
        if (capability != "8.9") {
            fail("the plan was built for compute capability " + capability + ", and this GPU has 8.9");
            return nullptr;
        }
        bool whole = false;
        while (in >> word) {
            Tensor tensor;
            std::string type, least, most;
            if (word == "input") {
                in >> tensor.name >> type >> least >> most;
                tensor.input = true;
                tensor.least = dims(least);
                tensor.most = dims(most);
            } else if (word == "output") {
                in >> tensor.name >> type >> tensor.like;
            } else if (word == "scratch") {
                in >> plan.scratch;
            } else if (word == "host") {
                in >> type;
                for (Tensor& t : plan.tensors) t.host = t.host || t.name == type;
            } else if (word == "add") {
                std::vector<std::string> operation(4, word);
                in >> operation[1] >> operation[2] >> operation[3];
                plan.operations.push_back(operation);
            }
            plan.uncapturable = plan.uncapturable || word == "uncapturable";
            plan.broken = plan.broken || word == "broken";
            whole = whole || word == "end";
            if (tensor.name.empty()) continue;
            tensor.type = type == "float32" ? DataType::kFLOAT
                          : type == "fp8"   ? DataType::kFP8
                                            : DataType::kINT64;
            plan.tensors.push_back(tensor);
        }
        if (!whole) {
            fail("Serialization (length does not match) in deserializeCudaEngine: the plan is truncated");
            return nullptr;
        }
        return new Engine(std::move(plan));
    }
};

}  // namespace

extern "C" {

void* createInferRuntime_INTERNAL(void* given, std::int32_t) noexcept {
    logger = static_cast<ILogger*>(given);
    return new Runtime;
}
std::int32_t getInferLibMajorVersion() noexcept { return version()[0]; }
std::int32_t getInferLibMinorVersion() noexcept { return version()[1]; }
std::int32_t getInferLibPatchVersion() noexcept { return version()[2]; }
std::int32_t getInferLibBuildVersion() noexcept { return version()[3]; }
}
