// What the tests see of the fake driver, and what the fake TensorRT runs on it.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>

#include "cuda.h"

struct FakeCuda {
    // Counted since reset().
    std::atomic<int> captures = 0, launches = 0, device_copies = 0, host_writes = 0;
    int allocations = 0;                       // of device memory, now
    int contexts = 0;                          // current in this thread, now
    std::size_t bytes = 0;                     // of device memory, now
    std::size_t limit = std::size_t{1} << 40;  // how much there is
    std::size_t misalign = 0;                  // added to the addresses of device memory
    int most_pending = 0;                      // steps that were under way at once

    void reset();
    // Whether all pinned host memory is zero.
    bool pinned_is_zero() const;
};
extern "C" FakeCuda* fake_cuda();

// Puts work on a stream: done when something waits for it, or recorded if the stream is captured.
void fake_cuda_enqueue(CUstream stream, std::function<void()> work);
// Spoils the capture under way, as something that cannot be captured does.
void fake_cuda_invalidate(CUstream stream);
// Whether the whole range is device memory that is allocated.
bool fake_cuda_owns(const void* address, std::size_t bytes);
