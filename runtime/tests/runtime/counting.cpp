#include "counting.hpp"

#include <cstdlib>
#include <new>

namespace {

thread_local bool counting = false, armed = false, fired = false;
thread_local std::size_t counted = 0, left = 0;
thread_local int excluded = 0;

// Memory, or null.
void* take_or_null(std::size_t size, std::size_t alignment) noexcept {
    if (excluded == 0) {
        if (counting) ++counted;
        if (armed && --left == 0) {
            armed = false;
            fired = true;
            return nullptr;
        }
    }
    return alignment > alignof(std::max_align_t)
               ? std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment)
               : std::malloc(size != 0 ? size : 1);
}

void* take(std::size_t size, std::size_t alignment) {
    void* const memory = take_or_null(size, alignment);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

}  // namespace

void* operator new(std::size_t size) { return take(size, 0); }
void* operator new[](std::size_t size) { return take(size, 0); }
void* operator new(std::size_t size, std::align_val_t alignment) {
    return take(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
    return take(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return take_or_null(size, 0); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return take_or_null(size, 0); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace hywu::testing {

bool replaced() {
    const Counting counting;
    char* volatile const memory = new char;  // volatile: not to be optimised away
    delete memory;
    return counting.count() != 0;
}

Counting::Counting() {
    counted = 0;
    counting = true;
}
Counting::~Counting() { counting = false; }
std::size_t Counting::count() const { return counted; }

Failing::Failing(std::size_t n) {
    left = n;
    fired = false;
    armed = true;
}
Failing::~Failing() { armed = false; }
bool Failing::failed() const { return fired; }

Excluded::Excluded() { ++excluded; }
Excluded::~Excluded() { --excluded; }

}  // namespace hywu::testing
