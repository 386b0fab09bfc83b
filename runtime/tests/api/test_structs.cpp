// Structs of earlier and later headers.
#include "api/structs.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <vector>

using namespace hywu;

namespace {

// A struct of three versions: version 1 ends after `a`, version 2 after `b`.
struct Params {
    std::size_t struct_size;
    std::int64_t a;
    std::int64_t b;
    std::int64_t c;
};
constexpr std::size_t version_1 = offsetof(Params, b), version_2 = offsetof(Params, c);
const Params defaults = {sizeof(Params), 1, 2, 3};

struct Later {
    Params known;
    std::int64_t more;
};

Params read(const Params* given) {
    return api::read_struct(given, defaults, {version_1, version_2}, "params");
}

}  // namespace

TEST_CASE("what an earlier header does not have is left at its default") {
    Params given = {version_1, 10, 20, 30};
    Params seen = read(&given);
    CHECK(seen.a == 10);
    CHECK(seen.b == 2);
    CHECK(seen.c == 3);
    given.struct_size = version_2;
    seen = read(&given);
    CHECK(seen.b == 20);
    CHECK(seen.c == 3);
    given.struct_size = sizeof given;
    CHECK(read(&given).c == 30);
    CHECK(read(nullptr).a == 1);
}

TEST_CASE("what a later header has must be zero") {
    Later later = {{sizeof(Later), 10, 20, 30}, 0};
    CHECK(read(&later.known).c == 30);
    later.more = 1;
    CHECK_THROWS_WITH_AS(read(&later.known),
                         doctest::Contains("sets fields that this version of the library does not know"),
                         core::Error);
}

TEST_CASE("sizes that no version had are refused") {
    for (const std::size_t size :
         {std::size_t{0}, std::size_t{1}, sizeof(std::size_t), version_1 - 1, version_1 + 1, version_2 + 4,
          sizeof(Params) - 1, std::size_t{4097}, static_cast<std::size_t>(-1)}) {
        std::vector<Params> memory(256);  // the compiler need not see that no struct is as large
        Params& given = memory[0];
        given.struct_size = size;
        CHECK_THROWS_WITH_AS(read(&given), doctest::Contains("params has struct_size"), core::Error);
        CHECK_THROWS_AS(api::write_struct(&given, defaults, {version_1, version_2}, "params"), core::Error);
    }
}

TEST_CASE("results fit the caller's struct, and no byte behind it is touched") {
    std::vector<Params> memory(64);
    Params& small = memory[0];
    std::memset(memory.data(), 0x55, sizeof small);
    small.struct_size = version_1;
    api::write_struct(&small, defaults, {version_1, version_2}, "params");
    CHECK(small.struct_size == version_1);
    CHECK(small.a == 1);
    CHECK(small.b == 0x5555555555555555);
    Later large;
    std::memset(&large, 0x55, sizeof large);
    api::write_struct(&large.known, sizeof large, defaults, {version_1, version_2}, "params");
    CHECK(large.known.struct_size == sizeof large);
    CHECK(large.known.c == 3);
    CHECK(large.more == 0);
}
