// Allocations of this process: counted, or made to fail. counting.cpp replaces the global operator new.
#pragma once

#include <cstddef>

namespace hywu::testing {

// Whether operator new is ours: a tool such as valgrind may have put its own in its place.
bool replaced();

// Counts this thread's calls of operator new while it lives.
class Counting {
public:
    Counting();
    ~Counting();
    std::size_t count() const;
};

// Lets this thread's n-th call of operator new from now on (1: the next) throw std::bad_alloc, once.
class Failing {
public:
    explicit Failing(std::size_t n);
    ~Failing();
    bool failed() const;  // whether it came to that
};

// While it lives, this thread's allocations are not looked at: those of a backend's library.
class Excluded {
public:
    Excluded();
    ~Excluded();
};

}  // namespace hywu::testing
