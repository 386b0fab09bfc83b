// The part of TensorRT's interface that the TensorRT backend calls, for fake_tensorrt.cpp: names and
// signatures as in TensorRT 10.3 and later, or with HYWU_FAKE_RTX as in TensorRT-RTX, nothing else, and not
// their binary layout. With it the backend is compiled and tested where there is no TensorRT.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

#if defined(HYWU_FAKE_RTX)
#define TRT_MAJOR_RTX 1
#define NV_TENSORRT_MAJOR 1
#define NV_TENSORRT_MINOR 6
#else
#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 3
#endif
#define NV_TENSORRT_VERSION (NV_TENSORRT_MAJOR * 10000L + NV_TENSORRT_MINOR * 100L)

namespace nvinfer1 {

enum class DataType : std::int32_t {
    kFLOAT = 0,
    kHALF = 1,
    kINT8 = 2,
    kINT32 = 3,
    kBOOL = 4,
    kUINT8 = 5,
    kFP8 = 6,
    kBF16 = 7,
    kINT64 = 8,
};
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class TensorLocation : std::int32_t { kDEVICE = 0, kHOST = 1 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t {
    kSTATIC = 0,
    kON_PROFILE_CHANGE = 1,
    kUSER_MANAGED = 2
};

struct Dims {
    static constexpr std::int32_t MAX_DIMS = 8;
    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};

class ILogger {
public:
    enum class Severity : std::int32_t {
        kINTERNAL_ERROR = 0,
        kERROR = 1,
        kWARNING = 2,
        kINFO = 3,
        kVERBOSE = 4
    };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IHostMemory {
public:
    virtual ~IHostMemory() = default;
    virtual void* data() const noexcept = 0;
    virtual std::size_t size() const noexcept = 0;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() = default;
    virtual bool setInputShape(const char* tensor, const Dims& dims) noexcept = 0;
    virtual Dims getTensorShape(const char* tensor) const noexcept = 0;
    virtual bool setTensorAddress(const char* tensor, void* data) noexcept = 0;
    virtual std::size_t updateDeviceMemorySizeForShapes() noexcept = 0;
    virtual void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

#if defined(HYWU_FAKE_RTX)
enum class DynamicShapesKernelSpecializationStrategy : std::int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };

class IRuntimeCache {
public:
    virtual ~IRuntimeCache() = default;
    virtual IHostMemory* serialize() const noexcept = 0;
    virtual bool deserialize(const void* blob, std::size_t size) noexcept = 0;
};

class IRuntimeConfig {
public:
    virtual ~IRuntimeConfig() = default;
    virtual void setExecutionContextAllocationStrategy(
        ExecutionContextAllocationStrategy strategy) noexcept = 0;
    virtual IRuntimeCache* createRuntimeCache() const noexcept = 0;
    virtual bool setRuntimeCache(const IRuntimeCache& cache) noexcept = 0;
    virtual void setDynamicShapesKernelSpecializationStrategy(
        DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;
};
#endif

class ICudaEngine {
public:
    virtual ~ICudaEngine() = default;
#if defined(HYWU_FAKE_RTX)
    virtual IRuntimeConfig* createRuntimeConfig() noexcept = 0;
    virtual IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept = 0;
#else
    virtual IExecutionContext* createExecutionContext(
        ExecutionContextAllocationStrategy strategy) noexcept = 0;
#endif
    virtual std::int32_t getNbIOTensors() const noexcept = 0;
    virtual const char* getIOTensorName(std::int32_t index) const noexcept = 0;
    virtual TensorIOMode getTensorIOMode(const char* tensor) const noexcept = 0;
    virtual TensorLocation getTensorLocation(const char* tensor) const noexcept = 0;
    virtual DataType getTensorDataType(const char* tensor) const noexcept = 0;
    virtual Dims getProfileShape(const char* tensor, std::int32_t profile,
                                 OptProfileSelector which) const noexcept = 0;
    virtual std::int64_t getDeviceMemorySizeV2() const noexcept = 0;
};

class IRuntime {
public:
    virtual ~IRuntime() = default;
    virtual ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept = 0;
};

}  // namespace nvinfer1
